"""What a config may say, what it may not, and what of it makes a stage what it is."""

import dataclasses
import math
from typing import Any

import pytest
from ml_collections import ConfigDict

from experiments import base, quickstart
from models.config import ModelConfig
from research.algorithms.registry import objectives
from research.config.checks import flatten
from research.config.experiment import (
    Evaluation,
    Optimizer,
    Reward,
    Roles,
    Rollout,
    Stage,
    StageData,
    Tools,
    to_tree,
)
from research.config.resolve import resolve, resolve_tree
from research.config.rules import BOUNDS, CHOICES, SECTIONS
from research.core.errors import ConfigError
from research.rewards.shaping import Shaping


def configured(objective: str = "grpo", **changes: Any) -> ConfigDict:
    """The defaults with this objective in `rl`; `rl__steps=3` sets `rl.steps`."""
    config = base.get_config().unlock()
    config.rl.objective.name = objective
    for key, value in changes.items():
        assign(config, key.replace("__", "."), value)
    return config


def assign(config: ConfigDict, key: str, value: Any) -> None:
    *path, last = key.split(".")
    section = config
    for part in path:
        section = section[part]
    with section.ignore_type():
        section[last] = value


@pytest.mark.parametrize("module", [base, quickstart])
def test_the_configs_resolve(module: Any) -> None:
    experiment = resolve(module.get_config())
    assert [stage.name for stage in experiment.stages] == ["pretrain", "sft", "rl"]
    assert [stage.online for stage in experiment.stages] == [False, False, True]
    assert experiment.model_config(512).vocab_size == 512
    assert experiment.tree["name"] == module.get_config().name


def test_the_tables_know_exactly_the_keys_of_base_and_of_the_dataclasses() -> None:
    tree = to_tree(base.get_config())
    del tree["ablation"]
    expected = {
        f"{pattern.replace('*', stage)}.{key}".lstrip(".")
        for pattern, keys in SECTIONS.items()
        for stage in (("pretrain", "sft", "rl") if "*" in pattern else ("",))
        for key in keys
        if f"{pattern}.{key}".lstrip(".") not in SECTIONS
    }
    stages = ("pretrain", "sft", "rl")
    expected -= {"ablation", *(f"{stage}.objective" for stage in stages)}
    for stage in stages:
        for objective in objectives().values():
            expected |= {f"{stage}.objective.{objective.name}.{key}" for key in objective.options}
        expected.add(f"{stage}.objective.name")
    assert expected == set(flatten(tree))
    assert set(objectives()) | {"name"} == set(tree["rl"]["objective"])
    for pattern, cls in {
        "*.data": StageData,
        "*.optimizer": Optimizer,
        "*.rollout": Rollout,
        "*.roles": Roles,
        "evaluation": Evaluation,
        "tools": Tools,
    }.items():
        assert set(SECTIONS[pattern]) == {field.name for field in dataclasses.fields(cls)}
    assert set(SECTIONS["model"]) == {f.name for f in dataclasses.fields(ModelConfig)} - {"vocab_size"} | {
        "max_length"
    }
    own = {field.name for field in dataclasses.fields(Reward)} - {"shaping"}
    assert set(SECTIONS["*.reward"]) == own | {field.name for field in dataclasses.fields(Shaping)}
    assert set(SECTIONS["*"]) <= {field.name for field in dataclasses.fields(Stage)}
    for pattern in (*BOUNDS, *CHOICES):
        assert pattern.replace("*", "rl") in flatten(tree), pattern


BAD = [
    ("rl.rollout.group_size", 1, r"rl\.rollout\.group_size: got 1, expected >= 2 because a completion is compared"),
    ("rl.rollout.max_prompt_length", 2000, r"rl\.rollout: got max_prompt_length 2000 \+ .* 64 = 2064, .*=2048"),
    ("evaluation.max_new_tokens", 2000, r"evaluation: got max_prompt_length 64 \+ max_new_tokens 2000"),
    ("sft.length", 4096, r"sft\.length: got 4096, expected at most model\.max_length=2048"),
    ("rl.rollout.top_k", 5, r"rl\.rollout: got top_k 5 .* under grpo"),
    ("rl.rollout.top_p", 0.9, r"rl\.rollout: .*top_p 0\.9, expected 0 and 1 under grpo"),
    ("rl.objective.name", "pop", r"rl\.objective\.name: got 'pop', expected one of cispo, cpo, dapo"),
    ("rl.roles.reference", "rm", None),
    ("rl.start_from", "rl", r"rl\.start_from: got 'rl', expected scratch or an earlier stage: pretrain, sft"),
    ("rl.reward.source", "model", r"rl\.roles\.reward: got none, expected at least one stage that trains a reward"),
    ("rl.reward.step_coef", 0.5, r"rl\.roles\.prm: got '', expected an earlier stage: pretrain, sft"),
    ("rl.reward.format_coef", 0.5, r"rl\.reward\.format_coef: got 0\.5 .*expected > 0 with a format"),
    ("rl.reward.overlong_buffer", 65, r"rl\.reward\.overlong_buffer: got 65, expected at most"),
    ("rl.rollout.curriculum_low", 1.0, r"rl\.rollout\.curriculum_low: got 1\.0, expected less than"),
    ("rl.objective.grpo.delta", 1.1, r"rl\.objective\.grpo\.delta: got 1\.1, expected 0 \(off\) or more than"),
    ("evaluation.k", (1, 8), r"evaluation\.k: got \[1, 8\], expected values from 1 to evaluation\.samples=4"),
    ("evaluation.k", (), r"evaluation\.k"),
    ("evaluation.temperature", 0.0, r"evaluation\.samples: got 4, expected 1 at evaluation\.temperature=0"),
    ("stages", ("sft", "ppo"), r"stages: got 'ppo'"),
    ("stages", (), r"stages: got \[\]"),
    ("stages", ("sft", "sft"), r"stages: got"),
    ("model.num_kv_heads", 3, r"model\.num_kv_heads: got 3, expected a divisor of num_heads=4"),
    ("model.head_dim", 7, r"model\.head_dim: got 7, expected an even number"),
    ("model.num_layers", 0, r"model\.num_layers: got 0"),
    ("model.remat", "some", r"model\.remat: got 'some', expected one of none, dots, full"),
    ("data.problems.verifier", "judge", r"data\.problems\.verifier: got 'judge'"),
    ("pretrain.data.text_weight", 0.0, r"pretrain\.data: got text_weight and problems_weight 0"),
    ("pretrain.data.text_weight", -1.0, r"pretrain\.data\.text_weight: got -1"),
    ("rl.optimizer.learning_rate", math.nan, r"rl\.optimizer\.learning_rate: got nan"),
    ("rl.optimizer.learning_rate", math.inf, r"rl\.optimizer\.learning_rate: got inf"),
    ("rl.optimizer.learning_rate", -1e-3, r"rl\.optimizer\.learning_rate: got -0\.001, expected >= 0"),
    ("rl.optimizer.b2", 1.0, r"rl\.optimizer\.b2: got 1\.0"),
    ("rl.objective.grpo.ddof", 2, r"rl\.objective\.grpo\.ddof: got 2"),
    ("rl.objective.grpo.clip_eps_low", 1.5, r"clip_eps_low: got 1\.5, expected 0 to 1"),
    ("rl.objective.grpo.kl_estimator", "k1", r"kl_estimator: got 'k1', expected one of k2, k3"),
    ("rl.micro_batches", 3, r"rl\.micro_batches: got 3, expected a divisor of the 256 rows"),
    ("sft.micro_batches", 5, r"sft\.micro_batches: got 5, expected a divisor of the 32 rows"),
    ("rl.steps", 0, r"rl\.steps: got 0"),
    ("rl.seed", -1, r"rl\.seed: got -1"),
    ("sft.data.terse_fraction", 1.5, r"sft\.data\.terse_fraction: got 1\.5"),
    ("tools.names", ("calculator",), r"sampler\.slots: got 0, expected > 0 with tools because"),
    ("tools.names", ("abacus",), r"tools\.names: got \['abacus'\], expected some of calculator, python, search"),
    ("tools.names", ("python", "python"), r"tools\.names: got .*, each once"),
    ("tools.names", ("search",), r"tools\.corpus: got '', expected a file where search is among"),
    ("tools.corpus", "a.txt", r"tools\.corpus: got 'a\.txt', expected .* and '' elsewhere"),
    ("tools.max_turns", 0, r"tools\.max_turns: got 0, expected >= 1"),
    ("tools.isolation", "none", r"tools\.isolation: got 'none', expected one of required, best_effort"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), BAD, ids=[f"{k}={v}" for k, v, _ in BAD])
def test_bad_values(key: str, value: Any, message: str) -> None:
    config = configured()
    assign(config, key, value)
    if message is None:  # without a KL term nobody asks who the reference is
        assert resolve(config)
        return
    with pytest.raises(ConfigError, match=message) as raised:
        resolve(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("objective", "key", "value", "message"),
    [
        (
            "rejection_sampling",
            "keep_per_prompt",
            9,
            r"rl\.objective\.rejection_sampling\.keep_per_prompt: got 9",
        ),
        ("dpo", "pairs_per_prompt", 5, r"rl\.objective\.dpo\.pairs_per_prompt: got 5, expected 1 to 4"),
        ("dpo", "beta", 0.0, r"rl\.objective\.dpo\.beta: got 0"),
        ("dpo", "label_smoothing", 0.6, r"rl\.objective\.dpo\.label_smoothing"),
    ],
)
def test_bad_options(objective: str, key: str, value: Any, message: str) -> None:
    config = configured(objective)
    config.rl.objective[objective][key] = value
    with pytest.raises(ConfigError, match=message):
        resolve(config)


@pytest.mark.parametrize("objective", ["rejection_sampling", "dpo"])
def test_truncated_sampling_is_fine_where_there_is_no_ratio(objective: str) -> None:
    resolve(configured(objective, rl__rollout__top_k=5, rl__rollout__top_p=0.9))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("rl.optimizer.learning_rat", "rl.optimizer.learning_rate"),
        ("rl.stpes", "rl.steps"),
        ("rl.objective.grpo.clip_eps", "rl.objective.grpo.clip_eps_low"),
        ("data.text.max_byte", "data.text.max_bytes"),
        ("modle", "model"),
    ],
)
def test_a_key_that_nothing_reads_is_refused_with_the_nearest_one(key: str, nearest: str) -> None:
    """An unlocked ConfigDict takes a typo for a new key, so the file itself must be checked."""
    config = configured()
    assign(config, key, 1)
    with pytest.raises(ConfigError, match=f"^{key}: unknown config key; the nearest known one is {nearest}"):
        resolve(config)


def test_a_missing_key_is_named() -> None:
    config = configured()
    del config.rl.rollout["top_p"]
    with pytest.raises(ConfigError, match=r"rl\.rollout\.top_p: is missing"):
        resolve(config)


@pytest.mark.parametrize(
    ("objective", "changes", "key"),
    [
        ("grpo", {}, "rl.objective.dpo.beta"),
        ("grpo", {}, "rl.batch_size"),
        ("grpo", {}, "rl.length"),
        ("grpo", {}, "rl.data.source"),
        ("grpo", {}, "rl.objective.grpo.kl_estimator"),  # beta is 0
        ("grpo", {"rl__objective__grpo__normalization": "none"}, "rl.objective.grpo.ddof"),
        ("dpo", {"rl__data__source": "given"}, "rl.rollout.temperature"),
        ("dpo", {"rl__data__source": "given"}, "rl.objective.dpo.pairs_per_prompt"),
        ("grpo", {}, "sft.rollout.group_size"),
        ("grpo", {}, "sft.data.text_weight"),
        ("grpo", {}, "pretrain.data.limit"),  # no problems in the mixture
        ("grpo", {}, "pretrain.eval_problems"),
        ("grpo", {}, "data.preferences.path"),
        ("grpo", {}, "data.problems.path"),
        ("grpo", {}, "tools.max_turns"),
        ("grpo", {"tools__names": ("calculator",), "sampler__slots": 4}, "tools.isolation"),
        ("grpo", {"tools__names": ("python",), "sampler__slots": 4}, "tools.search_results"),
        ("grpo", {"stages": ("sft",)}, "rl.steps"),
    ],
)
def test_overrides_without_effect_are_refused(objective: str, changes: dict[str, Any], key: str) -> None:
    config = configured(objective, **changes)
    with pytest.raises(ConfigError, match=f"^{key}: has no effect under"):
        resolve(config, [key])
    assert resolve(config)


def test_an_override_of_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"rl\.optimiser\.learning_rate: .* rl\.optimizer\.learning_rate"):
        resolve(configured(), ["rl.optimiser.learning_rate"])


def test_tools_are_part_of_what_a_run_is_only_where_there_are_some() -> None:
    plain = resolve(configured(sampler__slots=4))
    assert "tools" not in plain.identity("rl")
    tools = resolve(configured(sampler__slots=4, tools__names=("calculator",)))
    found = tools.identity("rl")
    assert found.pop("tools") == {"names": ["calculator"], "max_turns": 4, "max_result_tokens": 128}
    assert found == plain.identity("rl")


def with_judges(objective: str, **changes: Any) -> ConfigDict:
    """`configured`, with a reward model, a process reward model and a teacher that can play roles."""
    config = configured(objective)
    for name, trained in (("reward", "reward_model"), ("prm", "prm"), ("teacher", "sft")):
        config[name] = base.stage(trained)
    config.teacher.model = "teacher_model"
    config.stages = ("pretrain", "sft", "teacher", "reward", "prm", "rl")
    config.rl.roles.teacher = "teacher"
    config.rl.objective.dpo.label_smoothing = 0.1  # exo_pair takes its log
    config.data.preferences.kind = "arithmetic"  # only generated pairs have steps to leave out
    for key, value in changes.items():
        assign(config, key.replace("__", "."), value)
    return config


STAGES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in sorted(objectives())),
    *(
        (name, {"rl__data__source": "given"})
        for name, objective in sorted(objectives().items())
        if objective.own and objective.given
    ),
    ("next_token", {"rl__data__problems_weight": 0.5}),
    ("dpo", {"rl__objective__dpo__loss_type": "bco_pair"}),
    ("dpo", {"rl__objective__dpo__f_divergence": "alpha"}),
    ("cpo", {"rl__objective__cpo__loss_type": "ipo"}),
    ("distill", {"rl__objective__distill__top_k": 4, "rl__objective__distill__divergence": "jsd"}),
    ("grpo", {"rl__objective__grpo__beta": 0.1, "rl__objective__grpo__normalization": "none"}),
    ("grpo", {"rl__objective__grpo__importance": "token"}),
    ("grpo", {"rl__rollout__curriculum_low": 0.1, "rl__reward__overlong_buffer": 4}),
    ("grpo", {"rl__reward__source": "model", "rl__roles__reward": ("reward",)}),
    ("grpo", {"rl__reward__step_coef": 0.5, "rl__roles__prm": "prm"}),
    ("grpo", {"rl__reward__format_mode": "gated", "rl__reward__format_coef": 0.5}),
    ("ppo", {"rl__objective__ppo__kl_controller": "adaptive", "rl__objective__ppo__kl_in": "loss"}),
    ("ppo", {"rl__objective__ppo__kl_coef": 0.0}),
    ("sft", {"rl__final_answer": "prm", "rl__roles__prm": "prm"}),
]


@pytest.mark.parametrize(("objective", "changes"), STAGES)
def test_a_stage_is_what_has_an_effect_and_nothing_else(objective: str, changes: dict[str, Any]) -> None:
    """Every key of the stage: an ignored one leaves its identity, an effective one changes it."""
    tree = to_tree(with_judges(objective, **changes))
    before = resolve_tree(tree).stages[-1]
    effective = {f"rl.{key}" for key in flatten(before.tree)}
    values = {key: value for key, value in flatten(tree).items() if key.startswith("rl.")}
    assert effective <= set(values) and len(effective) > 18
    tried = set()
    for key, now in values.items():
        if key in ("rl.objective.name", "rl.data.source"):
            continue  # another stage altogether
        for value in other_values(key, now):
            try:
                after = resolve_tree(changed(tree, key, value)).stages[-1]
            except ConfigError:
                continue
            tried.add(key)
            assert (after.tree != before.tree) == (key in effective), key
            break
    assert set(values) - tried <= {"rl.objective.name", "rl.data.source"} | UNTESTABLE, sorted(
        set(values) - tried - UNTESTABLE
    )


def changed(tree: Any, key: str, value: Any) -> Any:
    """A copy of the tree with another value at a dotted key."""
    first, _, rest = key.partition(".")
    return {**tree, first: changed(tree[first], rest, value) if rest else value}


UNTESTABLE = {  # no other single value is allowed where another key or a stage does not follow
    "rl.rollout.top_k",
    "rl.rollout.top_p",
    "rl.reward.format_mode",
    "rl.reward.format_coef",
    "rl.reward.source",
    "rl.reward.step_coef",
    "rl.reward.difficulty_weighting",
    "rl.reward.missing_eos_penalty",
    "rl.reward.normalize",
    "rl.reward.score_clip",
    "rl.reward.length_coef",
    "rl.reward.overlong_buffer",
    "rl.roles.reward",
    "rl.roles.prm",
    "rl.roles.teacher",
    "rl.model",
    "rl.micro_batches",  # bco_pair looks at the whole batch
    "rl.objective.dpo.f_divergence",  # and bco_pair is no function of the contrast
    "rl.objective.gspo.advantage",
    "rl.objective.grpo.advantage",  # with rewards of steps
    "rl.reward.format_pattern",  # where no reward is read
    "rl.reward.overlong_coef",
}


def other_values(key: str, value: Any) -> list[Any]:
    short = key.removeprefix("rl.")
    choices = CHOICES.get(f"*.{short}", OTHERS.get(short, ()))
    parts = short.split(".")
    if parts[0] == "objective" and len(parts) == 3:
        choices = objectives()[parts[1]].options[parts[2]].choices
    if choices:
        return [choice for choice in choices if choice != value]
    if isinstance(value, bool):
        return [not value]
    candidates: list[Any]
    if isinstance(value, float):
        candidates = [value * 2, value + 1, value / 2, value + 0.25, value - 0.1, value + 3]
    else:
        candidates = [value * 2, value + 1, value - 1]
    return [candidate for candidate in candidates if candidate != value]


OTHERS: dict[str, tuple[Any, ...]] = {
    "start_from": ("pretrain",),
    "data.context": ("Think.",),
    "roles.reference": ("pretrain",),
    "roles.teacher": ("sft",),
    "roles.reward": (("reward",), ("reward", "reward")),
    "roles.value": ("reward",),
    "roles.prm": ("prm",),
    "reward.normalize": ("running",),
    "reward.difficulty_weighting": ("fail_rate",),
    "reward.format_mode": ("gated",),
    "reward.format_pattern": ("final_line",),
}
"""What a name can be changed to."""


def test_two_stages_of_one_objective_differ_by_name_only_in_their_keys() -> None:
    config = base.get_config().unlock()
    config.again = config.sft.copy_and_resolve_references()
    config.stages = ("pretrain", "sft", "again")
    experiment = resolve(config)
    first, second = (dict(stage.tree) for stage in experiment.stages[1:])
    assert (first.pop("start_from"), second.pop("start_from")) == ("pretrain", "sft")
    assert first == second
