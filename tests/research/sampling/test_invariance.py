"""A completion depends on (seed, step, prompt id, sample id) and on nothing around it."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest

from models.axes import param_shardings
from models.decode.rows import resize
from models.transformer import init_params
from research.core.mesh import make_mesh, to_device
from research.sampling.methods import SamplingMethod
from research.sampling.sampler import decode, sample, start
from research.sampling.types import Completions, Prompts
from tests.models.tiny import ONE_LAYER as CONFIG
from tests.models.tiny import make_params, make_tokens
from tests.research.sampling.tiny import make_prompts, make_spec, scalars

TEXTS = [make_tokens(CONFIG, 1, n, seed=n)[0] for n in (8, 5, 3, 6)]
IDS = [10, 11, 12, 13]
METHOD = SamplingMethod(top_k=30, nucleus=True)
SPEC = make_spec(6, 2, stops=(0, 7, 14), method=METHOD)


def draw(prompts: Prompts, spec: Any = SPEC, **numbers: Any) -> Completions:
    numbers = {"seed": 5, "step": 3, "temperature": 1.2, "top_p": 0.95, **numbers}
    return jax.device_get(sample(make_params(CONFIG), prompts, scalars(**numbers), config=CONFIG, spec=spec))


@cache
def baseline() -> Completions:
    return draw(make_prompts(TEXTS, 8, IDS))


def assert_same(found: Completions, rows: list[int], expected_rows: list[int]) -> None:
    """Rows of `found` are rows of the baseline."""
    for name in ("tokens", "mask", "stop_reason", "lengths"):
        np.testing.assert_array_equal(getattr(found, name)[rows], getattr(baseline(), name)[expected_rows], name)
    for name in ("sampler_logps", "policy_logps"):
        np.testing.assert_allclose(
            getattr(found, name)[rows], getattr(baseline(), name)[expected_rows], atol=1e-5, err_msg=name
        )


def test_other_neighbours_and_another_slot() -> None:
    others = [make_tokens(CONFIG, 1, n, seed=50 + n)[0] for n in (7, 2)]
    found = draw(make_prompts([others[0], TEXTS[2], others[1], TEXTS[0]], 8, [90, 12, 91, 10]))
    assert_same(found, [2, 3, 6, 7], [4, 5, 0, 1])


def test_another_batch_size_and_padding_width() -> None:
    for row, slots in ((3, [6, 7]), (1, [2, 3])):
        assert_same(draw(make_prompts([TEXTS[row]], 13, [IDS[row]])), [0, 1], slots)


def test_another_group_size_and_longer_completions() -> None:
    longer = draw(make_prompts(TEXTS, 8, IDS), make_spec(9, 3, stops=(0, 7, 14), method=METHOD))
    rows, expected = [0, 1, 3, 4, 6, 7, 9, 10], list(range(8))
    np.testing.assert_array_equal(longer.tokens[rows][:, :6], baseline().tokens[expected])
    assert len({tuple(longer.tokens[row]) for row in range(3)}) == 3


def test_groups_are_adjacent_and_share_one_prefill() -> None:
    """[p1, p1, p2, p2, ..]: as if each copy had been prefilled on its own."""
    params = make_params(CONFIG)
    begin = jax.jit(start, static_argnames=("config", "spec"))
    numbers = scalars(seed=5, step=3, temperature=1.2, top_p=0.95)
    shared = begin(params, make_prompts(TEXTS, 8, IDS), numbers, config=CONFIG, spec=SPEC)
    twice = make_prompts([t for t in TEXTS for _ in range(2)], 8, [i for i in IDS for _ in range(2)])
    one_each = make_spec(6, 1, stops=(0, 7, 14), method=METHOD)
    copies = begin(params, twice, numbers, config=CONFIG, spec=one_each)
    for one, two in zip(jax.tree.leaves(shared.cache), jax.tree.leaves(copies.cache), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    # A prompt's last token is the first to be fed, however many slots of padding there are.
    np.testing.assert_array_equal(shared.positions, np.repeat([len(text) - 1 for text in TEXTS], 2))
    np.testing.assert_array_equal(shared.last, np.repeat([text[-1] for text in TEXTS], 2))
    for name in ("last", "positions"):
        np.testing.assert_array_equal(getattr(shared, name), getattr(copies, name))
    # Copies all have sample id 0; so have the even rows of the groups.
    keys = jax.random.key_data(shared.keys)
    np.testing.assert_array_equal(keys[::2], jax.random.key_data(copies.keys)[::2])
    assert not np.array_equal(keys[1::2], jax.random.key_data(copies.keys)[1::2])


def test_a_prompt_kept_once_a_group_is_not_copied_into_its_rows() -> None:
    begin = jax.jit(start, static_argnames=("config", "spec", "share"))
    slots = begin(make_params(CONFIG), make_prompts(TEXTS, 8, IDS), scalars(5, 3), config=CONFIG, spec=SPEC, share=True)
    assert slots.cache.slots == 0 and slots.cache.prefix.shape == (len(TEXTS), 7)
    np.testing.assert_array_equal(slots.cache.prefix.sum(axis=1), [len(text) - 1 for text in TEXTS])


def test_a_prompt_kept_once_a_group_draws_what_its_copies_draw() -> None:
    """Against rows whose caches hold the prompt, in the same decode steps."""
    numbers, N = scalars(5, 3, 1.2, 0.95), SPEC.max_new_tokens

    @partial(jax.jit, static_argnames="share")
    def run(share: bool) -> Any:
        prompts = make_prompts(TEXTS, 8, IDS)
        slots = start(make_params(CONFIG), prompts, numbers, config=CONFIG, spec=SPEC, share=share)
        slots = slots.replace(cache=resize(slots.cache, slots.cache.slots + N))
        return decode(
            make_params(CONFIG), slots, numbers, np.int32(99), np.int32(N), steps=N, config=CONFIG, spec=SPEC
        )[1]

    shared, apart = run(True), run(False)
    np.testing.assert_array_equal(shared.active, apart.active)
    np.testing.assert_array_equal(shared.tokens[shared.active], apart.tokens[apart.active])
    np.testing.assert_allclose(shared.policy_logps[shared.active], apart.policy_logps[apart.active], atol=1e-5)


def test_prompts_of_one_token_leave_nothing_to_share() -> None:
    """Their only token is the first to be fed."""
    shortest = make_prompts([TEXTS[0][:1], TEXTS[1][:1]], 1, IDS[:2])
    wider = make_prompts([TEXTS[0][:1], TEXTS[1][:1]], 4, IDS[:2])
    found, expected = draw(shortest), draw(wider)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.policy_logps, expected.policy_logps, atol=1e-5)


def test_an_int8_cache_keeps_each_row_s_own_prompt() -> None:
    """So that other samplers, which fill rows one by one, draw the same."""
    spec = dataclasses.replace(SPEC, int8_cache=True)
    begin = jax.jit(start, static_argnames=("config", "spec", "share"))
    prompts = make_prompts(TEXTS, 8, IDS)
    slots = begin(make_params(CONFIG), prompts, scalars(5, 3), config=CONFIG, spec=spec, share=True)
    assert slots.cache.prefix is None and slots.cache.slots == 7


def test_a_cache_that_grows_draws_the_same() -> None:
    for bucket in (1, 4):
        spec = dataclasses.replace(SPEC, cache_bucket=bucket)
        assert_same(draw(make_prompts(TEXTS, 8, IDS), spec), list(range(8)), list(range(8)))


@pytest.mark.parametrize("change", ["seed", "step", "prompt_ids", "sample"])
def test_every_counter_changes_the_completions(change: str) -> None:
    prompts = make_prompts(TEXTS, 8, IDS)
    if change == "sample":
        one, other = baseline().tokens[::2], baseline().tokens[1::2]
    elif change == "prompt_ids":
        one, other = baseline().tokens, draw(prompts.replace(prompt_ids=prompts.prompt_ids + 100)).tokens
    else:
        one, other = baseline().tokens, draw(prompts, **{change: 4}).tokens
    assert (one != other).any(axis=1).mean() > 0.7


def test_seed_and_step_do_not_alias() -> None:
    """Seed 5 step 3 is not seed 3 step 5, nor is a prompt id exchanged for a step."""
    prompts = make_prompts(TEXTS, 8, IDS)
    assert (draw(prompts, seed=3, step=5).tokens != baseline().tokens).any(axis=1).mean() > 0.7
    shifted = draw(prompts.replace(prompt_ids=prompts.prompt_ids - 1), step=4)
    assert (shifted.tokens != baseline().tokens).any(axis=1).mean() > 0.7


def test_is_a_function_of_its_inputs_and_compiles_once() -> None:
    prompts = make_prompts(TEXTS, 8, IDS)
    baseline()
    compiled = sample._cache_size()
    assert_same(draw(prompts), list(range(8)), list(range(8)))
    for numbers in ({"seed": 6}, {"step": 9}, {"temperature": 0.3}, {"top_p": 0.1}, {"seed": 2**31 - 1}):
        draw(prompts, **numbers)
    assert sample._cache_size() == compiled


def test_vmap_over_seeds() -> None:
    """The sampler is pure: seeds can become an axis."""
    prompts, numbers = make_prompts(TEXTS, 8, IDS), scalars(5, 3, 1.2, 0.95)
    many = jax.vmap(
        lambda seed: sample(make_params(CONFIG), prompts, numbers.replace(seed=seed), config=CONFIG, spec=SPEC)
    )(np.array([4, 5], np.int32))
    assert_same(jax.tree.map(lambda x: np.asarray(x[1]), many), list(range(8)), list(range(8)))
    assert not np.array_equal(many.tokens[0], many.tokens[1])


def test_one_device_equals_eight() -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    boxed = jax.eval_shape(partial(init_params, CONFIG), jax.random.key(0))
    params = jax.device_put(make_params(CONFIG), param_shardings(boxed, mesh))
    prompts = to_device(mesh, make_prompts(TEXTS, 8, IDS))
    with jax.set_mesh(mesh):
        found = sample(params, prompts, scalars(5, 3, 1.2, 0.95), config=CONFIG, spec=SPEC)
        assert len(found.tokens.sharding.device_set) == 8
    assert_same(jax.device_get(found), list(range(8)), list(range(8)))
