"""What the config of a comparison may say: which systems do what work, on which machine."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from models.config import ModelConfig
from research.config.experiment import make_model
from research.config.schema import key
from research.config.sections import COUNTER, Model
from research.config.tree import Tree, merged, parse_override, parse_section, to_tree, unknown_key
from research.core.errors import ConfigError

_PEERS = "Systems that do the same work, besides Temper."


@dataclasses.dataclass(frozen=True)
class RolloutCase:
    """Completions of `batches * batch_size` prompts of random tokens."""

    peers: tuple[str, ...] = key((), _PEERS)
    batch_sizes: tuple[int, ...] = key((64,), "Rows at a time; several make a curve.", low=1, element=int)
    batches: int = key(1, "Batches that a repetition draws.", low=1)
    prompt_length: int = key(32, "Of every prompt.", unit="tokens", low=2)
    max_new_tokens: int = key(128, "Of every completion, or the longest.", unit="tokens", low=1)
    mean_new_tokens: int = key(
        0,
        "Mean of exponential lengths, cut at max_new_tokens; 0: all have max_new_tokens.",
        unit="tokens",
        low=0,
    )
    greedy: bool = key(False, "The likeliest token; else one is drawn at temperature 1.")


@dataclasses.dataclass(frozen=True)
class TrainCase:
    """Optimizer steps on full rows of random tokens, or on examples of different lengths."""

    peers: tuple[str, ...] = key((), _PEERS)
    batch_size: int = key(16, "Rows.", low=1)
    length: int = key(256, "Of a row.", unit="tokens", low=4)
    steps: int = key(4, "In a repetition; with examples, as many as one pass takes.", low=1)
    examples: int = key(0, "Chat examples, which Temper packs; 0: full rows.", low=0)
    mean_length: int = key(
        180, "Of an example; a third of it is the standard deviation.", unit="tokens", low=4
    )


@dataclasses.dataclass(frozen=True)
class GRPOCase:
    """Iterations of GRPO on prompts of random tokens: sample, reference log-probs, one update."""

    peers: tuple[str, ...] = key((), _PEERS)
    prompts: int = key(8, "In an iteration.", low=1)
    group_size: int = key(8, "Completions a prompt.", low=2)
    prompt_length: int = key(32, "Of every prompt.", unit="tokens", low=2)
    max_new_tokens: int = key(64, "Of every completion.", unit="tokens", low=1)
    iterations: int = key(2, "In a repetition.", low=1)
    beta: float = key(0.04, "Weight of the KL to the reference.", low=0)


Case = RolloutCase | TrainCase | GRPOCase
KINDS: Mapping[str, type[Case]] = {"rollout": RolloutCase, "train": TrainCase, "grpo": GRPOCase}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for all cases."""

    platform: str = key("cpu", "Where the systems compute.", choices=("cpu", "gpu"))
    threads: int = key(
        2, "Cores of each system; on a CPU, Temper splits rows over one XLA device a core.", low=1
    )
    repetitions: int = key(5, "Timed runs of each system, in turn.", low=1)
    pause: float = key(0.3, "Between two runs.", unit="seconds", low=0)
    timeout: float = key(1800.0, "Of one run, compilation included.", unit="seconds", low=0.1)
    seed: int = key(0, "Of prompts, lengths and sampling.", low=0, high=COUNTER)
    vocab_size: int = key(4096, "Token ids.", low=16)
    cache_bucket: int = key(32, "Temper's KV cache grows by so many tokens.", unit="tokens", low=1)
    model: Model = Model()


class Comparison(NamedTuple):
    """A comparison, checked.

    Attributes:
      settings: what holds for all cases.
      model: the decoder that all systems run.
      cases: by dotted name: the kind of work, and the case's own.
      tree: what the config says.
    """

    settings: Settings
    model: ModelConfig
    cases: Mapping[str, Case]
    tree: Tree


def read_comparison(
    config: ConfigDict, overrides: Iterable[str] = (), only: Sequence[str] = ()
) -> Comparison:
    """What a config and "dotted.key=value" overrides describe; `only` names cases or kinds, none is all.

    Raises:
      ConfigError: an unknown key, a value of another type or out of range, shapes that do not fit together.
    """
    tree = to_tree(config)
    for text in overrides:
        name, value = parse_override(text, "override")
        kind, _, rest = name.partition(".")
        if kind in KINDS and rest.partition(".")[0] not in tree.get(kind, {}):
            raise unknown_key(name, [f"{kind}.{case}" for case in tree.get(kind, {})])
        tree = merged(tree, name, value)
    settings = parse_section(Settings, tree, others=("question", *KINDS)).value
    cases: dict[str, Case] = {}
    for kind, declared in KINDS.items():
        for name, given in tree.get(kind, {}).items():
            case = parse_section(declared, given, f"{kind}.{name}.").value
            if isinstance(case, RolloutCase) and not case.batch_sizes:
                raise ConfigError(f"{kind}.{name}.batch_sizes: got (), expected at least one")
            cases[f"{kind}.{name}"] = case
    for name in only:
        if not any(name in _names(case) for case in cases):
            raise ConfigError(f"--only: got {name!r}, expected some of {', '.join(cases)}")
    chosen = {name: case for name, case in cases.items() if not only or _names(name) & set(only)}
    return Comparison(settings, make_model(settings.model, settings.vocab_size), chosen, tree)


def _names(case: str) -> set[str]:
    """What chooses a case: its dotted name, its kind, its own name."""
    return {case, *case.split(".", 1)}
