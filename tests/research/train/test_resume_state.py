"""What a resumed run needs besides its parameters: controller, score statistics, curriculum, data position."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from research.core.checkpoint import restore_subtree
from research.core.state import abstract_params
from research.train import online
from research.train.chain import Finished
from tests.research.train.chain import Shared, changed

pytestmark = pytest.mark.usefixtures("quick")

CHANGES: dict[str, Any] = {
    "rl.steps": 5,
    "rl.checkpoint_every": 1e-9,
    "rl.objective.name": "ppo",
    "rl.objective.ppo.kl_controller": "adaptive",
    "rl.objective.ppo.target_kl": 0.5,
    "rl.objective.ppo.horizon": 100.0,
    "rl.reward.normalize": "running",
    "rl.reward.score_clip": 3.0,
    "rl.rollout.curriculum_low": 0.2,
    "rl.rollout.curriculum_high": 0.9,
    "rl.rollout.resample_rounds": 1,
    "rl.rollout.prompts_per_step": 16,
    "rl.rollout.epochs": 2,
    "rl.rollout.minibatches": 2,
}


class Killed(BaseException):
    """Nothing in the product catches it."""


def state_of(shared: Shared, done: Finished) -> tuple[dict[str, str], dict[str, Any]]:
    """Digests of every parameter and the record, of the newest checkpoint."""
    model = shared.setup.models["model"]
    params = abstract_params(model, shared.setup.mesh, "actor_critic")
    restored = restore_subtree(done.folder.checkpoints, params)
    digests = {
        jax.tree_util.keystr(path): hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(restored.arrays))
    }
    return digests, json.loads(json.dumps(restored.record))


def test_ppo_with_all_its_controllers_resumes_bit_for_bit(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shared.run(CHANGES, shared.copy(tmp_path / "whole"))
    iterate, killed = online._iterate, shared.copy(tmp_path / "killed")
    seen: list[int] = []

    def mortal(session: Any, keeper: Any, step: int) -> Any:
        seen.append(step)
        found = iterate(session, keeper, step)
        if seen == [1, 2, 3, 4]:  # the fourth iteration is lost, all of its updates done
            raise Killed
        return found

    monkeypatch.setattr(online, "_iterate", mortal)
    with pytest.raises(Killed):
        shared.run(CHANGES, killed)
    resumed = shared.run(CHANGES, killed)
    assert seen == [1, 2, 3, 4, 4, 5]

    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (resumed.folder.path / name).read_bytes() == (whole.folder.path / name).read_bytes(), name
    assert resumed.result["metrics"] == whole.result["metrics"]
    assert resumed.result["curve"] == whole.result["curve"]
    (digests, record), (expected, record_of_whole) = state_of(shared, resumed), state_of(shared, whole)
    assert digests == expected
    for part in (record, record_of_whole):
        del part["spent"]["seconds"], part["offsets"]["performance.jsonl"]
    assert record == record_of_whole

    # Everything that had to be kept was there to be lost.
    start = changed(shared.config, CHANGES).stages[-1].options["kl_coef"]
    assert record["objective_scalars"]["kl_coef"] != pytest.approx(start, rel=1e-4)
    stage = changed(shared.config, CHANGES).stages[-1]
    s, (schedule,) = stage.optimizer, stage.chosen("optimizer", "schedule")
    end = schedule.options["end_fraction"]
    rates = []  # of the last pass: updates 18 and 19 of 5 iterations * 2 passes * 2 mini-batches
    for update in (18, 19):
        done = (update - s.warmup_steps) / (20 - s.warmup_steps)
        rates.append(end + (1 - end) * (1 + np.cos(np.pi * done)) / 2)
    assert _logged(resumed)[-1]["learning_rate"] == pytest.approx(s.learning_rate * np.mean(rates), rel=1e-4)
    norm = record["extra"]["rewards"]
    assert norm["count"] == record["spent"]["completions_sampled"] and norm["m2"] > 0
    assert any(line["curriculum/skipped"] > 0 for line in _logged(resumed))


def _logged(done: Finished) -> list[dict[str, Any]]:
    lines = (done.folder.path / "metrics.jsonl").read_text("utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "curriculum/skipped" in record]
