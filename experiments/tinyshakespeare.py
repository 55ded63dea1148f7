"""Does pretraining reach nanoGPT's loss on the same text with the same budget?

Varies: nothing; nanoGPT's CPU configuration (4 layers, 128 wide, block 64, batch 12, 2,000 steps, characters),
  whose validation loss is 1.88 nats a character.
Command: python -m launch.train --config=experiments/tinyshakespeare.py --workdir=runs/tinyshakespeare \
    --config.data.text.path=tinyshakespeare.txt
Hardware: 2 CPU cores.
Time: 5 minutes.
Result: 1.50 nats a character on held-out passages (experiments/LOG.md).
"""

from ml_collections import ConfigDict

from experiments import base


def get_config(arg: str = "") -> ConfigDict:
    """nanoGPT's CPU configuration; `arg` is not used."""
    config = base.get_config(arg)
    config.name = "tinyshakespeare"
    config.question = "Does pretraining reach nanoGPT's loss on the same text with the same budget?"
    config.stages = ("pretrain",)
    # SwiGLU has three matrices where nanoGPT's MLP has two: 344 instead of 512 keeps the parameter count.
    config.model.update({"num_layers": 4, "d_model": 128, "num_heads": 4, "num_kv_heads": 4, "d_ff": 344})
    config.data.validation_one_in = 10
    config.data.tokenizer.update({"model_type": "char", "vocab_size": 0})
    config.pretrain.update(
        {"steps": 2_000, "batch_size": 12, "length": 64, "log_every": 100, "eval_every": 500, "eval_batches": 200}
    )
    config.pretrain.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 100, "adamw": {"b2": 0.99}})
    return config
