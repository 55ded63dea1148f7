"""What a benchmark's config becomes: frozen dataclasses, checked once; see `experiments/benchmarks/base.py`."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from ml_collections import ConfigDict

from models.config import ModelConfig
from research.config.schema import Key
from research.config.tree import flatten, merged, parse_override, to_tree, unknown_key
from research.core.errors import ConfigError

Kind = Literal["rollout", "train_step", "grpo_iteration"]
Platform = Literal["cpu", "gpu"]


@dataclasses.dataclass(frozen=True)
class RolloutCase:
    """Completions of `batches * batch_size` prompts of random tokens."""

    peers: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    batches: int
    prompt_length: int
    max_new_tokens: int
    mean_new_tokens: int
    greedy: bool


@dataclasses.dataclass(frozen=True)
class TrainCase:
    """Optimizer steps on rows of random tokens or on examples of a file."""

    peers: tuple[str, ...]
    batch_size: int
    length: int
    steps: int
    examples: int


@dataclasses.dataclass(frozen=True)
class GRPOCase:
    """Iterations of GRPO on prompts of random tokens."""

    peers: tuple[str, ...]
    prompts: int
    group_size: int
    prompt_length: int
    max_new_tokens: int
    iterations: int


Case = RolloutCase | TrainCase | GRPOCase
_CASES: Mapping[str, type] = {"rollout": RolloutCase, "train_step": TrainCase, "grpo_iteration": GRPOCase}
_MAY_BE_ZERO = {"mean_new_tokens", "examples", "greedy"}


@dataclasses.dataclass(frozen=True)
class LimitsSpec:
    """How the machine's limits are measured, and what its data sheet says (0: unknown)."""

    matmul_size: int
    peak_flops: float
    peak_bandwidth: float


@dataclasses.dataclass(frozen=True)
class SamplerSizes:
    """Sizes of Temper's sampler; see `research.sampling.types`."""

    chunk: int
    admit: int
    cache_bucket: int


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark, resolved; `tree` is the whole config as JSON."""

    kind: Kind
    question: str
    model: ModelConfig
    platform: Platform
    threads: int
    repetitions: int
    settle_seconds: float
    timeout_seconds: float
    seed: int
    limits: LimitsSpec
    sampler: SamplerSizes
    cases: Mapping[str, Case]
    optimizer: Mapping[str, float]
    objective: Mapping[str, Any]
    data: Mapping[str, Any]
    tree: Mapping[str, Any]


def read_benchmark(config: ConfigDict, overrides: Iterable[str] = ()) -> Benchmark:
    """The benchmark that a config describes.

    Raises:
      ConfigError: names the key, what it holds and what was expected.
    """
    tree = to_tree(config)
    known = flatten(tree)
    for text in overrides:
        key, value = parse_override(text, "override")
        if key not in known:
            raise unknown_key(key, known)
        tree = merged(tree, key, Key(known[key]).parse(key, value))
    values = {**_section("", tree, Benchmark, also=("tree",)), "tree": tree}
    if tree["kind"] not in _CASES:
        raise ConfigError(f"kind: got {tree['kind']!r}, expected one of {', '.join(_CASES)}")
    if tree["platform"] not in get_args(Platform):
        raise ConfigError(f"platform: got {tree['platform']!r}, expected cpu or gpu")
    for key in ("threads", "repetitions"):
        _at_least(key, tree[key], 1)
    for key in ("settle_seconds", "seed"):
        _at_least(key, tree[key], 0)
    values["limits"] = LimitsSpec(**_section("limits", tree["limits"], LimitsSpec))
    values["sampler"] = SamplerSizes(**_section("sampler", tree["sampler"], SamplerSizes))
    for key, value in tree["sampler"].items():
        _at_least(f"sampler.{key}", value, 1)
    _at_least("limits.matmul_size", tree["limits"]["matmul_size"], 1)
    try:
        values["model"] = ModelConfig(**_section("model", tree["model"], ModelConfig))
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    values["cases"] = {
        name: _case(f"cases.{name}", section, _CASES[tree["kind"]]) for name, section in tree["cases"].items()
    }
    return Benchmark(**values)


def _case(path: str, section: Mapping[str, Any], kind: type) -> Any:
    values = _section(path, section, kind)
    for key, value in values.items():
        if isinstance(value, list | tuple):
            values[key] = tuple(value)
            if key != "peers":
                if not value:
                    raise ConfigError(f"{path}.{key}: got none, expected at least one")
                for each in value:
                    _at_least(f"{path}.{key}", each, 1)
        else:
            _at_least(f"{path}.{key}", value, 0 if key in _MAY_BE_ZERO else 1)
    case = kind(**values)
    if isinstance(case, RolloutCase) and case.mean_new_tokens > case.max_new_tokens / 2:
        raise ConfigError(
            f"{path}.mean_new_tokens: got {case.mean_new_tokens}, expected at most half of max_new_tokens = "
            f"{case.max_new_tokens} because lengths are drawn from a falling distribution; 0 is fixed lengths"
        )
    return case


def _section(path: str, section: Mapping[str, Any], kind: type, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """The section's values; ConfigError for a key that is no field of `kind`, or a field without key and default."""
    fields = {field.name for field in dataclasses.fields(kind)} - set(also)
    optional = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
    prefix = f"{path}." if path else ""
    for key in sorted((set(section) - fields) | (fields - optional - set(section))):
        found = "unknown" if key in section else "missing"
        raise ConfigError(
            f"{prefix}{key}: {found} config key; {path or 'a benchmark'} has {', '.join(sorted(fields))}"
        )
    return dict(section)


def _at_least(key: str, value: float, low: int) -> None:
    if value < low:
        raise ConfigError(f"{key}: got {value}, expected at least {low}")
