"""Safe scoring: what raises is recorded and costs one sample, what is not finite ends the run, sums are weighted."""

import numpy as np
import pytest

from research.core.errors import ConfigError, DataError
from research.rewards.verifiers import exact_answer, final_line, score
from research.rewards.verify import RewardSource, VerifierError, reward_sources, score_safely, score_weighted
from tests.objectives.cases import SEEDS

TEXTS = ("#### 4", "#### 5", "4", "", "#### 4\nno", "boom")


def fragile(completion, answer):
    """Right or wrong, but raises on one word and returns no number on another."""
    if completion == "boom":
        raise KeyError("no such unit")
    return None if completion == "none" else exact_answer(completion, answer)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_bad_sample_costs_one_sample(seed):
    rng = np.random.default_rng(seed)
    texts = [TEXTS[i] for i in rng.integers(len(TEXTS), size=rng.integers(0, 9))]
    ids = rng.integers(1000, size=len(texts))
    error_reward = float(rng.choice([0.0, -1.0]))
    out = score_safely(texts, ["4"] * len(texts), fragile, prompt_ids=ids, error_reward=error_reward)
    expected = [error_reward if t == "boom" else float(t in ("#### 4", "#### 4\nno")) for t in texts]
    assert out.rewards.dtype == np.float32 and out.rewards.tolist() == expected
    assert out.errors == tuple(
        VerifierError(int(i), "fragile", "KeyError: 'no such unit'")
        for i, t in zip(ids, texts, strict=True)
        if t == "boom"
    )


@pytest.mark.parametrize("seed", SEEDS[::10])
def test_without_errors_it_is_score(seed):
    rng = np.random.default_rng(seed)
    texts = [TEXTS[i] for i in rng.integers(len(TEXTS), size=8)]
    out = score_safely(texts, ["4"] * 8, exact_answer, prompt_ids=range(8))
    assert out.rewards.tobytes() == score(texts, ["4"] * 8, exact_answer).tobytes() and out.errors == ()


def test_what_returns_no_number_counts_as_raising():
    out = score_safely(["none"], ["4"], fragile, prompt_ids=[7], error_reward=-2.0)
    assert out.rewards.tolist() == [-2.0] and out.errors[0].error.startswith("TypeError: ")


def test_an_exception_can_end_the_run_instead_and_names_prompt_and_function():
    with pytest.raises(DataError, match="prompt 31: reward function units raised KeyError: 'no such unit'"):
        score_safely(["", "boom"], ["4"] * 2, fragile, prompt_ids=[5, 31], on_error="raise", name="units")


def test_only_exceptions_are_caught():
    def interrupted(completion, answer):  # noqa: ARG001
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_safely([""], [""], interrupted, prompt_ids=[0])


def test_an_exception_that_cannot_be_printed_is_recorded_too():
    class Rude(Exception):
        def __str__(self):
            raise RuntimeError("no")

    def verifier(completion, answer):  # noqa: ARG001
        raise Rude

    assert "Rude" in score_safely([""], [""], verifier, prompt_ids=[0]).errors[0].error


def test_long_exceptions_are_cut():
    def verifier(completion, answer):  # noqa: ARG001
        raise ValueError("x" * 10_000)

    assert len(score_safely([""], [""], verifier, prompt_ids=[0]).errors[0].error) == 300


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
@pytest.mark.parametrize("on_error", ["score", "raise"])
def test_a_reward_that_is_not_finite_names_prompt_and_function(value, on_error):
    def broken(completion, answer):  # noqa: ARG001
        return value if completion == "b" else 0.0

    with pytest.raises(DataError, match="prompt 42: reward function broken returned"):
        score_safely(["a", "b"], ["", ""], broken, prompt_ids=np.array([41, 42]), on_error=on_error)


@pytest.mark.parametrize("seed", SEEDS)
def test_weighted_sum_and_each_source(seed):
    rng = np.random.default_rng(seed)
    texts = [TEXTS[i] for i in rng.integers(len(TEXTS), size=rng.integers(1, 9))]
    sources = (
        RewardSource("right", fragile, 1.0),
        RewardSource("format", final_line, float(rng.normal())),
        RewardSource("watched", exact_answer, 0.0),
    )
    out = score_weighted(texts, ["4"] * len(texts), sources, prompt_ids=range(len(texts)), error_reward=-0.5)
    columns = {source.name: [] for source in sources}
    for row, text in enumerate(texts):
        total = 0.0
        for source in sources:
            reward = -0.5 if text == "boom" and source.name == "right" else source.verifier(text, "4")
            columns[source.name].append(reward)
            total += source.weight * reward
        assert out.rewards[row] == pytest.approx(total, abs=1e-6)
    assert [error.source for error in out.errors] == ["right"] * texts.count("boom")
    metrics = out.metrics()
    for name, values in columns.items():
        assert out.sources[name].tolist() == values
        assert metrics.pop(f"reward/{name}/mean") == pytest.approx(np.mean(values), abs=1e-6)
        assert metrics.pop(f"reward/{name}/std") == pytest.approx(np.std(values), abs=1e-6)
    assert metrics == {"reward/verifier_errors": texts.count("boom")}


def test_sources_by_name():
    sources = reward_sources((("exact_answer", 1.0), ("final_line", 0.2)))
    assert sources == (
        RewardSource("exact_answer", exact_answer, 1.0),
        RewardSource("final_line", final_line, 0.2),
    )


@pytest.mark.parametrize(
    ("weighted", "says"),
    [
        ((), "rewards: got none with a weight other than 0"),
        ((("exact_answer", 0.0),), "rewards: got none with a weight other than 0"),
        ((("exact", 1.0),), "verifier: got 'exact', expected one of exact_answer, final_line"),
        ((("final_line", 1.0), ("final_line", 1.0)), "rewards: got 'final_line' 2 times, expected each once"),
        (
            (("final_line", float("nan")),),
            "rewards: got weight nan of 'final_line', expected a finite number",
        ),
    ],
)
def test_sources_that_make_no_sense_are_refused(weighted, says):
    with pytest.raises(ConfigError, match=says):
        reward_sources(weighted)


def test_refusals():
    with pytest.raises(DataError, match="got 1 completions, 1 answers and 2 prompt ids, expected as many"):
        score_safely(["a"], ["b"], exact_answer, prompt_ids=[0, 1])
    with pytest.raises(ConfigError, match="on_error: got 'zero', expected one of score, raise"):
        score_safely([], [], exact_answer, prompt_ids=[], on_error="zero")
    with pytest.raises(ConfigError, match="error_reward: got nan, expected a finite number"):
        score_safely([], [], exact_answer, prompt_ids=[], error_reward=float("nan"))
