"""What experiments start from: a chain of three stages, every key at its default.

A config says only what differs from the defaults. They are declared, with units and bounds, in
`research/config/sections.py` and beside each component; `python -m launch.describe` prints them. A key that does not
exist is refused when the config is read.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Pretrain, fine-tune, reinforce; `arg` is not used."""
    del arg
    return ConfigDict(
        {
            "name": "base",  # heads the report
            "question": "",  # what the experiment asks, one sentence
            "stages": ("pretrain", "sft", "rl"),  # each starts from the newest policy before it
            "model": {},
            "teacher_model": {},
            "mesh": {},
            "data": {"text": {}, "problems": {}, "preferences": {}, "rankings": {}, "steps": {}, "tokenizer": {}},
            "pretrain": stage("next_token"),
            "sft": stage("sft"),
            "rl": stage("grpo"),
            "evaluation": {},
            "sampler": {},
            "tools": {},
            "records": {},
            # arms: name -> overrides, each "dotted.key=value"; grid: dotted key -> values. Names may have dots.
            "ablation": ConfigDict({"arms": {}, "grid": {}}, convert_dict=False),
        }
    )


def stage(objective: str) -> ConfigDict:
    """A stage with this objective."""
    sections = ("data", "roles", "reward", "optimizer", "rollout")
    return ConfigDict({"objective": {"name": objective}, **{name: {} for name in sections}})


def decoder(layers: int, d_model: int, heads: int, d_ff: int, kv_heads: int = 0) -> dict[str, int]:
    """The shape of a decoder; as many key and value heads as query heads, if not said otherwise."""
    shape = {"num_layers": layers, "d_model": d_model, "num_heads": heads, "num_kv_heads": kv_heads or heads}
    return {**shape, "head_dim": d_model // heads, "d_ff": d_ff}
