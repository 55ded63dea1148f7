"""How many tokens a second does a training step take in, on full rows and on real, ragged ones?

Varies: the system (Temper; transformers + torch AdamW; Tunix's model + optax; TRL's SFTTrainer on the ragged rows).
Command: python -m launch.benchmark --config=experiments/benchmarks/train_step.py --workdir=runs/benchmarks \
    --config.data.problems.path=gsm8k_train.jsonl \
    --peers=transformers=TORCHENV/bin/python,trl=TORCHENV/bin/python,tunix=TUNIXENV/bin/python
On a GPU: --config=experiments/benchmarks/train_step.py:gpu
Hardware: 2 CPU cores, or a GPU.
Time: 13 minutes with all peers.
Result: 0.88x to 1.17x transformers on full rows, by machine; 2.05x and 2.11x TRL on GSM8K's (experiments/LOG.md).

`full` has rows without padding. `ragged` has chat examples of a JSONL file, the same token ids for each system,
counted in real tokens: TRL pads each batch to its longest row (packing is off by default), Temper packs.
"""

from experiments.benchmarks.base import sized, train_case


def cases(size: str) -> dict[str, object]:
    """Full rows; ragged rows."""
    if size == "gpu":
        return {
            "full": train_case((), batch_size=8, length=2048),
            "ragged": train_case((), batch_size=8, length=2048, examples=1024),
        }
    if size == "toy":
        return {
            "full": train_case(("transformers", "tunix"), batch_size=2, length=16, steps=2),
            "ragged": train_case(("trl",), batch_size=2, length=64, examples=8),
        }
    return {
        "full": train_case(("transformers", "tunix")),
        "ragged": train_case(("trl",), length=512, examples=256),
    }


get_config = sized("train_step", "How many tokens a second does a training step take in?", cases)
