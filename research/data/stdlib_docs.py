"""Real prose on any machine: the Python standard library's docstrings and its language reference topics.

Sources are parsed, never imported. The contents vary with the Python version.
"""

import ast
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from research.core.errors import DataError

# Test suites, third-party packages, and tools whose files are data rather than modules.
_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"})
_ROOT = Path(sysconfig.get_paths()["stdlib"])
_Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_stdlib_docs(*, max_bytes: int, root: Path = _ROOT) -> list[tuple[str, str]]:
    """The documentation of the running Python's standard library: (name, text), topics first, then modules by name.

    Args:
        max_bytes: stop before the document that would pass this many UTF-8 bytes; 0 reads all.
        root: where the library lies.

    Raises:
        DataError: no documentation is found there, or none fits `max_bytes`.
    """
    documents: list[tuple[str, str]] = []
    size = 0
    for name, text in _documents(root):
        data = text.encode("utf-8", errors="replace")
        size += len(data)
        if max_bytes and size > max_bytes:
            break
        documents.append((name, data.decode()))
    if not documents:
        raise DataError(f"{root}: found no standard library documentation within max_bytes = {max_bytes}.")
    return documents


def stdlib_fingerprint(root: Path = _ROOT) -> Mapping[str, str]:
    """The Python version and a hash of the sources, without the seconds that parsing them takes."""
    digest = hashlib.sha256()
    for path in _sources(root):
        digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return {"python": platform.python_version(), "sources_sha256": digest.hexdigest()}


def _sources(root: Path) -> list[Path]:
    parts = {path: path.relative_to(root).parts for path in sorted(root.rglob("*.py"))}
    return [path for path, at in parts.items() if not _SKIPPED.intersection(at) and not at[0].startswith("config-")]


def _documents(root: Path) -> Iterator[tuple[str, str]]:
    topics = root / "pydoc_data" / "topics.py"
    for node in _parse(topics).body if topics.exists() else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield f"topic/{name}", text.strip() + "\n"
    for path in _sources(root):
        text = "\n\n\n".join(_docstrings(_parse(path), "")).strip() if path != topics else ""
        if text:
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            yield f"module/{name}", f"{name}\n\n{text}\n"


def _parse(path: Path) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules hold invalid escapes
            return ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, OSError) as error:
        raise DataError(f"{path}: the standard library module cannot be parsed ({error}).") from error


def _docstrings(node: ast.Module | _Documented, prefix: str) -> Iterator[str]:
    """This node's docstring under its qualified name, then those of what it defines."""
    text = ast.get_docstring(node)
    if text:
        arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
        yield text if isinstance(node, ast.Module) else f"{prefix}{node.name}{arguments}\n\n{text}"
    inner = "" if isinstance(node, ast.Module) else f"{prefix}{node.name}."
    for child in node.body:
        if isinstance(child, _Documented):
            yield from _docstrings(child, inner)
