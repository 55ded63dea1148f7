"""Arms are checked, all of them, before any of them runs."""

from typing import Any

import pytest
from ml_collections import ConfigDict

from experiments import base, quickstart
from research.ablation.arms import Arm, arm_config, check_arms, control_of, parse_override, read_arms
from research.config.checks import flatten
from research.config.experiment import to_tree
from research.config.resolve import resolve
from research.core.errors import ConfigError

KNOWN = {"a.rate": 1e-3, "a.steps": 5, "a.packing": True, "a.name": "sft", "a.k": [1, 4]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.rate=3e-4", 3e-4),
        ("a.rate=2", 2.0),
        ("a.steps=7", 7),
        ("a.packing=false", False),
        ("a.packing=True", True),
        ("a.name=grpo", "grpo"),
        ("a.name=1", "1"),
        ("a.name=", ""),
        ("a.name=x=y", "x=y"),
        ("a.k=(1, 8)", (1, 8)),
        ("a.k=[2]", (2,)),
        (" a.steps = 7 ", 7),
    ],
)
def test_values_take_the_type_of_the_config(text: str, value: Any) -> None:
    _, found = parse_override(text, KNOWN, "arm x")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.steps", r"arm x: got 'a\.steps', expected dotted\.key=value"),
        ("a.step=3", r"arm x: a\.step: unknown config key; the nearest known one is a\.steps"),
        ("a.steps=3.5", r"a\.steps: got '3\.5', expected a int like 5"),
        ("a.steps=true", r"a\.steps: got 'true', expected a int"),
        ("a.packing=1", r"a\.packing: got '1', expected a bool"),
        ("a.rate=fast", r"a\.rate: got 'fast', expected a float like 0\.001"),
        ("a.rate=true", r"a\.rate: got 'true', expected a float"),
        ("a.k=3", r"a\.k: got '3', expected a list"),
        ("a.rate=", r"a\.rate: got ''"),
        ("a.rate=__import__('os')", r"a\.rate: got"),
    ],
)
def test_other_values_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_override(text, KNOWN, "arm x")


def ablation(arms: dict[str, Any], **settings: Any) -> ConfigDict:
    config = base.get_config().unlock()
    config.ablation.arms = ConfigDict(arms)
    config.ablation.update(settings)
    return config.lock()


def test_arms_of_the_quickstart() -> None:
    config = quickstart.get_config()
    arms = read_arms(config)
    experiments = check_arms(config, arms)
    assert list(experiments) == [arm.name for arm in arms] == list(to_tree(config)["ablation"]["arms"])
    first, *others = experiments.values()
    for other in others:  # they share all but the last stage
        assert [s.tree for s in other.stages[:-1]] == [s.tree for s in first.stages[:-1]]


@pytest.mark.parametrize(
    ("arms", "settings", "message"),
    [
        ({}, {}, r"ablation\.arms: got none"),
        ({"a": "rl.steps=3"}, {}, r"ablation\.arms\.a: got a string, expected a tuple"),
        ({"a": ("rl.steps=3", "rl.steps=4")}, {}, r"ablation\.arms\.a: rl\.steps is set twice"),
        ({"a": ("rl.stpes=3",)}, {}, r"ablation\.arms\.a: rl\.stpes: unknown config key; .* rl\.steps"),
        ({"a": ()}, {"control": "b"}, r"ablation\.control: got 'b', expected one of a"),
        ({"a": ("rl.steps=100",)}, {}, r"ablation\.arms\.a: its overrides \(rl\.steps\) change nothing"),
        ({"a": ("rl.batch_size=3",)}, {}, r"ablation\.arms\.a: rl\.batch_size: has no effect under rl\.obj"),
        ({"a": ("rl.steps=3",), "b": ("rl.steps=3",)}, {}, r"ablation\.arms\.b: is the same experiment as arm a"),
        ({"a": (), "b": ()}, {}, r"ablation\.arms\.b: is the same experiment as arm a"),
        ({"a": ("rl.rollout.group_size=1",)}, {}, r"ablation\.arms\.a: rl\.rollout\.group_size: got 1"),
        ({"a": ()}, {"seeds": (0, 0)}, r"ablation\.seeds: got \[0, 0\]"),
        ({"a": ()}, {"seeds": ()}, r"ablation\.seeds: got \[\]"),
        ({"a": ()}, {"seed_keys": ("rl.sed",)}, r"ablation\.seed_keys: rl\.sed: unknown config key; .* rl\.seed"),
        ({"a": ()}, {"stage": "ppo"}, r"ablation\.stage: got 'ppo', which arm \w+ does not have"),
        ({"a": ("rl.steps=3", "rl.seed=3")}, {}, r"ablation\.arms\.a: rl\.seed: is one of ablation\.seed_keys"),
    ],
)  # fmt: skip
def test_ablations_that_make_no_sense(arms: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config = ablation(arms, **settings)
        check_arms(config, read_arms(config))


def test_the_control_is_the_first_arm_unless_named() -> None:
    arms = {"a": (), "b": ("rl.steps=3",)}
    assert control_of(ablation(arms), read_arms(ablation(arms))) == "a"
    named = ablation(arms, control="b")
    assert control_of(named, read_arms(named)) == "b"


def test_overrides_then_seeds_are_written_and_nothing_else() -> None:
    config = ablation(
        {"a": ("rl.optimizer.learning_rate=1", "rl.data.limit=7")}, seed_keys=("rl.seed", "sft.seed")
    )
    (arm,) = read_arms(config)
    run = arm_config(config, arm, seed=5)
    before, after = flatten(to_tree(config)), flatten(to_tree(run))
    changed = {key: after[key] for key in after if before[key] != after[key]}
    assert changed == {
        "rl.optimizer.learning_rate": 1.0,
        "rl.data.limit": 7,
        "rl.seed": 5,
        "sft.seed": 5,
    }
    assert resolve(run).stages[-1].seed == 5
    assert flatten(to_tree(arm_config(config, Arm("x", {})))) == before
