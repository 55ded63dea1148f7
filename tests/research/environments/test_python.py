"""The Python tool: what the model is told of a program's end."""

import pytest

from research.environments.calls import Call
from research.environments.python import python
from research.environments.toolbox import Toolbox
from research.rewards.sandbox.sandbox import Sandbox, SandboxLimits, make_sandbox


@pytest.fixture(scope="module")
def namespaces() -> bool:
    return make_sandbox(isolation="best_effort").namespaces


@pytest.fixture
def answer(namespaces, tokenizer):
    def run(code, **limits):
        sandbox = Sandbox(SandboxLimits(**limits), namespaces=namespaces)
        result = Toolbox([python(sandbox)], tokenizer, max_result_tokens=80).run(Call("python", {"code": code}))
        return result.how, result.text

    return run


def test_answers(answer):
    assert answer("print(6*7)") == ("ok", "42\n")
    assert answer("x = 1") == ("ok", "(no output)")
    error, text = answer("print('hi')\n1/0")
    assert error == "tool" and text.startswith("error: python: status 1: ZeroDivisionError: division by zero\nhi")
    assert answer("raise SystemExit(3)") == ("tool", "error: python: status 3: nothing was printed")
    error, text = answer("while True: print('x')", output_bytes=10)
    assert (error, text) == ("tool", "error: python: stopped after 10 bytes of output\nx\nx\nx\nx\nx\n")


def test_limits_of_time(answer):
    assert answer("print(1)\nwhile True: pass", cpu_s=1) == (
        "timeout",
        "error: python: stopped after 1 seconds of processor time\n1\n",
    )
    assert answer("import time\ntime.sleep(99)", wall_s=1.0) == ("timeout", "error: python: stopped after 1 seconds")


def test_code_that_cannot_be_run(answer):
    assert answer("\0") == ("tool", "error: python: the code has a null character, or more than 100000 bytes")
    assert answer("#" * 100_001)[0] == "tool"
    assert answer("'\ud800'")[0] == "tool"


def test_a_busy_machine_does_not_change_an_answer(tokenizer):
    """Wall time is far above processor time, and the toolbox gives up later than the sandbox."""
    limits = SandboxLimits()
    assert limits.deadline_s >= 10 * limits.cpu_s
    tool = python(Sandbox(limits))
    assert Toolbox([tool], tokenizer, max_result_tokens=80).timeout_s > 2 * limits.deadline_s
