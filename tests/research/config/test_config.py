"""What a config may say, what it may not, and what of it makes a stage what it is."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from experiments import base, quickstart
from models.config import ModelConfig
from research.config.experiment import Experiment
from research.config.identity import evaluation_identity, run_identity, stage_identity
from research.config.references import provided
from research.config.resolve import resolve, used_keys
from research.config.schema import keys_of, sections_of
from research.config.sections import Data, Evaluation, Model, Sampler, StageSection, Tools
from research.config.tree import Tree, flatten, merged
from research.core.errors import ConfigError


def objectives() -> Mapping[str, Any]:
    return {name: target for name, (_, target) in provided("objective").items()}


def configured(objective: str = "grpo", **changes: Any) -> Tree:
    """The defaults with this objective in `rl`; `rl__steps=3` sets `rl.steps`."""
    return changed(merged(base.get_config().to_dict(), "rl.objective.name", objective), changes)


def changed(tree: Tree, changes: Mapping[str, Any]) -> Tree:
    """The tree with keys set, `__` standing for a dot."""
    for key, value in changes.items():
        tree = merged(tree, key.replace("__", "."), value)
    return tree


@pytest.mark.parametrize("module", [base, quickstart])
def test_the_configs_resolve(module: Any) -> None:
    experiment = resolve(module.get_config())
    assert [stage.name for stage in experiment.stages] == ["pretrain", "sft", "rl"]
    assert [stage.online for stage in experiment.stages] == [False, False, True]
    assert experiment.model_config(512).vocab_size == 512
    assert experiment.tree["name"] == module.get_config().name


def test_sections_are_what_is_built_from_them() -> None:
    assert set(keys_of(Model)) == {*vars(ModelConfig)["__dataclass_fields__"]} - {"vocab_size"} | {"max_length"}


def test_every_key_is_documented_and_its_default_is_allowed() -> None:
    def check(cls: type, where: str) -> None:
        for name, declared in keys_of(cls).items():
            assert declared.doc.strip(), f"{where}{name}"
            assert declared.parse(f"{where}{name}", declared.default) == declared.default
        for name, inner in sections_of(cls).items():
            check(inner, f"{where}{name}.")

    for cls in (StageSection, Data, Evaluation, Sampler, Tools, Model):
        check(cls, "")
    for kind in ("objective", "optimizer", "schedule", "task", "tool", "transform"):
        for name, (_, target) in provided(kind).items():  # type: ignore[arg-type]
            for option, declared in keys_of(target).items():
                assert declared.doc.strip(), f"{name}.{option}"
                assert declared.parse(option, declared.default) == declared.default, f"{name}.{option}"


BAD = [
    ("rl.rollout.group_size", 1, r"rl\.rollout\.group_size: got 1, expected >= 2 because a completion is compared"),
    ("rl.rollout.max_prompt_length", 2000, r"rl\.rollout: got max_prompt_length 2000 \+ .* 64 = 2064, .*=2048"),
    ("evaluation.max_new_tokens", 2000, r"evaluation: got max_prompt_length 64 \+ max_new_tokens 2000"),
    ("sft.length", 4096, r"sft\.length: got 4096, expected at most model\.max_length=2048"),
    ("rl.rollout.top_k", 5, r"rl\.rollout: got top_k 5 .* under grpo"),
    ("rl.rollout.top_p", 0.9, r"rl\.rollout: .*top_p 0\.9, expected 0 and 1 under grpo"),
    ("rl.objective.name", "pop", r"rl\.objective\.name: got 'pop', expected one of cispo, cpo, dapo"),
    ("rl.roles.reference", "rm", None),
    ("rl.start_from", "rl", r"rl\.start_from: got 'rl', expected scratch, .*earlier stage: pretrain, sft"),
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
    ("stages", (), r"stages: got \(\)"),
    ("stages", ("sft", "sft"), r"stages: got"),
    ("model.num_kv_heads", 3, r"model\.num_kv_heads: got 3, expected a divisor of num_heads=4"),
    ("model.head_dim", 7, r"model\.head_dim: got 7, expected an even number"),
    ("model.num_layers", 0, r"model\.num_layers: got 0"),
    ("model.remat", "some", r"model\.remat: got 'some', expected one of none, dots, full"),
    ("evaluation.correct", "judge", r"evaluation\.correct: got 'judge', expected one of correct"),
    ("rl.reward.functions", ("judge",), r"rl\.reward\.functions: got 'judge', expected one of"),
    ("rl.reward.functions", (), r"rl\.reward\.functions: got \[\], expected at least one"),
    ("rl.reward.weights", (1.0, 2.0), r"rl\.reward\.weights: got \[1\.0, 2\.0\], expected one for each of"),
    ("rl.steps", 2.5, r"rl\.steps: got 2\.5, expected a whole number like 100"),
    ("rl.seed", 1.0, r"rl\.seed: got 1\.0, expected a whole number"),
    ("rl.steps", None, r"rl\.steps: got None, expected a whole number"),
    ("rl.optimizer", None, r"rl\.optimizer: got None, expected a section"),
    ("rl.optimizer.learning_rate", "fast", r"rl\.optimizer\.learning_rate: got 'fast', expected a number"),
    ("evaluation.k", ("1",), r"evaluation\.k: got '1'|evaluation\.k: got \('1',\), expected a tuple, each a whole"),
    ("rl.seed", 2**63, r"rl\.seed: got 9223372036854775808, expected 0 to 2"),
    ("model.rope_theta", 0.0, r"model\.rope_theta: got 0\.0"),
    ("model.norm_eps", math.nan, r"model\.norm_eps: got nan"),
    ("name", "../../evil\0", r"name: got"),
    ("mesh.fsdp", -1, r"mesh: got .*at most one of them -1"),
    ("rl.rollout.minibatches", 5, r"rl\.rollout\.minibatches: got 5, expected a divisor of the 32 prompts"),
    ("pretrain.data.text_weight", 0.0, r"pretrain\.data: got text_weight and problems_weight 0"),
    ("pretrain.data.text_weight", -1.0, r"pretrain\.data\.text_weight: got -1"),
    ("rl.optimizer.learning_rate", math.nan, r"rl\.optimizer\.learning_rate: got nan"),
    ("rl.optimizer.learning_rate", math.inf, r"rl\.optimizer\.learning_rate: got inf"),
    ("rl.optimizer.learning_rate", -1e-3, r"rl\.optimizer\.learning_rate: got -0\.001, expected >= 0"),
    ("rl.optimizer.adamw.b2", 1.0, r"rl\.optimizer\.adamw\.b2: got 1\.0"),
    ("rl.objective.grpo.ddof", 2, r"rl\.objective\.grpo\.ddof: got 2"),
    ("rl.objective.grpo.clip_eps_low", 1.5, r"clip_eps_low: got 1\.5, expected 0 to 1"),
    ("rl.objective.grpo.kl_estimator", "k1", r"kl_estimator: got 'k1', expected one of k3, k2"),
    ("rl.micro_batches", 3, r"rl\.micro_batches: got 3, expected a divisor of the 256 rows"),
    ("sft.micro_batches", 5, r"sft\.micro_batches: got 5, expected a divisor of the 32 rows"),
    ("rl.steps", 0, r"rl\.steps: got 0"),
    ("rl.seed", -1, r"rl\.seed: got -1"),
    ("sft.data.terse.fraction", 1.5, r"sft\.data\.terse\.fraction: got 1\.5"),
    ("tools.names", ("calculator",), r"sampler\.slots: got 0, expected > 0 with tools because"),
    ("tools.names", ("abacus",), r"tools\.names: got 'abacus', expected one of calculator, python, search"),
    ("rl.objective.name", "", r"rl\.objective\.name: got '', expected one of cispo"),
    ("rl.optimizer.schedule", "", r"rl\.optimizer\.schedule: got '', expected one of constant"),
    ("data.problems.task", "", r"data\.problems\.task: got '', expected one of arithmetic"),
    ("tools.max_turns", 0, r"tools\.max_turns: got 0, expected >= 1"),
    ("tools.python.isolation", "none", r"tools\.python\.isolation: got 'none', expected one of required, best_effort"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), BAD, ids=[f"{k}={v}" for k, v, _ in BAD])
def test_bad_values(key: str, value: Any, message: str) -> None:
    tree = merged(configured(), key, value)
    if message is None:  # without a KL term nobody asks who the reference is
        assert resolve(tree)
        return
    with pytest.raises(ConfigError, match=message) as raised:
        resolve(tree)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("objective", "key", "value", "message"),
    [
        ("rejection_sampling", "keep_per_prompt", 9, r"rl\.objective\.rejection_sampling\.keep_per_prompt: got 9"),
        ("dpo", "pairs_per_prompt", 5, r"rl\.objective\.dpo\.pairs_per_prompt: got 5, expected 1 to 4"),
        ("dpo", "beta", 0.0, r"rl\.objective\.dpo\.beta: got 0"),
        ("dpo", "label_smoothing", 0.6, r"rl\.objective\.dpo\.label_smoothing"),
    ],
)
def test_bad_options(objective: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(merged(configured(objective), f"rl.objective.{objective}.{key}", value))


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
    for overrides, tree in (((), merged(configured(), key, 1)), ((f"{key}=1",), configured())):
        with pytest.raises(ConfigError, match=f"^{key}: unknown config key; the nearest known one is {nearest}"):
            resolve(tree, overrides)


def test_overrides_are_read_as_the_type_that_the_key_has() -> None:
    texts = ("rl.optimizer.learning_rate=3e-4", "evaluation.k=(1, 2)", "rl.steps=1_000", "sft.data.packing=False")
    found = resolve(configured(), (*texts, "ablation.seed_keys=rl.seed,sft.seed"))
    assert found.stage("rl").optimizer.learning_rate == 3e-4 and found.stage("rl").steps == 1000
    assert found.evaluation.k == (1, 2) and not found.stage("sft").data.packing
    assert found.ablation.seed_keys == ("rl.seed", "sft.seed")
    for text, message in (
        ("rl.steps=2.5", r"rl\.steps: got '2\.5', expected a whole number"),
        ("rl.steps", r"override: got 'rl\.steps', expected dotted\.key=value"),
        ("rl.steps.more=1", r"rl\.steps"),
        ("sft.data.packing=maybe", r"sft\.data\.packing: got 'maybe', expected true or false"),
        ("rl.optimizer.learning_rate=" + "9" * 5000, r"learning_rate: got .*expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(configured(), [text])
    with pytest.raises(ConfigError, match="rl.steps is set twice"):
        resolve(configured(), ["rl.steps=1", "rl.steps=2"])
    assert resolve(configured(), ["stages=pretrain,sft"]).stages[-1].name == "sft"


def test_an_objective_is_named_with_its_options_in_one_go() -> None:
    found = resolve(configured(), ["rl.objective.name=dpo", "rl.objective.dpo.beta=0.3"])
    assert found.stage("rl").options["beta"] == 0.3


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
        ("grpo", {}, "data.problems.jsonl.path"),
        ("grpo", {}, "tools.max_turns"),
        ("grpo", {"tools__names": ("calculator",), "sampler__slots": 4}, "tools.python.isolation"),
        ("grpo", {"tools__names": ("python",), "sampler__slots": 4}, "tools.search.results"),
        ("grpo", {"stages": ("sft",)}, "rl.steps"),
    ],
)
def test_overrides_without_effect_are_refused(objective: str, changes: dict[str, Any], key: str) -> None:
    tree = configured(objective, **changes)
    declared = declaration_of(key)
    said = []
    for value in declared.choices or other_values(key, declared.default):
        with pytest.raises(ConfigError) as raised:
            resolve(tree, [f"{key}={value}"])
        said.append(str(raised.value))
    assert any(text.startswith(f"{key}: has no effect under") for text in said), said
    assert resolve(tree)


def declaration_of(key: str) -> Any:
    """Of a key, whichever section or component declares it."""
    section, *rest = key.split(".")
    sections = {"data": Data, "evaluation": Evaluation, "sampler": Sampler, "tools": Tools, "model": Model}
    cls: Any = sections.get(section, StageSection)
    for part in rest[:-1]:
        inner = sections_of(cls)
        if part in inner:
            cls = inner[part]
        elif part != "objective":
            kinds = ("objective", "optimizer", "schedule", "task", "tool", "transform")
            cls = next(found for kind in kinds if (found := provided(kind).get(part)))[1]  # type: ignore[arg-type]
    return keys_of(cls)[rest[-1]]


def test_tools_are_part_of_what_a_run_is_only_where_there_are_some() -> None:
    plain = resolve(configured(sampler__slots=4))
    tools = resolve(configured(sampler__slots=4, tools__names=("calculator",)))
    for identity in (stage_identity, evaluation_identity):
        without, found = identity(plain, plain.stage("rl")), identity(tools, tools.stage("rl"))
        assert "tools" not in without
        assert found.pop("tools")["names"][0]["name"] == "calculator"
        assert found == without


def with_judges(objective: str, **changes: Any) -> Tree:
    """`configured`, with a reward model, a process reward model and a teacher that can play roles."""
    tree = configured(objective)
    for name, trained in (("reward", "reward_model"), ("prm", "prm"), ("teacher", "sft")):
        tree[name] = base.stage(trained).to_dict()
    judges = {
        "teacher.model": "teacher_model",
        "stages": ("pretrain", "sft", "teacher", "reward", "prm", "rl"),
        "rl.roles.teacher": "teacher",
        "rl.objective.dpo.label_smoothing": 0.1,  # exo_pair takes its log
    }
    return changed(tree, {**judges, **changes})


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
    """Every key of the stage: an ignored one leaves what the run is, an effective one changes it."""
    tree = with_judges(objective, **changes)
    before = resolve(tree)
    used = {key for key in used_keys(before) if key.startswith("rl.")}
    values = {f"rl.{key}": value for key, value in flatten(before.tree["rl"]).items()}
    for name, option in objectives()[objective].options.items():
        values[f"rl.objective.{objective}.{name}"] = before.stage("rl").options.get(name, option.default)
    assert used <= set(values), sorted(used - set(values))
    tried = set()
    for key, now in values.items():
        if key in ("rl.objective.name", "rl.data.source"):
            continue  # another stage altogether
        for value in other_values(key, now):
            try:
                after = resolve(merged(tree, key, value))
            except ConfigError:
                continue
            tried.add(key)
            effect = identity_of(after) != identity_of(before)
            assert effect == (key in used and key not in RECORDS), key
            break
    assert set(values) - tried <= {"rl.objective.name", "rl.data.source"} | UNTESTABLE, sorted(
        set(values) - tried - UNTESTABLE
    )


def identity_of(experiment: Experiment) -> Tree:
    """What the last run is."""
    return run_identity(experiment, "rl")


RECORDS = {
    *("rl.log_every", "rl.eval_every", "rl.eval_batches", "rl.eval_problems", "rl.checkpoint_every"),
    *("rl.keep_checkpoints", "rl.optimizer.max_skipped", "rl.rollout.monitor_kl"),
}
"""Effective keys that change only what is written down, and when."""


def test_what_only_an_evaluation_reads_is_no_part_of_a_stage() -> None:
    before = resolve(configured())
    for key, value in (("evaluation.max_prompt_length", 128), ("evaluation.seed", 1), ("rl.final_answer", "majority")):
        after = resolve(merged(configured(), key, value))
        assert stage_identity(after, after.stage("rl")) == stage_identity(before, before.stage("rl")), key
        assert evaluation_identity(after, after.stage("rl")) != evaluation_identity(before, before.stage("rl")), key
    for key, value in (("mesh.fsdp", 2), ("evaluation.batch_problems", 8), ("rl.log_every", 3), ("sampler.slots", 8)):
        after = resolve(merged(configured(), key, value))
        assert run_identity(after, "rl") == run_identity(before, "rl"), key


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
    "rl.reward.functions",  # tested with bad values and by the rewards' own tests
    "rl.reward.weights",
    "rl.extend",  # needs a folder
    "rl.rollout.minibatches",
}


def other_values(key: str, value: Any) -> list[Any]:
    short = key.removeprefix("rl.")
    parts = short.split(".")
    choices = OTHERS.get(short, ())
    if parts[0] == "objective" and len(parts) == 3:
        choices = objectives()[parts[1]].options[parts[2]].choices
    elif not choices:
        cls: Any = StageSection
        for part in parts[:-1]:
            cls = sections_of(cls).get(part)
        choices = keys_of(cls)[parts[-1]].choices if cls and parts[-1] in keys_of(cls) else ()
    if choices:
        return [choice for choice in choices if choice != value]
    if isinstance(value, str):
        return ["something"]
    if isinstance(value, bool):
        return [not value]
    candidates: list[Any]
    if isinstance(value, float):
        candidates = [value * 2, value + 1, value / 2, value + 0.25, value - 0.1, value + 3]
    elif isinstance(value, tuple):
        candidates = []
    else:
        candidates = [value * 2, value + 1, value - 1]
    return [candidate for candidate in candidates if candidate != value]


OTHERS: dict[str, tuple[Any, ...]] = {
    "start_from": ("pretrain",),
    "data.transform": ("terse",),
    "optimizer.name": ("sgd",),
    "optimizer.schedule": ("linear",),
    "reward.functions": (("final_line",),),
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


def test_two_stages_of_one_objective_differ_only_in_what_they_start_from() -> None:
    config = base.get_config()
    config.again = config.sft.copy_and_resolve_references()
    config.stages = ("pretrain", "sft", "again")
    experiment = resolve(config)
    first, second = experiment.stages[1:]
    assert (first.start, second.start) == ("pretrain", "sft")
    assert stage_identity(experiment, first) == stage_identity(experiment, second)
