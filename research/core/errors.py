"""Errors that a user can act on: one clear sentence that names the file, record or key."""


class TemperError(Exception):
    """Base of every error caused by input; launchers print its message and exit with status 1."""


class ConfigError(TemperError):
    """A config key is unknown, out of range, or has no effect under the chosen objective."""


class DataError(TemperError):
    """A data file or record cannot be used; the message names the file and the line or record."""


class CheckpointError(TemperError):
    """A checkpoint is missing, truncated or corrupt; the message names it and the previous good one."""


class WorkdirError(TemperError):
    """A working directory holds another config's run, or cannot be written."""


class DivergedError(TemperError):
    """Training cannot go on because its numbers are not finite; the message names the step."""
