"""The tables that a config is checked against: every key, the choices of names, the bounds of numbers.

"*" in a key stands for every stage. An objective's own options are listed by its module in
`research/algorithms/`.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from research.rewards.sandbox.sandbox import Isolation
from research.rewards.shaping import Shaping

STAGE_SCALARS = (
    "model",
    "start_from",
    "final_answer",
    "prm_score",
    "seed",
    "steps",
    "batch_size",
    "length",
    "micro_batches",
    "log_every",
    "eval_every",
    "eval_batches",
    "eval_problems",
    "checkpoint_every",
    "keep_checkpoints",
)
"""The keys of a stage that are single values."""

MODEL = (
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_ff",
    "rope_theta",
    "norm_eps",
    "tie_embeddings",
    "scan_layers",
    "remat",
    "param_dtype",
    "compute_dtype",
    "logprob_chunk",
    "max_length",
)
"""The keys of a model."""

JUDGED = ("kind", "path", "validation_one_in", "train", "validation")
"""The keys of judged data: pairs, rankings, labelled steps."""

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "": (
        "name",
        "question",
        "stages",
        "model",
        "teacher_model",
        "mesh",
        "data",
        "evaluation",
        "sampler",
        "tools",
        "ablation",
    ),
    "model": MODEL,
    "teacher_model": MODEL,
    "mesh": ("data", "fsdp", "tensor"),
    "evaluation": (
        "problems",
        "samples",
        "k",
        "temperature",
        "seed",
        "batch_problems",
        "max_prompt_length",
        "max_new_tokens",
    ),
    "sampler": ("slots", "chunk", "admit", "cache_bucket", "int8_cache", "weights"),
    "tools": ("names", "corpus", "max_turns", "max_result_tokens", "search_results", "isolation"),
    "data": ("text", "problems", "preferences", "rankings", "steps", "tokenizer"),
    "data.text": ("path", "max_bytes", "validation_one_in"),
    "data.problems": (
        "kind",
        "path",
        "validation_one_in",
        "train",
        "test",
        "seed",
        "operations",
        "min_steps",
        "max_steps",
        "max_operand",
        "max_value",
        "verifier",
    ),
    "data.preferences": JUDGED,
    "data.rankings": (*JUDGED, "candidates"),
    "data.steps": JUDGED,
    "data.tokenizer": ("path", "vocab_size", "model_type"),
    "*": (*STAGE_SCALARS, "data", "objective", "optimizer", "rollout", "reward", "roles"),
    "*.data": ("source", "text_weight", "problems_weight", "limit", "packing", "terse_fraction", "context"),
    "*.roles": ("reference", "teacher", "reward", "value", "prm"),
    "*.reward": (
        "source",
        "ensemble",
        "variance_coef",
        "step_coef",
        "error_reward",
        *(field.name for field in fields(Shaping)),
    ),
    "*.optimizer": (
        "learning_rate",
        "warmup_steps",
        "end_fraction",
        "b1",
        "b2",
        "eps",
        "weight_decay",
        "clip_norm",
    ),
    "*.rollout": (
        "prompts_per_step",
        "group_size",
        "max_prompt_length",
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "epochs",
        "minibatches",
        "resample_rounds",
        "curriculum_low",
        "curriculum_high",
        "curriculum_decay",
        "curriculum_retry",
        "monitor_kl",
    ),
}
"""The keys of every section: a typo in an unlocked ConfigDict makes a new key, silently."""

CHOICES: Mapping[str, tuple[Any, ...]] = {
    **{
        f"{model}.{key}": choices
        for model in ("model", "teacher_model")
        for key, choices in (
            ("remat", ("none", "dots", "full")),
            ("param_dtype", ("float32", "bfloat16")),
            ("compute_dtype", ("float32", "bfloat16")),
        )
    },
    "data.problems.kind": ("arithmetic", "jsonl"),
    "data.problems.verifier": ("exact_answer", "final_line"),
    "data.tokenizer.model_type": ("bpe", "unigram", "char"),
    **{f"data.{kind}.kind": ("arithmetic", "jsonl") for kind in ("preferences", "rankings", "steps")},
    "sampler.weights": ("compute", "bfloat16", "int8"),
    "tools.isolation": get_args(Isolation),
    "*.model": ("model", "teacher_model"),
    "*.final_answer": ("sample", "majority", "reward", "prm"),
    "*.prm_score": ("min", "prod", "last", "mean"),
    "*.data.source": ("own", "given"),
    "*.reward.source": ("verifier", "model"),
    "*.reward.ensemble": ("mean", "min", "mean_minus_variance"),
}

# key -> (lowest, highest, why); None is unbounded.
BOUNDS: Mapping[str, tuple[float | None, float | None, str]] = {
    "evaluation.problems": (1, None, "something must be evaluated"),
    "evaluation.samples": (1, None, "a problem needs a sample"),
    "evaluation.temperature": (0, None, "a negative temperature prefers unlikely tokens; 0 is greedy"),
    "evaluation.batch_problems": (1, None, "a batch needs a problem"),
    "sampler.slots": (0, None, "0 decodes all at once"),
    "tools.max_turns": (1, None, "a call that nobody answers is of no use"),
    "tools.max_result_tokens": (1, None, "a result has a token"),
    "tools.search_results": (1, None, "an answer has a document"),
    "sampler.chunk": (1, None, "a chunk is a step at least"),
    "sampler.admit": (1, None, "one prompt at least is taken in"),
    "sampler.cache_bucket": (1, None, "a cache grows by a token at least"),
    "evaluation.seed": (0, 2**31 - 1, "the sampler counts in 32 bits"),
    "evaluation.max_prompt_length": (1, None, "a prompt has a token"),
    "evaluation.max_new_tokens": (1, None, "a completion has a token"),
    **{
        f"{model}.{key}": bound
        for model in ("model", "teacher_model")
        for key, bound in {
            "num_layers": (1, None, "a model has a layer"),
            "d_model": (1, None, "a layer has a width"),
            "num_heads": (1, None, "attention has a head"),
            "num_kv_heads": (1, None, "attention has a key head"),
            "head_dim": (2, None, "rotary embeddings turn pairs"),
            "d_ff": (1, None, "a block has a width"),
            "max_length": (2, None, "a row needs a token to predict and one to predict it from"),
            "logprob_chunk": (1, None, "some logits must exist at once"),
        }.items()
    },
    "data.text.max_bytes": (0, None, "0 is all"),
    "data.problems.train": (1, None, "there must be something to train on"),
    "data.problems.test": (1, None, "there must be something to evaluate on"),
    "data.problems.seed": (0, 2**31 - 1, "the sampler counts in 32 bits"),
    "data.tokenizer.vocab_size": (0, None, "0 with char is all characters"),
    "data.text.validation_one_in": (2, None, "some documents must be held out and some remain"),
    "data.problems.validation_one_in": (2, None, "some records must be held out and some remain"),
    **{
        f"data.{kind}.{key}": bound
        for kind in ("preferences", "rankings", "steps")
        for key, bound in {
            "validation_one_in": (2, None, "some records must be held out and some remain"),
            "train": (1, None, "there must be something to train on"),
            "validation": (1, None, "there must be something to evaluate on"),
        }.items()
    },
    "data.rankings.candidates": (2, None, "a ranking compares candidates"),
    "*.seed": (0, 2**31 - 1, "the sampler counts in 32 bits"),
    "*.steps": (1, None, "a stage without steps does nothing"),
    "*.batch_size": (1, None, "a batch needs a row"),
    "*.length": (2, None, "a row needs a token to predict and one to predict it from"),
    "*.micro_batches": (1, None, "a batch has at least one part"),
    "*.log_every": (1, None, "metrics are written every so many steps"),
    "*.eval_every": (0, None, "0 evaluates only at the end"),
    "*.eval_batches": (1, None, "something must be evaluated"),
    "*.eval_problems": (1, None, "something must be evaluated"),
    "*.checkpoint_every": (0, None, "0 saves only at the end"),
    "*.keep_checkpoints": (1, None, "a run resumes from the newest"),
    "*.data.text_weight": (0, None, "it is a share of the rows"),
    "*.data.problems_weight": (0, None, "it is a share of the rows"),
    "*.data.limit": (0, None, "0 is all"),
    "*.data.terse_fraction": (0, 1, "it is a share of the examples"),
    "*.rollout.prompts_per_step": (1, None, "an iteration needs a prompt"),
    "*.rollout.group_size": (2, None, "a completion is compared with others of its prompt"),
    "*.rollout.temperature": (1e-3, None, "rollouts are random; log-probs are divided by it"),
    "*.rollout.top_k": (0, None, "0 keeps all tokens"),
    "*.rollout.top_p": (1e-6, 1, "it is a probability mass"),
    "*.rollout.epochs": (1, None, "samples are there to be learned from"),
    "*.rollout.minibatches": (1, None, "a pass takes at least one optimizer step"),
    "*.rollout.resample_rounds": (0, None, "0 keeps groups with equal rewards"),
    "*.rollout.curriculum_low": (0, 1, "it is a pass rate"),
    "*.rollout.curriculum_high": (0, 1, "it is a pass rate"),
    "*.rollout.curriculum_decay": (0, 1, "it is the share that an old attempt keeps"),
    "*.rollout.curriculum_retry": (0, 1, "it is a probability"),
    "*.reward.variance_coef": (0, None, "it is the strength of a penalty"),
    "*.reward.step_coef": (0, None, "0 pays no step"),
    "*.reward.error_reward": (-1e6, 1e6, "it is a reward"),
    "*.rollout.max_prompt_length": (1, None, "a prompt has a token"),
    "*.rollout.max_new_tokens": (1, None, "a completion has a token"),
    "*.optimizer.learning_rate": (0, None, "a negative rate climbs"),
    "*.optimizer.warmup_steps": (0, None, "0 starts at the peak"),
    "*.optimizer.end_fraction": (0, 1, "it is a share of the peak"),
    "*.optimizer.b1": (0, 0.9999999, "at 1 the mean never moves"),
    "*.optimizer.b2": (0, 0.9999999, "at 1 the mean never moves"),
    "*.optimizer.weight_decay": (0, None, "a negative decay grows"),
    "*.optimizer.clip_norm": (1e-9, None, "at 0 nothing moves"),
    "*.optimizer.eps": (1e-20, None, "Adam divides by it where gradients vanish"),
}
