"""A trained policy as evaluators see it: in a stage's own run, in its final evaluation, and in the launchers."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from rich import print as show

from models.config import ModelConfig
from models.transformer import Params
from research.config.sections import Evaluation, Sampler
from research.core.batch import PreferenceBatch, SequenceBatch
from research.core.errors import ConfigError
from research.core.mesh import to_device
from research.core.network import Network, batch_logps
from research.core.progress import Progress
from research.data.examples import prompt_examples
from research.data.pipelines import prompt_batches
from research.data.records import Record, Records, Selected, first_records
from research.data.report import Limits
from research.data.tokenizer import Tokenizer
from research.environments.interaction import Interaction
from research.environments.turns import RowTurns
from research.evals.scorers import score_samples
from research.rewards.base import Dialogue, RewardContext, RewardFunction, WeightedReward, score
from research.rewards.base import Sample as Judged
from research.rewards.builtin import correct as task_correct
from research.sampling.decoded import Decoded, sample_prompts, sampler_spec
from research.sampling.methods import SamplingMethod
from research.sampling.types import make_scalars
from research.tasks.base import Task

Arrays = Mapping[str, np.ndarray]
Score = Callable[[SequenceBatch], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion of a prompt; T tokens."""

    text: str  # what is judged: what follows the last message that it was given, without markup
    prompt: np.ndarray  # ids of the prompt
    tokens: np.ndarray  # [T] ids, what it was given included
    drawn: np.ndarray  # [T] bool, False on tokens that it was given, such as a tool's result
    logps: np.ndarray  # [T] log-probs under the plain model, nats; 0 where not drawn
    stopped: bool  # False where it was cut: at its limit of tokens, or at a turn that was not answered
    shown: str  # as a person should read it: with markup, where an environment answered
    turns: RowTurns | None = None  # the episode, where an environment answered

    @property
    def length(self) -> int:
        """Tokens that the model drew, the stop token included."""
        return int(self.drawn.sum())

    @property
    def calls(self) -> tuple[tuple[str, str], ...]:
        """Of each tool call, the tool and "ok" or what went wrong."""
        return self.turns.calls if self.turns else ()


@dataclasses.dataclass(frozen=True)
class TrainedPolicy:
    """A trained policy; its methods must run inside `jax.set_mesh(mesh)`."""

    params: Params
    model: ModelConfig
    mesh: Mesh
    tokenizer: Tokenizer
    sampler: Sampler
    settings: Evaluation  # the config's `evaluation` section: problems, samples, k, temperature, lengths
    task: Task  # of the records: prompts, answers, extraction
    records: Records  # held-out ones
    interaction: Interaction | None = None  # what answers it while it is sampled, if anything
    limits: Limits = Limits()  # what happens to records whose prompt is longer than `settings.max_prompt_length`
    # says whether a completion is right (1 or more); the default asks the task
    yardstick: RewardFunction = task_correct
    # how one answer is given to a problem: sample, majority, or the best of n by a scorer: reward, prm
    final_answer: str = "sample"
    scorer: Score | None = None  # chooses among samples, where `final_answer` says so: rows on the host -> [B] scores
    reference: Callable[[], Network] | None = None  # what implicit rewards are relative to
    # pipelines of held-out rows and pairs, one ordered pass each
    row_arrays: Callable[[], Iterable[Arrays]] | None = None
    pair_arrays: Callable[[], Iterable[Arrays]] | None = None
    between: Callable[[], None] = lambda: None  # called between two batches; may raise to stop
    # the completions drawn so far, so that evaluators which ask for the same ones share them
    drawn: dict[str, list[list[Sample]]] = dataclasses.field(default_factory=dict)
    errors: list[str] = dataclasses.field(default_factory=list)  # what the yardstick raised; it could not tell then

    def held_out(self, limit: int = 0) -> Records:
        """The first records of the task that nothing was trained on; 0 is all."""
        return first_records(self._fitting, limit)

    @cached_property
    def _fitting(self) -> Records:
        """Those whose prompts are used; says how many are not."""
        length = self.settings.max_prompt_length
        prompts = prompt_examples(
            self._prompts(self.records), self.tokenizer, length=length, name="evaluation", limits=self.limits
        )
        if prompts.report.dropped or prompts.report.changed:
            show(prompts.report.line())
        return Selected(self.records, [int(index) for index in prompts.record_ids])

    def _prompts(self, records: Records) -> Records:
        return records if self.interaction is None else self.interaction.prompts(records)

    def generate(
        self,
        records: Records,
        *,
        seed: int,
        samples: int | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> list[list[Sample]]:
        """Completions [P][n] of records; None is what the `evaluation` section says. Temperature 0 is greedy.

        A completion depends on (seed, the record's place, the sample's place) and on nothing else. DataError for a
        prompt that is too long.
        """
        how = self.settings
        n = how.samples if samples is None else samples
        heat = how.temperature if temperature is None else temperature
        longest = how.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not len(records):
            raise ConfigError("evaluation: there are no held-out problems, expected at least one")
        content = json.dumps([list(records), seed, n, heat, longest], sort_keys=True, default=str)
        key = hashlib.sha256(content.encode()).hexdigest()
        if key not in self.drawn:
            self.drawn[key] = self._generate(records, seed, n, heat, longest)
        return self.drawn[key]

    def _generate(
        self, records: Records, seed: int, samples: int, temperature: float, max_new_tokens: int
    ) -> list[list[Sample]]:
        batches = prompt_batches(
            self._prompts(records),
            self.tokenizer,
            prompts_per_batch=self.settings.batch_problems,
            max_prompt_length=self.settings.max_prompt_length,
            seed=None,
            limits=Limits("truncate" if self.limits.too_long == "truncate" else "error"),
        )
        spec = sampler_spec(
            self.tokenizer,
            self.sampler,
            samples=samples,
            max_new_tokens=max_new_tokens,
            method=SamplingMethod(greedy=temperature == 0),
            interactive=self.interaction is not None,
        )
        scalars = make_scalars(seed=seed, temperature=temperature)
        groups: list[list[Sample]] = []
        with Progress(f"sampling {samples} each", len(records), "problems") as progress:
            for prompts in batches:
                self.between()
                out = sample_prompts(
                    self.params,
                    prompts,
                    scalars,
                    model=self.model,
                    spec=spec,
                    mesh=self.mesh,
                    tokenizer=self.tokenizer,
                    interaction=self.interaction,
                    records=records,
                )
                drawn = [_sample(prompts, row // samples, out, row) for row in range(len(out.texts))]
                real = int((prompts["prompt_id"] >= 0).sum())  # what fills the last batch comes last
                groups += [drawn[place * samples : (place + 1) * samples] for place in range(real)]
                progress.advance(real, tokens=int(out.arrays.lengths.sum()))
        return groups

    def correct(self, sample: Sample, record: Record) -> float | None:
        """The yardstick's verdict: 1 right, 0 wrong, None where it cannot be told; what was cut is wrong."""
        if not sample.stopped:
            return 0.0
        turns = None if sample.turns is None else Dialogue(sample.shown, sample.turns.calls, sample.turns.reward)
        prompt = self.task.prompt(record)
        context = RewardContext(self.task, prompt, sample.length, sample.stopped, self.settings.seed, turns)
        judged = score([Judged(sample.text, record, context, 0)], [WeightedReward("correct", self.yardstick)])
        self.errors.extend(error.error for error in judged.errors)
        verdict = float(judged.values["correct"][0])
        return None if math.isnan(verdict) else verdict

    def scores(self, groups: Sequence[Sequence[Sample]]) -> np.ndarray:
        """[P, n] scores by the scorer that `final_answer` names."""
        if self.scorer is None:
            raise ConfigError(f"final_answer: got {self.final_answer}, expected a scorer for it")
        return self.scored(self.scorer, groups)

    def scored(self, score: Score, groups: Sequence[Sequence[Sample]]) -> np.ndarray:
        """[..., P, n] scores by any scorer."""
        return score_samples(
            score,
            [group[0].prompt for group in groups],
            [[(sample.tokens, sample.drawn) for sample in group] for group in groups],
            max_prompt_length=self.settings.max_prompt_length,
            max_new_tokens=max(self.settings.max_new_tokens, *(len(s.tokens) for g in groups for s in g)),
            pad_id=self.tokenizer.pad_id,
            mesh=self.mesh,
        )

    def rows(self) -> Iterator[SequenceBatch]:
        """Held-out rows of text or chat on the host; the last batch is filled up with rows of weight 0."""
        for arrays in self._passed(self.row_arrays, "validation_loss: there are no held-out rows of text or chat"):
            yield SequenceBatch.from_arrays(arrays)

    def pairs(self) -> Iterator[PreferenceBatch]:
        """Held-out pairs of preferences, likewise."""
        for arrays in self._passed(self.pair_arrays, "preference_accuracy: there are no held-out pairs"):
            sides = {side: SequenceBatch.from_arrays(arrays, f"{side}_") for side in ("chosen", "rejected")}
            yield PreferenceBatch(**sides, margins=arrays["margins"], soft_labels=arrays["soft_labels"])

    def _passed(self, pipeline: Callable[[], Iterable[Arrays]] | None, missing: str) -> Iterator[Arrays]:
        if pipeline is None:
            raise ConfigError(missing)
        for arrays in pipeline():
            self.between()
            yield arrays

    def logps(self, rows: SequenceBatch, *, reference: bool = False) -> np.ndarray:
        """[B, T] teacher-forced log-probs of a batch's targets, nats, by the policy or by its reference; else 0."""
        network = Network(self.params, self.model)
        if reference:
            if self.reference is None:
                raise ConfigError("preference_accuracy: there is no reference to compare with")
            network = self.reference()
        return np.asarray(jax.device_get(_logps(network, to_device(self.mesh, rows))), np.float32)


@jax.jit
def _logps(network: Network, rows: SequenceBatch) -> Array:
    return batch_logps(network, rows).logps


def _sample(prompts: Arrays, place: int, out: Decoded, row: int) -> Sample:
    length = int(out.arrays.lengths[row])
    return Sample(
        text=out.texts[row],
        prompt=prompts["prompt_tokens"][place][prompts["prompt_mask"][place]],
        tokens=out.arrays.tokens[row, :length],
        drawn=out.arrays.mask[row, :length],
        logps=out.arrays.policy_logps[row, :length],
        stopped=bool(out.stopped[row]),
        shown=out.shown[row],
        turns=out.turns[row] if out.turns else None,
    )
