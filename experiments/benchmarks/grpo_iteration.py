"""How long does one iteration of GRPO take: samples, log-probs of the reference, one update?

Varies: the system (Temper, TRL's GRPOTrainer).
Command: python -m launch.benchmark --config=experiments/benchmarks/grpo_iteration.py --workdir=runs/benchmarks \
    --peers=trl=TORCHENV/bin/python
On a GPU: --config=experiments/benchmarks/grpo_iteration.py:gpu
Hardware: 2 CPU cores, or a GPU.
Time: 3 minutes with TRL.
Result: 1.89x to 2.27x TRL, by machine, at 58 to 61% of its FLOP/s (experiments/LOG.md).

Both run their own trainer's code on prompts of random tokens; the reward is the share of even token ids.
"""

from experiments.benchmarks.base import grpo_case, sized


def cases(size: str) -> dict[str, object]:
    """One case."""
    if size == "gpu":
        return {"iteration": grpo_case((), prompt_length=128, max_new_tokens=512)}
    if size == "toy":
        short = {"prompt_length": 8, "max_new_tokens": 8}
        return {"iteration": grpo_case(("trl",), prompts=2, group_size=2, iterations=1, **short)}
    return {"iteration": grpo_case(("trl",))}


get_config = sized("grpo_iteration", "How long does one iteration of GRPO take?", cases)
