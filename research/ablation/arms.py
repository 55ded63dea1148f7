"""Arms: an experiment's config with a few dotted overrides each, checked before anything runs."""

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from research.config import Experiment, flatten, resolve, to_tree, unknown_key
from research.errors import ConfigError


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
    base = resolve(arm_config(config, Arm("base", {}), seeds[0])).resolved
    experiments: dict[str, Experiment] = {}
    for arm in arms:
        try:
            experiment = resolve(arm_config(config, arm, seeds[0]), arm.overrides)
        except ConfigError as error:
            raise ConfigError(f"ablation.arms.{arm.name}: {error}") from error
        if arm.overrides and experiment.resolved == base:
            raise ConfigError(
                f"ablation.arms.{arm.name}: its overrides ({', '.join(arm.overrides)}) change nothing, expected "
                "them to differ from the config's own values"
            )
        for other, seen in experiments.items():
            if seen.resolved == experiment.resolved:
                raise ConfigError(f"ablation.arms.{arm.name}: is the same experiment as arm {other}")
        experiments[arm.name] = experiment
    stage = config.ablation.stage
    for name, experiment in experiments.items():
        if stage not in [s.name for s in experiment.stages]:
            raise ConfigError(
                f"ablation.stage: got {stage!r}, which arm {name} does not have; expected one of "
                f"{', '.join(s.name for s in experiment.stages)}"
            )
    return experiments


def _assign(config: ConfigDict, key: str, value: Any) -> None:
    *path, last = key.split(".")
    section = config
    for part in path:
        section = section[part]
    section[last] = value
