"""What every entry point shares: flags, clear errors, exit codes."""

import errno
import io
import logging as py_logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from launch import interrupts
from research.config.files import load_config
from research.core.errors import ConfigError, TemperError, WorkdirError
from research.core.files import explain_os_error
from research.core.interrupts import Interrupted, end
from research.core.progress import say
from research.sampling.drafts import Draft
from research.tasks.sources import Sources
from research.train.stored import Policy, load_policy

_OVERRIDE = "--config."


def define_config() -> None:
    """`--config=FILE[:arg]` with `--config.key=value` overrides, and `--workdir`."""
    flags.DEFINE_string("config", None, "experiment file, such as experiments/quickstart.py, or FILE:ARGUMENT")
    flags.DEFINE_string("workdir", None, "folder for checkpoints, metrics and reports")
    flags.mark_flags_as_required(["config", "workdir"])
    kernels = py_logging.getLogger("temper.kernels")
    kernels.setLevel(py_logging.INFO)
    kernels.addHandler(_OnConsole())


def config() -> ConfigDict:
    """The experiment that the command line names; ConfigError if it cannot be read or trains nothing."""
    found = load_config(flags.FLAGS.config)
    what = f"--config: {flags.FLAGS.config}: has no stages, so it trains nothing (is it a benchmark?)"
    refuse("stages" not in found, what)
    return found


def overrides() -> tuple[str, ...]:
    """ "dotted.key=value" of every `--config.key=value`."""
    return tuple(text.removeprefix(_OVERRIDE) for text in sys.argv[1:] if text.startswith(_OVERRIDE))


def workdir() -> Path:
    """The working directory that the command line names; ConfigError if it is no local folder."""
    path: str = flags.FLAGS.workdir
    refuse(not path.strip(), "--workdir: got '', expected a folder")
    refuse("://" in path, f"--workdir: got {path!r}, expected a local folder; remote ones are not supported yet")
    refuse("\0" in path, f"--workdir: got {path!r}, expected a path without NUL")
    return Path(path)


def sources_of(policy: Policy, folder: Path) -> Sources:
    """The data that the policy of a stage's folder was trained on."""
    return Sources.of(policy.experiment, folder.parent.parent / "data")


def given(*names: str) -> str:
    """The first of these flags that the command line sets, as --name; "" if none."""
    return next((f"--{name}" for name in names if flags.FLAGS[name].present), "")


def refuse(wrong: object, sentence: str) -> None:
    """ConfigError with the sentence, if something is wrong."""
    if wrong:
        raise ConfigError(sentence)


def read_text(path: Path | str, flag: str) -> str:
    """The text of a file that a flag names; ConfigError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag}: {path}: is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise ConfigError(f"{flag}: {path}: cannot be read ({error.strerror})") from error


def check_context(policy: Policy, prompt: int, completion: int) -> None:
    """ConfigError if prompts and completions of so many tokens do not fit the model's context."""
    if prompt + completion > policy.max_length:
        raise ConfigError(
            f"--max_new_tokens: got {completion} after prompts of up to {prompt} tokens, expected a sum of at most "
            f"{policy.max_length}, the model's context"
        )


def numbers(name: str) -> list[float]:
    """The numbers of a list flag; ConfigError if it is empty or holds something else."""
    values: list[str] = flags.FLAGS[name].value or []
    try:
        found = [float(value) for value in values]
    except ValueError:
        found = []
    refuse(not found, f"--{name}: got {','.join(values) or 'nothing'}, expected numbers such as 1,4,16")
    return found


def integers(name: str, *, high: int, because: str = "") -> tuple[int, ...]:
    """The integers from 1 to `high` of a list flag; `because` says where the bound comes from."""
    found, given = numbers(name), ",".join(getattr(flags.FLAGS, name))
    within = all(value.is_integer() and 1 <= value <= high for value in found)
    refuse(not within, f"--{name}: got {given}, expected integers from 1 to {because or high}")
    return tuple(map(int, found))


NGRAM = "ngram"
"""As a draft: no model, but n-grams of the text."""


def load_draft(name: str, policy: Policy, draft_tokens: int) -> Draft:
    """What proposes tokens to a policy: the model of a stage's folder, or n-grams of the text.

    Raises:
      ConfigError: the draft's tokenizer is not the policy's.
      WorkdirError: the folder is not a policy's.
    """
    if name == NGRAM:
        return Draft(None, None, draft_tokens)
    draft = load_policy(Path(name).resolve(), policy.mesh)
    other = draft.tokenizer.pieces != policy.tokenizer.pieces
    refuse(other, f"--draft: {name}: has another tokenizer, expected the policy's")
    return Draft(draft.params, draft.model, draft_tokens)


def run(main: Callable[[], None], *, arguments: bool = False, resumes: bool = False) -> None:
    """Runs a command: `--help` shows the module's docstring; bad input is one sentence and exit status 1.

    Args:
      arguments: whether it takes some besides flags, which it reads from `sys.argv`.
      resumes: whether the same command goes on where it was interrupted; signals then end it at once, but for the
        stretches that `interrupts` defers.
    """
    if resumes:
        interrupts.advice = "interrupted; the same command goes on from what is saved"
        interrupts.install()
    else:
        interrupts.release()
    # Orbax and JAX tell every checkpoint and compilation at INFO; ours are the lines a person wants. What goes
    # wrong in Orbax's threads is logged with a traceback there and raised here.
    _open_streams()
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = _quiet_hook
    py_logging.getLogger("jax").setLevel(py_logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _keep_programs()
    py_logging.getLogger("temper.kernels").propagate = False  # else absl says it, on standard error

    def explained(argv: list[str]) -> None:
        if len(argv) > 1 and not arguments:
            _fail(ConfigError(f"got the argument {argv[1]!r}, expected flags only; --help shows an example"))
        try:
            main()
        except TemperError as error:
            _fail(error)
        except KeyboardInterrupt as stop:
            end(stop.number if isinstance(stop, Interrupted) else signal.SIGINT, str(stop) or "interrupted")
        except BrokenPipeError:  # whoever read the output has ended
            os._exit(128 + signal.SIGPIPE)
        except Exception as error:
            reason = _disk_reason(error)
            if reason is None:
                raise
            _fail(WorkdirError(reason))

    app.run(explained, flags_parser=_parse)


class _OnConsole(py_logging.Handler):
    """What the models choose to compute with, each choice a line."""

    def emit(self, record: py_logging.LogRecord) -> None:
        say(record.getMessage())


def _open_streams() -> None:
    """Output that its encoding lacks is escaped; a closed stream swallows its output, so that nothing else gets it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _keep_programs() -> None:
    """Keeps programs that took over a second to compile in `$XDG_CACHE_HOME/temper/xla` (`~/.cache/temper/xla`), unless
    `JAX_COMPILATION_CACHE_DIR` names another folder; `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "temper" / "xla"))


def _parse(argv: Sequence[str]) -> list[str]:
    """absl's parser, with its mistakes explained in one sentence; overrides of the config are kept apart."""
    for text in argv:
        if any("\ud800" <= character <= "\udfff" for character in text):
            _fail(ConfigError(f"the argument {ascii(text)} is not valid UTF-8"))
    try:
        return flags.FLAGS([text for text in argv if not text.startswith(_OVERRIDE)])
    except flags.Error as error:
        _fail(ConfigError(f"{_last_line(error)} (--help shows an example)"))


def _last_line(error: Exception) -> str:
    """The end of an error's text."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_DISK_ERRORS = (*_FULL, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.ENAMETOOLONG)


def _disk_reason(error: BaseException | None) -> str | None:
    """One sentence where a disk is at fault, whatever the library in between made of it; else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return explain_os_error(error, error.filename or "a file")
        for number in _FULL:
            if os.strerror(number) in str(error):
                return _last_line(Exception(str(error).strip("; ")))
        error = error.__cause__ or error.__context__
    return None


def _quiet_hook(unraisable: Any) -> None:
    """Python's own hook, but for TensorStore's threads that call back into a save that has failed already."""
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _fail(error: Exception) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr)
    sys.stderr.flush()
    # Not sys.exit: Orbax's and Grain's threads may still be waiting for work that will never come.
    os._exit(1)
