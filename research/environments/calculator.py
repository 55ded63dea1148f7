"""A calculator: exact rational arithmetic on a syntax tree, never `eval`."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

from research.environments.base import Tool, ToolError

_MOST_CHARACTERS = 500
_MOST_BITS = 4096  # about 1233 digits: enough for any sum, small enough that no operation takes time
_DIGITS = 12  # of a number that is not written out exactly
_SIGNS = str.maketrans({"^": "**", "×": "*", "·": "*", "÷": "/", "−": "-"})
_EXPECTED = "expected numbers, + - * / // % ^, brackets and abs, ceil, floor, max, min, round, sqrt"


def calculator() -> Tool:
    """The tool "calculator"."""
    return Tool(
        name="calculator",
        description="Evaluates an arithmetic expression exactly.",
        parameters={
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "such as 12*(3+4)/5"}},
            "required": ["expression"],
            "additionalProperties": False,
        },
        run=lambda arguments: calculate(arguments["expression"]),
    )


def calculate(expression: str) -> str:
    """The value of an expression as a text: "12", "0.1", "1/3, about 0.333333333333".

    Integers and decimals are exact fractions, so that 0.1+0.2 is 0.3. `^` is a power. Square roots of numbers
    that are not squares are taken to 28 digits.

    Raises:
      ToolError: it is no such expression, divides by zero, or a number gets larger than 4096 bits.
    """
    if len(expression) > _MOST_CHARACTERS:
        raise ToolError(f"the expression has {len(expression)} characters, expected at most {_MOST_CHARACTERS}")
    source = expression.translate(_SIGNS).strip()
    try:
        tree = ast.parse(source, mode="eval")
        return _written(_value(tree.body, source))
    except (SyntaxError, ValueError) as error:  # ValueError: a null character, or an integer of 4300 digits
        raise ToolError(f"{expression[:40]!r} is not an expression, {_EXPECTED}") from error
    except ZeroDivisionError as error:
        raise ToolError("division by zero") from error
    except (RecursionError, MemoryError) as error:  # of the parser
        raise ToolError("the expression is nested too deeply") from error


def _value(node: ast.expr, source: str) -> Fraction:
    # One frame a level: 500 characters cannot nest deeper than Python's stack.
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, source), _value(node.right, source)
        return _bounded(Fraction(_OPERATORS[type(node.op)](left, right)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(_literal(ast.get_source_segment(source, node) or "", node.value))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        name = node.func.id
        if name in _FUNCTIONS:
            values = [_value(argument, source) for argument in node.args]
            try:
                return _bounded(Fraction(_FUNCTIONS[name](*values)))
            except TypeError as error:
                raise ToolError(f"{name} does not take {len(values)} numbers") from error
    raise ToolError(f"found {(ast.get_source_segment(source, node) or '')[:40]!r}, {_EXPECTED}")


def _literal(text: str, value: int | float) -> Fraction:
    if isinstance(value, int):
        return Fraction(value)  # 0x10 and 1_000 too
    number = Decimal(text)  # holds 1e999999999 without spelling it out
    if number and abs(number.adjusted()) > _MOST_BITS // 4:
        raise ToolError(f"the number {text[:40]} is too large or too small")
    return Fraction(number)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
        raise ToolError(f"a number gets too large, expected at most {_MOST_BITS} bits")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 2 and base >= 0:  # x^0.5, x^1.5
        return _power(_sqrt(base), Fraction(exponent.numerator))
    if exponent.denominator != 1:
        raise ToolError("a power needs an integer exponent (or halves, of a number >= 0)")
    if base in (0, 1, -1):
        return base ** (int(exponent) if exponent < 0 else int(exponent % 2 + 2 * (exponent > 0)))
    bits = max(abs(base.numerator), base.denominator).bit_length() - 1
    if abs(exponent) * bits > _MOST_BITS:  # before the power is taken: 9^9^9^9
        raise ToolError(f"a number gets too large, expected at most {_MOST_BITS} bits")
    return Fraction(base ** int(exponent))


def _sqrt(value: Fraction) -> Fraction:
    if value < 0:
        raise ToolError("the square root of a negative number")
    roots = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if roots * roots == value:
        return roots
    with localcontext() as context:
        context.prec = 28
        return Fraction((Decimal(value.numerator) / Decimal(value.denominator)).sqrt())


def _written(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    with localcontext() as context:
        context.prec = 20
        exact = Decimal(value.numerator) / Decimal(value.denominator)
        if rest == 1 and Fraction(exact) == value:
            return format(exact, "f") if abs(exact.adjusted()) <= 20 else str(exact)
        context.prec = _DIGITS
        about = str(Decimal(value.numerator) / Decimal(value.denominator))
    fraction = f"{value.numerator}/{value.denominator}"
    return f"{fraction}, about {about}" if len(fraction) <= 20 else f"about {about}"


_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}


def _round(value: Fraction, digits: Fraction = Fraction(0)) -> Fraction:
    if digits.denominator != 1 or abs(digits) > 1000:
        raise ToolError("round needs a number of digits from -1000 to 1000")
    return Fraction(round(value, int(digits)))


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "floor": math.floor,
    "max": lambda first, *rest: max((first, *rest)),
    "min": lambda first, *rest: min((first, *rest)),
    "round": _round,
    "sqrt": _sqrt,
}

PROVIDES = {"tool": {"calculator": calculator}}
