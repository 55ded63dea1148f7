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
from research.checkpoint import restore_subtree
from research.config import Experiment, Stage, Tree, make_model
from research.data.tokenizer import Tokenizer, load_tokenizer
from research.errors import WorkdirError
from research.files import read_json, write_json_atomic
from research.loops.offline import run_offline
from research.loops.online import run_online
from research.loops.session import StageRun
from research.mesh import check_rows, make_mesh
from research.sources import Sources
from research.stages import StageDir
from research.state import abstract_state, state_shardings

TOKENIZER, EXPERIMENT = "tokenizer.model", "experiment.json"


@dataclasses.dataclass(frozen=True)
class Finished:
    """One finished stage.

    Attributes:
      stage: its resolved config.
      folder: where it is.
      result: what it left: metrics, budget, curve.
    """

    stage: Stage
    folder: StageDir
    result: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all stages of an experiment stand on.

    Attributes:
      sources: the data, opened.
      mesh: the devices.
      model: static model description, vocabulary included.
    """

    sources: Sources
    mesh: Mesh
    model: ModelConfig


def lay_ground(experiment: Experiment, workdir: Path) -> Ground:
    """Prepares the data, trains the tokenizer and checks that everything fits the devices, before any training.

    Prepared data are addressed by content and shared by all runs of a working directory.

    Raises:
      ConfigError: rows or the model do not divide over the mesh.
      DataError: a file or record cannot be used.
    """
    mesh = make_mesh(*experiment.mesh)
    check_rows(mesh, "evaluation.batch_problems", experiment.evaluation.batch_problems)
    for stage in experiment.stages:
        if stage.online:
            check_rows(mesh, f"{stage.name}.rollout.prompts_per_step", stage.rollout.prompts_per_step)
        key = "rollout.prompts_per_step" if stage.online else "batch_size"
        check_rows(mesh, f"{stage.name}.{key}", stage.rows, stage.micro_batches)
    sources = Sources(experiment.data, workdir / "data")
    model = experiment.model_config(sources.tokenizer.vocab_size)
    state_shardings(model, mesh)
    for stage in experiment.stages:
        sources.versions(_kinds(stage))
    return Ground(sources, mesh, model)


def run_chain(
    experiment: Experiment, workdir: Path, *, ground: Ground | None = None, label: str = ""
) -> list[Finished]:
    """Runs every stage of the experiment that is not finished yet, in order.

    Args:
      experiment: the resolved config.
      workdir: holds `stages/` and `data/`.
      ground: data, mesh and model, where the caller has laid them already.
      label: goes before the stage's name on the progress bar.
    """
    ground = ground or lay_ground(experiment, workdir)
    finished: list[Finished] = []
    with jax.set_mesh(ground.mesh):
        for stage in experiment.stages:
            folder = _open_folder(experiment, stage, workdir, ground, finished)
            result = folder.result()
            if result is None:
                before = finished[-1].folder if finished else None
                run = StageRun(
                    stage=stage,
                    folder=folder,
                    model=ground.model,
                    mesh=ground.mesh,
                    sources=ground.sources,
                    evaluation=experiment.evaluation,
                    start_from=partial(_load_params, before, ground) if before else None,
                    label=f"{label}{stage.name} ({stage.objective})",
                )
                with folder.running():
                    ground.sources.tokenizer.save(folder.path / TOKENIZER)
                    write_json_atomic(folder.path / EXPERIMENT, experiment.tree)
                    result = (run_online if stage.online else run_offline)(run)
            finished.append(Finished(stage, folder, result))
    return finished


def _load_params(folder: StageDir, ground: Ground) -> Params:
    """The last parameters of a finished stage, split over the mesh."""
    return restore_subtree(folder.checkpoints, abstract_state(ground.model, ground.mesh).params).arrays


@dataclasses.dataclass(frozen=True)
class Policy:
    """A trained model read back from a stage's folder, which holds all it takes.

    Attributes:
      params: its newest parameters.
      model: static model description.
      tokenizer: the one it was trained with.
      mesh: the devices it lies on.
      experiment: the config that it came from.
    """

    params: Params
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    experiment: Tree


def load_policy(folder: Path, mesh_shape: tuple[int, int, int] = (-1, 1, 1)) -> Policy:
    """Loads the newest parameters of a stage's folder.

    Raises:
      WorkdirError: the folder is not a stage's.
      CheckpointError: it holds no readable checkpoint.
    """
    for name in (EXPERIMENT, TOKENIZER):
        if not (folder / name).exists():
            raise WorkdirError(f"{folder}: is not the folder of a stage that has run, expected {name} in it")
    experiment = read_json(folder / EXPERIMENT)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    mesh = make_mesh(*mesh_shape)
    model = make_model(experiment["model"], tokenizer.vocab_size)
    params = restore_subtree(folder / "checkpoints", abstract_state(model, mesh).params).arrays
    return Policy(params, model, tokenizer, mesh, experiment)


def _open_folder(
    experiment: Experiment, stage: Stage, workdir: Path, ground: Ground, before: list[Finished]
) -> StageDir:
    """The stage's folder: named by what its result is made of, and nothing else."""
    identity: Tree = {
        "stage": stage.identity,
        "model": experiment.model,
        "mesh": dict(ground.mesh.shape),
        "data": ground.sources.versions(_kinds(stage)),
    }
    if stage.objective != "next_token":
        identity["evaluation"] = {
            "verifier": experiment.data["problems"]["verifier"],
            "problems": ground.sources.problems.version,
            **{key: value for key, value in experiment.tree["evaluation"].items() if key != "batch_problems"},
        }
    return StageDir.open(workdir, stage.name, identity, [done.folder.hash for done in before[-1:]])


def _kinds(stage: Stage) -> tuple[str, ...]:
    """Which data a stage reads."""
    if stage.objective == "next_token":
        text = ("text",) if stage.data.text_weight > 0 else ()
        return text + (("problems",) if stage.data.problems_weight > 0 else ())
    return ("preferences",) if stage.objective == "dpo" and not stage.online else ("problems",)
