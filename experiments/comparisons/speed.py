"""How fast are rollouts, training steps and iterations of GRPO, beside the systems that one would use instead?

Varies: the system (Temper; transformers with torch; TRL; Tunix), the batch size, the lengths.
Command: python -m launch.benchmark --config=experiments/comparisons/speed.py --workdir=runs/speed \
    --peers=transformers=TORCHENV/bin/python,trl=TORCHENV/bin/python,tunix=TUNIXENV/bin/python
Some cases: --only=train or --only=greedy,iteration; on a GPU: --config=experiments/comparisons/speed.py:gpu
Hardware: 2 CPU cores, or a GPU.
Time: with all peers 40 minutes: rollouts 23 (`greedy` 2), training steps 13, GRPO 3.
Result: rollouts 2.3x to 2.7x transformers and 3.8x to 4.0x Tunix at 64 rows of equal length, 4.6x to 5.5x and 7.4x to
  8.2x where lengths differ, 3.4x to 7.2x and 2.1x to 3.0x with one greedy row; a training step 0.88x to 1.17x
  transformers on full rows, 2.05x and 2.11x TRL on GSM8K's rows, packed; GRPO 1.89x to 2.27x TRL (experiments/LOG.md).

Every key is declared in `research/comparisons/workloads.py`; this says what differs from the defaults.
"""

from ml_collections import ConfigDict

_LLAMA_3_2_1B = {
    "num_layers": 16,
    "d_model": 2048,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 64,
    "d_ff": 8192,
    "rope_theta": 500_000.0,
    "remat": "full",
    "param_dtype": "bfloat16",
    "compute_dtype": "bfloat16",
}
_7M = {"num_layers": 6, "d_model": 288, "num_heads": 6, "num_kv_heads": 6, "head_dim": 48, "d_ff": 768}
_TINY = {"num_layers": 2, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "d_ff": 64}


_BOTH, _SHORT = {"peers": ("transformers", "tunix")}, {"prompt_length": 8, "max_new_tokens": 16}

SIZES: dict[str, dict[str, object]] = {
    "cpu": {
        "model": {**_7M, "logprob_chunk": 256},
        "rollout": {
            "fixed": {**_BOTH, "batch_sizes": (1, 4, 16, 64, 256)},
            "lengths": {**_BOTH, "batches": 4, "mean_new_tokens": 32},
            "greedy": {**_BOTH, "batch_sizes": (1,), "batches": 8, "greedy": True},
        },
        "train": {"full": _BOTH, "ragged": {"peers": ("trl",), "length": 512, "examples": 256}},
        "grpo": {"iteration": {"peers": ("trl",)}},
    },
    "gpu": {
        "platform": "gpu",
        "vocab_size": 128_256,
        "cache_bucket": 128,
        "model": {**_LLAMA_3_2_1B, "logprob_chunk": 256},
        "rollout": {
            "fixed": {"batch_sizes": (1, 8, 64, 256), "prompt_length": 128, "max_new_tokens": 256},
            "lengths": {"batches": 4, "prompt_length": 128, "max_new_tokens": 512, "mean_new_tokens": 128},
            "greedy": {"batch_sizes": (1,), "prompt_length": 128, "max_new_tokens": 256, "greedy": True},
        },
        "train": {
            "full": {"batch_size": 8, "length": 2048},
            "ragged": {"batch_size": 8, "length": 2048, "examples": 1024},
        },
        "grpo": {"iteration": {"prompt_length": 128, "max_new_tokens": 512}},
    },
    "toy": {
        "repetitions": 2,
        "pause": 0.0,
        "vocab_size": 384,
        "model": _TINY,
        "rollout": {
            "fixed": {**_BOTH, **_SHORT, "batch_sizes": (1, 4)},
            "lengths": {**_BOTH, **_SHORT, "batch_sizes": (4,), "batches": 2, "mean_new_tokens": 4},
            "greedy": {**_BOTH, **_SHORT, "batch_sizes": (1,), "greedy": True},
        },
        "train": {
            "full": {**_BOTH, "batch_size": 2, "length": 16, "steps": 2},
            "ragged": {"peers": ("trl",), "batch_size": 2, "length": 64, "examples": 8, "mean_length": 24},
        },
        "grpo": {"iteration": {**_SHORT, "peers": ("trl",), "prompts": 2, "group_size": 2, "iterations": 1}},
    },
}


def get_config(arg: str = "cpu") -> ConfigDict:
    """`arg` is the size: cpu (7.2M parameters, the default), gpu (Llama 3.2 1B's shape, no peers) or toy, for tests."""
    if arg and arg not in SIZES:
        raise ValueError(f"got the argument {arg!r}, expected cpu, gpu or toy")
    return ConfigDict(
        {"question": "How fast are rollouts, training steps and iterations of GRPO?", **SIZES[arg or "cpu"]}
    )
