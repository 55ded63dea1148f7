"""Refilled slots draw what one batch draws; callbacks between chunks; what the engine counts."""

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from models.logprobs import token_logps
from research.core.errors import DataError
from research.core.mesh import make_mesh
from research.sampling.controls import make_controls
from research.sampling.engine import Engine, sample_refilled
from research.sampling.rows import ForceTokens, Request, Row, StopRow
from research.sampling.sampler import sample
from research.sampling.types import STOPPED, TRUNCATED, Completions, EngineSpec, Prompts
from tests.models.tiny import ONE_LAYER as CONFIG
from tests.models.tiny import make_params, make_tokens, right_padded
from tests.research.sampling.tiny import make_prompts, make_spec, scalars

N, WIDTH = 14, 9
STOPS = (0, 7, 14, 21)
SPEC = dataclasses.replace(make_spec(N, 2, stops=STOPS), cache_bucket=8)
ENGINE = EngineSpec(slots=4, chunk=5, admit=2, prompt_bucket=4)
REFILLED = dataclasses.replace(SPEC, engine=ENGINE)
TEXTS = [make_tokens(CONFIG, 1, n, seed=n)[0] for n in (8, 5, 3, 6, 9, 1, 7)]
PROMPTS = make_prompts(TEXTS, WIDTH, list(range(10, 17)))
NUMBERS = scalars(seed=3, step=2)


@cache
def baseline() -> Completions:
    return jax.device_get(sample(make_params(CONFIG), PROMPTS, NUMBERS, config=CONFIG, spec=SPEC))


def refilled(engine: EngineSpec = ENGINE, prompts: Prompts = PROMPTS, spec: Any = SPEC, **more: Any) -> Any:
    return sample_refilled(
        make_params(CONFIG), prompts, NUMBERS, config=CONFIG, spec=dataclasses.replace(spec, engine=engine), **more
    )


def assert_same(found: Completions, expected: Completions, rows: Any = slice(None)) -> None:
    for name in ("tokens", "mask", "stop_reason", "lengths"):
        np.testing.assert_array_equal(getattr(found, name)[rows], getattr(expected, name)[rows], name)
    for name in ("sampler_logps", "policy_logps"):
        np.testing.assert_allclose(getattr(found, name)[rows], getattr(expected, name)[rows], atol=1e-5, err_msg=name)


RARER = ({"slots": 20}, {"chunk": 1}, {"chunk": 64}, {"prompt_bucket": 32})


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"slots": 1, "admit": 1},
        {"slots": 3, "admit": 8},
        {"max_forced": 4},
        *(pytest.param(change, marks=pytest.mark.slow) for change in RARER),
    ],
    ids=str,
)
def test_equals_one_batch(change: dict[str, int]) -> None:
    """Rows of many lengths, prompts of one token and of many; the slots change hands several times."""
    found, stats = refilled(dataclasses.replace(ENGINE, **change))
    assert_same(found, baseline())
    assert len(set(baseline().lengths.tolist())) > 5 and {STOPPED, TRUNCATED} == set(found.stop_reason)
    assert stats.tokens == baseline().lengths.sum()
    assert stats.prefilled >= sum(len(text) - 1 for text in TEXTS)


def test_a_slot_is_refilled_while_the_others_go_on() -> None:
    """Four slots take about a quarter of all tokens in steps, not the sum of each batch's longest row."""
    _, stats = refilled(dataclasses.replace(ENGINE, admit=1))
    lengths = baseline().lengths
    in_batches = sum(int(lengths[i : i + 4].max()) for i in range(0, 14, 4))
    assert stats.steps < in_batches
    assert stats.slot_steps <= 4 * stats.steps and stats.tokens / stats.slot_steps > 0.75


def test_stragglers_run_in_a_smaller_batch() -> None:
    """One long row among short ones: the slots are halved around it, whatever slot it is in."""
    for long in (0, 3):
        engine = Engine(make_params(CONFIG), NUMBERS, config=CONFIG, spec=dataclasses.replace(REFILLED, stop_tokens=()))
        requests = [Request(TEXTS[i], 10 + i, 0, N if i == long else 2) for i in range(4)]
        rows = {row.number: row for row in engine.run(requests)}
        free = sample(
            make_params(CONFIG), PROMPTS, NUMBERS, config=CONFIG, spec=dataclasses.replace(SPEC, stop_tokens=())
        )
        np.testing.assert_array_equal(rows[long].tokens, free.tokens[2 * long])
        assert engine.stats.tokens == N + 6
        assert engine.stats.slot_steps <= 4 * ENGINE.chunk + (N - ENGINE.chunk)


def test_the_cache_stays_as_small_as_the_rows_need() -> None:
    """56 rows of up to 14 tokens through 4 slots: what is behind is left out, so few sizes are compiled."""
    many = Prompts(np.tile(PROMPTS.tokens, (4, 1)), np.tile(PROMPTS.mask, (4, 1)), np.arange(28, dtype=np.int32))
    out, _ = refilled(prompts=many)
    assert (out.lengths > 0).all()
    engine = Engine(make_params(CONFIG), NUMBERS, config=CONFIG, spec=REFILLED)
    requests = [Request(text, number, 0, N) for number, text in enumerate(TEXTS * 4)]
    from research.sampling.engine import _Run  # the sizes are not part of what a run returns

    run = _Run(engine, requests, None)
    sizes = set()
    for _ in run.chunks():
        sizes.add(run.slots.cache.slots)
        assert run.length == int(run.slots.cache.length) <= run.slots.cache.slots
    assert max(sizes) <= WIDTH + N + 2 * SPEC.cache_bucket


def test_prompts_that_only_fill_a_batch_are_not_drawn() -> None:
    ids = np.array([10, 11, -1, -1], np.int32)
    found, stats = refilled(prompts=Prompts(PROMPTS.tokens[[0, 1, 1, 1]], PROMPTS.mask[:4] & (ids >= 0)[:, None], ids))
    first = jax.tree.map(lambda x: x[:4], (found, baseline()))
    assert_same(*first)
    assert stats.tokens == found.lengths.sum() and not found.lengths[4:].any() and not found.mask[4:].any()
    assert len(found.tokens) == 8 and (found.tokens[4:] == SPEC.pad_id).all()


def test_limits_of_single_requests() -> None:
    limits = [1, 3, 14, 2]
    engine = Engine(make_params(CONFIG), NUMBERS, config=CONFIG, spec=REFILLED)
    requests = [Request(TEXTS[i], 10 + i, 0, limit) for i, limit in enumerate(limits)]
    rows = {row.number: row for row in engine.run(requests)}
    for number, limit in enumerate(limits):
        length = min(limit, int(baseline().lengths[2 * number]))
        assert rows[number].length == length
        np.testing.assert_array_equal(rows[number].tokens[:length], baseline().tokens[2 * number, :length])


@pytest.mark.parametrize("shared", [11])
def test_a_common_prefix_is_prefilled_once(shared: int) -> None:
    prefix = make_tokens(CONFIG, 1, shared, seed=99)[0]
    texts = [np.concatenate([prefix, text]).astype(np.int32) for text in TEXTS]
    prompts = make_prompts(texts, WIDTH + shared, list(range(7)))
    apart, cost_apart = refilled(dataclasses.replace(ENGINE, min_prefix=0), prompts)
    found, cost = refilled(dataclasses.replace(ENGINE, min_prefix=4), prompts)
    assert_same(found, apart)
    assert cost_apart.prefilled - cost.prefilled >= (shared // 4 * 4) * 2


def test_int8_cache_is_close() -> None:
    exact, _ = refilled()
    rough, _ = refilled(spec=dataclasses.replace(SPEC, int8_cache=True))
    first = exact.tokens[:, 0] == rough.tokens[:, 0]
    assert first.mean() > 0.8
    error = np.abs(exact.policy_logps[first, 0] - rough.policy_logps[first, 0])
    assert 0 < error.max() < 0.05


class Tool:
    """Answers each stop token 7 with two tokens, at most twice a row."""

    def __init__(self) -> None:
        self.calls: dict[int, int] = {}

    def __call__(self, rows: Sequence[Row]) -> dict[int, ForceTokens | StopRow]:
        actions: dict[int, ForceTokens | StopRow] = {}
        for row in rows:
            if row.stopped and row.tokens[row.length - 1] == 7 and self.calls.get(row.number, 0) < 2:
                self.calls[row.number] = self.calls.get(row.number, 0) + 1
                actions[row.number] = ForceTokens([30, 31])
        return actions


def test_forced_tokens_are_appended_masked_and_decoding_goes_on() -> None:
    tool = Tool()
    engine = dataclasses.replace(ENGINE, max_forced=3)
    out, _ = refilled(engine, callback=tool)
    assert tool.calls, "no row called"
    untouched = [row for row in range(14) if row not in tool.calls]
    assert_same(out, baseline(), untouched)
    called = sorted(tool.calls)
    for row in called:
        tokens, mask = out.tokens[row, : out.lengths[row]].tolist(), out.mask[row, : out.lengths[row]]
        at = tokens.index(7)
        forced = [t for t in (at + 1, at + 2) if t < len(tokens)]
        assert tokens[at + 1 : at + 3] == [30, 31][: len(forced)]
        assert not mask[forced].any() and mask[: at + 1].all()
        np.testing.assert_array_equal(out.sampler_logps[row][forced], 0.0)
    assert any(out.lengths[row] > baseline().lengths[row] + 2 for row in called), "nothing was drawn after it"
    # What is drawn after a forced token is scored as the model scores it after these tokens.
    texts = [np.concatenate([TEXTS[row // 2], out.tokens[row, : out.lengths[row]]]) for row in called]
    batch = right_padded(texts, WIDTH + N)
    logps = jax.jit(token_logps, static_argnames="config")(make_params(CONFIG), CONFIG, *batch)[0].logps
    for i, row in enumerate(called):
        start, length = len(TEXTS[row // 2]), out.lengths[row]
        expected = np.where(out.mask[row, :length], logps[i, start : start + length], 0.0)
        np.testing.assert_allclose(out.policy_logps[row, :length], expected, atol=1e-4)


def test_too_many_forced_tokens() -> None:
    with pytest.raises(ValueError, match="got 5 tokens, expected 1 to 3"):
        refilled(
            dataclasses.replace(ENGINE, max_forced=3),
            callback=lambda rows: {row.number: ForceTokens([1, 2, 3, 4, 5]) for row in rows if row.length < N},
        )


def test_a_callback_can_end_a_row() -> None:
    """As a stop string does: at its fourth token, whatever was drawn behind it."""

    def callback(rows: Sequence[Row]) -> dict[int, ForceTokens | StopRow]:
        return {row.number: StopRow(4) for row in rows if row.length > 4}

    out, _ = refilled(callback=callback)
    np.testing.assert_array_equal(out.lengths, np.minimum(baseline().lengths, 4))
    long = baseline().lengths > 4
    assert (out.stop_reason[long] == STOPPED).all()
    np.testing.assert_array_equal(out.tokens[:, :4], baseline().tokens[:, :4])
    assert (out.tokens[long, 4:] == SPEC.pad_id).all() and not out.mask[:, 4:].any()


def test_on_eight_devices() -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        found, _ = refilled()
    assert_same(found, baseline())


def test_nothing_to_draw() -> None:
    engine = Engine(make_params(CONFIG), NUMBERS, config=CONFIG, spec=REFILLED)
    assert list(engine.run([])) == []


VOCABULARY = CONFIG.vocab_size


def controlled(**settings: Any) -> tuple[Any, Any]:
    """What each completion of the refilled and of the one-batch sampler is under these controls."""
    controls = make_controls(VOCABULARY, max_new_tokens=N, **settings)
    engine = Engine(make_params(CONFIG), NUMBERS, config=CONFIG, spec=REFILLED, controls=controls)
    requests = [Request(text, 10 + i, g, N) for i, text in enumerate(TEXTS) for g in range(2)]
    rows = sorted(engine.run(requests), key=lambda row: row.number)
    whole = sample(make_params(CONFIG), PROMPTS, NUMBERS, controls, config=CONFIG, spec=SPEC)
    for row, tokens, length in zip(rows, np.asarray(whole.tokens), np.asarray(whole.lengths), strict=True):
        assert row.length == length
        np.testing.assert_array_equal(row.tokens[:length], tokens[:length])
    return rows, jax.device_get(whole)


def test_minimum_length_and_bias() -> None:
    rows, out = controlled(min_new_tokens=5, logit_bias={11: -np.inf, 12: 2.0})
    assert (out.lengths >= 6).all() and baseline().lengths.min() < 6
    assert not (out.tokens[out.mask] == 11).any()
    assert (out.tokens[out.mask] == 12).mean() > (baseline().tokens[baseline().mask] == 12).mean()
    # Log-probs are those of what was drawn from; the plain model's differ.
    row = rows[0]
    assert np.abs(row.sampler_logps[: row.length] - row.policy_logps[: row.length]).max() > 1e-3


def test_repetition_penalty_sees_prompt_and_completion() -> None:
    def repeats(out: Completions) -> int:
        """Tokens that their prompt or completion had before."""
        count = 0
        for row, (tokens, length) in enumerate(zip(out.tokens, out.lengths, strict=True)):
            seen = set(TEXTS[row // 2].tolist())
            for token in tokens[:length].tolist():
                count += token in seen
                seen.add(token)
        return count

    _, out = controlled(repetition_penalty=100.0)
    assert repeats(out) < repeats(baseline()) / 2


def test_a_row_without_tokens_is_an_error() -> None:
    controls = make_controls(VOCABULARY, max_new_tokens=N, logit_bias=dict.fromkeys(range(VOCABULARY), -np.inf))
    engine = Engine(make_params(CONFIG), NUMBERS, config=CONFIG, spec=REFILLED, controls=controls)
    with pytest.raises(DataError, match=r"prompt 10, sample 0: no token was left to draw at completion token 0"):
        list(engine.run([Request(TEXTS[0], 10, 0, N)]))
