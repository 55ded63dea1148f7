"""Speculative decoding: whoever proposes, the completions are the model's own, and each is reported as such."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest
from scipy.stats import chisquare

from models.axes import param_shardings
from models.logprobs import token_logps
from models.transformer import Params, init_params
from research.core.errors import ConfigError
from research.core.mesh import make_mesh, to_device
from research.sampling.drafts import Draft, propose_by_ngram
from research.sampling.methods import SamplingMethod
from research.sampling.sampler import sample
from research.sampling.speculative import SpeculativeStats, sample_speculative
from research.sampling.types import STOPPED, TRUNCATED, Completions, Prompts
from tests.models.reference import numpy_log_probs
from tests.models.tiny import ONE_LAYER, make_params, make_tokens
from tests.research.sampling.reference import numpy_distribution
from tests.research.sampling.tiny import GREEDY, TEMPERATURE, TOP_K, TOP_P, make_prompts, make_spec, scalars

NARROW = dataclasses.replace(ONE_LAYER, d_model=16, num_heads=2, num_kv_heads=1)
Drawn = tuple[Completions, SpeculativeStats]


def make_draft(config: Any, k: int, params: Params | None = None) -> Draft:
    """Of n-grams where there is no config."""
    return Draft(make_params(config, seed=7) if config and params is None else params, config, k)


# The distribution: many completions of three tokens, V = 7, by rounds of up to three.

SMALL, SMALL_NARROW = (dataclasses.replace(c, vocab_size=7) for c in (ONE_LAYER, NARROW))
TEXT = [1, 4, 2, 5, 1, 4]
V, ROWS, QUICK_ROWS = 7, 10_000, 1500
CASES: dict[str, tuple[Any, SamplingMethod, float, float]] = {
    "plain": (SMALL_NARROW, TEMPERATURE, 1.0, 1.0),
    "hot": (SMALL_NARROW, TEMPERATURE, 1.8, 1.0),
    "top_k": (SMALL_NARROW, TOP_K, 1.0, 1.0),
    "top_p": (SMALL_NARROW, TOP_P, 1.0, 0.8),
    "ngram": (None, TEMPERATURE, 1.0, 1.0),
    "ngram_top_k": (None, TOP_K, 1.4, 1.0),
    "quick_top_k": (SMALL_NARROW, TOP_K, 1.2, 1.0),
}
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.startswith("quick") else pytest.mark.slow) for name in CASES]
)


def rows_of(name: str) -> int:
    return QUICK_ROWS if name.startswith("quick") else ROWS


@cache
def drawn(name: str) -> Drawn:
    draft, method, temperature, top_p = CASES[name]
    return jax.device_get(
        sample_speculative(
            make_params(SMALL),
            make_draft(draft, 2),
            make_prompts([np.array(TEXT, np.int32)], len(TEXT)),
            scalars(seed=3, temperature=temperature, top_p=top_p),
            config=SMALL,
            spec=dataclasses.replace(make_spec(3, rows_of(name), method=method), cache_bucket=4),
        )
    )


@cache
def exact(name: str) -> np.ndarray:
    """Probabilities `[V, V, V]` of three tokens, in NumPy."""
    _, method, temperature, top_p = CASES[name]

    def after(*tokens: int) -> np.ndarray:
        logits = numpy_log_probs(make_params(SMALL), SMALL, [*TEXT, *tokens])
        return numpy_distribution(logits, method, temperature, top_p)

    third = np.array([[after(i, j) for j in range(V)] for i in range(V)])
    second = np.array([after(i) for i in range(V)])
    return after()[:, None, None] * second[:, :, None] * third


@every_case
def test_tokens_follow_the_models_exact_distribution(name: str) -> None:
    out, stats = drawn(name)
    counts = np.bincount(out.tokens @ np.array([V * V, V, 1]), minlength=V**3)
    expected = rows_of(name) * exact(name).ravel()
    assert counts[expected == 0].sum() == 0, "a removed token was drawn"
    rare = (expected > 0) & (expected < 5)
    observed, wanted = counts[expected >= 5], expected[expected >= 5]
    if rare.any():
        observed, wanted = np.append(observed, counts[rare].sum()), np.append(wanted, expected[rare].sum())
    assert len(wanted) > 12
    assert chisquare(observed, wanted).pvalue > 1e-3
    # The proposals were neither all right nor all wrong, so that every branch was taken.
    assert 0.1 < stats.metrics()["sampler/acceptance_rate"] < 0.9


@every_case
def test_sampler_logps_are_those_of_the_exact_distribution(name: str) -> None:
    """Not the draft's, and not those of what a rejection leaves."""
    out, _ = drawn(name)
    expected = np.log(exact(name)[tuple(out.tokens.T)])
    np.testing.assert_allclose(out.sampler_logps.sum(axis=1), expected, atol=2e-4)


# Longer completions of prompts of unequal length.

TEXTS = [make_tokens(ONE_LAYER, 1, n, seed=n)[0] for n in (8, 5, 1)]
STOPS, N = (0, 7, 14), 14
METHOD = SamplingMethod(top_k=30)
IDS = [10, 11, 12]


def speculate(prompts: Prompts, draft: Any, k: int, spec: Any, params: Params | None = None, **numbers: Any) -> Drawn:
    return jax.device_get(
        sample_speculative(
            make_params(ONE_LAYER),
            make_draft(draft, k, params),
            prompts,
            scalars(**numbers),
            config=ONE_LAYER,
            spec=dataclasses.replace(spec, cache_bucket=8),  # two sizes of cache, both packed
        )
    )


@cache
def long(stops: tuple[int, ...] = STOPS) -> Drawn:
    spec = make_spec(N, 4, stops=stops, pad=STOPS[1], method=METHOD)
    return speculate(make_prompts(TEXTS, 8, IDS), NARROW, 3, spec, seed=2, temperature=1.2)


@pytest.mark.slow
def test_policy_logps_are_the_plain_models() -> None:
    out, _ = long(())
    rows = [np.concatenate([TEXTS[row // 4], out.tokens[row]]) for row in range(12)]
    tokens, segments = np.zeros((2, 12, 8 + N), np.int32)
    for row, text in enumerate(rows):
        tokens[row, : len(text)], segments[row, : len(text)] = text, 1
    positions = np.broadcast_to(np.arange(8 + N, dtype=np.int32), tokens.shape)
    score = jax.jit(token_logps, static_argnames="config")
    logps = score(make_params(ONE_LAYER), ONE_LAYER, tokens, positions, segments)[0].logps
    for row, text in enumerate(rows):
        expected = logps[row, len(text) - N : len(text)]
        np.testing.assert_allclose(out.policy_logps[row], expected, atol=1e-4)


@pytest.mark.slow
def test_rows_end_with_their_first_stop_token_or_at_the_limit() -> None:
    """Against the same draws without stop tokens: a stop within an accepted run ends the row there."""
    (out, stats), (free, free_stats) = long(), long(())
    lengths = []
    for row, tokens in enumerate(free.tokens):
        ends = [t for t, token in enumerate(tokens) if token in STOPS]
        length = ends[0] + 1 if ends else N
        lengths.append(length)
        assert out.stop_reason[row] == (STOPPED if ends else TRUNCATED)
        np.testing.assert_array_equal(out.mask[row], np.arange(N) < length)
        np.testing.assert_array_equal(out.tokens[row, :length], tokens[:length])
        np.testing.assert_array_equal(out.tokens[row, length:], STOPS[1])
        for name in ("sampler_logps", "policy_logps"):
            found, expected = getattr(out, name)[row], getattr(free, name)[row]
            np.testing.assert_allclose(found[:length], expected[:length], atol=1e-5)
            np.testing.assert_array_equal(found[length:], 0.0)
    np.testing.assert_array_equal(out.lengths, lengths)
    assert len(set(lengths)) > 4 and N in lengths
    assert free.mask.all() and (free.lengths == N).all() and (free.stop_reason == TRUNCATED).all()
    assert stats.tokens == sum(lengths) and free_stats.tokens == 12 * N


@pytest.mark.slow
def test_a_completion_does_not_depend_on_its_neighbours() -> None:
    """Others beside it leave gaps in the cache; a row alone leaves none."""
    out, _ = long()
    others = [make_tokens(ONE_LAYER, 1, n, seed=50 + n)[0] for n in (7, 2)]
    spec = make_spec(N, 4, stops=STOPS, pad=STOPS[1], method=METHOD)
    found, _ = speculate(
        make_prompts([others[0], TEXTS[1], others[1]], 8, [90, 11, 91]), NARROW, 3, spec, seed=2, temperature=1.2
    )
    alone, _ = speculate(
        make_prompts([TEXTS[1]], 8, [11]), NARROW, 3, dataclasses.replace(spec, samples_per_prompt=1),
        seed=2, temperature=1.2,
    )  # fmt: skip
    for other, rows in ((found, slice(4, 8)), (alone, slice(0, 1))):
        here = slice(4, 4 + rows.stop - rows.start)
        for name in ("tokens", "mask", "lengths", "stop_reason"):
            np.testing.assert_array_equal(getattr(other, name)[rows], getattr(out, name)[here], name)
        for name in ("sampler_logps", "policy_logps"):
            np.testing.assert_allclose(getattr(other, name)[rows], getattr(out, name)[here], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [True, False])
def test_a_draft_equal_to_the_model_is_always_right(greedy: bool) -> None:
    spec = make_spec(N, 2, method=GREEDY if greedy else TEMPERATURE)
    params = make_params(ONE_LAYER)
    out, stats = speculate(make_prompts(TEXTS, 8), ONE_LAYER, 3, spec, params)
    assert stats.accepted == stats.proposed
    assert stats.forwards == -(-N // 4) and stats.row_rounds == 6 * stats.forwards
    assert stats.metrics()["sampler/tokens_per_forward"] == N / 4
    assert out.mask.all()


@pytest.mark.parametrize(
    ("draft", "int8"),
    [pytest.param(NARROW, False, marks=pytest.mark.slow), (None, True)],
    ids=["model", "ngram_int8_cache"],
)
def test_greedy_is_plain_greedy(draft: Any, int8: bool) -> None:
    spec = dataclasses.replace(make_spec(N, method=GREEDY), int8_cache=int8)
    prompts = make_prompts(TEXTS, 8)
    plain = jax.device_get(sample(make_params(ONE_LAYER), prompts, scalars(), config=ONE_LAYER, spec=spec))
    out, stats = speculate(prompts, draft, 3, spec)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_allclose(out.policy_logps, plain.policy_logps, atol=1e-4)
    np.testing.assert_array_equal(out.sampler_logps, 0.0)
    assert 0 < stats.accepted < stats.proposed


@pytest.mark.slow
def test_one_row_of_one_token() -> None:
    """The shortest prompt there is: the draft has nothing before its last token."""
    spec = make_spec(N, method=GREEDY)
    prompts = make_prompts([TEXTS[2]], 1)
    plain = sample(make_params(ONE_LAYER), prompts, scalars(), config=ONE_LAYER, spec=spec)
    out, stats = speculate(prompts, ONE_LAYER, 3, spec, make_params(ONE_LAYER))
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert stats.accepted == stats.proposed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1, 2]),  # what followed 1 2 3
        ([5, 3, 7, 1, 3, 8, 2, 1, 3], [8, 2, 1]),  # 1 3 before 3 alone
        ([4, 6, 4, 7, 4], [7, 4, 7]),  # the later of two; behind the end it goes round
        ([6, 6, 6, 6], [6, 6, 6]),
        ([3, 7, 3, 3], [3, 3, 3]),  # the padding does not lengthen the first match
        ([1, 2, 3], [3, 3, 3]),  # nothing to go by
        ([5], [5, 5, 5]),
    ],
)
def test_ngrams_propose_what_followed_the_longest_and_latest_match(text: list[int], expected: list[int]) -> None:
    """The padding before the text and the room behind it hold tokens that would match."""
    row = np.array([[*text[-1:] * 3, *text, *text[-1:] * 2]], np.int32)
    first, last = np.array([3]), np.array([2 + len(text)])
    found = propose_by_ngram(row, first, last, 3)
    assert found.distribution is None
    np.testing.assert_array_equal(found.tokens[0], expected)


def test_a_draft_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match="vocabulary of 7 tokens, expected the target's 40"):
        speculate(make_prompts(TEXTS, 8), SMALL_NARROW, 2, make_spec())


@pytest.mark.slow
def test_one_device_equals_eight() -> None:
    """Rows, heads and packing split over a mesh."""
    texts = [*TEXTS, TEXTS[0][:6]]
    spec = make_spec(9, 2, method=METHOD)
    draft = make_params(ONE_LAYER, seed=7)
    one, stats = speculate(make_prompts(texts, 8), ONE_LAYER, 2, spec, draft, seed=4)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    boxed = jax.eval_shape(partial(init_params, ONE_LAYER), jax.random.key(0))
    params, draft = (jax.device_put(p, param_shardings(boxed, mesh)) for p in (make_params(ONE_LAYER), draft))
    with jax.set_mesh(mesh):
        found, found_stats = sample_speculative(
            params,
            Draft(draft, ONE_LAYER, 2),
            to_device(mesh, make_prompts(texts, 8)),
            scalars(seed=4),
            config=ONE_LAYER,
            spec=dataclasses.replace(spec, cache_bucket=8),
        )
    np.testing.assert_array_equal(found.tokens, one.tokens)
    np.testing.assert_allclose(found.sampler_logps, one.sampler_logps, atol=1e-5)
    assert int(found_stats.accepted) == stats.accepted > 0


def test_no_proposals_are_an_error() -> None:
    with pytest.raises(ConfigError, match="draft_tokens: got 0, expected an integer from 1 to 64"):
        Draft(None, None, 0)
