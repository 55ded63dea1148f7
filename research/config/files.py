"""Experiment files: Python that makes a config."""

from pathlib import Path

from ml_collections import ConfigDict

from research.config.references import run_file, said_by
from research.config.schema import short
from research.core.errors import ConfigError


def load_config(reference: str) -> ConfigDict:
    """What `get_config` of an experiment file returns; `reference` is the file's path, or path:argument.

    Raises:
      ConfigError: no such file, one that cannot be run, or one that makes no config.
    """
    place, _, argument = reference.partition(":")
    path = Path(place)
    if not place or not path.is_file():
        raise ConfigError(f"--config: {short(place)}: no such experiment file")
    if path.suffix != ".py":
        raise ConfigError(f"--config: {place}: is no Python file")
    try:
        module = run_file(path, f"experiment_{path.stem}")
        if "get_config" not in vars(module):
            raise ConfigError(f"--config: {place}: has no get_config, so it is no experiment")
        config = module.get_config(argument) if argument else module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - the file is a user's
        raise ConfigError(f"--config: {place}: {said_by(error, path)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config: {place}: get_config gave {short(config)}, expected a ConfigDict")
    return config
