"""Bad input that no other test refuses: roles that do not fit, and rewards that an objective would not read."""

from typing import Any

import pytest

from research.config.resolve import resolve
from research.core.errors import ConfigError
from tests.research.config.test_config import with_judges

BETA = {"grpo": "rl.objective.grpo.beta", "ppo": "rl.objective.ppo.kl_coef"}


@pytest.mark.parametrize(("objective", "beta"), BETA.items())
def test_without_a_kl_term_no_reference_is_loaded_and_naming_one_is_refused(objective: str, beta: str) -> None:
    config = with_judges(objective, **{beta: 0.0, "rl.roles.reference": "pretrain"})
    stage = resolve(config).stages[-1]
    assert not stage.facts.roles & {"reference"} and "pretrain" not in stage.inputs
    with pytest.raises(ConfigError, match=r"^rl\.roles\.reference: has no effect under rl\.objective\.name"):
        resolve(config, ["rl.roles.reference=sft"])
    with_beta = with_judges(objective, **{beta: 0.1, "rl.roles.reference": "pretrain"})
    stage = resolve(with_beta).stages[-1]
    assert "reference" in stage.facts.roles and "pretrain" in stage.inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rl.objective.grpo.beta": 0.1, "rl.roles.reference": "teacher"},
            r"rl\.roles\.reference: got 'teacher' of teacher_model, expected one of model",
        ),
        (
            {"rl.objective.grpo.beta": 0.1, "rl.roles.reference": "reward"},
            r"rl\.roles\.reference: got 'reward', which trains a scorer, expected a stage that trains a policy",
        ),
        (
            {"rl.objective.name": "distill", "rl.roles.teacher": "prm"},
            r"rl\.roles\.teacher: got 'prm', which trains a step_scorer, expected a stage that trains a policy",
        ),
        (
            {"rl.reward.source": "model"},
            r"rl\.roles\.reward: got none, expected at least one stage that trains a reward model",
        ),
        (
            {"rl.reward.step_coef": 0.5, "rl.roles.prm": "reward"},
            r"rl\.roles\.prm: got 'reward', which trains a scorer, expected a stage that trains a step_scorer",
        ),
    ],
)
def test_a_role_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(with_judges("grpo", **changes))


def test_student_and_teacher_of_one_run_have_one_vocabulary() -> None:
    """The tokenizer gives it; no section of a config can say another."""
    experiment = resolve(with_judges("distill"))
    student, teacher = (experiment.model_config(300, name) for name in ("model", "teacher_model"))
    assert student.vocab_size == teacher.vocab_size == 300
    config = with_judges("distill", **{"teacher_model.vocab_size": 400})
    with pytest.raises(ConfigError, match=r"^teacher_model\.vocab_size: unknown config key"):
        resolve(config)


@pytest.mark.parametrize(
    ("objective", "key", "value"),
    [
        ("dpo", "step_coef", 0.5),
        ("dpo", "difficulty_weighting", "fail_rate"),
        ("kto", "missing_eos_penalty", 0.5),
        ("rejection_sampling", "missing_eos_penalty", 0.5),
        ("rejection_sampling", "difficulty_weighting", "fail_rate"),
        ("distill", "missing_eos_penalty", 0.5),
        ("reinforce_pp", "step_coef", 0.5),
    ],
)
def test_a_reward_that_the_objective_does_not_read_is_refused(objective: str, key: str, value: Any) -> None:
    config = with_judges(objective, **{f"rl.reward.{key}": value, "rl.roles.prm": "prm"})
    with pytest.raises(ConfigError, match=f"rl.reward.{key}"):
        resolve(config)


def test_step_rewards_with_a_ratio_of_the_whole_sequence_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rl\.reward\.step_coef|ratio_level"):
        resolve(with_judges("gspo", **{"rl.reward.step_coef": 0.5, "rl.roles.prm": "prm"}))


@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_k1_as_a_loss_is_refused_with_the_reason(objective: str) -> None:
    config = with_judges(objective, **{BETA[objective]: 0.1, f"rl.objective.{objective}.kl_estimator": "k1"})
    with pytest.raises(ConfigError, match="expected gradient is zero"):
        resolve(config)
