"""A chain of stages, each addressed by content: finished ones are read, unfinished ones go on, new ones start."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from models.config import ModelConfig
from models.transformer import Params
from research.algorithms.base import Algorithm
from research.config.experiment import Experiment, Stage
from research.config.identity import evaluation_identity, stage_identity
from research.config.resolve import resolve_tree
from research.config.tree import Tree, to_json
from research.core.checkpoint import restore_subtree
from research.core.errors import ConfigError, WorkdirError
from research.core.files import read_json, write_json_atomic
from research.core.mesh import check_rows, make_mesh
from research.core.network import Network
from research.core.stages import StageDir
from research.core.state import abstract_params, policy_of
from research.data.tokenizer import Tokenizer, load_tokenizer
from research.environments.interaction import Interaction, make_interaction
from research.rewards.base import RewardFunction
from research.rewards.builtin import correct
from research.tasks.sources import Sources
from research.train.build import build, context_ids
from research.train.check_data import check_data
from research.train.offline import run_offline
from research.train.online import run_online
from research.train.session import StageResult, StageRun

TOKENIZER, EXPERIMENT = "tokenizer.model", "experiment.json"


@dataclasses.dataclass(frozen=True)
class Finished:
    """One finished stage.

    Attributes:
      stage: its resolved config.
      folder: where it is.
      result: what it left: metrics, budget, curve.
      reused: whether it was read from disk, and not run.
    """

    stage: Stage
    folder: StageDir
    result: Mapping[str, Any]
    reused: bool = False


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all stages of an experiment stand on.

    Attributes:
      sources: the data, opened.
      mesh: the devices.
      models: static model descriptions by section, vocabulary included.
      yardstick: what says whether a completion is right: `evaluation.correct`, or the task's own.
      interaction: what answers policies while they are sampled, if anything.
    """

    sources: Sources
    mesh: Mesh
    models: Mapping[str, ModelConfig]
    yardstick: RewardFunction
    interaction: Interaction | None = None


def lay_ground(experiment: Experiment, workdir: Path) -> Ground:
    """Prepares the data, trains the tokenizer and checks that everything fits the devices, before any training.

    Prepared data are addressed by content and shared by all runs of a working directory.

    Raises:
      ConfigError: rows or the model do not divide over the mesh.
      DataError: a file or record cannot be used.
    """
    sizes = experiment.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    check_rows(mesh, "evaluation.batch_problems", experiment.evaluation.batch_problems)
    for stage in experiment.stages:
        if stage.online:
            how, key = stage.rollout, f"{stage.name}.rollout.prompts_per_step"
            check_rows(mesh, key, how.prompts_per_step, minibatches=how.minibatches)
            check_rows(mesh, key, stage.rows, stage.micro_batches, how.minibatches)
        else:
            check_rows(mesh, f"{stage.name}.batch_size", stage.rows, stage.micro_batches)
    sources = Sources.of(experiment, workdir / "data")
    models = {name: experiment.model_config(sources.tokenizer.vocab_size, name) for name in experiment.models}
    for model in models.values():
        abstract_params(model, mesh)
    for stage in experiment.stages:
        sources.versions(_kinds(stage))
        try:
            build(stage, sources.tokenizer)[0].check_model(models[stage.model])
        except ValueError as error:
            raise ConfigError(f"{stage.name}.objective.{stage.objective.name}.{error}") from error
        _check_context(experiment, stage, sources.tokenizer)
    interaction = interaction_of(experiment.tree["tools"], sources.tokenizer)
    check_data(experiment, sources, interaction)
    yardstick = experiment.parsed["evaluation"].chosen["correct"]
    return Ground(sources, mesh, models, yardstick[0].make() if yardstick else correct, interaction)


def interaction_of(section: Tree, tokenizer: Tokenizer) -> Interaction | None:
    """What the `tools` section of a config names."""
    return make_interaction(
        section["names"],
        {name: options for name, options in section.items() if isinstance(options, Mapping)},
        tokenizer,
        max_turns=section["max_turns"],
        max_result_tokens=section["max_result_tokens"],
        environment=section["environment"],
    )


def _check_context(experiment: Experiment, stage: Stage, tokenizer: Tokenizer) -> None:
    """A teacher must be able to read its longer rows."""
    if "teacher" not in stage.facts.roles:
        return
    how, extra = stage.rollout, len(context_ids(stage.data.context, tokenizer))
    rows = how.max_prompt_length + how.max_new_tokens if stage.online else stage.length
    teacher = next(other for other in experiment.stages if other.name == stage.roles.teacher)
    limit = experiment.models[teacher.model].max_length
    if rows + extra > limit:
        raise ConfigError(
            f"{stage.name}.data.context: got {extra} tokens before rows of {rows}, expected at most "
            f"{teacher.model}.max_length={limit} together"
        )


def run_chain(
    experiment: Experiment,
    workdir: Path,
    *,
    until: str = "",
    ground: Ground | None = None,
    label: str = "",
) -> list[Finished]:
    """Runs every stage of the experiment that is not finished yet, in order.

    Args:
      experiment: the resolved config.
      until: only this stage and those whose results it needs; "" runs all.
      workdir: holds `stages/` and `data/`.
      ground: data, mesh and model, where the caller has laid them already.
      label: goes before the stage's name on the progress bar.
    """
    ground = ground or lay_ground(experiment, workdir)
    finished: dict[str, Finished] = {}
    with jax.set_mesh(ground.mesh):
        for stage in experiment.until(until) if until else experiment.stages:
            folder = _open_folder(experiment, stage, workdir, ground, finished)
            result = folder.result()
            reused = result is not None
            if result is None:
                run = StageRun(
                    stage=stage,
                    folder=folder,
                    model=ground.models[stage.model],
                    mesh=ground.mesh,
                    sources=ground.sources,
                    evaluation=experiment.evaluation,
                    sampler=experiment.sampler,
                    result_of=partial(_load_result, dict(finished), ground),
                    label=f"{label}{stage.name} ({stage.objective.name})",
                    yardstick=ground.yardstick,
                    interaction=ground.interaction,
                )
                with folder.running():
                    ground.sources.tokenizer.save(folder.path / TOKENIZER)
                    write_json_atomic(folder.path / EXPERIMENT, {"stage": stage.name, **experiment.tree})
                    result = (run_online if stage.online else run_offline)(run)
            finished[stage.name] = Finished(stage, folder, result, reused)
    return list(finished.values())


def _load_result(finished: Mapping[str, Finished], ground: Ground, name: str) -> StageResult:
    """What a finished stage has trained, split over the mesh."""
    done = finished[name]
    model, layout = ground.models[done.stage.model], done.stage.facts.trains
    params = restore_subtree(done.folder.checkpoints, abstract_params(model, ground.mesh, layout)).arrays
    return StageResult(Network(params, model), layout)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A trained model read back from a stage's folder, which holds all it takes.

    Attributes:
      params: its newest parameters.
      model: static model description.
      tokenizer: the one it was trained with.
      mesh: the devices it lies on.
      experiment: the config that it came from.
      max_length: tokens that the model can read at most, prompt and completion together.
    """

    params: Params
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    experiment: Tree
    max_length: int


@dataclasses.dataclass(frozen=True)
class TrainedStage:
    """What a stage's folder says of what it has trained; the parameters are read when asked for.

    Attributes:
      folder: <workdir>/stages/<name>-<hash>.
      name: the stage's.
      experiment: the config that it came from.
      algorithm: what trained it; its layout says what the parameters are.
      model: static model description.
      tokenizer: the one it was trained with.
      max_length: tokens that the model can read at most.
    """

    folder: Path
    name: str
    experiment: Tree
    algorithm: Algorithm
    model: ModelConfig
    tokenizer: Tokenizer
    max_length: int

    def params(self, mesh: Mesh) -> Params:
        """The newest parameters, split over the mesh; CheckpointError if there are none that can be read."""
        params = abstract_params(self.model, mesh, self.algorithm.layout)
        return restore_subtree(self.folder / "checkpoints", params).arrays


def load_stage(folder: Path) -> TrainedStage:
    """Reads a stage's folder but for its parameters.

    Raises:
      WorkdirError: the folder is not a stage's.
      DataError: its tokenizer cannot be read.
    """
    for name in (EXPERIMENT, TOKENIZER):
        if not (folder / name).exists():
            raise WorkdirError(f"{folder}: is not the folder of a stage that has run, expected {name} in it")
    tree = read_json(folder / EXPERIMENT)
    name = tree.pop("stage")
    tokenizer = load_tokenizer(folder / TOKENIZER)
    experiment = resolve_tree(tree)
    stage = experiment.stage(name)
    return TrainedStage(
        folder=folder,
        name=name,
        experiment=tree,
        algorithm=stage.objective.static(stage.options, False, 2, 1),
        model=experiment.model_config(tokenizer.vocab_size, stage.model),
        tokenizer=tokenizer,
        max_length=experiment.models[stage.model].max_length,
    )


def load_policy(folder: Path, mesh: Mesh | None = None) -> Policy:
    """Loads the newest parameters of a policy's stage; without a mesh, all devices are replicas.

    Raises:
      WorkdirError: the folder is not a stage's, or holds no policy.
      CheckpointError: it holds no readable checkpoint.
    """
    stage = load_stage(folder)
    layout = stage.algorithm.layout
    if layout not in ("policy", "actor_critic"):
        raise WorkdirError(f"{folder}: holds a {layout}, expected a policy, which can be sampled")
    mesh = mesh or make_mesh(-1, 1, 1)
    params = policy_of(stage.params(mesh), layout)
    return Policy(params, stage.model, stage.tokenizer, mesh, stage.experiment, stage.max_length)


def _open_folder(
    experiment: Experiment, stage: Stage, workdir: Path, ground: Ground, finished: Mapping[str, Finished]
) -> StageDir:
    """The stage's folder: named by what its result is made of, and nothing else."""
    identity: Tree = {**stage_identity(experiment, stage), "data": ground.sources.versions(_kinds(stage))}
    if ground.interaction is not None and "tools" in identity:
        identity["tools"] = ground.interaction.version
    if stage.samples:
        identity["evaluation"] = evaluation_identity(experiment, stage)
        identity["problems"] = ground.sources.problems.version
    return StageDir.open(
        workdir, stage.name, to_json(identity), [finished[name].folder.hash for name in stage.inputs]
    )


def _kinds(stage: Stage) -> tuple[str, ...]:
    """Which data a stage reads."""
    kind = stage.objective.given
    if stage.online or kind is None or kind == "chat":
        return ("problems",)
    if kind != "text":
        return (kind,)
    text = ("text",) if stage.data.text_weight > 0 else ()
    return text + (("problems",) if stage.data.problems_weight > 0 else ())
