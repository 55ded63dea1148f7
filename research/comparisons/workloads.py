"""From a comparison's config to workloads: what every system is told to do, and what a token of it costs at least."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from models.config import ModelConfig
from research.comparisons.roofline import (
    Cost,
    decode_step_bytes,
    forward_flops,
    grpo_cost,
    parameter_bytes,
    rollout_cost,
)
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
    """The same work for every system.

    Attributes:
      name: the case's dotted name, with the batch size where it varies.
      peers: which may take part besides Temper.
      batch_size: rows at a time.
      message: what the systems are told, besides the settings; plain JSON.
      cost: the least that a useful token costs.
      read_bytes: what one pass over memory reads: the size at which the bandwidth is measured.
      curve: the case, where this is a point of a plot over batch sizes.
    """

    name: str
    peers: tuple[str, ...]
    batch_size: int
    message: dict[str, Any]
    cost: Cost
    read_bytes: float
    curve: str = ""


@dataclasses.dataclass(frozen=True)
class RolloutCase:
    """Completions of `batches * batch_size` prompts of random tokens."""

    peers: tuple[str, ...] = key((), _PEERS)
    batch_sizes: tuple[int, ...] = key((64,), "Rows at a time; several make a curve.", low=1, element=int)
    batches: int = key(1, "Batches that a repetition draws.", low=1)
    prompt_length: int = key(32, "Of every prompt.", unit="tokens", low=2)
    max_new_tokens: int = key(128, "Of every completion, or the longest.", unit="tokens", low=1)
    mean_new_tokens: int = key(
        0, "Mean of exponential lengths, cut at max_new_tokens; 0: all are as long.", unit="tokens", low=0
    )
    greedy: bool = key(False, "The likeliest token; else one is drawn at temperature 1.")

    def workloads(self, name: str, settings: Settings, model: ModelConfig) -> Iterator[Workload]:
        """One for each batch size."""
        several = len(self.batch_sizes) > 1
        for size in self.batch_sizes:
            rng = np.random.default_rng(settings.seed)
            lengths = np.full(self.batches * size, self.max_new_tokens)
            if self.mean_new_tokens:
                drawn = np.ceil(rng.exponential(self.mean_new_tokens, len(lengths)))
                lengths = np.clip(drawn, 1, self.max_new_tokens).astype(int)
            prompts = rng.integers(FIRST_ID, settings.vocab_size, (len(lengths), self.prompt_length))
            message = {"prompts": prompts.tolist(), "lengths": lengths.tolist(), "batch_size": size}
            yield Workload(
                f"{name}, batch {size}" if several else name,
                self.peers,
                size,
                {**message, "max_new_tokens": self.max_new_tokens, "greedy": self.greedy},
                rollout_cost(model, self.prompt_length, lengths, size),
                decode_step_bytes(model, size, self.prompt_length + float(lengths.mean()) / 2),
                curve=name if several else "",
            )


@dataclasses.dataclass(frozen=True)
class TrainCase:
    """Optimizer steps on full rows of random tokens, or on examples of different lengths."""

    peers: tuple[str, ...] = key((), _PEERS)
    batch_size: int = key(16, "Rows.", low=1)
    length: int = key(256, "Of a row.", unit="tokens", low=4)
    steps: int = key(4, "In a repetition; with examples, as many as one pass takes.", low=1)
    examples: int = key(0, "Chat examples, which Temper packs; 0: full rows.", low=0)
    mean_length: int = key(180, "Of an example; a third of it is the standard deviation.", unit="tokens", low=4)

    def workloads(self, name: str, settings: Settings, model: ModelConfig) -> Iterator[Workload]:
        """One."""
        rng = np.random.default_rng(settings.seed)
        drawn = np.rint(rng.normal(self.mean_length, self.mean_length / 3, self.examples))
        lengths = np.clip(drawn, 4, self.length).astype(int).tolist()
        examples = [  # the loss is on the last two thirds
            {
                "tokens": rng.integers(FIRST_ID, settings.vocab_size, n).tolist(),
                "loss_mask": [0] * (n // 3) + [1] * (n - n // 3),
            }
            for n in lengths
        ]
        message = {"batch_size": self.batch_size, "length": self.length, "steps": self.steps}
        yield Workload(
            name,
            self.peers,
            self.batch_size,
            {**message, "examples": examples, "learning_rate": LEARNING_RATE},
            Cost(3 * forward_flops(model, lengths or [self.length])),
            parameter_bytes(model),
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

    def workloads(self, name: str, settings: Settings, model: ModelConfig) -> Iterator[Workload]:
        """One; its prompts are those of 32 iterations, because TRL wants a data set."""
        rng, rows = np.random.default_rng(settings.seed), self.prompts * self.group_size
        prompts = rng.integers(FIRST_ID, settings.vocab_size, (32 * self.prompts, self.prompt_length))
        yield Workload(
            name,
            self.peers,
            rows,
            {
                "prompts": prompts.tolist(),
                "batch_size": self.prompts,
                "group_size": self.group_size,
                "max_new_tokens": self.max_new_tokens,
                "iterations": self.iterations,
                "beta": self.beta,
                "learning_rate": LEARNING_RATE,
            },
            grpo_cost(model, self.prompt_length, self.max_new_tokens, self.prompts, self.group_size),
            decode_step_bytes(model, rows, self.prompt_length + self.max_new_tokens / 2),
        )


KINDS: Mapping[str, type[RolloutCase | TrainCase | GRPOCase]] = {
    "rollout": RolloutCase,
    "train": TrainCase,
    "grpo": GRPOCase,
}


class Comparison(NamedTuple):
    """A comparison, checked.

    Attributes:
      settings: what holds for all cases.
      model: the decoder that all systems run.
      workloads: of all chosen cases.
      tree: what the config says.
    """

    settings: Settings
    model: ModelConfig
    workloads: Sequence[Workload]
    tree: Mapping[str, Any]


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
        for name, given in tree.get(kind, {}).items():
            case = parse_section(declared, given, f"{kind}.{name}.").value
            common = {**dataclasses.asdict(settings), "kind": kind}
            works = case.workloads(f"{kind}.{name}", settings, model)
            found[f"{kind}.{name}"] = [w._replace(message={**common, **w.message}) for w in works]
            if not found[f"{kind}.{name}"]:
                raise ConfigError(f"{kind}.{name}.batch_sizes: got (), expected at least one")
    for name in only:
        if not any(name in _names(case) for case in found):
            raise ConfigError(f"--only: got {name!r}, expected some of {', '.join(found)}")
    chosen = [works for case, works in found.items() if not only or _names(case) & set(only)]
    return Comparison(settings, model, sum(chosen, []), tree)


def _names(case: str) -> set[str]:
    """What chooses a case: its dotted name, its kind, its own name."""
    return {case, *case.split(".", 1)}
