"""The sections of a config: every key with its default, unit, bounds and effect, once.

Objectives, rewards, tasks, evaluators, tools, optimizers and schedules declare their own options beside their code; a
config gives them in a section of the component's name, beside the key that names it (`rl.objective.grpo.beta`,
`data.problems.arithmetic.max_steps`, `rl.optimizer.adamw.b1`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

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
      trains: the layout of what it trains.
      reads: what of a rewarded sample it learns from: correct, rewards, steps, scale; nothing of given data.
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


# Keys by what they change, and by when they have an effect.
_evaluation = functools.partial(key, effect="evaluation")
_speed = functools.partial(key, effect="speed")
_record = functools.partial(key, effect="record")
_report = functools.partial(key, effect="report")
_given = functools.partial(key, used=lambda _, f: not f.online)
_text = functools.partial(key, used=lambda _, f: f.given == "text")
_online = functools.partial(key, used=lambda _, f: f.online)
_filter = functools.partial(key, used=lambda s, f: f.online and s.curriculum)
_function = functools.partial(key, used=lambda s, f: f.reads and s.source == "functions")
_scored = functools.partial(key, used=lambda s, f: f.reads and s.source == "model")
_shaped = functools.partial(key, used=lambda _, f: "rewards" in f.reads)
_generated = functools.partial(key, used=lambda s, _: not s.path)
_slots = functools.partial(key, effect="speed", used=lambda s, _: s.slots > 0)


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
    scan_layers: bool = _speed(False, "Scan over layers: compile time independent of depth.")
    remat: Remat = _speed("none", "What the backward pass recomputes.")
    param_dtype: Literal["float32", "bfloat16"] = key("float32", "Of the stored parameters.")
    compute_dtype: Literal["float32", "bfloat16"] = key("float32", "Of matrix products.")
    logprob_chunk: int = _speed(128, "Time positions whose logits exist at once.", low=1)
    attention_kernel: AttentionKernel = _speed("auto", "Attention outside of the sampler.")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one may be -1, which takes what is left."""

    data: int = _speed(-1, "Rows are split.", low=-1)
    fsdp: int = _speed(1, "Rows and parameters are split.", low=-1)
    tensor: int = _speed(1, "Heads and hidden widths are split.", low=-1)


@dataclasses.dataclass(frozen=True)
class Text:
    """Raw documents for pretraining."""

    path: str = key("", "A .txt or .jsonl file or a folder of them; '' is the standard library's docs.")
    max_bytes: int = _generated(0, "Of the standard library's docs; 0 is all.", low=0)


@dataclasses.dataclass(frozen=True)
class Problems:
    """Questions with answers that can be checked; fine-tuning learns from their worked answers."""

    task: str = key("arithmetic", "Where problems come from and how answers are checked.", component="task")


@dataclasses.dataclass(frozen=True)
class Judged:
    """Judged solutions: pairs, rankings or labelled steps."""

    path: str = key("", "A JSONL file; '' lets the task of data.problems generate them, where it can.")
    train: int = _generated(4_000, "Generated problems to train on.", low=1)
    validation: int = _generated(256, "Generated problems held out.", low=1)


@dataclasses.dataclass(frozen=True)
class Rankings(Judged):
    """Ranked candidates."""

    candidates: int = _generated(4, "Candidates a generated prompt.", low=2)


@dataclasses.dataclass(frozen=True)
class TokenizerSection:
    """Text to tokens."""

    path: str = key("", "A SentencePiece model; '' trains one on this experiment's corpus.")
    vocab_size: int = key(512, "Pieces, markup and bytes included; 0 with char is all characters.", low=0)
    model_type: Literal["bpe", "unigram", "char"] = key("bpe", "How it is trained.")


@dataclasses.dataclass(frozen=True)
class Data:
    """Where data come from, what is held out, and what happens to records that do not fit."""

    validation_one_in: int = key(
        20,
        "One in so many is held out, by a hash of its prompt.",
        low=2,
        why="some records must be held out and some remain",
    )
    too_long: Literal["error", "drop", "truncate"] = key("drop", "What happens to a record longer than its limit.")
    max_dropped: float = _record(0.05, "A run refuses to start if more of a source is dropped.", low=0, high=1)
    text: Text = Text()
    problems: Problems = Problems()
    preferences: Judged = Judged()
    rankings: Rankings = Rankings()
    steps: Judged = Judged()
    tokenizer: TokenizerSection = TokenizerSection()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What measures a policy, whatever it was optimised for. () as `evaluators` turns it off."""

    evaluators: tuple[str, ...] = _evaluation(("accuracy",), "Run at the end of a stage.", component="evaluator")
    correct: str = _evaluation(
        "", "Reward function that pays 1 or more for a right completion; '' is the task's own.", component="reward"
    )
    problems: int = _evaluation(256, "Held-out problems.", low=1)
    samples: int = _evaluation(4, "Completions a problem.", low=1)
    k: tuple[int, ...] = _evaluation((1, 4), "The k of pass@k and maj@k.", low=1)
    temperature: float = _evaluation(1.0, "0 is greedy.", low=0, high=100)
    seed: int = _evaluation(1234, "Of its sampling: the same for every arm.", low=0, high=COUNTER, why=_SEED)
    max_prompt_length: int = _evaluation(64, "Markup included.", unit="tokens", low=1)
    max_new_tokens: int = _evaluation(64, "Longest completion.", unit="tokens", low=1)
    batch_problems: int = _speed(64, "Problems sampled at a time.", low=1)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Sampler settings. Only `int8_cache` and `weights` affect the samples; the rest affect speed."""

    slots: int = _speed(0, "Sequences decoded together, refilled as they end; 0 decodes a batch at once.", low=0)
    chunk: int = _slots(32, "Decode steps between host syncs that check which sequences are unfinished.", low=1)
    admit: int = _slots(8, "Prompts admitted at a time, once so many slots are free.", low=1)
    cache_bucket: int = _speed(128, "The KV cache grows by so many tokens.", unit="tokens", low=1)
    int8_cache: bool = key(False, "Keys and values in 8 bits: half the memory of bfloat16, and not exact.")
    weights: Literal["compute", "bfloat16", "int8"] = key(
        "compute",
        "Dtype of the layers' matrices. Embedding and LM head stay unquantised. Sampler and trainer log-probs then "
        "differ; see the log-prob gap metric, and correct with `importance`. int8 needs the extra `int8`.",
    )


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a policy may call while it is sampled; prompts list them in the system turn. Needs sampler.slots."""

    names: tuple[str, ...] = key((), "Tools; () is none.", component="tool")
    environment: str = key("", "Answers the policy's turns instead of tools; '' is none.", component="environment")
    max_turns: int = key(4, "A completion that needs more answers than this ends.", low=1, used=lambda s, _: s.any)
    max_result_tokens: int = key(
        128, "Of one result; they count towards max_new_tokens.", unit="tokens", low=1, used=lambda s, _: s.names != ()
    )

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

    source: Literal["own", "given"] = key(
        "own", "Own samples or given data, where an objective takes both.", used=lambda _, f: f.own and bool(f.given)
    )
    text_weight: float = _text(1.0, "Share of rows from the text corpus.", low=0)
    problems_weight: float = _text(0.0, "Share of rows from worked problems, written as plain text.", low=0)
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
        "", "Applied to the records.", component="transform", used=lambda _, f: f.given != "text" and not f.online
    )
    context: str = key("", "A system turn that only the teacher sees.", used=lambda _, f: "teacher" in f.roles)


def _played(role: str) -> Callable[[Any, Facts], bool]:
    return lambda _, facts: role in facts.roles | facts.answer_roles


@dataclasses.dataclass(frozen=True)
class Roles:
    """The stages whose models play a role in this one: names of earlier stages, or folders of finished ones."""

    reference: str = key("", "'' is the stage that this one starts from.", used=_played("reference"))
    teacher: str = key("", "Any size, same tokenizer.", used=_played("teacher"))
    reward: tuple[str, ...] = key((), "Reward models; several are an ensemble.", used=_played("reward"))
    value: str = key("", "A reward model to start the value model from; '' is the policy.", used=_played("value"))
    prm: str = key("", "Process reward model.", used=_played("prm"))


@dataclasses.dataclass(frozen=True)
class Reward:
    """The reward of a sample, in this order: functions or reward models, normalisation, clipping, format, length,
    overlong, missing end. What measures a policy is `evaluation`, not this.
    """

    source: Literal["functions", "model"] = key("functions", "Functions, or roles.reward.", used=lambda _, f: f.reads)
    functions: tuple[str, ...] = _function(
        ("correct",), "Reward functions, summed by weight; each is logged apart.", component="reward"
    )
    weights: tuple[float, ...] = _function((), "Of the functions, in their order; () is 1 each.")
    success_threshold: float = _function(
        1.0, "A weighted sum from here on is right, to objectives that select, the curriculum, format and length."
    )
    unknown: float = _function(0.0, "Paid where a function raises or returns None.", low=-1e6, high=1e6)
    ensemble: Literal["mean", "min", "mean_minus_variance"] = _scored(
        "mean", "How several reward models make one score."
    )
    variance_coef: float = key(
        0.0,
        "Of mean_minus_variance.",
        low=0,
        used=lambda s, f: f.reads and s.source == "model" and s.ensemble == "mean_minus_variance",
    )
    normalize: Literal["none", "running", "reference"] = _shaped("none", "To mean 0 and standard deviation 1.")
    score_clip: float = _shaped(0.0, "Bound of the normalised score; 0 is off.", low=0)
    format_mode: Literal["off", "gated", "additive"] = _shaped("off", "gated: of right answers only.")
    format_coef: float = _shaped(0.0, "Reward of the format.", low=0)
    format_pattern: Literal["one_final_line", "final_line"] = key(
        "one_final_line", "What is the right format.", used=lambda s, f: "rewards" in f.reads and s.format_mode != "off"
    )
    length_coef: float = _shaped(0.0, "Of the group-relative length reward; 0 is off.", low=0)
    overlong_buffer: int = _shaped(0, "Before max_new_tokens, where a penalty grows.", unit="tokens", low=0)
    overlong_coef: float = key(
        1.0, "Full size of the penalty.", low=0, used=lambda s, f: "rewards" in f.reads and s.overlong_buffer > 0
    )
    missing_eos_penalty: float = _shaped(0.0, "Subtracted where a completion never stops.", low=0)
    difficulty_weighting: Literal["none", "fail_rate", "inverse_pass_rate"] = key(
        "none", "Scale of the advantages by a prompt's pass rate.", used=lambda _, f: "scale" in f.reads
    )
    step_coef: float = key(0.0, "Of a PRM's score at each step; 0 is off.", low=0, used=lambda _, f: "steps" in f.reads)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer and its schedule."""

    name: str = key("adamw", "The optimizer.", component="optimizer")
    schedule: str = key("cosine", "The learning rate's course after warm-up.", component="schedule")
    learning_rate: float = key(1e-3, "Peak learning rate.", low=0, why="a negative rate climbs")
    warmup_steps: int = key(10, "Linear warm-up.", unit="optimizer steps", low=0)
    clip_norm: float = key(1.0, "Largest global gradient norm.", low=1e-9, why="at 0 nothing moves")
    max_skipped: int = _record(
        5, "Updates in a row that may be skipped because loss or gradient is not finite, before the run stops.", low=0
    )


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How the policy is sampled, and how often each sample is learned from."""

    prompts_per_step: int = _online(32, "Prompts an iteration.", low=1)
    group_size: int = _online(8, "Samples a prompt.", low=2, why="a completion is compared with others of its prompt")
    max_prompt_length: int = _online(64, "Markup included.", unit="tokens", low=1)
    max_new_tokens: int = _online(64, "Longest completion.", unit="tokens", low=1)
    temperature: float = _online(1.0, "Log-probs are divided by it.", low=1e-3, high=100)
    top_k: int = _online(0, "0 keeps all.", low=0, high=COUNTER)
    top_p: float = _online(1.0, "1 keeps all.", low=1e-6, high=1)
    epochs: int = _online(1, "Passes over each iteration's samples.", low=1)
    minibatches: int = _online(1, "Optimizer steps a pass; groups stay whole.", low=1)
    resample_rounds: int = _online(0, "Extra prompt batches that replace zero-variance groups (DAPO).", low=0)
    curriculum_low: float = _online(0.0, "Prompts whose pass rate lies in this band are sampled.", low=0, high=1)
    curriculum_high: float = _online(1.0, "Upper end of the band; 0 and 1 take all.", low=0, high=1)
    curriculum_decay: float = _filter(0.5, "Share of an attempt's weight left at the next visit.", low=0, high=1)
    curriculum_retry: float = _filter(0.1, "Chance to try a prompt outside the band all the same.", low=0, high=1)
    monitor_kl: bool = _record(
        True,
        "Measure the KL to the start.",
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
    """One stage. Keys without effect enter no identity and are refused as overrides."""

    model: Literal["model", "teacher_model"] = key("model", "The section that describes its model.")
    start_from: str = key(
        "", "An earlier stage's name, the folder of a finished stage, or scratch; '' is the newest policy of the model."
    )
    extend: str = key("", "Folder of a finished stage whose whole state this one continues to `steps`; '' is none.")
    final_answer: Literal["sample", "majority", "reward", "prm"] = _evaluation(
        "sample", "How eval/accuracy answers: a sample, majority, or best of n by a scorer.", used=lambda _, f: f.policy
    )
    prm_score: Literal["min", "prod", "last", "mean"] = _evaluation(
        "min", "With prm: a solution's score from its steps'.", used=lambda s, f: f.policy and s.final_answer == "prm"
    )
    seed: int = key(0, "Of everything random in the stage.", low=0, high=COUNTER, why=_SEED)
    steps: int = key(100, "Optimizer steps, or rollout iterations where the policy samples its own data.", low=1)
    batch_size: int = _given(32, "Rows an optimizer step, where the data are given.", low=1)
    length: int = _given(128, "Of a row, where the data are given.", unit="tokens", low=2)
    micro_batches: int = key(1, "Gradients are accumulated over so many parts of a batch.", low=1)
    log_every: int = _record(10, "Between two lines of metrics.", unit="steps", low=1)
    eval_every: int = _record(0, "Between evaluations on held-out data; 0 is only at the end.", unit="steps", low=0)
    eval_batches: int = _given(8, "Batches an evaluation, where the data are given.", low=1, effect="record")
    eval_problems: int = _record(128, "Problems an evaluation before the end.", low=1, used=lambda _, f: f.policy)
    checkpoint_every: float = _record(15.0, "Between checkpoints; 0 saves only at the end.", unit="minutes", low=0)
    keep_checkpoints: int = _record(2, "Newest checkpoints kept.", low=1)
    data: StageData = StageData()
    roles: Roles = Roles()
    reward: Reward = Reward()
    optimizer: Optimizer = Optimizer()
    rollout: Rollout = Rollout()
    objective: Objective = Objective()


@dataclasses.dataclass(frozen=True)
class Records:
    """What is written down besides files of metrics, in the working directory."""

    sinks: tuple[Literal["tensorboard", "wandb"], ...] = _record(
        ("tensorboard",), "Where every metric also goes. wandb needs the extra `wandb`."
    )


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Which arms and seeds are compared, and by what."""

    stage: str = _report("rl", "The stage whose runs are compared.")
    control: str = _report("", "The arm that all others are compared to; '' is the first.")
    seeds: tuple[int, ...] = _report((0, 1, 2), "Written to `seed_keys` for each run of an arm.", low=0, high=COUNTER)
    seed_keys: tuple[str, ...] = _report(("rl.seed",), "Keys that a seed is written to.")
    metric: str = _report("eval/pass@1", "Of the final evaluation.")
    higher_is_better: bool = _report(True, "Which way is up.")
    pairs: tuple[str, ...] = _report((), "Further pairs of arms to test, each 'a:b'.")


MODELS = ("model", "teacher_model")
SECTIONS: Mapping[str, type] = {
    **dict.fromkeys(MODELS, Model),
    "mesh": Mesh,
    "data": Data,
    "evaluation": Evaluation,
    "sampler": Sampler,
    "tools": Tools,
    "records": Records,
    "ablation": Ablation,
}
"""All but the stages."""
