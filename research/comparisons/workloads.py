"""From a comparison's config to workloads: what every system is told to do."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from models.config import ModelConfig
from research.config.experiment import make_model
from research.config.schema import key
from research.config.sections import COUNTER, Model
from research.config.tree import parse_section, unknown_key, with_overrides
from research.core.errors import ConfigError

FIRST_ID = 5
"""Ids below are left to padding and markup."""
LEARNING_RATE = 1e-3
_PEERS = "Systems that do the same work, besides Temper."


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for all cases."""

    platform: str = key("cpu", "Where the systems compute.", choices=("cpu", "gpu"))
    threads: int = key(2, "Cores of each system; on a CPU, Temper splits rows over one XLA device a core.", low=1)
    repetitions: int = key(5, "Timed runs of each system, in turn.", low=1)
    pause: float = key(0.3, "Between two runs.", unit="seconds", low=0)
    timeout: float = key(1800.0, "Of one run, compilation included.", unit="seconds", low=0.1)
    seed: int = key(0, "Of prompts, lengths and sampling.", low=0, high=COUNTER)
    vocab_size: int = key(4096, "Token ids.", low=16)
    cache_bucket: int = key(32, "Temper's KV cache grows by so many tokens.", unit="tokens", low=1)
    model: Model = Model()


class Workload(NamedTuple):
    """The same work for every system: what they are told is plain JSON."""

    name: str  # the case's dotted name, with the batch size where it varies
    peers: tuple[str, ...]  # who may take part besides Temper
    message: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RolloutCase:
    """Completions of `batches * batch_size` prompts of random tokens."""

    peers: tuple[str, ...] = key((), _PEERS)
    batch_sizes: tuple[int, ...] = key((64,), "Rows at a time, each a workload.", low=1, element=int)
    batches: int = key(1, "Batches that a repetition draws.", low=1)
    prompt_length: int = key(32, "Of every prompt.", unit="tokens", low=2)
    max_new_tokens: int = key(128, "Of every completion, or the longest.", unit="tokens", low=1)
    mean_new_tokens: int = key(
        0, "Mean of exponential lengths, cut at max_new_tokens; 0: all are as long.", unit="tokens", low=0
    )
    greedy: bool = key(False, "The likeliest token; else one is drawn at temperature 1.")

    def messages(self, settings: Settings) -> Iterator[dict[str, Any]]:
        """One for each batch size."""
        for size in self.batch_sizes:
            rng = np.random.default_rng(settings.seed)
            lengths = np.full(self.batches * size, self.max_new_tokens)
            if self.mean_new_tokens:
                drawn = np.ceil(rng.exponential(self.mean_new_tokens, len(lengths)))
                lengths = np.clip(drawn, 1, self.max_new_tokens).astype(int)
            prompts = rng.integers(FIRST_ID, settings.vocab_size, (len(lengths), self.prompt_length))
            yield {"prompts": prompts.tolist(), "lengths": lengths.tolist(), "batch_size": size}


@dataclasses.dataclass(frozen=True)
class TrainCase:
    """Optimizer steps on full rows of random tokens, or on examples of different lengths."""

    peers: tuple[str, ...] = key((), _PEERS)
    batch_size: int = key(16, "Rows.", low=1)
    length: int = key(256, "Of a row.", unit="tokens", low=4)
    steps: int = key(4, "In a repetition; with examples, as many as one pass takes.", low=1)
    examples: int = key(0, "Chat examples, which Temper packs; 0: full rows.", low=0)
    mean_length: int = key(180, "Of an example; a third of it is the standard deviation.", unit="tokens", low=4)

    def messages(self, settings: Settings) -> Iterator[dict[str, Any]]:
        """One; the loss is on the last two thirds of an example."""
        rng = np.random.default_rng(settings.seed)
        drawn = np.rint(rng.normal(self.mean_length, self.mean_length / 3, self.examples))
        examples = [
            {
                "tokens": rng.integers(FIRST_ID, settings.vocab_size, n).tolist(),
                "loss_mask": [0] * (n // 3) + [1] * (n - n // 3),
            }
            for n in np.clip(drawn, 4, self.length).astype(int).tolist()
        ]
        yield {"examples": examples}


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

    def messages(self, settings: Settings) -> Iterator[dict[str, Any]]:
        """One; its prompts are those of 32 iterations, because TRL wants a data set."""
        rng = np.random.default_rng(settings.seed)
        prompts = rng.integers(FIRST_ID, settings.vocab_size, (32 * self.prompts, self.prompt_length))
        yield {"prompts": prompts.tolist(), "batch_size": self.prompts}


KINDS: Mapping[str, type[RolloutCase | TrainCase | GRPOCase]]
KINDS = {"rollout": RolloutCase, "train": TrainCase, "grpo": GRPOCase}


class Comparison(NamedTuple):
    """A comparison, checked."""

    settings: Settings
    model: ModelConfig  # the decoder that all systems run
    workloads: Sequence[Workload]  # of all chosen cases
    tree: Mapping[str, Any]  # what the config says


def read_comparison(config: ConfigDict, overrides: Iterable[str] = (), only: Sequence[str] = ()) -> Comparison:
    """What a config and "dotted.key=value" overrides describe; `only` names cases or kinds, none is all.

    Raises:
      ConfigError: an unknown key, a value of another type or out of range, shapes that do not fit together.
    """
    plain = config.to_dict()
    tree, names = with_overrides(plain, overrides, "override")
    for name in names:
        kind, _, rest = name.partition(".")
        if kind in KINDS and rest.partition(".")[0] not in plain.get(kind, {}):
            raise unknown_key(name, [f"{kind}.{case}" for case in plain.get(kind, {})])
    settings = parse_section(Settings, tree, others=("question", *KINDS)).value
    model = make_model(settings.model, settings.vocab_size)
    found: dict[str, list[Workload]] = {}
    for kind, declared in KINDS.items():
        for short, given in tree.get(kind, {}).items():
            name = f"{kind}.{short}"
            case: Any = parse_section(declared, given, f"{name}.").value
            common = {**dataclasses.asdict(settings), "kind": kind, "learning_rate": LEARNING_RATE, **vars(case)}
            told = list(case.messages(settings))
            if not told:
                raise ConfigError(f"{name}.batch_sizes: got (), expected at least one")
            found[name] = [
                Workload(
                    f"{name}, batch {each['batch_size']}" if len(told) > 1 else name, case.peers, {**common, **each}
                )
                for each in told
            ]
    for name in only:
        if not any(name in _names(case) for case in found):
            raise ConfigError(f"--only: got {name!r}, expected some of {', '.join(found)}")
    chosen = [works for case, works in found.items() if not only or _names(case) & set(only)]
    return Comparison(settings, model, sum(chosen, []), tree)


def _names(case: str) -> set[str]:
    """What chooses a case: its dotted name, its kind, its own name."""
    return {case, *case.split(".", 1)}
