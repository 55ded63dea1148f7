"""How much faster is one row decoded when a ten times smaller model proposes its tokens?

Varies: who proposes (nobody, the draft model, a look-up in the text), how many tokens, the temperature.
Command: python -m launch.train --config=experiments/speculative.py --workdir=runs/target
  python -m launch.train --config=experiments/speculative.py:draft --workdir=runs/draft
  python -m launch.speculate --stage=runs/target/stages/pretrain-... --draft=runs/draft/stages/pretrain-...,ngram
  --output=runs/speculative --prompts=problems --max_new_tokens=96
Hardware: 2 CPU cores.
Time: 10 minutes to train the target, 3 the draft (JAX_NUM_CPU_DEVICES=2), 3 to measure (without it).
Result: on a CPU 1.4x to 1.6x at temperature 1 with 8 proposals (74% accepted, 6.7 tokens a look), 0.8x to 1.0x
  greedy: a look at several tokens takes up to four plain steps there (experiments/LOG.md).
"""

from ml_collections import ConfigDict

from experiments import base

SHAPES = {
    "": {"num_layers": 6, "d_model": 288, "num_heads": 6, "num_kv_heads": 6, "head_dim": 48, "d_ff": 768},
    "draft": {"num_layers": 2, "d_model": 96, "num_heads": 4, "num_kv_heads": 4, "head_dim": 24, "d_ff": 288},
}


def get_config(arg: str = "") -> ConfigDict:
    """The target of 7.2M parameters, or with `draft` one of 0.6M, on the same text with the same tokenizer."""
    if arg not in SHAPES:
        raise ValueError(f"speculative: got the argument {arg!r}, expected '' or draft")
    config = base.get_config().unlock()
    config.name = "speculative"
    config.question = "How much faster is a row decoded when a ten times smaller model proposes its tokens?"
    config.stages = ("pretrain",)
    config.model.update(SHAPES[arg])
    config.data.tokenizer.vocab_size = 4096
    # Long worked answers: what reinforcement learning samples, and easier to guess than prose.
    config.data.problems.update({"operations": "+-", "min_steps": 16, "max_steps": 18, "train": 20_000})
    config.pretrain.data.update({"text_weight": 0.1, "problems_weight": 0.9})
    config.pretrain.update({"batch_size": 8, "length": 256, "log_every": 20, "checkpoint_every": 100})
    config.pretrain.steps = 1000 if arg == "draft" else 500
    config.pretrain.optimizer.update({"learning_rate": 3e-3 if arg == "draft" else 1e-3, "warmup_steps": 50})
    return config.lock()
