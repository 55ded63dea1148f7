"""One stage's run from end to end: whose parameters the reference's are, what is spent, what an error costs."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import DataError, DivergedError
from research.train import chain, online
from research.train.session import Session
from research.train.updates import BATCH
from tests.research.train.chain import Shared

pytestmark = pytest.mark.usefixtures("quick")
G = 4


def watch(monkeypatch: pytest.MonkeyPatch, look: Callable[[Session, int, bool], None]) -> None:
    """Calls `look(session, step, after)` around every iteration."""
    iterate = online._iterate

    def watched(session: Session, state: Any, step: int) -> Any:
        look(session, step, False)
        found = iterate(session, state, step)
        look(session, step, True)
        return found

    monkeypatch.setattr(online, "_iterate", watched)


def leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def logged(folder: Any) -> list[dict[str, Any]]:
    """The metrics of each iteration."""
    lines = (folder.path / "metrics.jsonl").read_text("utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "reward/mean" in record]


FRAGILE = """
def fragile(completion, record, context):
    if completion[-1:] in "13579":
        raise RuntimeError("odd")
    return context.task.correct(completion, record)
"""


def test_reference_budget_and_errors_of_a_run(shared: Shared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Dynamic sampling with a KL term, and a user's reward function that raises on odd answers."""
    file = tmp_path / "mine.py"
    file.write_text(FRAGILE, encoding="utf-8")
    start: list[Any] = []
    drawn: list[int] = []

    def look(session: Session, step: int, after: bool) -> None:
        if step == 1 and not after:
            reference = session.learner.frozen().reference
            assert reference is not None
            shares = [a is b for a, b in zip(leaves(reference.params), leaves(session.learner.policy), strict=True)]
            assert all(shares), "a second copy before the first update"
            start.append(jax.device_get(reference.params))
        if after:
            reference = session.learner.frozen().reference
            assert reference is not None and session.learner.moved
            assert not any(
                a is b for a, b in zip(leaves(reference.params), leaves(session.learner.policy), strict=True)
            )
            assert same(jax.device_get(reference.params), start[0]), "the reference moved"
            assert not same(jax.device_get(session.learner.policy), start[0]), "the policy did not"
            assert session.learner.frozen().reference is reference, "loaded once"
            drawn.append(session.learner.spent.completions_sampled)

    watch(monkeypatch, look)
    done = shared.run(
        {
            "rl.steps": 2,
            "rl.seed": 5,
            "rl.objective.grpo.beta": 0.1,
            "rl.rollout.resample_rounds": 2,
            "rl.reward.functions": (f"{file}:fragile",),
            "rl.reward.unknown": -0.5,
        }
    )
    metrics = logged(done.folder)
    for record in metrics:
        groups, rounds = record["dynamic_sampling/groups_drawn"], record["dynamic_sampling/rounds"]
        assert groups == 8 * rounds and 1 <= rounds <= 3
        assert record["frac_reward_zero_std"] == record["dynamic_sampling/groups_unfilled"] / 8
        # At the first step the policy is its reference, and its log-probs are the sampler's.
        assert abs(record["kl/reference"]) < 1e-3 or record["step"] > 1
        assert record["sampler_trainer_gap"] < 1e-4
    cost = [G * record["dynamic_sampling/groups_drawn"] for record in metrics]
    assert drawn == list(np.cumsum(cost)), "what is drawn and thrown away is spent too"
    assert done.result["budget"]["completions_sampled"] == drawn[-1]
    assert done.result["note"]["data"]["kept"] == logged(done.folder)[0]["data/records"] > 0
    errors = done.result["note"]["reward_errors"]
    assert 0 < len(errors) <= 20 and errors[0]["name"] == "fragile" and "odd" in errors[0]["error"]
    rewards = {
        record["reward"]
        for record in map(json.loads, (done.folder.path / "samples.jsonl").read_text("utf-8").splitlines())
    }
    assert rewards <= {1.0, 0.0, -0.5} and sum(record["reward/fragile/unknown"] for record in metrics) > 0


def test_time_left_is_not_guessed_from_compilation() -> None:
    said: list[Any] = []
    compiled = SimpleNamespace(count=0)

    def update(*_: Any) -> dict[str, Any]:
        compiled.count += 1
        time.sleep(1.05)
        return {"skipped_updates": 0}

    session: Any = SimpleNamespace(
        _compiled=compiled,
        _updated=False,
        learner=SimpleNamespace(update=update),
        updates=SimpleNamespace(add=lambda *_: None),
        say=said.append,
        progress=SimpleNamespace(exclude=said.append),
    )
    Session.update(session, 1, None, {})  # type: ignore[arg-type]
    assert said[0] == "compiling the training step took 1 s" and 1.0 < said[1] < 10.0


def test_a_reward_function_that_raises_on_everything_ends_the_run(shared: Shared, tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("def wrong(completion, record, context):\n    return record['levl']\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"^reward function wrong: raised on all \d+ completions .* \(KeyError: 'levl'\)"
    ):
        shared.run({"rl.steps": 2, "rl.reward.functions": (f"{file}:wrong",)})


@pytest.mark.parametrize("objective", ["grpo", pytest.param("dpo", marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_the_second_iteration(shared: Shared, tmp_path: Path, objective: str) -> None:
    """The first has a fresh state, the second one whose shardings are spelled as an update leaves them."""
    changes = {"rl.objective.name": objective, "rl.steps": 4, "rl.log_every": 1, "rl.seed": 11}
    jax.clear_caches()  # other tests may have compiled the same programs in this process
    folder = shared.run(changes, shared.copy(tmp_path)).folder
    lines = (folder.path / "performance.jsonl").read_text("utf-8").splitlines()
    counts = [json.loads(line)["compilations"] for line in lines]
    assert len(counts) == 4 and counts[0] > 0
    assert counts[1] == counts[2] == counts[3]


def test_a_learning_rate_that_diverges_stops_the_run_and_keeps_the_batch(shared: Shared, tmp_path: Path) -> None:
    workdir = shared.copy(tmp_path)
    with pytest.raises(DivergedError, match=r"updates in a row were skipped .*max_skipped=2.* is in .*not_finite\.npz"):
        shared.run({"rl.optimizer.learning_rate": 1e30, "rl.steps": 9, "rl.optimizer.max_skipped": 2}, workdir)
    (folder,) = (workdir / "stages").glob("rl-*")
    assert not (folder / "done.json").exists()
    batch = np.load(folder / BATCH)
    assert any(name.endswith("tokens") for name in batch) and all(batch[name].size for name in batch)


def test_a_run_without_any_update_is_no_result(shared: Shared, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="all 2 updates were skipped"):
        shared.run({"rl.optimizer.learning_rate": 1e30, "rl.steps": 2}, shared.copy(tmp_path))


def test_no_stage_starts_from_what_is_not_finite(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = chain._Chain._read

    def broken(*arguments: Any) -> Any:
        found = read(*arguments)
        params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), found.network.params)
        return found._replace(network=found.network.replace(params=params))

    monkeypatch.setattr(chain._Chain, "_read", broken)
    with pytest.raises(DivergedError, match="rl: starts from parameters that are not all finite, .*result of sft"):
        shared.run({"rl.seed": 77}, shared.copy(tmp_path))
