"""Real prose on any machine: the Python standard library's docstrings and its language reference topics.

Sources are parsed, never imported. The contents vary with the Python version, so both it and a hash of the
text come with the documents.
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
_Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_stdlib_docs(*, max_bytes: int = 0, root: str | Path | None = None) -> list[tuple[str, str]]:
    """The documentation of the running Python's standard library as (name, text), topics first, then modules by name.

    Args:
        max_bytes: stop before the document that would pass this many UTF-8 bytes; 0 reads all.
        root: where the library lies (default: the running Python's).

    Raises:
        DataError: no documentation is found there, or none fits `max_bytes`.
    """
    root = Path(root or _stdlib_root())
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


def stdlib_fingerprint(root: str | Path | None = None) -> Mapping[str, str]:
    """The Python version and a hash of the sources, without the seconds that parsing them takes."""
    root = Path(root or _stdlib_root())
    digest = hashlib.sha256()
    for path in _sources(root):
        digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return {"python": platform.python_version(), "sources_sha256": digest.hexdigest()}


def _stdlib_root() -> str:
    return sysconfig.get_paths()["stdlib"]


def _sources(root: Path) -> list[Path]:
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED.intersection(path.relative_to(root).parts)
        and not path.relative_to(root).parts[0].startswith("config-")
    ]


def _documents(root: Path) -> Iterator[tuple[str, str]]:
    topics = root / "pydoc_data" / "topics.py"
    if topics.exists():
        yield from _topics(topics)
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


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield f"topic/{name}", text.strip() + "\n"


def _docstrings(node: ast.Module | _Documented, prefix: str) -> Iterator[str]:
    """This node's docstring under its qualified name, then those of what it defines."""
    text = ast.get_docstring(node)
    if text:
        heading = "" if isinstance(node, ast.Module) else f"{prefix}{_signature(node)}\n\n"
        yield heading + text
    if not isinstance(node, ast.Module):
        prefix = f"{prefix}{node.name}."
    for child in node.body:
        if isinstance(child, _Documented):
            yield from _docstrings(child, prefix)


def _signature(node: _Documented) -> str:
    return node.name if isinstance(node, ast.ClassDef) else f"{node.name}({ast.unparse(node.args)})"
