"""Every key of a benchmark, with its unit. A benchmark is no chain of stages: `launch/benchmark.py` runs it."""

from collections.abc import Callable

from ml_collections import ConfigDict

SIZES = ("cpu", "gpu", "toy")
"""What `get_config(arg)` takes; "" is cpu."""


def sized(kind: str, question: str, cases: Callable[[str], dict[str, object]]) -> Callable[[str], ConfigDict]:
    """The `get_config` of a benchmark whose cases depend on the size alone."""

    def make(arg: str = "") -> ConfigDict:
        size = arg or "cpu"
        if size not in SIZES:
            raise ValueError(f"{kind}: got the argument {arg!r}, expected one of {', '.join(SIZES)}")
        return ConfigDict({**shared(kind, size), "question": question, "cases": cases(size)}).lock()

    return make


def shared(kind: str, size: str) -> dict[str, object]:
    """What all benchmarks have."""
    data = {
        "text": {"path": "", "max_bytes": 100_000 if size == "toy" else 0},
        "problems": {"path": ""},  # a JSONL file
        "tokenizer": {"path": "", "vocab_size": model(size)["vocab_size"], "model_type": "bpe"},
    }
    return {
        "kind": kind,  # rollout, train_step, grpo_iteration
        "model": model(size),
        "platform": "gpu" if size == "gpu" else "cpu",  # where the systems compute
        "threads": 2,  # cores that each system may use; on a CPU, Temper splits rows over one XLA device a core
        "repetitions": 2 if size == "toy" else 5,  # timed runs of each system, in turn
        "settle_seconds": 0.0 if size == "toy" else 0.3,  # pause between two runs
        "timeout_seconds": 1800.0,  # of one run, compilation included
        "seed": 0,  # of prompts, lengths and sampling
        "limits": {
            "matmul_size": {"cpu": 2048, "gpu": 8192, "toy": 256}[size],  # n of the n x n product timed
            "peak_flops": 0.0,  # the data sheet's FLOP/s in the compute dtype; 0: only the measured limit is used
            "peak_bandwidth": 0.0,  # the data sheet's bytes/s; 0 likewise
        },
        "sampler": {  # of Temper
            "chunk": 32,  # decode steps between two refills, at most
            "admit": 8,  # prompts taken in at a time
            "cache_bucket": {"cpu": 32, "gpu": 128, "toy": 32}[size],  # tokens by which the KV cache grows
        },
        "optimizer": {
            "learning_rate": 1e-3,
            "warmup_steps": 10,
            "end_fraction": 0.1,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
        },
        "objective": {"beta": 0.04},  # of grpo_iteration; the other options of GRPO are at their defaults
        "data": data,  # `data.problems.path`: a JSONL file for the cases on real lengths
    }


def model(size: str) -> dict[str, object]:
    """7.2M parameters; Llama 3.2 1B's shape in bfloat16 for a GPU; a toy."""
    keys = (
        "vocab_size",
        "num_layers",
        "d_model",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "d_ff",
        "rope_theta",
    )
    shapes: dict[str, tuple[float, ...]] = {
        "cpu": (4096, 6, 288, 6, 6, 48, 768, 10_000.0),
        "gpu": (128_256, 16, 2048, 32, 8, 64, 8192, 500_000.0),
        "toy": (384, 2, 32, 2, 2, 16, 64, 10_000.0),
    }
    dtype = "bfloat16" if size == "gpu" else "float32"
    return {
        **dict(zip(keys, shapes[size], strict=True)),
        "norm_eps": 1e-5,
        "tie_embeddings": True,
        "scan_layers": False,
        "remat": "full" if size == "gpu" else "none",
        "param_dtype": dtype,
        "compute_dtype": dtype,
        "logprob_chunk": 256,
    }


def rollout_case(peers: tuple[str, ...], **changes: object) -> dict[str, object]:
    """Completions of prompts of equal length."""
    case: dict[str, object] = {
        "peers": peers,
        "batch_sizes": (64,),  # rows at a time; several make a curve
        "batches": 1,  # a repetition draws batches * batch size completions
        "prompt_length": 32,  # tokens
        "max_new_tokens": 128,
        "mean_new_tokens": 0,  # of lengths drawn for each row; 0: every row has max_new_tokens
        "greedy": False,
    }
    return {**case, **changes}


def train_case(peers: tuple[str, ...], **changes: object) -> dict[str, object]:
    """Optimizer steps."""
    case: dict[str, object] = {
        "peers": peers,
        "batch_size": 16,  # rows
        "length": 256,  # tokens a row
        "steps": 4,  # in a repetition; with examples, as many as one pass takes
        "examples": 0,  # of the JSONL file, at most `length` tokens each; 0: full rows of random tokens
    }
    return {**case, **changes}


def grpo_case(peers: tuple[str, ...], **changes: object) -> dict[str, object]:
    """Iterations: sample, reference log-probs, one update."""
    case: dict[str, object] = {
        "peers": peers,
        "prompts": 8,
        "group_size": 8,  # completions a prompt
        "prompt_length": 32,
        "max_new_tokens": 64,
        "iterations": 2,  # in a repetition
    }
    return {**case, **changes}
