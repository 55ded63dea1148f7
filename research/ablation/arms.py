"""Arms: an experiment's config with a few dotted overrides each, checked before anything runs."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from research.analysis.glossary import describe
from research.config.experiment import Experiment
from research.config.identity import run_identity
from research.config.resolve import resolve
from research.config.schema import expect, short
from research.config.tree import Tree, flatten, merged, unknown_key, with_overrides
from research.core.errors import ConfigError
from research.evals.results import evaluator_metrics


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm: overrides, each "dotted.key=value"; `grid` says where it lies in the ablation's: key -> value's text."""

    name: str
    overrides: tuple[str, ...]
    grid: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """An ablation, checked.

    Attributes:
      tree, base: the config with the command line's overrides, as it is and resolved.
      arms: the control first.
      experiments: by arm's name, at the first seed.
    """

    tree: Tree
    arms: tuple[Arm, ...]
    base: Experiment
    experiments: Mapping[str, Experiment]

    def run(self, arm: Arm, seed: int) -> Experiment:
        """The experiment of one run: the arm's overrides, then the seed written to every seed key."""
        return _resolve(self.tree, arm, self.base, seed)


def plan(config: ConfigDict, overrides: Iterable[str] = ()) -> Plan:
    """Resolves every arm, and refuses an ablation that would compare a thing with itself.

    Raises:
      ConfigError: no arms, a malformed or repeated override, one that no arm reads, two arms that are the same
        experiment or are measured differently, a control or seed key that does not exist.
    """
    texts = tuple(overrides)
    tree, _ = with_overrides(config.to_dict(), texts, "override")
    arms = _read_arms(tree)
    base = resolve(tree)
    _check_ablation(base, arms)
    control = base.ablation.control or arms[0].name
    arms.sort(key=lambda arm: arm.name != control)  # first, so that every report has it to compare with
    _check_overridden(tree, arms, texts)
    return Plan(tree, tuple(arms), base, _check_arms(tree, arms, base))


def _read_arms(tree: Tree) -> list[Arm]:
    """The arms of a config, in order: those it lists, then those of its grid, its base point included."""
    section = tree.get("ablation", {})
    arms = []
    for name, overrides in dict(section.get("arms", {})).items():
        where, expected = f"ablation.arms.{short(name)}", "a tuple of 'dotted.key=value'"
        if isinstance(overrides, Mapping):  # a dotted name that was read as sections
            raise ConfigError(f"{where}: got a section, expected {expected}")
        texts = not isinstance(overrides, str) and all(isinstance(text, str) for text in overrides)
        expect(texts, where, overrides, expected)
        arms.append(Arm(name, tuple(overrides)))
    arms += _grid_arms(flatten(section.get("grid", {})))
    names = [arm.name for arm in arms]
    for name in names:
        _check_name(name)
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"ablation.arms.{name}: is given twice")
    if not arms:
        raise ConfigError("ablation.arms: got none, expected name -> ('dotted.key=value', ...), or ablation.grid")
    return arms


def _grid_arms(grid: Mapping[str, Any]) -> list[Arm]:
    """Every combination of the grid's values; names say the last part of each key that tells the keys apart."""
    for key, values in grid.items():
        several = isinstance(values, list | tuple) and 0 < len(values) == len(set(map(str, values)))
        expect(several, f"ablation.grid.{key}", values, "a tuple of different values")
    named, found = _shortened(list(grid)), []
    for point in itertools.product(*grid.values()) if grid else ():
        texts = {key: _spelled(value) for key, value in zip(grid, point, strict=True)}
        name = ", ".join(f"{named[key]}={text}" for key, text in texts.items())
        found.append(Arm(name, tuple(f"{key}={text}" for key, text in texts.items()), texts))
    return found


def _spelled(value: Any) -> str:
    """A value as an override spells it: "0.003" for 3e-3, a tuple with commas."""
    if isinstance(value, list | tuple):
        return ",".join(map(_spelled, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _shortened(keys: list[str]) -> dict[str, str]:
    """The shortest endings of dotted keys that tell them apart."""
    found = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        apart = (end for end in endings if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
        found[key] = next(apart, key)
    return found


def _check_name(name: str) -> None:
    """A name reaches tables, plots and folders."""
    fine = isinstance(name, str) and name.strip() and name.strip(".") and name.isprintable() and len(name) <= 120
    if not fine or "/" in name or "\\" in name:
        raise ConfigError(
            f"ablation.arms: got the name {short(name)}, expected 1 to 120 printable characters without / and \\ "
            "because reports and folders are named by it"
        )


def _check_ablation(base: Experiment, arms: list[Arm]) -> None:
    section, names, known = base.ablation, [arm.name for arm in arms], flatten(base.tree)
    listed, seeds = ", ".join(map(repr, names)), list(section.seeds)
    expect(0 < len(seeds) == len(set(seeds)), "ablation.seeds", seeds, "at least one and each once")
    expect(section.control in ("", *names), "ablation.control", section.control, f"one of {listed}")
    for pair in section.pairs:
        of_arms = pair.count(":") == 1 and set(pair.split(":")) <= set(names)
        expect(of_arms, "ablation.pairs", pair, f"'a:b' of two arms among {listed}")
    for key in section.seed_keys:
        if key not in known:
            raise ConfigError(f"ablation.seed_keys: {unknown_key(key, known)}")
        for arm in arms:
            if any(text.partition("=")[0].strip() == key for text in arm.overrides):
                raise ConfigError(
                    f"ablation.arms.{arm.name}: {key}: is one of ablation.seed_keys, which each run overwrites; "
                    "expected it not to be set"
                )


def _check_arms(tree: Tree, arms: list[Arm], base: Experiment) -> dict[str, Experiment]:
    until, seeds = base.ablation.stage, base.ablation.seeds
    plain = run_identity(_resolve(tree, Arm("base", ()), base, seeds[0]), until)
    experiments: dict[str, Experiment] = {}
    seen: dict[str, Tree] = {}
    for arm in arms:
        where, experiment = f"ablation.arms.{arm.name}", _resolve(tree, arm, base, seeds[0])
        identity = run_identity(experiment, until)
        if arm.overrides and not arm.grid and identity == plain:
            raise ConfigError(
                f"{where}: its overrides ({', '.join(arm.overrides)}) change nothing, expected them to differ from the "
                "config's own values"
            )
        for other, known in seen.items():
            if known == identity:
                raise ConfigError(f"{where}: is the same experiment as arm {other}")
            if known["evaluation"]["evaluation"] != identity["evaluation"]["evaluation"]:
                raise ConfigError(
                    f"{where}: is measured by another evaluation than arm {other}, expected one yardstick for all arms"
                )
        for seed in seeds[1:]:
            if run_identity(_resolve(tree, arm, base, seed), until) == identity:
                raise ConfigError(
                    f"ablation.seed_keys: got {list(base.ablation.seed_keys)}, expected a key on which stage {until} "
                    f"depends: arm {arm.name} is the same run at seeds {seeds[0]} and {seed}"
                )
        _check_metric(base, experiment, arm)
        experiments[arm.name], seen[arm.name] = experiment, identity
    return experiments


def _check_overridden(tree: Tree, arms: list[Arm], overridden: Iterable[str]) -> None:
    """Refuses a key set on the command line that no arm reads."""
    for text in overridden:
        refusals = []
        for arm in arms:
            try:
                resolve(with_overrides(tree, arm.overrides, f"ablation.arms.{arm.name}")[0], [text])
            except ConfigError as error:
                refusals.append(error)
        if len(refusals) == len(arms):
            raise refusals[0]


def _resolve(tree: Tree, arm: Arm, base: Experiment, seed: int) -> Experiment:
    """The arm's experiment, with the stage that is compared."""
    for key in base.ablation.seed_keys:
        tree = merged(tree, key, seed)
    where = f"ablation.arms.{arm.name}"
    try:
        experiment = resolve(tree, arm.overrides, where)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from error
    if base.ablation.stage not in experiment.names:
        raise ConfigError(
            f"ablation.stage: got {base.ablation.stage!r}, which arm {arm.name} does not have; expected one of "
            f"{', '.join(experiment.names)}"
        )
    return experiment


def _check_metric(base: Experiment, experiment: Experiment, arm: Arm) -> None:
    """Refuses a metric that the compared stage will not have, before anything is trained."""
    stage, metric = experiment.stage(base.ablation.stage), base.ablation.metric
    evaluators = {each.component.name for each in experiment.parsed["evaluation"].chosen["evaluators"]}
    built_in = evaluator_metrics(experiment.evaluation)
    if evaluators - built_in.keys():  # a user's own, whose metrics show when it runs
        return
    available: set[str] = set()
    for name, metrics in built_in.items():  # the others may stand in for the accuracy
        if evaluators and (name != "accuracy" or (name in evaluators and stage.samples)):
            available |= metrics
    on_given = not stage.online and metric.startswith("eval/") and describe(metric.removeprefix("eval/")) is not None
    if metric not in available and not on_given:
        found = [*sorted(available), *([] if stage.online else ["eval/loss and the like"])] or ["nothing"]
        raise ConfigError(
            f"ablation.metric: got {metric!r}, but stage {stage.name} of arm {arm.name} measures {', '.join(found)}"
        )
