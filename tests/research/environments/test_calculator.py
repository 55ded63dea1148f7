"""Exact values, and nothing that a model can write takes time, memory or the interpreter."""

import time

import pytest

from research.environments.base import ToolError
from research.environments.calculator import calculate, calculator
from research.environments.calls import Call
from research.environments.toolbox import Toolbox


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*(3+4)", "84"),
        ("0.1+0.2", "0.3"),
        ("1/3", "1/3, about 0.333333333333"),
        ("1/3*3", "1"),
        ("2^10", "1024"),
        ("-2^2", "-4"),
        ("2**-1", "0.5"),
        ("7//2 + 7%3", "4"),
        ("-7//2", "-4"),
        ("6 × 7 ÷ 2 − 1", "20"),
        ("9^0.5", "3"),
        ("8^1.5", "about 22.6274169980"),
        ("sqrt(2)", "about 1.41421356237"),
        ("sqrt(1/4)", "0.5"),
        ("max(1, 2.5, -3)", "2.5"),
        ("min(4, 2) + abs(-3) + floor(2.7) + ceil(2.1)", "10"),
        ("round(2.567, 2)", "2.57"),
        ("round(7/2)", "4"),
        ("(-1)^999999999", "-1"),
        ("(-1)^-2", "1"),
        ("0^0", "1"),
        ("1e3", "1000"),
        ("1e-300*1e300", "1"),
        ("1_000 + 1", "1001"),
        ("123456789012345678901234567890 + 1", "123456789012345678901234567891"),
        ("2^4000 / 2^4000", "1"),
        ("+".join(["1"] * 250), "250"),
    ],
)
def test_values(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1/0", "division by zero"),
        ("0^-1", "division by zero"),
        ("5 % 0", "division by zero"),
        ("sqrt(-1)", "square root of a negative"),
        ("(-1)^0.5", "integer exponent"),
        ("2^0.3", "integer exponent"),
        ("9^9^9^9", "a number gets too large"),
        ("2^99999999999", "a number gets too large"),
        ("(1/3)^-99999999999", "a number gets too large"),
        ("2^4095 * 4", "a number gets too large"),
        ("1e999999999", "the number 1e999999999 is too large or too small"),
        ("1e-999999999", "too large or too small"),
        ("9" * 501, "has 501 characters, expected at most 500"),
        ("", "'' is not an expression, expected numbers"),
        ("2+", "is not an expression"),
        ("1\0", "is not an expression"),
        ("1,000", "found '1,000', expected numbers"),
        ("x+1", "found 'x', expected"),
        ("True + 1", "found 'True', expected"),
        ("'a'*3", "found \"'a'\", expected"),
        ("2j", "found '2j', expected"),
        ("1 < 2", "found '1 < 2', expected"),
        ("1 << 9999999", "found '1 << 9999999', expected"),
        ("__import__('os').system('true')", "found \"__import__('os').system"),
        ("(1).__class__", "found '(1).__class__', expected"),
        ("[1 for _ in (1,)]", "expected numbers"),
        ("(lambda: 1)()", "expected numbers"),
        ("round(1, 2, 3)", "round does not take 3 numbers"),
        ("max()", "max does not take 0 numbers"),
        ("round(1, 99999999999)", "round needs a number of digits"),
        ("round(1, ndigits=2)", "found 'round(1, ndigits=2)', expected"),
        ("max(*[1, 2])", "expected numbers"),
        ("(" * 250 + "1" + ")" * 249, "is not an expression"),
        ("-" * 499 + "1", None),
        ("abs(" * 99 + "1" + ")" * 99, None),
    ],
)
def test_refusals_are_quick_sentences(expression, message):
    start = time.process_time()
    if message is None:
        assert calculate(expression) in ("1", "-1")
    else:
        with pytest.raises(ToolError) as found:
            calculate(expression)
        assert message in str(found.value)
    assert time.process_time() - start < 1


def test_as_a_tool(tokenizer):
    box = Toolbox([calculator()], tokenizer, max_result_tokens=60)
    assert box.run(Call("calculator", {"expression": "6*7"})).text == "42"
    assert box.run(Call("calculator", {"expression": "6/0"})).text == "error: calculator: division by zero"
    assert box.run(Call("calculator", {"expression": 6})).how == "arguments"
