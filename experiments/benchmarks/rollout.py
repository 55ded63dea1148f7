"""How many tokens a second are sampled, and how far is that from what the machine can do?

Varies: the system (Temper, transformers' generate, Tunix's sampler), the batch size, the lengths.
Command: python -m launch.benchmark --config=experiments/benchmarks/rollout.py --workdir=runs/benchmarks \
    --peers=transformers=TORCHENV/bin/python,tunix=TUNIXENV/bin/python
On a GPU: --config=experiments/benchmarks/rollout.py:gpu
Hardware: 2 CPU cores, or a GPU.
Time: with both peers 23 minutes, 2 of them for `greedy`.
Result: 2.3x to 2.7x transformers and 3.8x to 4.0x Tunix at 64 rows of equal length, 4.6x to 5.5x and 7.4x to 8.2x where
  lengths differ, 3.4x to 7.2x and 2.1x to 3.0x with one greedy row, whose weights are read at 53 to 73% of the
  bandwidth (experiments/LOG.md).
"""

from experiments.benchmarks.base import rollout_case, sized

PEERS = ("transformers", "tunix")


def cases(size: str) -> dict[str, object]:
    """Fixed lengths over batch sizes; lengths of a quarter of the limit in the mean; single greedy rows."""
    if size == "gpu":
        return {
            "fixed": rollout_case((), batch_sizes=(1, 8, 64, 256), prompt_length=128, max_new_tokens=256),
            "lengths": rollout_case(
                (), batches=4, prompt_length=128, max_new_tokens=512, mean_new_tokens=128
            ),
            "greedy": rollout_case((), batch_sizes=(1,), greedy=True, prompt_length=128, max_new_tokens=256),
        }
    if size == "toy":
        short = {"prompt_length": 8, "max_new_tokens": 16}
        return {
            "fixed": rollout_case(PEERS, batch_sizes=(1, 4), **short),
            "lengths": rollout_case(PEERS, batch_sizes=(4,), batches=2, mean_new_tokens=4, **short),
            "greedy": rollout_case(PEERS, batch_sizes=(1,), greedy=True, **short),
        }
    return {
        "fixed": rollout_case(PEERS, batch_sizes=(1, 4, 16, 64, 256)),
        "lengths": rollout_case(PEERS, batches=4, mean_new_tokens=32),
        "greedy": rollout_case(PEERS, batch_sizes=(1,), batches=8, greedy=True),
    }


get_config = sized("rollout", "How many tokens a second are sampled?", cases)
