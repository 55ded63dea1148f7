"""A chain of stages, each addressed by content: finished ones are read, unfinished ones go on, new ones start."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from models.config import ModelConfig
from models.transformer import Params
from research.checkpoint import restore_subtree
from research.config import Experiment, Stage, make_model
from research.data.tokenizer import Tokenizer, load_tokenizer
from research.errors import WorkdirError
from research.files import read_json
from research.loops.offline import run_offline
from research.loops.online import run_online
from research.loops.session import StageRun
from research.mesh import make_mesh
from research.sources import Sources
from research.stages import StageDir
from research.state import abstract_state

TOKENIZER = "tokenizer.model"


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


def open_sources(experiment: Experiment, workdir: Path) -> Sources:
    """The experiment's data; prepared data sets are shared by all runs of a working directory."""
    return Sources(experiment.data, workdir / "data")


def run_chain(
    experiment: Experiment, workdir: Path, *, sources: Sources | None = None, label: str = ""
) -> list[Finished]:
    """Runs every stage of the experiment that is not finished yet, in order.

    Args:
      experiment: the resolved config.
      workdir: holds `stages/` and `data/`.
      sources: the data, where the caller has opened them already.
      label: goes before the stage's name on the progress bar.
    """
    sources = sources or open_sources(experiment, workdir)
    mesh = make_mesh(*experiment.mesh)
    model = experiment.model_config(sources.tokenizer.vocab_size)
    finished: list[Finished] = []
    with jax.set_mesh(mesh):
        for stage in experiment.stages:
            folder = _open_folder(experiment, stage, workdir, sources, finished)
            result = folder.result()
            if result is None:
                sources.tokenizer.save(folder.path / TOKENIZER)
                with folder.running():
                    run = StageRun(
                        stage=stage,
                        folder=folder,
                        model=model,
                        mesh=mesh,
                        sources=sources,
                        evaluation=experiment.evaluation,
                        start_from=_loader(finished[-1].folder, model, mesh) if finished else None,
                        label=f"{label}{stage.name} ({stage.objective})",
                    )
                    result = (run_online if stage.online else run_offline)(run)
            finished.append(Finished(stage, folder, result))
    return finished


class _loader:
    """Loads the last parameters of a finished stage, split over the mesh."""

    def __init__(self, folder: StageDir, model: ModelConfig, mesh: Mesh) -> None:
        self.folder, self.model, self.mesh = folder, model, mesh

    def __call__(self) -> Params:
        abstract = abstract_state(self.model, self.mesh).params
        return restore_subtree(self.folder.checkpoints, abstract).arrays


@dataclasses.dataclass(frozen=True)
class Policy:
    """A trained model read back from a stage's folder, which holds all it takes.

    Attributes:
      params: its newest parameters.
      model: static model description.
      tokenizer: the one it was trained with.
      mesh: the devices it lies on.
      identity: the stage's config: model, data, stage settings.
    """

    params: Params
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    identity: Mapping[str, Any]


def load_policy(folder: Path, mesh_shape: tuple[int, int, int] = (-1, 1, 1)) -> Policy:
    """Loads the newest parameters of a stage's folder.

    Raises:
      WorkdirError: the folder is not a stage's.
      CheckpointError: it holds no readable checkpoint.
    """
    if not (folder / "config.json").exists() or not (folder / TOKENIZER).exists():
        raise WorkdirError(f"{folder}: is not a stage's folder, expected config.json and {TOKENIZER} in it")
    identity = read_json(folder / "config.json")
    tokenizer = load_tokenizer(folder / TOKENIZER)
    mesh = make_mesh(*mesh_shape)
    model = make_model(identity["model"], tokenizer.vocab_size)
    params = restore_subtree(folder / "checkpoints", abstract_state(model, mesh).params).arrays
    return Policy(params, model, tokenizer, mesh, identity)


def _open_folder(
    experiment: Experiment, stage: Stage, workdir: Path, sources: Sources, before: list[Finished]
) -> StageDir:
    """The stage's folder: named by what it is made of, and nothing else."""
    identity = {
        "stage": stage.tree,
        "model": experiment.model,
        "mesh": experiment.tree["mesh"],
        "data": sources.versions(_kinds(stage)),
        "problems": experiment.resolved["data"]["problems"],
        **({} if stage.objective == "next_token" else {"evaluation": experiment.tree["evaluation"]}),
    }
    return StageDir.open(workdir, stage.name, identity, [done.folder.hash for done in before[-1:]])


def _kinds(stage: Stage) -> tuple[str, ...]:
    """Which data a stage reads."""
    if stage.objective == "next_token":
        text = ("text",) if stage.data.text_weight > 0 else ()
        return text + (("problems",) if stage.data.problems_weight > 0 else ())
    return ("preferences",) if stage.objective == "dpo" and not stage.online else ("problems",)
