"""Arms of the quickstart at toy size, two seeds, with one arm that cannot run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments import quickstart
from research.ablation.runner import run_ablation
from research.analysis.results import RunResult, load_results
from research.core.errors import ConfigError, WorkdirError
from research.core.stages import hold_workdir
from tests.experiments.toy import shrink, undescribed
from tests.research.algorithms.toy import compilations, quick_compilation

ARMS = ("rejection_sampling", "dpo")


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    config = shrink(quickstart.get_config(), tmp_path_factory.mktemp("data"))
    config.stages = ("sft", "rl")
    del config.ablation.arms["grpo"], config.ablation.arms["sft"]  # run by other tests
    config.ablation.control = "dpo"
    config.evaluation.correct = "final_line"
    config.ablation.arms["broken"] = ("rl.rollout.max_prompt_length=3",)  # no prompt is that short
    config.ablation.seeds = (0, 1)
    return config


@pytest.fixture(scope="module")
def ran(config: ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RunResult]]:
    workdir = tmp_path_factory.mktemp("ablation") / "run"
    results, _ = run_ablation(config, workdir)
    return workdir, results


def files(workdir: Path) -> dict[str, int]:
    """All files of the stages and when they were written."""
    return {
        str(path.relative_to(workdir)): path.stat().st_mtime_ns
        for path in (workdir / "stages").rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_every_arm_runs_at_every_seed_and_one_failure_loses_no_other(ran: tuple[Path, list[RunResult]]) -> None:
    workdir, results = ran
    status = {(result.arm, result.seed): result.status for result in results}
    assert status == {
        **{(arm, seed): "finished" for arm in ARMS for seed in (0, 1)},
        ("broken", 0): "failed",
        ("broken", 1): "failed",
    }, [result.error for result in results]
    broken = next(result for result in results if result.arm == "broken")
    assert broken.error is not None and "\n" not in broken.error
    assert "do not fit 3 tokens" in broken.error
    assert "Traceback" in (workdir / broken.run_dir).read_text(encoding="utf-8")
    assert (workdir / "failures" / "broken-seed1.txt").exists()


def test_shared_stages_run_once(ran: tuple[Path, list[RunResult]]) -> None:
    workdir, results = ran
    assert len(list((workdir / "stages").glob("sft-*"))) == 1
    done = [path for path in (workdir / "stages").glob("rl-*") if (path / "done.json").exists()]
    assert len(done) == len(ARMS) * 2
    assert len({result.run_dir for result in results if result.status == "finished"}) == len(ARMS) * 2


def test_seeds_differ_and_are_paired_with_what_they_were_set_to(ran: tuple[Path, list[RunResult]]) -> None:
    _, results = ran
    for result in results:
        assert json.loads(result.config_text)["rl"]["seed"] == result.seed
    samplers = {r.arm: r.budget.completions_sampled for r in results if r.seed == 0 and r.status == "finished"}
    assert samplers == {"rejection_sampling": 64, "dpo": 64}


def test_report_and_results_are_written(ran: tuple[Path, list[RunResult]]) -> None:
    workdir, results = ran
    found = load_results(workdir / "results.json")
    assert {(r.arm, r.seed, r.status) for r in found} == {(r.arm, r.seed, r.status) for r in results}
    text = (workdir / "report" / "report.md").read_text(encoding="utf-8")
    assert all(arm in text for arm in (*ARMS, "broken")) and "do not fit 3 tokens" in text
    assert (workdir / "report" / "report.html").exists()
    assert not undescribed(workdir)


def test_what_is_finished_is_never_run_again(config: ConfigDict, ran: tuple[Path, list[RunResult]]) -> None:
    workdir, results = ran
    before = files(workdir)
    with compilations() as compiled:
        again, _ = run_ablation(config, workdir)
    finished = {r.run_dir for r in again if r.status == "finished"}
    changed = {path for path, when in files(workdir).items() if before.get(path) != when}
    assert not [path for path in changed if any(path.startswith(folder) for folder in finished)]
    assert "train_step" not in compiled and "sample" not in compiled
    assert [(r.arm, r.seed, r.status, r.metrics, r.budget) for r in again] == [
        (r.arm, r.seed, r.status, r.metrics, r.budget) for r in results
    ]


def test_another_config_shares_the_workdir_and_what_both_have_in_common(
    config: ConfigDict, ran: tuple[Path, list[RunResult]]
) -> None:
    """One more seed, another metric, another control: nothing that is on disk is run again."""
    workdir, results = ran
    other = config.copy_and_resolve_references()
    other.ablation.update({"metric": "eval/pass@4", "control": "rejection_sampling"})
    before = set(files(workdir / "stages"))
    again, _ = run_ablation(other, workdir)
    assert {(r.arm, r.seed): r.metrics for r in again} == {(r.arm, r.seed): r.metrics for r in results}
    assert set(files(workdir / "stages")) == before


def test_an_ablation_is_run_by_one_process_at_a_time(config: ConfigDict, tmp_path: Path) -> None:
    with hold_workdir(tmp_path / "run", {}), pytest.raises(WorkdirError, match="is being run by process"):
        run_ablation(config, tmp_path / "run")


def test_senseless_arms_stop_before_anything_is_written(config: ConfigDict, tmp_path: Path) -> None:
    other = config.copy_and_resolve_references()
    other.ablation.arms["dpo_too"] = ("rl.objective.name=dpo",)
    with pytest.raises(ConfigError, match=r"ablation\.arms\.dpo_too: is the same experiment as arm dpo"):
        run_ablation(other, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_arm_that_diverges_has_failed_and_no_number_of_its_is_compared(config: ConfigDict, tmp_path: Path) -> None:
    other = config.copy_and_resolve_references()
    other.stages, other.evaluation.evaluators = ("sft",), ()
    other.sft.steps = 8
    arms = {"control": (), "diverges": ("sft.optimizer.learning_rate=1e30",)}
    other.ablation = {"stage": "sft", "metric": "eval/loss", "seeds": (0,), "seed_keys": ("sft.seed",)}
    other.ablation.arms = arms
    results, paths = run_ablation(other, tmp_path / "run")
    assert [(r.arm, r.status) for r in results] == [("control", "finished"), ("diverges", "failed")]
    assert results[1].metrics == {} and "updates in a row were skipped" in (results[1].error or "")
    assert "not finite" in paths.markdown.read_text(encoding="utf-8")
