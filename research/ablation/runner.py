"""Runs an ablation: every arm at every seed, in one process, so that arms share compiled steps and stages."""

import dataclasses
import json
import traceback
from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict

from research.ablation.arms import Arm, Plan, plan
from research.analysis.report import ReportPaths, ReportSpec, write_report
from research.analysis.results import Budget, RunResult, StageUse, save_results
from research.config.experiment import Experiment
from research.config.tree import to_json
from research.core.errors import ConfigError
from research.core.files import write_text_atomic
from research.core.interrupts import Interrupts
from research.core.progress import Progress
from research.core.stages import hold_workdir
from research.core.versions import collect_versions
from research.train.chain import run_chain
from research.train.setup import Setup, set_up


def run_ablation(
    config: ConfigDict, workdir: Path, overrides: Iterable[str] = (), interrupts: Interrupts | None = None
) -> tuple[list[RunResult], ReportPaths]:
    """Runs what is not finished, notes the results after every run and writes the report after every seed.

    A finished (arm, seed) is read, an interrupted one goes on from its newest checkpoint, a failed one is recorded with
    its error and tried again next time. Seeds are the outer loop, so that an interrupted ablation has compared all arms
    at the seeds it has.

    Returns:
      One result an (arm, seed), and the report's files.

    Raises:
      ConfigError: before anything runs, where arms or their overrides make no sense.
      WorkdirError: another process works in the workdir.
      Interrupted: a signal asked to stop; the run under way is saved and not recorded.
    """
    planned = plan(config, overrides)
    first = planned.experiments[planned.arms[0].name]
    seeds, order = planned.base.ablation.seeds, [arm.name for arm in planned.arms]
    results: list[RunResult] = []
    with hold_workdir(workdir, planned.base.tree):
        setups = {_setup_key(first): set_up(first, workdir)}
        with Progress("ablation", len(planned.arms) * len(seeds), unit="runs") as overall:
            for seed in seeds:
                for arm in planned.arms:
                    results.append(_run(planned, arm, seed, workdir, setups, interrupts))
                    overall.advance(1)
                    by_arm = sorted(results, key=lambda result: order.index(result.arm))
                    save_results(workdir / "results.json", by_arm)
                paths = _report(planned, by_arm, workdir)
    return results, paths


def _run(
    planned: Plan, arm: Arm, seed: int, workdir: Path, setups: dict[str, Setup], interrupts: Interrupts | None
) -> RunResult:
    """One run; whatever stops it is recorded, so that the other arms are not lost."""
    experiment, section = planned.run(arm, seed), planned.base.ablation
    place = workdir / "failures" / f"{arm.name}-seed{seed}.txt"
    result = RunResult(
        arm=arm.name,
        seed=seed,
        status="failed",
        metrics={},
        budget=Budget(0, 0, 0, 0.0, 0.0),
        curve=[],
        error=None,
        overrides={text.partition("=")[0]: text.partition("=")[2] for text in arm.overrides},
        config_text=_text(experiment),
        run_dir=str(place.relative_to(workdir)),
        grid=dict(arm.grid),
    )
    try:
        key = _setup_key(experiment)
        if key not in setups:
            setups[key] = set_up(experiment, workdir)
        name, shared = f"{arm.name[:50]}-s{seed}", setups[key]
        chain = run_chain(experiment, workdir, until=section.stage, setup=shared, run_name=name, interrupts=interrupts)
        done = next(f for f in chain if f.stage.name == section.stage)
        metrics = done.metrics
        if section.metric not in metrics:
            raise ConfigError(f"ablation.metric: got {section.metric!r}, expected one of {', '.join(sorted(metrics))}")
    except Exception as error:  # noqa: BLE001 - one failed arm must not lose the others; recorded, reported
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(place, traceback.format_exc())
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return dataclasses.replace(result, error=line)
    place.unlink(missing_ok=True)  # an earlier try's
    return dataclasses.replace(
        result,
        status="finished",
        metrics=metrics,
        budget=Budget(**done.result["budget"]),
        curve=done.curve,
        run_dir=str(done.folder.path.relative_to(workdir)),
        stages=tuple(
            StageUse(f.stage.name, str(f.folder.path.relative_to(workdir)), f.result["budget"]["seconds"], f.reused)
            for f in chain
        ),
        evaluation=done.evaluated_by,
        curve_evaluation=done.result["curve_evaluation"],
    )


def _report(planned: Plan, results: list[RunResult], workdir: Path) -> ReportPaths:
    base, control = planned.base, planned.arms[0].name
    spec = ReportSpec(
        title=base.name,
        question=base.question,
        metric=base.ablation.metric,
        control=control,
        pairs=tuple((a, b) for a, _, b in (pair.partition(":") for pair in base.ablation.pairs)),
        higher_is_better=base.ablation.higher_is_better,
        base_config_text=_text(planned.experiments[control]),
        versions=collect_versions(),
    )
    return write_report(results, spec, workdir)


def _setup_key(experiment: Experiment) -> str:
    """Equal for experiments that share data, mesh and model."""
    tree = experiment.tree
    parts = [tree[name] for name in ("data", "mesh", "model", "teacher_model", "evaluation", "tools")]
    stages = [(s.name, s.model, s.facts.given, s.online, s.batch_size, s.rollout, s.length) for s in experiment.stages]
    return repr((parts, stages))


def _text(experiment: Experiment) -> str:
    """The run's config as the report shows it: all keys but those of the ablation itself."""
    return json.dumps(to_json({k: v for k, v in experiment.tree.items() if k != "ablation"}), indent=1)
