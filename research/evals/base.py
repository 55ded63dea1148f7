"""What evaluators are, and what they may do with a policy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from research.config.sections import Evaluation
from research.core.batch import PreferenceBatch, SequenceBatch
from research.data.records import Record, Records
from research.environments.turns import RowTurns
from research.tasks.base import Task

Need = Literal["answers", "rows", "pairs"]
"""What an evaluator reads: problems with answers that can be checked, rows of text or chat, pairs of preferences."""


@dataclass(frozen=True)
class Sample:
    """One completion of a prompt; T tokens.

    Attributes:
      text: what is judged: what follows the last message that it was given, without markup.
      prompt: ids of the prompt.
      tokens: [T] ids, what it was given included.
      drawn: [T] bool, False on tokens that it was given, such as a tool's result.
      logps: [T] log-probs under the plain model, nats; 0 where not drawn.
      stopped: False where it was cut: at its limit of tokens, or at a turn that was not answered.
      shown: as a person should read it: with markup, where an environment answered.
      turns: the episode, where an environment answered.
    """

    text: str
    prompt: np.ndarray
    tokens: np.ndarray
    drawn: np.ndarray
    logps: np.ndarray
    stopped: bool
    shown: str
    turns: RowTurns | None = None

    @property
    def length(self) -> int:
        """Tokens that the model drew, the stop token included."""
        return int(self.drawn.sum())


class Policy(Protocol):
    """What an evaluator may do with a trained policy."""

    @property
    def settings(self) -> Evaluation:
        """The config's `evaluation` section: problems, samples, k, temperature, lengths."""

    @property
    def task(self) -> Task:
        """Prompts, answers, extraction."""

    @property
    def final_answer(self) -> str:
        """How one answer is given to a problem: sample, majority, or the best of n by a scorer: reward, prm."""

    def held_out(self, limit: int = 0) -> Records:
        """The first records of the task that nothing was trained on; 0 is all."""

    def generate(
        self,
        records: Records,
        *,
        seed: int,
        samples: int | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> Sequence[Sequence[Sample]]:
        """Completions [P][n] of records; None is what the `evaluation` section says. Temperature 0 is greedy.

        A completion depends on (seed, the record's place, the sample's place) and on nothing else.
        """

    def correct(self, sample: Sample, record: Record) -> float | None:
        """The yardstick's verdict: 1 right, 0 wrong, None where it cannot be told."""

    def scores(self, groups: Sequence[Sequence[Sample]]) -> np.ndarray:
        """[P, n] scores by the scorer that `final_answer` names."""

    def rows(self) -> Iterator[SequenceBatch]:
        """Held-out rows of text or chat on the host; the last batch is filled up with rows of weight 0."""

    def pairs(self) -> Iterator[PreferenceBatch]:
        """Held-out pairs of preferences, likewise."""

    def logps(self, rows: SequenceBatch, *, reference: bool = False) -> np.ndarray:
        """[B, T] teacher-forced log-probs of a batch's targets, nats, by the policy or by its reference; else 0."""


class Evaluator(Protocol):
    """Measures a policy.

    A component of kind "evaluator" is a class of these, made without arguments or with its `key` fields.
    """

    def run(self, policy: Policy, seed: int) -> Iterator[tuple[str, np.ndarray]]:
        """Metric name and [N] values, one per example; the metric is their mean."""


@runtime_checkable
class Needing(Protocol):
    """An evaluator that says what it cannot do without."""

    needs: ClassVar[frozenset[Need]]
