"""Runs an ablation: every arm at every seed, in one process, so that arms share compiled steps and stages."""

import json
import traceback
from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict

from research.ablation.arms import Arm, arm_config, check_arms, check_overridden, control_of, read_arms
from research.analysis.report import ReportPaths, ReportSpec, write_report
from research.analysis.results import Budget, RunResult, save_results
from research.config.experiment import Experiment
from research.config.resolve import resolve
from research.core.errors import ConfigError
from research.core.files import write_text_atomic
from research.core.progress import Progress
from research.core.stages import claim_workdir
from research.core.versions import collect_versions
from research.train.chain import Ground, lay_ground, run_chain


def run_ablation(
    config: ConfigDict, workdir: Path, overridden: Iterable[str] = ()
) -> tuple[list[RunResult], ReportPaths]:
    """Runs what is not finished, notes the results after every run and writes the report after every seed.

    A finished (arm, seed) is read, an interrupted one goes on from its newest checkpoint, a failed one is
    recorded with its error and tried again next time. Seeds are the outer loop, so that an interrupted
    ablation has compared all arms at the seeds it has.

    Args:
      config: with an `ablation` section.
      workdir: belongs to this config from the first run on.
      overridden: dotted keys that somebody set by hand; one that no arm reads is refused.

    Returns:
      One result an (arm, seed), and the report's files.

    Raises:
      ConfigError: before anything runs, where arms or their overrides make no sense.
      WorkdirError: the workdir holds another config's run.
    """
    arms = read_arms(config)
    control = control_of(config, arms)
    check_overridden(config, arms, overridden)
    experiments = check_arms(config, arms)
    grounds = {_ground_key(experiments[control]): lay_ground(experiments[control], workdir)}
    claim_workdir(workdir, json.loads(config.to_json()))
    arms.sort(key=lambda arm: arm.name != control)  # first, so that every report has it to compare with
    seeds = list(config.ablation.seeds)
    results: dict[tuple[str, int], RunResult] = {}
    with Progress("ablation", len(arms) * len(seeds), unit="runs") as overall:
        for seed in seeds:
            for arm in arms:
                results[arm.name, seed] = _run(config, arm, seed, workdir, grounds)
                overall.advance(1)
                save_results(workdir / "results.json", _ordered(config, arms, results))
            paths = _report(config, control, experiments, _ordered(config, arms, results), workdir)
    return list(results.values()), paths


def _run(config: ConfigDict, arm: Arm, seed: int, workdir: Path, grounds: dict[str, Ground]) -> RunResult:
    """One run; whatever stops it is recorded, so that the other arms are not lost."""
    experiment = resolve(arm_config(config, arm, seed))
    text = _text(experiment)
    place = workdir / "failures" / f"{arm.name}-seed{seed}.txt"
    try:
        key = _ground_key(experiment)
        if key not in grounds:
            grounds[key] = lay_ground(experiment, workdir)
        chain = run_chain(
            experiment,
            workdir,
            until=config.ablation.stage,
            ground=grounds[key],
            label=f"{arm.name}, seed {seed}: ",
        )
        done = next(f for f in chain if f.stage.name == config.ablation.stage)
        metrics = done.result["metrics"]
        if config.ablation.metric not in metrics:
            raise ConfigError(
                f"ablation.metric: got {config.ablation.metric!r}, expected one of {', '.join(sorted(metrics))}"
            )
    except Exception as error:  # noqa: BLE001 - one failed arm must not lose the others; recorded, reported
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(place, traceback.format_exc())
        nothing = Budget(0, 0, 0, 0.0, 0.0)
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return RunResult(
            arm.name,
            seed,
            "failed",
            {},
            nothing,
            [],
            line,
            dict(arm.overrides),
            text,
            str(place.relative_to(workdir)),
        )
    place.unlink(missing_ok=True)  # an earlier try's
    return RunResult(
        arm=arm.name,
        seed=seed,
        status="finished",
        metrics=metrics,
        budget=Budget(**done.result["budget"]),
        curve=done.result["curve"],
        error=None,
        overrides=dict(arm.overrides),
        config_text=text,
        run_dir=str(done.folder.path.relative_to(workdir)),
    )


def _ordered(
    config: ConfigDict, arms: list[Arm], results: dict[tuple[str, int], RunResult]
) -> list[RunResult]:
    """What there is so far, by arm and then by seed."""
    return [
        results[a.name, seed] for a in arms for seed in config.ablation.seeds if (a.name, seed) in results
    ]


def _report(
    config: ConfigDict,
    control: str,
    experiments: dict[str, Experiment],
    results: list[RunResult],
    workdir: Path,
) -> ReportPaths:
    spec = ReportSpec(
        title=config.name,
        question=config.question,
        metric=config.ablation.metric,
        control=control,
        higher_is_better=config.ablation.higher_is_better,
        base_config_text=_text(experiments[control]),
        versions=collect_versions(),
    )
    return write_report(results, spec, workdir)


def _ground_key(experiment: Experiment) -> str:
    """Equal for experiments that share data, mesh and model."""
    parts = (experiment.data, experiment.mesh, experiment.models, experiment.resolved["stages"])
    return json.dumps(parts, sort_keys=True)


def _text(experiment: Experiment) -> str:
    """The run's config as the report shows it: all keys but those of the ablation itself."""
    return json.dumps({key: value for key, value in experiment.tree.items() if key != "ablation"}, indent=1)
