"""Answers: every usual spelling of the right one is found, nothing else is, and no text raises or takes long."""

import random
import time
from fractions import Fraction

import pytest

from research.tasks.answers import extract_final_answer, matches

RIGHT = [
    ("#### $ 18", "18"), ("#### 18 .", "18"), ("#### .5", "0.5"), ("#### -$5", "-5"), ("#### $-5", "-5"),
    ("#### \u22125", "-5"), ("#### 1e3", "1000"), ("#### 1/2", "0.5"), ("#### 0.5", "1/2"), ("#### 50%", "50"),
    ("#### 50%", "0.5"), ("#### 50", "50%"), ("#### 50\\%", "50%"), ("#### **18**", "18"), ("**#### 18**", "18"),
    ("\\boxed{18}", "18"), ("so $\\boxed{\\frac{1}{2}}$.", "0.5"), ("\\boxed{\\text{a} = {b}}", "\\text{a} = {b}"),
    ("####18", "18"), ("x\n#### 72", "72"), ("x\n#### 72.0", "72"), ("#### 1,200", "steps\n#### 1200"),
    ("#### 1,234,567.50", "1234567.5"), ("#### +007.0", "7"), ("#### -0", "0"), ("#### 18.", "18"),
    ("#### $1,200.50.\nmore", "1200.5"), ("#### 1\nno, wait\n#### 2", "2"), ("#### 2/6", "1/3"),
    ("#### -1/2", "-0.5"), ("#### 12005e-1", "1200.5"), ("#### 1E+3", "1,000"), ("#### `18`", "18"),
    ("#### $18$", "18"), ("#### \\$18", "18"), ("#### €18", "18"), ("#### blue", "blue"), ("#### 18  ", " 18 "),
    ("#### 0.1", "1/10"), ("#### 1", "\\boxed{1}"), ("#### 9007199254740993", "9007199254740993"),
    ("#### 5 / 10", "0.5"), ("#### 10", "1e1"), ("\\boxed{7}\n#### 8", "8"), ("#### 7\n\\boxed{8}", "8"),
    ("\r\n#### 18\r\n", "18"),
]  # fmt: skip
WRONG = [
    ("#### 0,123", "123"), ("#### 1,2", "12"), ("#### 12,34", "1234"), ("#### 1,2000", "12000"),
    ("#### 1200,000", "1200000"), ("#### ,123", "123"), ("#### 1,200,", "1200"), ("#### 7", "72"),
    ("#### 72 or 73", "72"), ("72", "72"), ("the answer is 72", "72"), ("", ""), ("#### ", ""), ("####", ""),
    ("#### 5", "-5"), ("#### -5", "5"), ("#### --5", "5"), ("#### -$-5", "5"), ("#### \u0667", "7"),
    ("#### 1/0", "0"), ("#### 1/2/3", "1"), ("#### 1e", "1"), ("#### 1e999999999", "0"), ("#### .", "0"),
    ("#### -", "0"), ("#### 9007199254740993", "9007199254740992"), ("#### 0.333", "1/3"), ("#### 5%", "0.5"),
    ("#### 50%", "5"), ("#### 1 8", "18"), ("#### 18 apples", "18"), ("#### 18\n#### 19", "18"),
    ("#### 18\n#### ", "18"), ("\\boxed{18", "18"), ("\\boxed{}", ""), ("\\boxed{18}\n#### 19", "18"),
    ("#### 18\n\\boxed{19}", "18"), ("#### Blue", "blue"), ("#### nan", "inf"), ("#### 1.2.3", "1.23"),
    ("#### 0x12", "18"), ("#### 1_000", "1000"), ("### 18", "18"), ("#### x", ""),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "answer"), RIGHT)
def test_right(completion, answer):
    assert matches(completion, answer)
    assert extract_final_answer(completion) is not None


@pytest.mark.parametrize(("completion", "answer"), WRONG)
def test_wrong(completion, answer):
    assert not matches(completion, answer)


@pytest.mark.parametrize(
    ("how", "completion", "answer", "right"),
    [
        ("plain", "Paris", "Paris", True),
        ("plain", " Paris.\n", "Paris", True),
        ("plain", "Let me think.\nParis", "Paris", True),
        ("plain", "two\nlines", "two\nlines", True),
        ("plain", "18.0", "18", True),
        ("plain", "paris", "Paris", False),
        ("plain", "It is Paris", "Paris", False),
        ("plain", "Paris\nor Rome", "Paris", False),
        ("plain", "#### 18", "18", False),
        ("plain", "", "", False),
        ("normalized", "The answer is 18.", "18", True),
        ("normalized", "9 + 9 = $18, so...", "18", True),
        ("normalized", "so...18", "18", True),
        ("normalized", "10-3=7", "7", True),
        ("normalized", "it is -7", "-7", True),
        ("normalized", "half of it: 1/2", "0.5", True),
        ("normalized", "PARIS", "Paris", True),
        ("normalized", "Let me think.\nthe  Louvre.", "The Louvre", True),
        ("normalized", "no 19\n#### 18\nnot 20", "18", True),
        ("normalized", "18 or 19", "18", False),
        ("normalized", "19 #### 20", "19", False),
        ("normalized", "0,123", "123", False),
        ("normalized", "x18", "18", False),
        ("normalized", "it is 10-7", "-7", False),
        ("normalized", "Apollo 11", "Apollo 12", False),
        ("normalized", "eighteen", "18", False),
        ("normalized", "", "", False),
    ],
)  # fmt: skip
def test_other_matchers(how, completion, answer, right):
    assert matches(completion, answer, how) is right


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("$1,200.50", "1200.5"), ("2401/2", "1200.5"), ("2/6", "1/3"), ("-4/2", "-2"), ("1e-3", "0.001"), ("-0.0", "0"),
     ("50%", "50"), ("1e400", "1" + "0" * 400), ("1e401", "1e401"), (" **blue** ", "blue"), ("*", "*"), ("", None)],
)  # fmt: skip
def test_canonical_form(text, canonical):
    assert extract_final_answer(text, "plain") == canonical == extract_final_answer(canonical or "", "plain")


def test_equal_numbers_are_one_vote():
    rng = random.Random(0)
    for _ in range(300):
        value = Fraction(rng.randrange(-5000, 5000), rng.choice((1, 2, 3, 4, 5, 7, 40)))
        spellings = [str(value), f"${value}", f"**{value}**"]
        if value.denominator == 1:
            spellings += [f"{int(value):,}", f"{int(value)}.00", f"{int(value)}e0", f"{int(value) * 10}e-1"]
        votes = {extract_final_answer(f"so\n#### {text}") for text in spellings}
        assert len(votes) == 1 and Fraction(votes.pop()) == value


@pytest.mark.parametrize(
    ("how", "text", "vote"),
    [("mark", "18", None), ("plain", "a\nParis.", "Paris"), ("normalized", "it is $18.00", "18"),
     ("normalized", "It is Paris", "it is paris"), ("normalized", "#### Paris", "paris"), ("plain", "", None)],
)  # fmt: skip
def test_votes_of_other_matchers(how, text, vote):
    assert extract_final_answer(text, how) == vote


PIECES = ["####", "\\boxed{", "\\frac{1}{", "}", "\n", *" 0123,./$%-+eE*`{}x\x00é\ud800\u2212\u0667"]


def test_no_text_raises():
    rng = random.Random(0)
    for _ in range(3000):
        text, answer = ("".join(rng.choices(PIECES, k=rng.randrange(30))) for _ in range(2))
        for how in ("mark", "plain", "normalized"):
            assert matches(text, answer, how) in (True, False)
            vote = extract_final_answer(text, how)
            assert vote is None or how == "normalized" or "####" in vote or "boxed" in vote or matches(text, vote, how)
        canonical = extract_final_answer(text, "plain") or ""
        assert (extract_final_answer(canonical, "plain") or "") == canonical


def test_time_is_linear_in_the_length_of_a_text():
    def seconds(repeats):
        started = time.process_time()
        for piece in PIECES:
            for start in ("", "#### ", "\\boxed{"):
                for how in ("mark", "plain", "normalized"):
                    text = start + piece * repeats
                    matches(text, text, how)
                    extract_final_answer(text, how)
        return time.process_time() - started

    short = min(seconds(1000) for _ in range(3))
    assert seconds(16_000) < 5 * 16 * short, "quadratic time would be 256 times as long"
