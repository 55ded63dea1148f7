"""The experiments on real text and real problems, at full size: minutes each, where the files are at hand."""

from pathlib import Path

import pytest

from experiments import gsm8k, tinyshakespeare
from research.config.resolve import resolve
from research.train.chain import run_chain

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NANOGPT_CPU_LOSS = 1.88  # nats a character, from its README, same text, size and budget


def present(name: str) -> Path:
    """The data file, or a skipped test."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not on this machine")
    return path


@pytest.mark.slow
def test_tinyshakespeare_reaches_nanogpt(tmp_path: Path) -> None:
    config = tinyshakespeare.get_config()
    config.data.text.path = str(present("tinyshakespeare.txt"))
    (done,) = run_chain(resolve(config), tmp_path)
    assert done.metrics["eval/nll"] <= NANOGPT_CPU_LOSS + 0.05


@pytest.mark.slow
def test_gsm8k_loss_falls_and_answers_stop(tmp_path: Path) -> None:
    config = gsm8k.get_config()
    config.data.problems.jsonl = {"path": str(present("gsm8k_train.jsonl"))}
    (done,) = run_chain(resolve(config), tmp_path)
    losses = [point["eval/nll"] for point in done.result["curve"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 2.0
    assert done.metrics["eval/truncated_fraction"] < 0.2
