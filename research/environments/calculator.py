"""A calculator: exact rational arithmetic on a syntax tree, never `eval`."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

from research.environments.base import Tool, ToolError, text_tool

_MOST_CHARACTERS = 500
_MOST_BITS = 4096  # about 1233 digits: enough for any sum, small enough that no operation takes time
_SIGNS = str.maketrans({"^": "**", "×": "*", "·": "*", "÷": "/", "−": "-"})
_EXPECTED = "expected numbers, + - * / // % ^, brackets and abs, ceil, floor, max, min, round, sqrt"
_TOO_LARGE = f"a number gets too large, expected at most {_MOST_BITS} bits"


def calculator() -> Tool:
    """The tool "calculator"."""
    description = "Evaluates an arithmetic expression exactly."
    return text_tool("calculator", description, "expression", "such as 12*(3+4)/5", calculate)


def calculate(expression: str) -> str:
    """The value of an expression as a text: "12", "0.1", "1/3, about 0.333333333333".

    Integers and decimals are exact fractions, so that 0.1+0.2 is 0.3. `^` is a power. Square roots of numbers
    that are not squares are taken to 28 digits. ToolError where it is no such expression, divides by zero, or a number
    gets larger than 4096 bits.
    """
    if len(expression) > _MOST_CHARACTERS:
        raise ToolError(f"the expression has {len(expression)} characters, expected at most {_MOST_CHARACTERS}")
    source = expression.translate(_SIGNS).strip()
    try:
        return _written(_value(ast.parse(source, mode="eval").body, source))
    except (SyntaxError, ValueError) as error:  # ValueError: a null character, or an integer of 4300 digits
        raise ToolError(f"{expression[:40]!r} is not an expression, {_EXPECTED}") from error
    except ZeroDivisionError as error:
        raise ToolError("division by zero") from error
    except (RecursionError, MemoryError) as error:  # of the parser
        raise ToolError("the expression is nested too deeply") from error


def _value(node: ast.expr, source: str) -> Fraction:
    # One frame a level: 500 characters cannot nest deeper than Python's stack.
    text = ast.get_source_segment(source, node) or ""
    match node:
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            value = _OPERATORS[type(op)](_value(left, source), _value(right, source))
        case ast.UnaryOp(ast.USub(), operand):
            value = -_value(operand, source)
        case ast.UnaryOp(ast.UAdd(), operand):
            value = _value(operand, source)
        case ast.Constant(int() as number) if not isinstance(number, bool):
            value = number  # 0x10 and 1_000 too
        case ast.Constant(float()):
            decimal = Decimal(text)  # holds 1e999999999 without spelling it out
            if decimal and abs(decimal.adjusted()) > _MOST_BITS // 4:
                raise ToolError(f"the number {text[:40]} is too large or too small")
            value = Fraction(decimal)
        case ast.Call(ast.Name(name), arguments, []) if name in _FUNCTIONS:
            try:
                value = _FUNCTIONS[name](*(_value(argument, source) for argument in arguments))
            except TypeError as error:
                raise ToolError(f"{name} does not take {len(arguments)} numbers") from error
        case _:
            raise ToolError(f"found {text[:40]!r}, {_EXPECTED}")
    value = Fraction(value)
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
        raise ToolError(_TOO_LARGE)
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 2 and base >= 0:  # x^0.5, x^1.5
        return _power(_sqrt(base), Fraction(exponent.numerator))
    if exponent.denominator != 1:
        raise ToolError("a power needs an integer exponent (or halves, of a number >= 0)")
    bits = max(abs(base.numerator), base.denominator).bit_length() - 1
    if abs(exponent) * bits > _MOST_BITS:  # before the power is taken: 9^9^9^9
        raise ToolError(_TOO_LARGE)
    return Fraction(base ** int(exponent))


def _sqrt(value: Fraction) -> Fraction:
    if value < 0:
        raise ToolError("the square root of a negative number")
    roots = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if roots * roots == value:
        return roots
    return Fraction(Context(prec=28).sqrt(_decimal(value, 28)))


def _round(value: Fraction, digits: Fraction = Fraction(0)) -> Fraction:
    if digits.denominator != 1 or abs(digits) > 1000:
        raise ToolError("round needs a number of digits from -1000 to 1000")
    return Fraction(round(value, int(digits)))


def _decimal(value: Fraction, digits: int) -> Decimal:
    return Context(prec=digits).divide(Decimal(value.numerator), Decimal(value.denominator))


def _written(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    exact = _decimal(value, 20)
    if Fraction(exact) == value:
        return format(exact, "f") if abs(exact.adjusted()) <= 20 else str(exact)
    fraction, about = str(value), f"about {_decimal(value, 12)}"
    return f"{fraction}, {about}" if len(fraction) <= 20 else about


_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
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
