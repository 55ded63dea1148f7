"""Arms are checked, all of them, before any of them runs."""

from typing import Any

import pytest
from ml_collections import ConfigDict

from experiments import base, quickstart
from research.ablation.arms import Arm, Plan, plan
from research.config.identity import stage_identity
from research.config.resolve import resolve
from research.config.tree import flatten, merged
from research.core.errors import ConfigError


def ablation(arms: dict[str, Any], **settings: Any) -> ConfigDict:
    config = base.get_config()
    config.ablation.arms = arms
    config.ablation.update(settings)
    return config


def names(planned: Plan) -> list[str]:
    return [arm.name for arm in planned.arms]


def test_arms_of_the_quickstart() -> None:
    config = quickstart.get_config()
    planned = plan(config)
    assert names(planned) == list(planned.experiments) == list(config.ablation.arms)
    first, *others = planned.experiments.values()
    for other in others:  # they share all but the last stage
        for one, two in zip(first.stages[:-1], other.stages[:-1], strict=True):
            assert stage_identity(first, one) == stage_identity(other, two)


@pytest.mark.parametrize(
    ("arms", "settings", "message"),
    [
        ({}, {}, r"ablation\.arms: got none"),
        ({"a": "rl.steps=3"}, {}, r"ablation\.arms\.'a': got 'rl\.steps=3', expected a tuple"),
        ({"a": ("rl.steps=3", "rl.steps=4")}, {}, r"ablation\.arms\.a: rl\.steps is set twice"),
        ({"a": ("rl.stpes=3",)}, {}, r"ablation\.arms\.a: rl\.stpes: unknown config key; .* rl\.steps"),
        ({"a": ()}, {"control": "b"}, r"ablation\.control: got 'b', expected one of 'a'"),
        ({"a": ("rl.steps=100",)}, {}, r"ablation\.arms\.a: its overrides \(rl\.steps=100\) change nothing"),
        ({"a": ("rl.batch_size=3",)}, {}, r"ablation\.arms\.a: rl\.batch_size: has no effect under rl\.obj"),
        ({"a": ("rl.steps=3",), "b": ("rl.steps=3",)}, {}, r"ablation\.arms\.b: is the same experiment as arm a"),
        ({"a": (), "b": ()}, {}, r"ablation\.arms\.b: is the same experiment as arm a"),
        ({"a": ("rl.rollout.group_size=1",)}, {}, r"ablation\.arms\.a: rl\.rollout\.group_size: got 1"),
        ({"a": ()}, {"seeds": (0, 0)}, r"ablation\.seeds: got \[0, 0\]"),
        ({"a": ()}, {"seeds": ()}, r"ablation\.seeds: got \[\]"),
        ({"a": ()}, {"seed_keys": ("rl.sed",)}, r"ablation\.seed_keys: rl\.sed: unknown config key; .* rl\.seed"),
        ({"a": ()}, {"stage": "ppo"}, r"ablation\.stage: got 'ppo', which arm \w+ does not have"),
        ({"../a": ()}, {}, r"ablation\.arms: got the name '\.\./a', expected 1 to 120 printable characters without /"),
        ({"/etc/a": ()}, {}, r"ablation\.arms: got the name"),
        ({"a\0b": ()}, {}, r"ablation\.arms: got the name"),
        ({"..": ()}, {}, r"ablation\.arms: got the name"),
        ({"a": (), "b": ("evaluation.correct=final_line",)}, {}, r"ablation\.arms\.b: is measured by another evaluat"),
        ({"a": (), "b": ("evaluation.samples=8",)}, {}, r"ablation\.arms\.b: is measured by another evaluation than"),
        ({"a": ()}, {"metrc": "eval/loss"}, r"ablation\.metrc: unknown config key; .* ablation\.metric"),
        ({"a": ()}, {"metric": "eval/pass@16"}, r"ablation\.metric: got 'eval/pass@16', but stage rl of arm a"),
        ({"a": ()}, {"metric": "eval/acuracy"}, r"ablation\.metric: got 'eval/acuracy', but stage rl of arm a"),
        ({"a": ()}, {"metric": "eval/loss"}, r"ablation\.metric: got 'eval/loss', but stage rl of arm a"),
        ({"a": ("evaluation.evaluators=()",)}, {}, r"ablation\.metric: got 'eval/pass@1', .* measures nothing"),
        ({"a": ()}, {"pairs": ("a:c",)}, r"ablation\.pairs: got 'a:c', expected 'a:b' of two arms among 'a'"),
        ({"a": ()}, {"grid": {"rl.steps": ()}}, r"ablation\.grid\.rl\.steps: got \(\), expected a tuple"),
        ({"a": ()}, {"grid": {"rl.steps": (1, 1)}}, r"ablation\.grid\.rl\.steps: got \(1, 1\)"),
        ({"a": ()}, {"grid": {"rl.stpes": (1, 2)}}, r"rl\.stpes: unknown config key"),
        ({"a": ("rl.steps=3", "rl.seed=3")}, {}, r"ablation\.arms\.a: rl\.seed: is one of ablation\.seed_keys"),
    ],
)  # fmt: skip
def test_ablations_that_make_no_sense(arms: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(ablation(arms, **settings))


def test_the_control_is_the_first_arm_unless_named() -> None:
    arms = {"a": (), "b": ("rl.steps=3",)}
    assert names(plan(ablation(arms))) == ["a", "b"]
    assert names(plan(ablation(arms, control="b"))) == ["b", "a"]


def test_names_may_have_dots_and_signs() -> None:
    assert names(plan(ablation({"lr 3e-4 ($x^$)": (), "b.c": ("rl.steps=3",)}))) == ["lr 3e-4 ($x^$)", "b.c"]


def test_a_grid_makes_the_arms_its_base_point_included() -> None:
    grid = {"rl.optimizer.learning_rate": (1e-3, 3e-4), "sft.optimizer.learning_rate": (1e-3,), "rl.steps": (100, 50)}
    planned = plan(ablation({}, grid=grid))
    assert names(planned)[0] == "rl.optimizer.learning_rate=0.001, sft.optimizer.learning_rate=0.001, steps=100"
    assert len(planned.arms) == 4
    assert planned.arms[3].grid == {
        "rl.optimizer.learning_rate": "0.0003",
        "sft.optimizer.learning_rate": "0.001",
        "rl.steps": "50",
    }
    last = planned.experiments[planned.arms[3].name]
    assert last.stage("rl").optimizer.learning_rate == 3e-4 and last.stage("rl").steps == 50
    both = plan(ablation({"long": ("rl.steps=400",)}, grid={"rl.steps": (100, 50)}))
    assert names(both) == ["long", "steps=100", "steps=50"]


def test_overrides_then_seeds_are_written_and_nothing_else() -> None:
    arm = {"a": ("rl.optimizer.learning_rate=1", "rl.data.limit=7")}
    config = ablation(arm, seed_keys=("rl.seed", "sft.seed"))
    planned = plan(config)
    before = flatten(resolve(config).tree)
    after = flatten(planned.run(planned.arms[0], 5).tree)
    changed = {key: after[key] for key in after if before.get(key) != after[key]}
    assert changed == {"rl.optimizer.learning_rate": 1.0, "rl.data.limit": 7, "rl.seed": 5, "sft.seed": 5}
    plain = merged(merged(config.to_dict(), "rl.seed", 5), "sft.seed", 5)
    assert planned.run(Arm("x", ()), 5).tree == resolve(plain).tree


def test_the_command_line_reaches_every_arm_and_must_reach_one() -> None:
    arms = {"a": (), "b": ("rl.objective.name=dpo",)}
    planned = plan(ablation(arms), ["rl.objective.grpo.beta=0.1", "ablation.seeds=3"])
    assert planned.experiments["a"].stage("rl").options["beta"] == 0.1
    assert planned.base.ablation.seeds == (3,)
    with pytest.raises(ConfigError, match=r"rl\.objective\.kto\.beta: has no effect"):
        plan(ablation(arms), ["rl.objective.kto.beta=0.2"])


def test_the_command_line_is_read_as_it_is_without_an_ablation() -> None:
    """The chain of stages too; and a key that is set twice is refused."""
    arms = {"a": (), "b": ("rl.steps=3",)}
    planned = plan(ablation(arms), ["stages=sft,rl"])
    assert [stage.name for stage in planned.experiments["b"].stages] == ["sft", "rl"]
    with pytest.raises(ConfigError, match=r"rl\.data\.limit is set twice"):
        plan(ablation(arms), ["rl.data.limit=3", "rl.data.limit=4"])
