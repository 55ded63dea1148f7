"""Arms: an experiment's config with a few dotted overrides each, checked before anything runs."""

import ast
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from research.config.checks import flatten, unknown_key
from research.config.experiment import Experiment, to_tree
from research.config.resolve import resolve
from research.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
      name: its name in tables.
      overrides: dotted key -> value.
    """

    name: str
    overrides: Mapping[str, Any]


def parse_override(text: str, known: Mapping[str, Any], where: str) -> tuple[str, Any]:
    """`"rl.optimizer.learning_rate=3e-4"` to its key and a value of the type that the config has there.

    Args:
      text: dotted.key=value.
      known: the config's dotted keys and values.
      where: what an error names.

    Raises:
      ConfigError: no such key, or a value of another type.
    """
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals:
        raise ConfigError(f"{where}: got {text!r}, expected dotted.key=value")
    if key not in known:
        raise ConfigError(f"{where}: {unknown_key(key, known)}")
    now = known[key]
    try:
        if isinstance(now, str):
            return key, raw
        value: Any = {"true": True, "false": False}.get(raw.lower())
        value = ast.literal_eval(raw) if value is None else value
    except (ValueError, SyntaxError) as error:
        raise ConfigError(
            f"{where}: {key}: got {raw!r}, expected a {type(now).__name__} like {now!r}"
        ) from error
    if isinstance(now, float) and type(value) is int:
        value = float(value)
    if isinstance(now, list | tuple) and isinstance(value, list | tuple):
        return key, tuple(value)
    if type(value) is not type(now):
        raise ConfigError(f"{where}: {key}: got {raw!r}, expected a {type(now).__name__} like {now!r}")
    return key, value


def read_arms(config: ConfigDict) -> list[Arm]:
    """The arms of a config, in order.

    Raises:
      ConfigError: no arms, a malformed or repeated override, a control that does not exist.
    """
    tree = to_tree(config)
    known = flatten({key: value for key, value in tree.items() if key != "ablation"})
    arms = []
    for name, overrides in tree["ablation"]["arms"].items():
        where = f"ablation.arms.{name}"
        if isinstance(overrides, str):
            raise ConfigError(f"{where}: got a string, expected a tuple of 'dotted.key=value'")
        parsed: dict[str, Any] = {}
        for text in overrides:
            key, value = parse_override(text, known, where)
            if key in parsed:
                raise ConfigError(f"{where}: {key} is set twice")
            parsed[key] = value
        arms.append(Arm(name, parsed))
    if not arms:
        raise ConfigError("ablation.arms: got none, expected name -> ('dotted.key=value', ...)")
    control = tree["ablation"]["control"]
    if control and control not in {arm.name for arm in arms}:
        raise ConfigError(
            f"ablation.control: got {control!r}, expected one of {', '.join(arm.name for arm in arms)}"
        )
    return arms


def control_of(config: ConfigDict, arms: list[Arm]) -> str:
    """The arm that all others are compared to."""
    return config.ablation.control or arms[0].name


def arm_config(config: ConfigDict, arm: Arm, seed: int | None = None) -> ConfigDict:
    """The config of one run: the arm's overrides, then the seed written to every seed key."""
    run = config.copy_and_resolve_references().unlock()
    for key, value in arm.overrides.items():
        _assign(run, key, value)
    if seed is not None:
        for key in config.ablation.seed_keys:
            _assign(run, key, seed)
    return run.lock()


def check_arms(config: ConfigDict, arms: list[Arm]) -> dict[str, Experiment]:
    """Resolves every arm and refuses an ablation that would compare a thing with itself.

    Returns:
      The arms' experiments at the first seed.

    Raises:
      ConfigError: an override without effect, or two arms that are the same experiment.
    """
    seeds = list(config.ablation.seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"ablation.seeds: got {seeds}, expected at least one and each once")
    known = flatten(to_tree(config))
    for key in config.ablation.seed_keys:
        if key not in known:
            raise ConfigError(f"ablation.seed_keys: {unknown_key(key, known)}")
        for arm in arms:
            if key in arm.overrides:
                raise ConfigError(
                    f"ablation.arms.{arm.name}: {key}: is one of ablation.seed_keys, which each run overwrites; "
                    "expected it not to be set"
                )
    until = config.ablation.stage
    base = _resolve(config, Arm("base", {}), seeds[0])
    experiments: dict[str, Experiment] = {}
    for arm in arms:
        experiment = _resolve(config, arm, seeds[0])
        identity = experiment.identity(until)
        if arm.overrides and identity == base.identity(until):
            raise ConfigError(
                f"ablation.arms.{arm.name}: its overrides ({', '.join(arm.overrides)}) change nothing, expected "
                "them to differ from the config's own values"
            )
        for other, seen in experiments.items():
            if seen.identity(until) == identity:
                raise ConfigError(f"ablation.arms.{arm.name}: is the same experiment as arm {other}")
        for seed in seeds[1:]:
            if _resolve(config, arm, seed).identity(until) == identity:
                raise ConfigError(
                    f"ablation.seed_keys: got {list(config.ablation.seed_keys)}, expected a key on which stage "
                    f"{until} depends: arm {arm.name} is the same run at seeds {seeds[0]} and {seed}"
                )
        _check_metric(config, experiment, arm)
        experiments[arm.name] = experiment
    return experiments


def check_overridden(config: ConfigDict, arms: list[Arm], overridden: Iterable[str]) -> None:
    """Refuses a key set on the command line that no arm reads.

    Raises:
      ConfigError: names the key and why it has no effect.
    """
    for key in overridden:
        refusals = []
        for arm in arms:
            try:
                resolve(arm_config(config, arm), [key])
            except ConfigError as error:
                refusals.append(error)
        if len(refusals) == len(arms):
            raise refusals[0]


def _resolve(config: ConfigDict, arm: Arm, seed: int) -> Experiment:
    """The arm's experiment, with the stage that is compared."""
    try:
        experiment = resolve(arm_config(config, arm, seed), arm.overrides)
    except ConfigError as error:
        raise ConfigError(f"ablation.arms.{arm.name}: {error}") from error
    names = [stage.name for stage in experiment.stages]
    if config.ablation.stage not in names:
        raise ConfigError(
            f"ablation.stage: got {config.ablation.stage!r}, which arm {arm.name} does not have; expected one of "
            f"{', '.join(names)}"
        )
    return experiment


def _check_metric(config: ConfigDict, experiment: Experiment, arm: Arm) -> None:
    """Refuses a metric that the compared stage is known not to measure, before anything is trained."""
    (stage,) = (stage for stage in experiment.stages if stage.name == config.ablation.stage)
    k = experiment.evaluation.k
    sampled = {f"eval/pass@{n}" for n in k} | {f"eval/maj@{n}" for n in k if n > 1}
    metric = config.ablation.metric
    if metric.startswith(("eval/pass@", "eval/maj@")) and (metric not in sampled or not stage.samples):
        found = ", ".join(sorted(sampled)) if stage.samples else "only eval/loss and the like"
        raise ConfigError(
            f"ablation.metric: got {metric!r}, but stage {stage.name} of arm {arm.name} measures {found}"
        )


def _assign(config: ConfigDict, key: str, value: Any) -> None:
    *path, last = key.split(".")
    section = config
    for part in path:
        section = section[part]
    section[last] = value
