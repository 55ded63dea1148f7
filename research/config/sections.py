"""The sections of a config: every key with its default, unit, bounds and effect, once.

Objectives, rewards, tasks, evaluators, tools, optimizers and schedules declare their own options beside their code; a
config gives them in a section of the component's name, beside the key that names it (`rl.objective.grpo.beta`,
`data.problems.arithmetic.max_steps`, `rl.optimizer.adamw.b1`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

from models.config import AttentionKernel, Remat
from research.config.schema import key

COUNTER = 2**31 - 1
_SEED = "randomness is counted in 32 bits"


class Facts(NamedTuple):
    """What decides which keys of a stage have an effect.

    Attributes:
      online: whether the policy samples its own data.
      given: the kind of given data that its objective learns from, "" where only from own samples.
      own: whether its objective can learn from own samples.
      policy: whether its result can be sampled and is worth it (not a bare language model, not a scorer).
      trains: the layout of what it trains: policy, actor_critic, scorer, step_scorer.
      reads: what of a rewarded sample the objective learns from: correct, rewards, steps, scale.
      roles: the other models that its training needs: reference, teacher, reward, value, prm.
      answer_roles: the models that its evaluation needs: reward or prm, to choose the best of n.
      untruncated: whether its ratio needs the untruncated distribution.
    """

    online: bool
    given: str
    own: bool
    policy: bool
    trains: Literal["policy", "actor_critic", "scorer", "step_scorer"]
    reads: frozenset[str]
    roles: frozenset[str]
    answer_roles: frozenset[str] = frozenset()
    untruncated: bool = False


def _played(role: str) -> Callable[[Any, Facts], bool]:
    return lambda _, facts: role in facts.roles | facts.answer_roles


def _offline(_: Any, facts: Facts) -> bool:
    return not facts.online


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder-only transformer; the vocabulary is the tokenizer's."""

    num_layers: int = key(4, "Layers.", low=1)
    d_model: int = key(128, "Width of the residual stream.", low=1)
    num_heads: int = key(4, "Query heads.", low=1)
    num_kv_heads: int = key(4, "Key and value heads; divides num_heads.", low=1)
    head_dim: int = key(32, "Width of a head; even.", low=2)
    d_ff: int = key(384, "Hidden width of the SwiGLU block.", low=1)
    rope_theta: float = key(10_000.0, "Base of the rotary frequencies.", low=1e-6)
    norm_eps: float = key(1e-5, "Epsilon inside RMSNorm.", low=1e-12)
    tie_embeddings: bool = key(True, "Read logits out with the input embedding.")
    max_length: int = key(2048, "Longest context.", unit="tokens", low=2)
    scan_layers: bool = key(False, "Scan over layers: compile time independent of depth.", effect="speed")
    remat: str = key("none", "What the backward pass recomputes.", choices=get_args(Remat), effect="speed")
    param_dtype: str = key("float32", "Of the stored parameters.", choices=("float32", "bfloat16"))
    compute_dtype: str = key("float32", "Of matrix products.", choices=("float32", "bfloat16"))
    logprob_chunk: int = key(128, "Time positions whose logits exist at once.", low=1, effect="speed")
    attention_kernel: str = key(
        "auto", "Attention outside of the sampler.", choices=get_args(AttentionKernel), effect="speed"
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one may be -1, which takes what is left."""

    data: int = key(-1, "Rows are split.", low=-1, effect="speed")
    fsdp: int = key(1, "Rows and parameters are split.", low=-1, effect="speed")
    tensor: int = key(1, "Heads and hidden widths are split.", low=-1, effect="speed")


@dataclasses.dataclass(frozen=True)
class Text:
    """Raw documents for pretraining."""

    path: str = key("", "A .txt or .jsonl file or a folder of them; '' is the standard library's docs.")
    max_bytes: int = key(0, "Of the standard library's docs; 0 is all.", low=0)


@dataclasses.dataclass(frozen=True)
class Problems:
    """Questions with answers that can be checked; fine-tuning learns from their worked answers."""

    task: str = key("arithmetic", "Where problems come from and how answers are checked.", component="task")


@dataclasses.dataclass(frozen=True)
class Judged:
    """Judged solutions: pairs, rankings or labelled steps."""

    path: str = key("", "A JSONL file; '' lets the task of data.problems generate them, where it can.")
    train: int = key(4_000, "Generated problems to train on.", low=1, used=lambda s, _: not s.path)
    validation: int = key(256, "Generated problems held out.", low=1, used=lambda s, _: not s.path)


@dataclasses.dataclass(frozen=True)
class Rankings(Judged):
    """Ranked candidates."""

    candidates: int = key(4, "Candidates a generated prompt.", low=2, used=lambda s, _: not s.path)


@dataclasses.dataclass(frozen=True)
class TokenizerSection:
    """Text to tokens."""

    path: str = key("", "A SentencePiece model; '' trains one on this experiment's corpus.")
    vocab_size: int = key(512, "Pieces, markup and bytes included; 0 with char is all characters.", low=0)
    model_type: str = key("bpe", "How it is trained.", choices=("bpe", "unigram", "char"))


@dataclasses.dataclass(frozen=True)
class Data:
    """Where data come from, what is held out, and what happens to records that do not fit."""

    validation_one_in: int = key(
        20,
        "Share of each file that is held out: a hash of the normalised prompt decides, so that a prompt held out in "
        "one file is held out in all.",
        low=2,
        why="some records must be held out and some remain",
    )
    too_long: str = key(
        "drop",
        "What happens to a record whose prompt, completion or row is longer than its limit.",
        choices=("error", "drop", "truncate"),
    )
    max_dropped: float = key(0.05, "Largest share of a source that may be dropped before a run refuses to start.",
                             low=0, high=1, effect="record")  # fmt: skip
    text: Text = Text()
    problems: Problems = Problems()
    preferences: Judged = Judged()
    rankings: Rankings = Rankings()
    steps: Judged = Judged()
    tokenizer: TokenizerSection = TokenizerSection()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What measures a policy, whatever it was optimised for. () as `evaluators` turns it off."""

    evaluators: tuple[str, ...] = key(
        ("accuracy",), "What is measured at the end of a stage.", component="evaluator", effect="evaluation"
    )
    correct: str = key(
        "",
        "Reward function that says whether a completion is right (1 or more); '' is the task's own.",
        component="reward",
        effect="evaluation",
    )
    problems: int = key(256, "Held-out problems.", low=1, effect="evaluation")
    samples: int = key(4, "Completions a problem.", low=1, effect="evaluation")
    k: tuple[int, ...] = key((1, 4), "The k of pass@k and maj@k.", low=1, element=int, effect="evaluation")
    temperature: float = key(1.0, "0 is greedy.", low=0, high=100, effect="evaluation")
    seed: int = key(
        1234, "Of the evaluation's sampling: the same for every arm.", low=0, high=COUNTER, why=_SEED,
        effect="evaluation",
    )  # fmt: skip
    max_prompt_length: int = key(64, "Markup included.", unit="tokens", low=1, effect="evaluation")
    max_new_tokens: int = key(64, "Longest completion.", unit="tokens", low=1, effect="evaluation")
    batch_problems: int = key(64, "Problems sampled at a time.", low=1, effect="speed")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Sampler settings. Only `int8_cache` and `weights` affect the samples; the rest affect speed."""

    slots: int = key(0, "Sequences decoded together, refilled as they end; 0 decodes a batch at once.", low=0,
                     effect="speed")  # fmt: skip
    chunk: int = key(32, "Decode steps between host syncs that check which sequences are unfinished.", low=1,
                     effect="speed", used=lambda s, _: s.slots > 0)  # fmt: skip
    admit: int = key(8, "Prompts admitted at a time, once so many slots are free.", low=1, effect="speed",
                     used=lambda s, _: s.slots > 0)  # fmt: skip
    cache_bucket: int = key(128, "The KV cache grows by so many tokens.", unit="tokens", low=1, effect="speed")
    int8_cache: bool = key(False, "Keys and values in 8 bits: half the memory of bfloat16, and not exact.")
    weights: Literal["compute", "bfloat16", "int8"] = key(
        "compute",
        "Dtype of the layers' matrices. Embedding and LM head stay unquantised. Sampler and trainer log-probs then "
        "differ; see the log-prob gap metric, and correct with `importance`. int8 needs the extra `int8`.",
        choices=("compute", "bfloat16", "int8"),
    )


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a policy may call while it is sampled; prompts list them in the system turn. Needs sampler.slots."""

    names: tuple[str, ...] = key((), "Tools; () is none.", component="tool")
    environment: str = key(
        "", "What answers the policy's turns instead of tools; '' is nothing.", component="environment"
    )
    max_turns: int = key(4, "Turns that are answered; a completion that needs another answer ends.", low=1,
                         used=lambda s, _: bool(s.names or s.environment))  # fmt: skip
    max_result_tokens: int = key(128, "Of one result; results count towards max_new_tokens.", unit="tokens", low=1,
                                 used=lambda s, _: bool(s.names))  # fmt: skip

    @property
    def any(self) -> bool:
        """Whether anything answers."""
        return bool(self.names or self.environment)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a stage learns by; each objective has its own options."""

    name: str = key("next_token", "The objective.", component="objective")


@dataclasses.dataclass(frozen=True)
class StageData:
    """Which data a stage learns from."""

    source: str = key(
        "own",
        "The policy's own samples or given data, where an objective takes both.",
        choices=("own", "given"),
        used=lambda _, f: f.own and bool(f.given),
    )
    text_weight: float = key(1.0, "Share of rows from the text corpus.", low=0,
                             used=lambda _, f: f.given == "text")  # fmt: skip
    problems_weight: float = key(0.0, "Share of rows from worked problems, written as plain text.", low=0,
                                 used=lambda _, f: f.given == "text")  # fmt: skip
    limit: int = key(
        0,
        "Only the first so many training problems; 0 is all.",
        low=0,
        used=lambda s, f: f.online or f.given == "chat" or (f.given == "text" and s.problems_weight > 0),
    )
    packing: bool = key(
        True,
        "Several examples a row.",
        used=lambda _, f: not f.online and f.given == "chat" and "teacher" not in f.roles,
    )
    transform: str = key(
        "",
        "A function on records, applied before they are used; '' is none.",
        component="transform",
        used=lambda _, f: not f.online and f.given != "text",
    )
    context: str = key("", "A system turn that only the teacher sees.", used=lambda _, f: "teacher" in f.roles)


@dataclasses.dataclass(frozen=True)
class Roles:
    """The stages whose models play a role in this one: names of earlier stages, or folders of finished ones."""

    reference: str = key("", "'' is the stage that this one starts from.", used=_played("reference"))
    teacher: str = key("", "Any size, same tokenizer.", used=_played("teacher"))
    reward: tuple[str, ...] = key((), "Reward models; several are an ensemble.",
                                  used=_played("reward"))  # fmt: skip
    value: str = key("", "A reward model to start the value model from; '' is the policy.",
                     used=_played("value"))  # fmt: skip
    prm: str = key("", "Process reward model.", used=_played("prm"))


def _learns(_: Any, facts: Facts) -> bool:
    return facts.online and bool(facts.reads)


def _shaped(_: Any, facts: Facts) -> bool:
    return facts.online and "rewards" in facts.reads


@dataclasses.dataclass(frozen=True)
class Reward:
    """The reward of a sample, in this order: functions or reward models, normalisation, clipping, format, length,
    overlong, missing end. What measures a policy is `evaluation`, not this.
    """

    source: str = key("functions", "Reward functions, or reward models (roles.reward).",
                      choices=("functions", "model"), used=_learns)  # fmt: skip
    functions: tuple[str, ...] = key(
        ("correct",),
        "Reward functions, summed by weight; each is logged apart.",
        component="reward",
        used=lambda s, f: _learns(s, f) and s.source == "functions",
    )
    weights: tuple[float, ...] = key((), "Of the functions, in their order; () is 1 each.", element=float,
                                     used=lambda s, f: _learns(s, f) and s.source == "functions")  # fmt: skip
    success_threshold: float = key(
        1.0,
        "A weighted sum from here on is a right answer to objectives that select, to the curriculum, and to rewards of "
        "format and length.",
        used=lambda s, f: _learns(s, f) and s.source == "functions",
    )
    unknown: float = key(
        0.0,
        "Reward where a function raises or returns None (it cannot tell).",
        low=-1e6,
        high=1e6,
        used=lambda s, f: _learns(s, f) and s.source == "functions",
    )
    ensemble: Literal["mean", "min", "mean_minus_variance"] = key(
        "mean",
        "How several reward models make one score.",
        choices=("mean", "min", "mean_minus_variance"),
        used=lambda s, f: _learns(s, f) and s.source == "model",
    )
    variance_coef: float = key(
        0.0,
        "Of mean_minus_variance.",
        low=0,
        used=lambda s, f: _learns(s, f) and s.source == "model" and s.ensemble == "mean_minus_variance",
    )
    normalize: str = key("none", "To mean 0 and standard deviation 1.",
                         choices=("none", "running", "reference"), used=_shaped)  # fmt: skip
    score_clip: float = key(0.0, "Bound of the normalised score; 0 is off.", low=0, used=_shaped)
    format_mode: str = key("off", "gated rewards only right answers; additive can be hacked.",
                           choices=("off", "gated", "additive"), used=_shaped)  # fmt: skip
    format_coef: float = key(0.0, "Reward of the format.", low=0, used=_shaped)
    format_pattern: str = key(
        "one_final_line",
        "What is the right format.",
        choices=("one_final_line", "final_line"),
        used=lambda s, f: _shaped(s, f) and s.format_mode != "off",
    )
    length_coef: float = key(0.0, "Of the group-relative length reward; 0 is off.", low=0, used=_shaped)
    overlong_buffer: int = key(0, "Before max_new_tokens, over which the penalty grows; 0 is off.", unit="tokens",
                               low=0, used=_shaped)  # fmt: skip
    overlong_coef: float = key(1.0, "Full size of the overlong penalty.", low=0,
                               used=lambda s, f: _shaped(s, f) and s.overlong_buffer > 0)  # fmt: skip
    missing_eos_penalty: float = key(0.0, "Subtracted where a completion never stops.", low=0, used=_shaped)
    difficulty_weighting: str = key(
        "none",
        "Scale of the advantages by a prompt's pass rate.",
        choices=("none", "fail_rate", "inverse_pass_rate"),
        used=lambda _, f: f.online and "scale" in f.reads,
    )
    step_coef: float = key(0.0, "Of a process reward model's probabilities, paid at each step's end; 0 is off.",
                           low=0, used=lambda _, f: f.online and "steps" in f.reads)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer and its schedule."""

    name: str = key("adamw", "The optimizer.", component="optimizer")
    schedule: str = key("cosine", "The learning rate's course after warm-up.", component="schedule")
    learning_rate: float = key(1e-3, "Peak learning rate.", low=0, why="a negative rate climbs")
    warmup_steps: int = key(10, "Linear warm-up.", unit="optimizer steps", low=0)
    clip_norm: float = key(1.0, "Largest global gradient norm.", low=1e-9, why="at 0 nothing moves")
    max_skipped: int = key(
        5,
        "Updates in a row that may be skipped because loss or gradient is not finite, before the run stops.",
        low=0,
        effect="record",
    )


def _online(_: Any, facts: Facts) -> bool:
    return facts.online


def _filters(s: Any, facts: Facts) -> bool:
    return facts.online and s.curriculum


_rollout_key = functools.partial(key, used=_online)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How the policy is sampled, and how often each sample is learned from."""

    prompts_per_step: int = _rollout_key(32, "Prompts an iteration.", low=1)
    group_size: int = _rollout_key(8, "Completions a prompt.", low=2,
                          why="a completion is compared with others of its prompt")  # fmt: skip
    max_prompt_length: int = _rollout_key(64, "Markup included.", unit="tokens", low=1)
    max_new_tokens: int = _rollout_key(64, "Longest completion.", unit="tokens", low=1)
    temperature: float = _rollout_key(1.0, "Log-probs are divided by it.", low=1e-3, high=100)
    top_k: int = _rollout_key(0, "0 keeps all.", low=0, high=COUNTER)
    top_p: float = _rollout_key(1.0, "1 keeps all.", low=1e-6, high=1)
    epochs: int = _rollout_key(1, "Passes over each iteration's samples.", low=1)
    minibatches: int = _rollout_key(1, "Optimizer steps a pass; groups stay whole.", low=1)
    resample_rounds: int = _rollout_key(
        0, "Extra prompt batches sampled to replace zero-variance groups (DAPO dynamic sampling).", low=0
    )
    curriculum_low: float = _rollout_key(0.0, "Prompts whose pass rate lies in this band are sampled.", low=0, high=1)
    curriculum_high: float = _rollout_key(1.0, "Upper end of the band; 0 and 1 take all.", low=0, high=1)
    curriculum_decay: float = key(
        0.5, "Share of an attempt's weight that is left at the next visit.", low=0, high=1, used=_filters
    )
    curriculum_retry: float = key(
        0.1, "Chance to try a prompt outside the band all the same.", low=0, high=1, used=_filters
    )
    monitor_kl: bool = key(
        True,
        "Measure the KL to the start of the stage when metrics are written.",
        effect="record",
        used=lambda _, f: f.online and not (f.untruncated and "reference" in f.roles),
    )

    @property
    def curriculum(self) -> bool:
        """Whether prompts are filtered by their pass rate."""
        return (self.curriculum_low, self.curriculum_high) != (0.0, 1.0)

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn: log-probs are then those of another distribution than the model's."""
        return self.top_k > 0 or self.top_p < 1.0


@dataclasses.dataclass(frozen=True)
class StageSection:
    """One stage without its objective. Keys without effect enter no identity and are refused as overrides."""

    model: str = key("model", "The section that describes its model: model or teacher_model.")
    start_from: str = key(
        "", "An earlier stage's name, the folder of a finished stage, or scratch; '' is the newest policy of the model."
    )
    extend: str = key(
        "",
        "Folder of a finished stage whose whole state (optimizer, data position, counters) this one continues to "
        "`steps`; '' is none.",
    )
    final_answer: str = key(
        "sample",
        "How eval/accuracy answers: a sample, the majority, or the best of n by a scorer.",
        choices=("sample", "majority", "reward", "prm"),
        effect="evaluation",
        used=lambda _, f: f.policy,
    )
    prm_score: Literal["min", "prod", "last", "mean"] = key(
        "min",
        "With prm: a solution's score from its steps'.",
        choices=("min", "prod", "last", "mean"),
        effect="evaluation",
        used=lambda s, f: f.policy and s.final_answer == "prm",
    )
    seed: int = key(0, "Of everything random in the stage.", low=0, high=COUNTER, why=_SEED)
    steps: int = key(100, "Optimizer steps, or rollout iterations where the policy samples its own data.", low=1)
    batch_size: int = key(32, "Rows an optimizer step, where the data are given.", low=1, used=_offline)
    length: int = key(128, "Of a row, where the data are given.", unit="tokens", low=2, used=_offline)
    micro_batches: int = key(1, "Gradients are accumulated over so many parts of a batch.", low=1)
    log_every: int = key(10, "Between two lines of metrics.", unit="steps", low=1, effect="record")
    eval_every: int = key(0, "Between evaluations on held-out data; 0 is only at the end.", unit="steps", low=0,
                          effect="record")  # fmt: skip
    eval_batches: int = key(8, "Batches of validation data an evaluation, where the data are given.", low=1,
                            effect="record", used=_offline)  # fmt: skip
    eval_problems: int = key(128, "Held-out problems an evaluation before the end.", low=1, effect="record",
                             used=lambda _, f: f.policy)  # fmt: skip
    checkpoint_every: float = key(15.0, "Between checkpoints; 0 saves only at the end.", unit="minutes", low=0,
                                  effect="record")  # fmt: skip
    keep_checkpoints: int = key(2, "Newest checkpoints kept.", low=1, effect="record")
    data: StageData = StageData()
    roles: Roles = Roles()
    reward: Reward = Reward()
    optimizer: Optimizer = Optimizer()
    rollout: Rollout = Rollout()


@dataclasses.dataclass(frozen=True)
class Records:
    """What is written down besides files of metrics, in the working directory."""

    sinks: tuple[str, ...] = key(
        ("tensorboard",),
        "Where every metric also goes. wandb needs the extra `wandb`.",
        choices=("tensorboard", "wandb"),
        effect="record",
    )


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Which arms and seeds are compared, and by what."""

    stage: str = key("rl", "The stage whose runs are compared.", effect="report")
    control: str = key("", "The arm that all others are compared to; '' is the first.", effect="report")
    seeds: tuple[int, ...] = key((0, 1, 2), "Written to `seed_keys` for each run of an arm.", low=0, high=COUNTER,
                                 element=int, effect="report")  # fmt: skip
    seed_keys: tuple[str, ...] = key(("rl.seed",), "Keys that a seed is written to.", effect="report")
    metric: str = key("eval/pass@1", "Of the final evaluation.", effect="report")
    higher_is_better: bool = key(True, "Which way is up.", effect="report")
    pairs: tuple[str, ...] = key((), "Further pairs of arms to test, each 'a:b'.", effect="report")
