"""Experiment files: Python that makes a config."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from research.config.references import said_by
from research.config.schema import short
from research.core.errors import ConfigError


def load_config(reference: str) -> ConfigDict:
    """What `get_config` of an experiment file returns.

    Args:
      reference: path of the file, or path:argument.

    Raises:
      ConfigError: no such file, one that cannot be run, or one that makes no config.
    """
    place, _, argument = reference.partition(":")
    path = Path(place)
    if not place or not path.is_file():
        raise ConfigError(f"--config: {short(place)}: no such experiment file")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config: {place}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
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
