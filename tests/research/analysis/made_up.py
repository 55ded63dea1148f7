"""Made-up results of four arms, realistic enough to look at."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from research.analysis.results import Budget, RunResult
from research.core.metrics import METRICS, encode_numbers

ARMS = {  # final accuracy, tokens sampled, tokens trained
    "sft": (0.412, 0, 2_400_000),
    "rejection_sampling": (0.487, 5_200_000, 2_400_000),
    "dpo": (0.531, 4_100_000, 2_400_000),
    "grpo": (0.638, 9_800_000, 2_400_000),
}
OVERRIDES: dict[str, dict[str, object]] = {
    "sft": {},
    "rejection_sampling": {"objective.name": "rejection_sampling", "data.samples_per_prompt": 8},
    "dpo": {"objective.name": "dpo", "objective.beta": 0.1},
    "grpo": {"objective.name": "grpo", "rollout.group_size": 16, "objective.clip_eps_high": 0.28},
}
BASE_CONFIG = """\
data:
  samples_per_prompt: 1
objective:
  beta: 0.0
  name: sft
  clip_eps_high: 0.2
rollout:
  group_size: 1
"""


def run(arm: str, seed: int, accuracy: float, sampled: int = 0, trained: int = 1000) -> RunResult:
    """One finished run."""
    rng = np.random.default_rng((seed, len(arm)))
    curve = [
        {
            "step": float(step),
            "eval/pass@1": accuracy - (accuracy - 0.22) * float(np.exp(-step / 60)) + 0.008 * float(rng.normal()),
            "tokens_spent": (sampled + trained) * step / 200,
        }
        for step in range(0, 180, 20)
    ]
    curve.append({"step": 200.0, "eval/pass@1": accuracy, "tokens_spent": float(sampled + trained)})
    config = BASE_CONFIG.replace("name: sft", f"name: {OVERRIDES.get(arm, {}).get('objective.name', arm)}")
    for key, value in OVERRIDES.get(arm, {}).items():
        name = key.rsplit(".", 1)[1]
        if name != "name":
            config = "\n".join(
                line.split(":")[0] + f": {value}" if line.strip().startswith(f"{name}:") else line
                for line in config.splitlines()
            )
    return RunResult(
        arm=arm,
        seed=seed,
        status="finished",
        metrics={"eval/pass@1": accuracy, "eval/loss": 3 - accuracy},
        budget=Budget(sampled, sampled // 130, trained, 6e9 * trained + 2e9 * sampled, 60.0 + sampled / 40_000),
        curve=curve,
        error=None,
        overrides=OVERRIDES.get(arm, {}),
        config_text=config + f"\nseed: {seed}\n",
        run_dir=f"runs/{arm}/{seed}",
    )


def failed(result: RunResult, error: str = "loss is NaN at step 120 | see <log>") -> RunResult:
    """The same run, failed."""
    return dataclasses.replace(result, status="failed", metrics={}, curve=result.curve[:4], error=error)


def results() -> list[RunResult]:
    """Four arms, three seeds, all finished."""
    rng = np.random.default_rng(5)
    common = rng.normal(size=3) * 0.012
    return [
        run(arm, seed, accuracy + float(common[seed]) + 0.01 * float(rng.normal()), sampled, trained)
        for arm, (accuracy, sampled, trained) in ARMS.items()
        for seed in range(3)
    ]


def log(seed: int, steps: int = 60) -> list[dict[str, float]]:
    """Training records at each step, gold rewards every third in records of their own."""
    rng = np.random.default_rng(seed)
    found: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        kl = step / 10 + float(rng.normal(0, 0.05))
        samples = {"reward/mean": 0.1 * kl, "entropy": 2 - 0.02 * step, "completions/mean_length": 80.0 + step}
        found.append({"step": step, "loss": 0.1, "kl/reference": kl, **samples})
        if step % 3 == 0:
            found.append({"step": step, "reward/gold": 0.3 * kl - 0.06 * kl**2})
    return found


def write_log(folder: Path, seed: int, loss: float = 0.1) -> None:
    """A run's metrics.jsonl, which ends with this loss."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [*log(seed), {"step": 61, "loss": loss}]
    text = "".join(json.dumps(encode_numbers(record)) + "\n" for record in records)
    (folder / METRICS).write_text(text, encoding="utf-8")
