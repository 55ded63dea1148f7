"""The small changes that `mutants.py` makes to the source of a module.

    sign      a + b -> a - b; -a -> a
    mask      masked(x, m) -> x; jnp.where(m, a, b) -> a
    swap      a name of the chosen becomes that of the rejected, and the other way round; so do policy and reference,
              values and returns
    clip      minimum <-> maximum, a name of the lower bound <-> that of the upper, clip(x, low, high) reversed
    scale     mean <-> sum, a * b <-> a / b, stop_gradient(x) -> x
    constant  a float other than 0 -> twice it, defaults of arguments included
    compare   < <-> >, <= <-> >=, == <-> !=
    logic     and <-> or, not x -> x, a if c else b -> a

Docstrings, annotations, the texts of errors and the declarations of options (`key(...)`) stay as they are.
"""

import ast
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

KINDS = ("sign", "mask", "swap", "clip", "scale", "constant", "compare", "logic")

BINARY = {ast.Add: ("sign", "-"), ast.Sub: ("sign", "+"), ast.Mult: ("scale", "/"), ast.Div: ("scale", "*")}
COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: ">", ast.Gt: "<", ast.LtE: ">=", ast.GtE: "<=", ast.Eq: "!=", ast.NotEq: "==",
}  # fmt: skip
CALLED = {
    "mean": ("scale", "sum"), "sum": ("scale", "mean"), "minimum": ("clip", "maximum"),
    "maximum": ("clip", "minimum"), "min": ("clip", "max"), "max": ("clip", "min"),
}  # fmt: skip
NAMED = (
    ("swap", "chosen", "rejected"), ("swap", "policy_", "ref_"), ("swap", "values", "returns"), ("clip", "low", "high"),
)  # fmt: skip


class Mutant(NamedTuple):
    """One change: `before` at `start` of the source of the module at `path` becomes `after`."""

    path: str
    kind: str
    line: int
    start: int
    before: str
    after: str

    def apply(self, source: str) -> str:
        end = self.start + len(self.before)
        assert source[self.start : end] == self.before, f"{self.path}:{self.line} has changed"
        return source[: self.start] + self.after + source[end:]

    def changed_line(self, source: str) -> str:
        return self.apply(source).splitlines()[self.line - 1].strip()

    def diff(self, source: str) -> str:
        first = source.rfind("\n", 0, self.start) + 1
        last = source.find("\n", self.start + len(self.before))
        old = source[first:last]
        new = source[first : self.start] + self.after + source[self.start + len(self.before) : last]
        lines = [f"    - {line.strip()}" for line in old.split("\n")]
        lines += [f"    + {line.strip()}" for line in new.split("\n")]
        return "\n".join([f"{self.path}:{self.line} ({self.kind})", *lines])


def find_mutants(path: str, source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    raw, starts = source.encode(), [0]  # ast counts bytes
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))

    def offset(line: int, column: int) -> int:
        return len(raw[: starts[line - 1] + column].decode())

    def text(node: ast.expr) -> str:
        end = offset(node.end_lineno or node.lineno, node.end_col_offset or 0)
        return source[offset(node.lineno, node.col_offset) : end]

    mutants = set()
    for node, names in _expressions(ast.parse(source), frozenset()):
        for kind, after in _changes(node, names, text):
            start = offset(node.lineno, node.col_offset)
            mutants.add(Mutant(path, kind, node.lineno, start, text(node), after))
    return sorted(mutants, key=lambda m: (m.start, m.kind, m.after))


def _expressions(node: ast.AST, names: frozenset[str]) -> Iterator[tuple[ast.expr, frozenset[str]]]:
    """The expressions that compute, each with the names its function reads and writes."""
    if isinstance(node, ast.FunctionDef):
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        inside = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} | {x.arg for x in args}
        names = frozenset(inside)
        children = [*node.body, *node.args.defaults, *(x for x in node.args.kw_defaults if x is not None)]
    elif isinstance(node, ast.AnnAssign):
        children = [node.value] if node.value else []
    elif isinstance(node, ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom | ast.Assert) or _declares(node):
        return
    else:
        children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.expr):
        yield node, names
    for child in children:
        yield from _expressions(child, names)


def _declares(node: ast.AST) -> bool:
    """Whether it is the declaration of an option."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith(("key", "number"))


def _changes(node: ast.expr, names: frozenset[str], text: Callable[[ast.expr], str]) -> Iterator[tuple[str, str]]:
    """What one node can become: (kind, its new text)."""
    match node:
        case ast.BinOp(left, op, right) if type(op) in BINARY:
            kind, symbol = BINARY[type(op)]
            yield kind, f"(({text(left)}) {symbol} ({text(right)}))"
        case ast.UnaryOp(ast.USub(), operand):
            yield "sign", f"({text(operand)})"
        case ast.Compare(left, [op], [right]) if type(op) in COMPARE:
            yield "compare", f"(({text(left)}) {COMPARE[type(op)]} ({text(right)}))"
        case ast.BoolOp(op, values):
            word = " or " if isinstance(op, ast.And) else " and "
            yield "logic", f"({word.join(f'({text(value)})' for value in values)})"
        case ast.UnaryOp(ast.Not(), operand):
            yield "logic", f"({text(operand)})"
        case ast.IfExp(_, value, _):
            yield "logic", f"({text(value)})"
        case ast.Constant(value) if isinstance(value, float) and value:
            yield "constant", repr(2.0 * value)
        case ast.Name(name, ast.Load()):
            for kind, one, other in NAMED:
                swapped = name.replace(one, other) if one in name else name.replace(other, one)
                if swapped != name and swapped in names:
                    yield kind, swapped
        case ast.Call(ast.Name("masked"), [values, _]):
            yield "mask", f"({text(values)})"
        case ast.Call(ast.Attribute(ast.Name("jnp"), "where"), [_, value, _]):
            yield "mask", f"({text(value)})"
        case ast.Call(ast.Attribute(ast.Name("jnp") as owner, "clip"), [values, low, high]):
            yield "clip", f"{text(owner)}.clip({text(values)}, {text(high)}, {text(low)})"
        case ast.Call(ast.Attribute(_, "stop_gradient"), [value]):
            yield "scale", f"({text(value)})"
        case ast.Call(ast.Attribute(owner, name) as called) if name in CALLED:
            kind, other = CALLED[name]
            yield kind, text(owner) + "." + other + text(node)[len(text(called)) :]


def sample(mutants: list[Mutant], per_kind: int | None) -> list[Mutant]:
    """At most `per_kind` mutants of each kind, always the same ones; None keeps all."""
    chosen = []
    for kind in KINDS:
        of_kind = [m for m in mutants if m.kind == kind]
        if per_kind is not None and len(of_kind) > per_kind:
            of_kind = random.Random(f"{of_kind[0].path} {kind}").sample(of_kind, per_kind)
        chosen += of_kind
    return chosen
