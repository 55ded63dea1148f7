"""The documentation of keys is their declaration."""

import pytest

from research.config.describe import describe
from research.core.errors import ConfigError


def test_a_key_is_described_by_all_that_is_declared() -> None:
    (beta,) = describe("rl.objective.grpo.beta")
    assert beta.lines() == [
        "rl.objective.grpo.beta = 0.0",
        "    Weight of the KL to the reference; 0 needs no reference.",
        "    from 0",
        "    changes what is trained; arms that differ in it share a compilation",
    ]
    (length,) = describe("sft.length")
    assert length.lines()[0] == "sft.length = 128  [tokens]"
    (name,) = describe("rl.reward.functions")
    assert "file.py:attribute" in "\n".join(name.lines()) and "correct" in "\n".join(name.lines())


def test_a_section_lists_its_keys_and_those_of_its_components() -> None:
    found = {each.path for each in describe("rl.optimizer")}
    assert {"rl.optimizer.learning_rate", "rl.optimizer.adamw.b1", "rl.optimizer.cosine.end_fraction"} <= found
    assert len(describe("")) > 250


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"rl\.rollout\.group: unknown config key; .* rl\.rollout\.group_size"):
        describe("rl.rollout.group")


def test_a_name_without_a_dot_is_a_section_or_refused() -> None:
    assert describe("pretrain")[0].path == "pretrain.model" and describe("reward.steps")[0].path == "reward.steps"
    with pytest.raises(ConfigError, match=r"^stages: is no section, expected one of model, .*, pretrain, sft, rl, or"):
        describe("stages")
