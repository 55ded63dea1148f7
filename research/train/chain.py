"""A chain of stages, each addressed by content: finished ones are read, unfinished ones go on, new ones start."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from research.config.experiment import Experiment, Stage
from research.config.identity import evaluation_identity, stage_identity
from research.config.tree import Tree, to_json
from research.core.errors import ConfigError
from research.core.files import write_json_atomic
from research.core.interrupts import Interrupted, Interrupts
from research.core.progress import say
from research.core.stages import StageDir, describe_difference
from research.evals.results import Results, load, results_path, store
from research.train.measure import choose_evaluators, final_evaluation
from research.train.offline import run_offline
from research.train.online import run_online
from research.train.run import StageRun
from research.train.setup import Setup, kinds_of, set_up
from research.train.stored import EXPERIMENT, TOKENIZER, StageResult, read_result


@dataclasses.dataclass(frozen=True)
class Finished:
    """One finished stage."""

    stage: Stage
    folder: StageDir
    result: Mapping[str, Any]  # what training left: metrics, budget, curve
    reused: bool = False  # whether it was read from disk, and not run
    evaluation: Results | None = None  # what the final evaluation found
    evaluated_by: str = ""  # identity of that evaluation

    @property
    def metrics(self) -> dict[str, float]:
        """Of the end of training, and of the final evaluation."""
        return {**self.result["metrics"], **(self.evaluation.metrics if self.evaluation else {})}

    @property
    def curve(self) -> list[dict[str, float]]:
        """Evaluations on the way; the last one is completed from the final evaluation, if that is of the same kind."""
        points = [dict(point) for point in self.result["curve"]]
        if points and self.evaluation and self.evaluated_by == self.result["curve_evaluation"]:
            points[-1] |= self.evaluation.first(self.stage.eval_problems)
        return points


def run_chain(
    experiment: Experiment,
    workdir: Path,
    *,
    until: str = "",
    setup: Setup | None = None,
    run_name: str = "",
    interrupts: Interrupts | None = None,
) -> list[Finished]:
    """Runs every stage of the experiment that is not finished yet, in order, and evaluates each.

    Args:
      experiment: the resolved config.
      workdir: holds `stages/` and `data/`.
      until: only this stage and those whose results it needs; "" runs all.
      setup: data, mesh and models, where the caller has them already.
      run_name: what the console calls the run, and a part of the names of the folders that it makes.
      interrupts: says when to save and to stop; then `Interrupted` is raised, and the same call goes on from there.
    """
    chain = _Chain(experiment, workdir, setup or set_up(experiment, workdir), run_name, interrupts or Interrupts())
    with jax.set_mesh(chain.setup.mesh):
        for stage in experiment.until(until) if until else experiment.stages:
            chain.add(stage)
    return list(chain.finished.values())


@dataclasses.dataclass
class _Chain:
    """The stages of one run, as far as it has come."""

    experiment: Experiment
    workdir: Path
    setup: Setup
    run_name: str
    interrupts: Interrupts
    finished: dict[str, Finished] = dataclasses.field(default_factory=dict)

    def add(self, stage: Stage) -> None:
        """Reads or trains a stage, then reads or makes its evaluation."""
        folder = self._folder(stage)
        label = ": ".join(part for part in (self.run_name, stage.name) if part)
        shown = f"{label} ({stage.objective.name})"
        run = StageRun(stage, folder, self.experiment, self.setup, self._result_of, shown, self.interrupts)
        chosen = self.experiment.parsed["evaluation"].chosen["evaluators"]
        evaluators, said = choose_evaluators(run, {each.component.name: each.make() for each in chosen})
        for line in said:
            say(f"{label}: {line}")
        identity = self._evaluation_identity(stage)
        run = dataclasses.replace(run, evaluators=evaluators, curve_evaluation=results_path(folder.path, identity).stem)
        result = folder.result()
        reused = result is not None
        if result is None:
            if not folder.checkpoints.exists() and (news := folder.news()):
                say(f"{label}: runs again: {news}")
            result = self._train(run)
        else:
            say(f"{label}: finished, read from {folder.path}")
        evaluation = self._evaluate(run, identity, label) if evaluators else None
        by = run.curve_evaluation if evaluators else ""
        self.finished[stage.name] = Finished(stage, folder, result, reused, evaluation, by)

    def _train(self, run: StageRun) -> dict[str, Any]:
        folder = run.folder
        with folder.running():
            self.setup.sources.tokenizer.save(folder.path / TOKENIZER)
            write_json_atomic(folder.path / EXPERIMENT, {"stage": run.stage.name, **self.experiment.tree})
            result = (run_online if run.stage.online else run_offline)(run)
        if self.interrupts.received:
            raise Interrupted(self.interrupts.received, f"{run.label}: finished; the same command goes on from there")
        return result

    def _evaluate(self, run: StageRun, identity: Tree, label: str) -> Results:
        place = run.folder.path
        found = load(place, identity)
        if found is not None:
            say(f"{label}: evaluation read from {results_path(place, identity)}")
            return found
        found = final_evaluation(run, self._read(run.stage, run.folder).policy.params)
        store(place, identity, found)
        return found

    def _read(self, stage: Stage, folder: StageDir) -> StageResult:
        """What a stage of this run has trained, split over the mesh."""
        model = self.setup.models[stage.model]
        return read_result(folder.checkpoints, model, self.setup.mesh, stage.facts.trains)

    def _result_of(self, name: str) -> StageResult:
        if name in self.setup.folders:
            return self.setup.folders[name].result(self.setup.mesh)
        return self._read(self.finished[name].stage, self.finished[name].folder)

    def _hash_of(self, name: str) -> str:
        return self.finished[name].folder.hash if name in self.finished else StageDir.at(Path(name)).hash

    def _folder(self, stage: Stage) -> StageDir:
        """The stage's folder: found by what its result is made of, and nothing else."""
        identity = self._with_versions(stage_identity(self.experiment, stage), kinds_of(stage))
        resolved, inputs = to_json(identity), [self._hash_of(name) for name in stage.training_inputs]
        if stage.extend:
            _check_extends(stage, resolved, inputs)
            inputs = [self._hash_of(stage.extend), *inputs]
        return StageDir.open(self.workdir, stage.name, resolved, inputs, label=self.run_name)

    def _evaluation_identity(self, stage: Stage) -> Tree:
        """What the evaluation of a stage's result depends on, besides that."""
        kinds = tuple(dict.fromkeys(("problems", *kinds_of(stage)))) if stage.samples else kinds_of(stage)
        players = [self._hash_of(name) for role, name in stage.played if role in stage.facts.answer_roles and name]
        identity = self._with_versions(evaluation_identity(self.experiment, stage), kinds)
        return to_json({**identity, "players": players})

    def _with_versions(self, identity: Tree, kinds: tuple[str, ...]) -> Tree:
        """With the versions of the data and tools that it reads."""
        tools = self.setup.interaction
        if tools is not None and "tools" in identity:
            identity = {**identity, "tools": tools.version}
        return {**identity, "data": self.setup.sources.versions(kinds)}


def _check_extends(stage: Stage, resolved: Tree, inputs: Sequence[str]) -> None:
    """A stage can be continued for more steps, and otherwise as it was."""
    there = StageDir.at(Path(stage.extend))
    key = f"{stage.name}.extend: {stage.extend}"
    before = there.config()
    steps = before.get("stage", {}).get("steps", 0)
    if stage.steps <= steps:
        raise ConfigError(f"{key}: has {steps} steps, expected {stage.name}.steps={stage.steps} to be more")
    same = {**resolved, "stage": {**resolved["stage"], "steps": steps}}
    difference = describe_difference(before, same)
    if difference is None and there.inputs()[-len(inputs) or len(there.inputs()) :] != list(inputs):
        difference = f"inputs: there {there.inputs()}, here {list(inputs)}"
    if difference is not None:
        raise ConfigError(f"{key}: differs in more than its steps: {difference}")
