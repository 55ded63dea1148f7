"""Components by reference: what a config names is a short name, `package.module:attribute` or `file.py:attribute`.

A module of Temper offers components by short name in `PROVIDES`: kind -> name -> component; all modules of the kind's
package are read. A component is a function, a frozen dataclass whose `key` fields are its options (`make` fills them),
or an objective with a mapping of options. A config gives options in a section of the component's name, beside the key.
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from research.config.schema import Key, Kind, keys_of, short
from research.core.errors import ConfigError

PACKAGES: Mapping[Kind, str] = {
    "objective": "research.algorithms",
    "reward": "research.rewards",
    **dict.fromkeys(("task", "transform"), "research.tasks"),
    "evaluator": "research.evals",
    **dict.fromkeys(("tool", "environment"), "research.environments"),
    **dict.fromkeys(("optimizer", "schedule"), "research.config"),
}
"""Where the components of each kind live that have short names."""

ROOMS = ("research", "models", "objectives", "launch", "experiments")


@dataclasses.dataclass(frozen=True)
class Component:
    """What a reference in a config stands for: a function, class or object.

    `name` is short, for logs, and the name of the section that holds its options; `source` is of `source_hash`.
    """

    reference: str
    name: str
    target: Any
    source: str

    @property
    def options(self) -> Mapping[str, Key]:
        """The keys that its section may have."""
        return keys_of(self.target)

    def make(self, options: Mapping[str, Any]) -> Any:
        """The component with its options filled in: an instance of a class, anything else as it is."""
        return self.target(**options) if isinstance(self.target, type) else self.target


def find(kind: Kind, reference: str, where: str) -> Component:
    """The component that a config names under the key `where`.

    Raises:
      ConfigError: no such name, file, module or attribute, or a file that cannot be run.
    """
    place, colon, attribute = reference.rpartition(":")
    if not colon:
        known = provided(kind)
        if reference not in known:
            near = difflib.get_close_matches(reference, known, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            listed = f"{', '.join(sorted(known))}, module:attribute or file.py:attribute{hint}"
            raise ConfigError(f"{where}: got {short(reference)}, expected one of {listed}")
        module, target = known[reference]
        return Component(reference, reference, target, source_hash(module))
    module = (_load_file if place.endswith(".py") else _load_module)(place, where)
    target = vars(module).get(attribute)
    if target is None:
        listed = ", ".join(sorted(n for n, v in vars(module).items() if _offered(module, n, v))) or "nothing"
        raise ConfigError(f"{where}: {place} has no {attribute!r}, expected one of: {listed}")
    name = getattr(target, "name", None)
    return Component(reference, name if isinstance(name, str) else attribute, target, source_hash(module))


@functools.cache
def provided(kind: Kind) -> Mapping[str, tuple[ModuleType, Any]]:
    """Short name -> (module, component) of all that the kind's package offers; ConfigError if one is offered twice."""
    found: dict[str, tuple[ModuleType, Any]] = {}
    folder = Path(importlib.import_module(PACKAGES[kind]).__path__[0])
    for file in sorted(folder.rglob("*.py")):
        if "\nPROVIDES" not in file.read_text(encoding="utf-8"):  # spares the import of all others
            continue
        parts = file.relative_to(folder).with_suffix("").parts
        module = importlib.import_module(".".join((PACKAGES[kind], *parts)).removesuffix(".__init__"))
        for name, target in module.PROVIDES.get(kind, {}).items():
            if name in found:
                raise ConfigError(f"{kind} {name!r}: is offered by {found[name][0].__name__} and {module.__name__}")
            found[name] = (module, target)
    return found


@functools.cache
def source_hash(module: ModuleType) -> str:
    """SHA-256 of a module's code and, for a user's own, of the modules beside it that it imports.

    Comments, docstrings and formatting do not count.
    """
    assert module.__file__ is not None
    own = module.__name__.split(".")[0] in ROOMS
    files = [Path(module.__file__)] if own else sorted(_with_neighbours(Path(module.__file__)))
    parts = [ast.dump(_without_docstrings(ast.parse(file.read_text(encoding="utf-8")))) for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _with_neighbours(file: Path) -> set[Path]:
    """A file and those in its folder that it imports, directly or not."""
    found, waiting = set(), {file.resolve()}
    while waiting:
        found.add(current := waiting.pop())
        for name in _imports(ast.parse(current.read_text(encoding="utf-8"))):
            path = current.parent.joinpath(*name.split("."))
            waiting |= {p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()} - found
    return found


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from [node.module] if node.module else []
            yield from (".".join(filter(None, (node.module, alias.name))) for alias in node.names)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body if ast.get_docstring(node) is None else node.body[1:]
    return tree


def _load_module(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - a user's module may raise anything
        raise ConfigError(f"{where}: {name} cannot be imported: {type(error).__name__}: {error}") from error


def _load_file(place: str, where: str) -> ModuleType:
    """Runs a file as a module; an unchanged one only once in a process, an edited one anew."""
    try:
        path = Path(place).resolve()
        digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:12]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{where}: {short(place)}: cannot be read ({reason})") from error
    name = f"{path.stem}_{digest}"
    sys.path.insert(0, str(path.parent))  # it may import its neighbours, as a script may
    try:
        return sys.modules.get(name) or run_file(path, name)
    except Exception as error:  # noqa: BLE001 - a user's file may raise anything
        raise ConfigError(f"{where}: {path.name}: {said_by(error, path)}") from error
    finally:
        sys.path.remove(str(path.parent))


def run_file(path: Path, name: str) -> ModuleType:
    """Runs a Python file as a module of this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def said_by(error: Exception, path: Path) -> str:
    """ "line 12: KeyError: 'a'": what a user's file raised, and where in it, if that is known."""
    frames, here = traceback.walk_tb(error.__traceback__), path.absolute()
    lines = [line for frame, line in frames if Path(frame.f_code.co_filename).absolute() == here]
    if isinstance(error, SyntaxError) and error.lineno:
        lines.append(error.lineno)
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {error}"


def _offered(module: ModuleType, name: str, value: Any) -> bool:
    """Whether a module itself defines something that could be a component."""
    return not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
