"""Rewards of a batch: what cannot tell costs one sample, what is not finite ends the run, sums are weighted."""

from typing import Any

import numpy as np
import pytest

from research.config.references import find
from research.core.errors import DataError
from research.data.chat import Message
from research.rewards.base import Dialogue, RewardContext, RewardError, Sample, WeightedReward, score
from research.rewards.builtin import PROVIDES
from research.tasks.jsonl import Jsonl
from tests.objectives.cases import SEEDS

TEXTS = ("#### 4", "#### 5", "4", "", "#### 4\nno", "boom", "none")
TASK = Jsonl(answer_format="mark")


def samples(texts: Any, ids: Any = None, *, record: Any = None, stopped: bool = True) -> list[Sample]:
    record = {"prompt": "2+2", "answer": "4", "unit": "apples"} if record is None else record
    context = RewardContext(TASK, (Message("user", "2+2"),), 3, stopped, 7)
    ids = range(len(texts)) if ids is None else ids
    return [Sample(text, record, context, int(i)) for text, i in zip(texts, ids, strict=True)]


def fragile(completion: str, record: Any, context: RewardContext) -> Any:
    """Right or wrong, but raises on one word and cannot tell on another."""
    if completion == "boom":
        raise KeyError("no such unit")
    return None if completion == "none" else context.task.correct(completion, record)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_bad_sample_costs_one_sample(seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = [TEXTS[i] for i in rng.integers(len(TEXTS), size=rng.integers(1, 9))]
    ids, unknown = rng.integers(1000, size=len(texts)), float(rng.choice([0.0, -1.0]))
    found = score(samples(texts, ids), [WeightedReward("mine", fragile)], unknown=unknown)
    cannot = [text in ("boom", "none") for text in texts]
    expected = [unknown if c else float(t in ("#### 4", "#### 4\nno")) for t, c in zip(texts, cannot, strict=True)]
    assert found.rewards.dtype == np.float32 and found.rewards.tolist() == expected
    assert np.isnan(found.values["mine"]).tolist() == cannot
    assert found.errors == tuple(
        RewardError(int(i), "mine", "KeyError: 'no such unit'")
        for i, text in zip(ids, texts, strict=True)
        if text == "boom"
    )
    assert found.metrics() == pytest.approx(
        {
            "reward/mine/mean": np.mean(expected),
            "reward/mine/std": np.std(expected),
            "reward/mine/unknown": np.mean(cannot),
        }
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_weighted_sum_and_each_function(seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = [TEXTS[i] for i in rng.integers(len(TEXTS), size=rng.integers(1, 9))]
    weights = (1.0, float(rng.normal()), 0.0)
    table = {"right": fragile, "long": lambda text, *_: len(text), "watched": PROVIDES["reward"]["exact"]}
    rewards = [WeightedReward(*pair, weight) for pair, weight in zip(table.items(), weights, strict=True)]
    found = score(samples(texts), rewards, unknown=-0.5)
    for row, (text, sample) in enumerate(zip(texts, samples(texts), strict=True)):
        each = {}
        for name, function in table.items():
            known = name != "right" or text not in ("boom", "none")
            each[name] = float(function(sample.completion, sample.record, sample.context)) if known else -0.5
            if known:
                assert found.values[name][row] == each[name]
        total = sum(w * r for w, r in zip(weights, each.values(), strict=True))
        assert found.rewards[row] == pytest.approx(total, abs=1e-6)
        assert found.known[row] == (text not in ("boom", "none"))
    silent = score(samples(["none"]), [rewards[1], WeightedReward("right", fragile, 0.0)])
    assert silent.known.all() and np.isnan(silent.values["right"]).all(), "only logged"


def test_functions_see_every_column_and_the_context() -> None:
    seen = []

    def mine(completion: str, record: Any, context: RewardContext) -> float:
        seen.append((completion, record["unit"], context.length, context.stopped, context.seed, context.prompt))
        return 1.0

    score(samples(["a"]), [WeightedReward("mine", mine)])
    assert seen == [("a", "apples", 3, True, 7, (Message("user", "2+2"),))]


@pytest.mark.parametrize(
    ("returned", "reward", "entries"),
    [
        ({"style": 0.25, "content": 1}, 1.25, {"mine/style": 0.25, "mine/content": 1.0}),
        ({"reward": 2, "style": 0.25}, 2.0, {"mine/style": 0.25}),
        ({}, -3.0, {}),
        (None, -3.0, {}),
        ("1.0", -3.0, {}),
        ({"style": "good"}, -3.0, {}),
        (["1"], -3.0, {}),
        (True, 1.0, {}),
        (np.float32(0.5), 0.5, {}),
        (np.array(0.5), 0.5, {}),
    ],
)  # fmt: skip
def test_what_a_function_may_return(returned: Any, reward: float, entries: dict[str, float]) -> None:
    found = score(samples(["a"]), [WeightedReward("mine", lambda *_: returned)], unknown=-3.0)
    assert found.rewards.tolist() == [reward]
    assert {name: values.tolist() for name, values in found.entries.items()} == {
        name: [value] for name, value in entries.items()
    }
    metrics = found.metrics()
    assert metrics["reward/mine/unknown"] == (reward == -3.0)
    assert {name: metrics[f"reward/{name}"] for name in entries} == entries


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
@pytest.mark.parametrize("named", [False, True])
def test_a_reward_that_is_not_finite_names_prompt_and_function(value: float, named: bool) -> None:
    def broken(completion: str, record: Any, context: Any) -> Any:  # noqa: ARG001
        value_b = value if completion == "b" else 0.0
        return {"reward": 1.0, "style": value_b} if named else value_b

    with pytest.raises(DataError, match="prompt 42: reward function mine returned .*, expected a finite number"):
        score(samples("ab", [41, 42]), [WeightedReward("mine", broken)])


def test_only_exceptions_are_caught() -> None:
    def interrupted(*_: Any) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(samples(["a"]), [WeightedReward("mine", interrupted)])


def test_exceptions_that_are_long_or_cannot_be_printed_are_recorded_too() -> None:
    class Rude(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    def mine(completion: str, *_: Any) -> float:
        raise Rude if completion == "rude" else ValueError("x" * 10_000)

    rude, long = score(samples(["rude", "long"]), [WeightedReward("mine", mine)]).errors
    assert "Rude" in rude.error and len(long.error) == 300


@pytest.mark.parametrize(
    ("name", "rights", "wrongs"),
    [
        ("correct", ["x\n#### 4", "####4\nmore"], ["4", "#### 5", ""]),
        ("exact", ["#### 4.0", "\\boxed{4}"], ["4", "#### 5", ""]),
        ("plain", ["4", "so\n4."], ["#### 4", "it is 4", ""]),
        ("normalized", ["it is 4.", "#### $4"], ["4 or 5", "four", ""]),
        ("final_line", ["x\n#### 5", "#### 1\n#### 2\n"], ["#### 4\nmore", "#### ", ""]),
        ("one_final_line", ["x\n#### 5"], ["#### 1\n#### 2", "#### 4\nmore", ""]),
    ],
)
def test_built_in_functions_by_name(name: str, rights: list[str], wrongs: list[str]) -> None:
    function = find("reward", name, "rl.reward.functions").make({})
    for texts, reward in ((rights, 1.0), (wrongs, 0.0)):
        assert score(samples(texts), [WeightedReward(name, function)]).rewards.tolist() == [reward] * len(texts)
    cut = score(samples(rights, stopped=False), [WeightedReward(name, function)])
    assert not cut.rewards.any(), "a completion that was cut is not right, whatever it says"


@pytest.mark.parametrize("name", ["correct", "exact", "plain", "normalized"])
def test_without_an_answer_nobody_can_tell(name: str) -> None:
    function, record = PROVIDES["reward"][name], {"prompt": "?", "answer": " "}
    found = score(samples(["#### 4"], record=record), [WeightedReward(name, function)])
    assert np.isnan(found.values[name]).all()


def test_a_class_brings_its_options(tmp_path: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\nfrom research.config.schema import key\n"
        "@dataclasses.dataclass(frozen=True)\nclass Short:\n    limit: int = key(10, 'Characters.', low=1)\n"
        "    def __call__(self, completion, record, context):\n        return float(len(completion) <= self.limit)\n"
    )
    component = find("reward", f"{file}:Short", "rl.reward.functions")
    assert list(component.options) == ["limit"]
    function = component.make({"limit": 2})
    assert score(samples(["ab", "abc"]), [WeightedReward(component.name, function)]).rewards.tolist() == [1, 0]


def test_an_environments_rewards_are_a_reward_function() -> None:
    (sample,) = samples(["4"])
    paid = PROVIDES["reward"]["environment"]
    assert paid("4", {}, sample.context) is None, "no environment: it cannot tell"
    assert paid("4", {}, sample.context._replace(turns=Dialogue("", (), 1.5))) == 1.5
