"""Stages that are on disk: their folders hold all it takes to use what they have trained."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from models.config import ModelConfig
from models.transformer import Params
from objectives.prm import StepReduction
from research.algorithms.base import Algorithm
from research.algorithms.prm import StepScorer
from research.config.experiment import Experiment, Stage
from research.config.identity import model_identity
from research.config.resolve import resolve_tree
from research.core.checkpoint import restore_subtree
from research.core.errors import ConfigError, TemperError, WorkdirError
from research.core.files import read_json
from research.core.mesh import make_mesh
from research.core.network import Network
from research.core.stages import StageDir, describe_difference
from research.core.state import Layout, abstract_params, policy_of
from research.data.tokenizer import Tokenizer, load_tokenizer
from research.evals.scorers import Kind, Scorer

TOKENIZER, EXPERIMENT = "tokenizer.model", "experiment.json"


class StageResult(NamedTuple):
    """What a finished stage has trained."""

    network: Network
    layout: Layout

    @property
    def policy(self) -> Network:
        """The policy in it."""
        return self.network.replace(params=policy_of(self.network.params, self.layout))


@dataclasses.dataclass(frozen=True)
class TrainedStage:
    """What a stage's folder says of what it has trained; the parameters are read when asked for."""

    folder: Path  # <workdir>/stages/<name>-<hash>
    stage: Stage
    experiment: Experiment  # the config that it came from
    algorithm: Algorithm  # what trained it; its layout says what the parameters are
    model: ModelConfig
    tokenizer: Tokenizer  # the one it was trained with

    @property
    def name(self) -> str:
        """The stage's."""
        return self.stage.name

    @property
    def max_length(self) -> int:
        """Tokens that the model can read at most, prompt and completion together."""
        return self.experiment.models[self.stage.model].max_length

    def read_params(self, mesh: Mesh) -> Params:
        """The newest parameters, split over the mesh; CheckpointError if there are none that can be read."""
        return self.result(mesh).network.params

    def result(self, mesh: Mesh) -> StageResult:
        """What it has trained, for a stage that reads it."""
        return read_result(self.folder / "checkpoints", self.model, mesh, self.algorithm.layout)

    def scorer(self, tokenizer: Tokenizer, mesh: Mesh, *, length: int, reductions: tuple[StepReduction, ...]) -> Scorer:
        """Its newest parameters as a scorer of the completions of a policy.

        Raises:
          ConfigError: it reads another vocabulary than the policy's tokenizer, or rows shorter than `length` tokens.
          WorkdirError, CheckpointError: it is no scorer, or its parameters cannot be read.
        """
        layout = self.algorithm.layout
        if layout not in ("scorer", "step_scorer"):
            raise WorkdirError(
                f"{self.folder}: holds a {layout}, expected a reward model, an outcome scorer or a process scorer"
            )
        if self.tokenizer.model != tokenizer.model:
            raise ConfigError(f"{self.folder}: has another tokenizer than the policy, expected the same for both")
        if length > self.max_length:
            raise ConfigError(
                f"{self.folder}: reads at most {self.max_length} tokens, expected {length}: prompt and completion"
            )
        kind: Kind = self.algorithm.supervision if isinstance(self.algorithm, StepScorer) else "reward"
        return Scorer(self.name, kind, self.result(mesh).network, tokenizer, mesh, reductions)

    def check_same(self, key: str, experiment: Experiment, model: str, tokenizer: Tokenizer) -> None:
        """Refuses, naming the config's `key`, another tokenizer or, where `model` is given, another model."""
        if self.tokenizer.sha256 != tokenizer.sha256:
            raise ConfigError(
                f"{key}: {self.folder} was trained with another tokenizer, expected this one's; "
                f"data.tokenizer.path={self.folder / TOKENIZER} uses that one"
            )
        if not model:
            return
        there, here = model_identity(self.experiment, self.stage.model), model_identity(experiment, model)
        difference = describe_difference(there, here)
        if difference is not None:
            raise ConfigError(f"{key}: {self.folder} was trained with another model: {model}.{difference}")


@dataclasses.dataclass(frozen=True)
class Policy(TrainedStage):
    """A trained model read back from a stage's folder: its newest parameters, and the devices they lie on."""

    params: Params
    mesh: Mesh


def read_result(checkpoints: Path, model: ModelConfig, mesh: Mesh, layout: Layout) -> StageResult:
    """What the newest checkpoint holds, split over the mesh: fresh buffers at every call."""
    params = restore_subtree(checkpoints, abstract_params(model, mesh, layout)).arrays
    return StageResult(Network(params, model), layout)


def load_stage(folder: Path) -> TrainedStage:
    """Reads a stage's folder but for its parameters.

    Raises:
      WorkdirError: the folder is not a stage's, or another version of Temper has written it.
      DataError: its tokenizer cannot be read.
    """
    for name in (EXPERIMENT, TOKENIZER):
        if not (folder / name).exists():
            raise WorkdirError(f"{folder}: is not the folder of a stage that has run, expected {name} in it")
    place = folder / EXPERIMENT
    found: Any = read_json(place)
    if not isinstance(found, dict) or not isinstance(found.get("stage"), str):
        raise WorkdirError(f"{place}: expected an experiment's keys, and the stage's name under 'stage'")
    try:
        experiment = resolve_tree({key: value for key, value in found.items() if key != "stage"})
        if found["stage"] not in experiment.names:
            raise ConfigError(f"stage: got {found['stage']!r}, expected one of {', '.join(experiment.names)}")
    except TemperError as error:
        raise WorkdirError(
            f"{place}: cannot be used: {error} (another version of Temper may have written it)"
        ) from error
    stage = experiment.stage(found["stage"])
    tokenizer = load_tokenizer(folder / TOKENIZER)
    algorithm = stage.objective.static(stage.options, False, 2, 1)
    model = experiment.model_config(tokenizer.vocab_size, stage.model)
    return TrainedStage(folder, stage, experiment, algorithm, model, tokenizer)


def load_finished(folder: Path, key: str) -> TrainedStage:
    """The stage of a folder that a config's `key` names; ConfigError if it is none, or not finished."""
    try:
        if StageDir.at(folder).result() is None:
            raise ConfigError(f"{key}: got {folder}, which is not finished (it has no done.json)")
        return load_stage(folder)
    except WorkdirError as error:
        raise ConfigError(f"{key}: {error}") from error


def load_policy(folder: Path, mesh: Mesh | None = None) -> Policy:
    """Loads the newest parameters of a policy's stage; without a mesh, all devices are replicas.

    Raises:
      WorkdirError: the folder is not a stage's, or holds no policy.
      CheckpointError: it holds no readable checkpoint.
    """
    stage, mesh = load_stage(folder), mesh or make_mesh(-1, 1, 1)
    if (layout := stage.algorithm.layout) not in ("policy", "actor_critic"):
        raise WorkdirError(f"{folder}: holds a {layout}, expected a policy, which can be sampled")
    return Policy(**vars(stage), params=stage.result(mesh).policy.params, mesh=mesh)
