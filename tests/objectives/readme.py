"""Writes objectives/README.md from the code: docstrings, signatures, algorithms, and the parity with TRL.

Write it anew with: python -m tests.objectives.readme --update
"""

import ast
import importlib
import inspect
import math
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import objectives
import research.algorithms
from research.config.references import provided
from tests.objectives.golden import ours
from tests.objectives.golden.inputs import CASES
from tests.objectives.golden.store import load

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "objectives" / "README.md"
UPDATE = "python -m tests.objectives.readme --update"
SMALLEST = 1e-6
"""No bound is printed below this: what is left is rounding, and differs from machine to machine."""

INTRODUCTION = f"""# Objectives

The mathematics: functions from arrays to unreduced float32 losses and metrics (`ObjectiveOutput`), which `reduce.py`
turns into `WeightedSum`s. Each name in the tables leads to its section: the full equation, the sources, the options.

Notation: `l` is the log-prob of a token (of a whole sequence where the batch is pairs), in nats; `l_ref` and
`l_old` are the same under the reference and under the policy that sampled. `A` is an advantage, `r` a reward, `b`
alone is beta, `e` a label smoothing, `s(x)` the sigmoid, `n_b` the number of unmasked tokens of row b; `_c` and
`_r` are the chosen and the rejected side. Shapes: B rows or pairs, N = P * G completions of P prompts, T tokens, V
vocabulary, K candidates, S steps, E models.

What a config may set, with defaults, stands beside each algorithm (`python -m launch.describe rl.objective.grpo`);
the KL of the GRPO family is off by default.

This file is generated from the code: `{UPDATE}`.
"""

FAMILY = """## Members of the GRPO family

| Member | advantages | reduction | `grpo_loss` |
|---|---|---|---|
| GRPO | defaults | `sequence_mean` | `beta` > 0 |
| Dr. GRPO | `normalization="none"` | `constant` | `beta` 0 |
| DAPO | defaults | `token_mean` | clip 0.2 / 0.28, `beta` 0; dynamic sampling and overlong penalty are elsewhere |
| RLOO (clipped) | `baseline="leave_one_out"`, `normalization="none"` | `constant` | clip by token; KL in the reward |
| GSPO | defaults | `sequence_mean` | `ratio_level="sequence"`, clip 3e-4 / 4e-4, `beta` 0 |
| CISPO | defaults | `token_mean` | `surrogate="cispo"` |
| SAPO | defaults | `sequence_mean` | `surrogate="sapo"` |
| REINFORCE++ | `reinforce_pp_advantages` | `token_mean` | KL (k1) in the reward |
"""

ABSENT = """TRL 1.16 ships no trainer for PPO (its GRPO has the entropy bonus), process reward models, rankings,
step-DPO or REINFORCE++: those are held to NumPy loops only. Of TRL's, we have none of: DFT (SFT), VESPO,
GMPO, off-policy sequence masks and entropy quantile masks (GRPO), AlphaPO, TPO, top-1 mixed
distillation. `tests/parity/` trains both sides for three optimizer steps on the same tokens (SFT, DPO,
GRPO, reward model; step scorer against transformers): parameters agree within 1e-4.

Defaults that differ: TRL's `GRPOConfig` multiplies the KL by the ratio (`use_bias_correction_kl`), ours is
`kl_correction="none"`. A reward model of transformers finds a row's end by token id, so that an end token that is
also padding is skipped; ours reads the last token of the mask.
"""

Bounds = dict[str, tuple[str, str]]
"""By variant: the printed bounds of the loss's and the gradient's difference."""


class Use(NamedTuple):
    """What an algorithm says of the objective it calls.

    Attributes:
      batch: class of its batch.
      roles: what it trains, then the frozen models it needs, in brackets where only some settings need them.
    """

    batch: str
    roles: str


def main() -> None:
    """Measures the parity, which takes about a minute, and writes the file."""
    if sys.argv[1:] != ["--update"]:
        sys.exit(f"usage: {UPDATE}")
    README.write_text(text(measured_bounds()), encoding="utf-8")
    print(f"wrote {README.relative_to(ROOT)}")


def text(bounds: Bounds) -> str:
    """The whole file."""
    losses = [function for function in objectives_only() if returns(function) == "ObjectiveOutput"]
    others = [function for function in objectives_only() if function not in losses]
    return "\n".join(
        [INTRODUCTION, "## Losses\n", summary_table(losses)]
        + ["## Advantages, rewards and terms of losses\n", summary_table(others)]
        + ["## Reductions\n", reduction_table(), FAMILY, "## Names in configs\n", name_table()]
        + ["## Details\n", *(section(function) for function in objectives_only())]
        + ["## Parity with TRL\n", parity_text(), parity_table(bounds), ABSENT]
    )


def objectives_only() -> list[Callable[..., Any]]:
    """The functions with a source that are no reduction."""
    return [function for function in public_functions() if function.__module__ != "objectives.reduce"]


def returns(function: Callable[..., Any]) -> str:
    """Name of the type returned."""
    return getattr(inspect.signature(function).return_annotation, "__name__", "")


def name_table() -> str:
    """One row a module of `research/algorithms/`: what a config may call its objective, and what the module calls."""
    named: dict[str, list[str]] = {}
    for module, objective in provided("objective").values():
        named.setdefault(module.__name__, []).append(f"`{objective.name}`")
    rows = []
    for name, names in named.items():
        path = f"{name.replace('.', '/')}.py"
        loaded = names_in(ast.parse((ROOT / path).read_text("utf-8")))
        calls = [x.__name__ for x in public_functions() if x.__name__ in loaded]
        rows.append(
            [", ".join(names), f"`{path}`", ", ".join(f"`{name}`" for name in calls) or "what its base class does"]
        )
    return table(["`objective`", "Algorithm", "Calls"], rows)


def summary_table(functions: list[Callable[..., Any]]) -> str:
    """One row a function; its name leads to its section below."""
    rows = [[f"[{x.__name__}](#{x.__name__})", meaning(x), short_equation(x), short_source(x)] for x in functions]
    return table(["Name", "Meaning", "Equation", "Source"], rows)


def meaning(function: Callable[..., Any]) -> str:
    """The docstring's first sentence."""
    return " ".join(paragraphs(function)[0].split()).removesuffix(".")


def short_equation(function: Callable[..., Any]) -> str:
    """The first formulas of the equation, as many as fit into a cell."""
    body = "\n\n".join(paragraphs(function)).split("Args:")[0].split("Source:")[0]
    formulas: list[str] = []
    for text in (equation(function), body):
        found = [x for x in re.findall(r"`[^`]+`", text) if not re.fullmatch(r"`[\w']+( \+ 1)?`", x)]
        formulas = formulas or found
    kept = formulas[:1]
    for formula in formulas[1:]:
        if len("; ".join([*kept, formula])) > 130:
            break
        kept.append(formula)
    return "; ".join(kept)


def short_source(function: Callable[..., Any]) -> str:
    """The first two citations."""
    cited = re.findall(r"[A-Z][\w'-]+(?: et al\.| and [A-Z]\w+| Team)? \d{4}", source(function))
    found = list(dict.fromkeys(cited))
    return ", ".join(found[:2]) + (", ..." if len(found) > 2 else "") if found else source(function).split(";")[0]


def section(function: Callable[..., Any]) -> str:
    """All of one function: equation, source, batch, roles, options and their variants."""
    use = declared_use(function.__name__)
    lines = [f"### {function.__name__}", "", f"{meaning(function)}.", "", f"- Equation: {equation(function)}"]
    lines.append(f"- Source: {source(function)}")
    if use and use.batch:
        lines.append(f"- Learns from: {use.batch}; models: {use.roles}")
    else:
        lines.append(f"- Shapes: {shapes(function)}")
    listed = options(function)
    if listed:
        lines.append(f"- Options: {listed}")
    for parameter in choices_of(function):
        found = [(value, variant_cell(function, parameter, value)) for value in choices_in_order(function, parameter)]
        lines.append(f"- `{parameter}`:")
        lines += [f"  - `{value}`: {cell}" for value, cell in found]
    return "\n".join(lines) + "\n"


def reduction_table() -> str:
    """The functions of reduce.py that make a `WeightedSum`."""
    rows = []
    for function in functions_of("objectives.reduce"):
        if inspect.signature(function).return_annotation.__class__ is type and function.__name__ != "reduce":
            returned = inspect.signature(function).return_annotation
            if returned.__name__ == "WeightedSum":
                rows.append([f"`{function.__name__}`", equation(function), source(function)])
    weights = "Each takes per-row `weights`, which enter total and count; rows that only pad the batch have weight 0."
    return table(["Reduction", "total / count", "Source"], rows) + f"\n{weights}\n"


def parity_text() -> str:
    """What the table below says."""
    header = load()[1]
    return (
        f"TRL {header['trl']} (torch {header['torch']}, {header['date']}) computed loss and gradient with its own "
        "trainers' methods;\n`tests/objectives/test_trl_golden.py` holds ours to them in float32 to 1e-5. Bounds are "
        "of the largest absolute difference\nover all cases, at least three times what was measured. A stated "
        f"difference is applied before comparing.\nWrite the numbers anew with `{header['command']}`.\n"
    )


def parity_table(bounds: Bounds) -> str:
    """One row a stored variant."""
    rows = []
    for variant, entry in ours.entries().items():
        cells = [f"`{entry.objective}`", entry.options, f"`{variant}`", str(CASES)]
        rows.append([*cells, *bounds[variant], entry.difference])
    columns = ["Objective", "Variant", "Stored as", "Cases", "Loss", "Gradient", "Stated difference"]
    return table(columns, rows)


def measured_bounds() -> Bounds:
    """Runs every entry."""
    found = {variant: ours.agreement(variant) for variant in ours.entries()}
    return {variant: (bound(x.loss), bound(x.gradient)) for variant, x in found.items()}


def bound(value: float) -> str:
    """A power of ten at least three times the value."""
    if math.isnan(value):
        return ""
    power = math.ceil(math.log10(max(3 * value, SMALLEST)) - 1e-9)
    return f"< 1e{power}"


def printed_bounds() -> Bounds:
    """What the file says now."""
    found = {}
    for line in README.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)][1:-1]
        if len(cells) == 7 and cells[3].isdigit():
            found[cells[2].strip("`")] = (cells[4], cells[5])
    return found


@cache
def public_functions() -> tuple[Callable[..., Any], ...]:
    """Every public function below `objectives` whose docstring names a source, module by module."""
    modules = sorted(module.name for module in pkgutil.iter_modules(objectives.__path__))
    found = (function for module in modules for function in functions_of(f"objectives.{module}"))
    return tuple(function for function in found if source(function))


def functions_of(module: str) -> Iterator[Callable[..., Any]]:
    """Public functions a module defines, in its order."""
    for name, value in vars(importlib.import_module(module)).items():
        if inspect.isfunction(value) and value.__module__ == module and not name.startswith("_"):
            yield value


def paragraphs(function: Callable[..., Any]) -> list[str]:
    """Of the docstring."""
    return (inspect.getdoc(function) or "").split("\n\n")


def equation(function: Callable[..., Any]) -> str:
    """The first paragraph with a formula, without its list of variants; else the first sentence's formula."""
    found = paragraphs(function)
    for paragraph in found[1:]:
        if paragraph.startswith(("Source:", "Args:")):
            break
        if "`" in paragraph:
            lines = paragraph.split("\n")
            kept = " ".join(line for line in lines if not line.startswith("  "))
            if lines[-1].startswith("  "):
                return re.sub(r"`[^`]*$", "`", kept)  # without the words that introduce the list
            return kept.replace("`: ", "`, ") if len(kept) < len(paragraph) else kept
    formula = re.search(r"`[^`]+`", found[0])
    return formula.group(0) if formula else ""


def source(function: Callable[..., Any]) -> str:
    """What follows "Source:", without its lists and without what introduces them."""
    for paragraph in paragraphs(function):
        if paragraph.startswith("Source:"):
            lines = [line for line in paragraph.removeprefix("Source:").split("\n") if line[:2] != "  "]
            sentences = " ".join(line.strip() for line in lines).strip()
            return re.sub(r"\. [^.]*:$", ".", sentences).removesuffix(".")
    return ""


def choices_of(function: Callable[..., Any]) -> dict[str, set[str]]:
    """The values of every parameter that takes one of a few."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: set(get_args(p.annotation)) for p in parameters if get_origin(p.annotation) is Literal}


def choices_in_order(function: Callable[..., Any], parameter: str) -> tuple[str, ...]:
    """The values of one parameter, in the order of the code."""
    return get_args(inspect.signature(function).parameters[parameter].annotation)


def variant_cell(function: Callable[..., Any], parameter: str, value: str) -> str:
    """The variant's formula, or the function that has it where this one only passes the choice on; else nothing."""
    found = variant_equation(function, value)
    if found:
        return found
    choices = choices_of(function)[parameter]
    for other in public_functions():
        named = other.__name__.startswith(value) and other.__name__.endswith(parameter)
        shared = other is not function and any(choices <= known for known in choices_of(other).values())
        if named or (shared and variant_equation(other, value)):
            return f"see [{other.__name__}](#{other.__name__})"
    return ""


def variant_equation(function: Callable[..., Any], value: str) -> str:
    """What the docstring gives next to a variant's name: its line of a list, or a formula."""
    body = "\n\n".join(paragraphs(function)).split("Args:")[0].split("Source:")[0]
    for line in body.split("\n"):
        for item in line.removeprefix("  ").split("; ") if line.startswith("  ") else ():
            if item.startswith(f"{value}: ") and "`" in item:
                return item.removeprefix(f"{value}: ")
    flat, name = " ".join(body.split()), re.escape(value)
    patterns = (
        rf"(?<![\w`]){name}: (`[^`]+`)",
        rf"`{name}`:? (`[^`]+`)",
        rf"(`{name} = [^`]+`)",
        rf"(`[^`]+`) \({name}\)",
        rf"(?<![\w`]){name} (`[^`]+`)",
    )
    matches = (re.search(pattern, flat) for pattern in patterns)
    return next((match.group(1) for match in matches if match), "")


def options(function: Callable[..., Any]) -> str:
    """Parameters that are not arrays, with their choices or defaults."""
    found = []
    for parameter in inspect.signature(function).parameters.values():
        if dims(parameter.annotation) and not is_scalar(parameter.annotation):
            continue
        name = f"`{parameter.name}`"
        if get_origin(parameter.annotation) is Literal:
            given = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default}"
            found.append(f"{name}{given} ({', '.join(map(str, get_args(parameter.annotation)))})")
        elif parameter.default is inspect.Parameter.empty:
            found.append(name)
        else:
            found.append(f"{name} = {parameter.default}")
    return "; ".join(found)


def shapes(function: Callable[..., Any]) -> str:
    """Array shapes of the parameters, each once."""
    parameters = inspect.signature(function).parameters.values()
    found = {shape: None for p in parameters for shape in dims(p.annotation) if shape}
    listed = ["any shape" if shape == "..." else f"`[{','.join(shape.split())}]`" for shape in found if shape.strip()]
    return ", ".join(listed)


def dims(annotation: Any) -> list[str]:
    """The jaxtyping shapes in an annotation; a scalar's is empty."""
    if isinstance(annotation, types.UnionType):
        return [shape for part in get_args(annotation) for shape in dims(part)]
    return [annotation.dim_str] if hasattr(annotation, "dim_str") else []


def is_scalar(annotation: Any) -> bool:
    return float in get_args(annotation)


def declared_use(function_name: str) -> Use | None:
    """Batch and roles of the algorithms that call an objective; None where no class does so itself."""
    found = [use for use in algorithm_uses() if function_name in use[0]]
    if not found:
        return None
    batches = {f"`{batch}`": None for _, use in found for batch in use.batch.split()}
    return Use(", ".join(batches), "; ".join({use.roles: None for _, use in found}))


@cache
def algorithm_uses() -> tuple[tuple[frozenset[str], Use], ...]:
    """For each algorithm class, from the sources: the names it loads, its batches (or its base's), its roles."""
    trained = {"scorer": "reward model", "step_scorer": "step scorer", "actor_critic": "policy, value"}
    paths = sorted(Path(research.algorithms.__path__[0]).glob("*.py"))
    nodes = [n for p in paths if p.name != "base.py" for n in ast.parse(p.read_text("utf-8")).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}

    def lineage(node: ast.ClassDef) -> Iterator[ast.ClassDef]:
        """The class and its bases."""
        yield node
        for base in node.bases:
            name = base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
            if name in classes:
                yield from lineage(classes[name])

    found = []
    for node in classes.values():
        batches, layout, frozen = [], "", ""
        for each in lineage(node):
            named = sorted(name for name in names_in(each) if name.endswith("Batch") and name != "Batch")
            batches = batches or named
            for member in each.body:
                if isinstance(member, ast.Assign | ast.AnnAssign) and member.value is not None:
                    target = member.targets[0] if isinstance(member, ast.Assign) else member.target
                    if getattr(target, "id", "") == "layout":
                        layout = layout or ast.literal_eval(member.value)
                    if getattr(target, "id", "") == "roles":
                        frozen = frozen or "".join(f", {role}" for role in ast.literal_eval(member.value))
                if isinstance(member, ast.FunctionDef) and member.name == "roles":
                    roles = [x.value for x in ast.walk(member) if isinstance(x, ast.Constant)]
                    frozen = frozen or "".join(f", ({x})" for x in roles if x in ("reference", "teacher"))
        use = Use(" ".join(batches), trained.get(layout, layout or "policy") + frozen)
        found.append((names_in(node), use))
    return tuple(found)


def names_in(tree: ast.AST) -> frozenset[str]:
    """The names that code loads or binds."""
    found = (
        getattr(x, "id", getattr(x, "attr", "")) for x in ast.walk(tree) if isinstance(x, ast.Name | ast.Attribute)
    )
    return frozenset(found)


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown; a bar inside a cell is escaped."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
