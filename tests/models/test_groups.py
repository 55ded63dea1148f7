"""Rows that share a prompt: the values and gradients of rows apart, the prompt computed once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.axes import MESH_AXES
from models.config import ModelConfig
from models.groups import Group, fold, groups_split, unfold
from models.heads import scorer_outputs
from models.kernels.attention import self_attention
from models.logprobs import token_logps
from models.transformer import Params, forward
from tests.models.tiny import CONFIG, UNTIED, equations_of, hidden_states, make_params

P, G, L, N = 3, 4, 5, 7
GROUP = Group(G, L)
T = L + N


def grouped_rows(config: ModelConfig, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """P groups: prompts padded on the left, completions on the right, one of them empty."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (P * G, T)).astype(np.int32)
    tokens[:, :L] = np.repeat(tokens[::G, :L], G, axis=0)
    padding = np.repeat(np.arange(P) % L, G)
    lengths = rng.integers(1, N + 1, P * G)
    lengths[1] = 0
    slots = np.arange(T)[None, :]
    real = (slots >= padding[:, None]) & (slots < L + lengths[:, None])
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(real.astype(np.int32))


def test_unfold_undoes_fold() -> None:
    rows = grouped_rows(CONFIG)[0]
    folded = fold(rows, GROUP)
    assert folded.shape == (P, L + G * N)
    np.testing.assert_array_equal(unfold(folded, GROUP), rows)
    wide = jnp.broadcast_to(rows[:, :, None], (*rows.shape, 2))
    np.testing.assert_array_equal(unfold(fold(wide, GROUP), GROUP), wide)


@pytest.mark.parametrize(
    "config", [CONFIG, dataclasses.replace(UNTIED, scan_layers=True, remat="full")], ids=["tied", "scan"]
)
def test_log_probs_and_gradients_are_those_of_rows_apart(config: ModelConfig) -> None:
    params, rows = make_params(config), grouped_rows(config)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((P * G, T)), jnp.float32)
    real = rows[2] > 0

    def total(params: Params, group: Group | None) -> tuple[jax.Array, jax.Array]:
        logps = jnp.where(real, token_logps(params, config, *rows, first=L, group=group)[0].logps, 0.0)
        return jnp.sum(weights * logps), logps

    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    (_, apart), apart_gradient = run(params, None)
    (_, together), gradient = run(params, GROUP)
    np.testing.assert_allclose(together, apart, atol=1e-5)
    assert np.abs(apart).max() > 1.0
    for found, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(apart_gradient), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_accelerators_attend_over_whole_rows_with_the_same_result() -> None:
    segments = fold(grouped_rows(CONFIG)[2], GROUP)
    rng = np.random.default_rng(3)
    heads = (CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.num_kv_heads)
    q, k, v = (jnp.asarray(rng.standard_normal((*segments.shape, n, CONFIG.head_dim)), jnp.float32) for n in heads)
    whole, apart = (self_attention(q, k, v, segments, kernel=kernel, group=GROUP) for kernel in ("xla", "cpu_blocks"))
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(apart[real], whole[real], atol=1e-5)


def test_scores_are_those_of_rows_apart() -> None:
    w = np.random.default_rng(2).standard_normal((CONFIG.d_model, 2)).astype(np.float32)
    scorer = {"trunk": make_params(CONFIG), "head": {"w": jnp.asarray(w)}}
    tokens, positions, segments = grouped_rows(CONFIG)
    score = jax.jit(scorer_outputs, static_argnames=("config", "group"))
    apart, together = (score(scorer, CONFIG, tokens, positions, segments, group=g)[0] for g in (None, GROUP))
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(together[real], apart[real], atol=1e-5)


def test_the_prompt_is_computed_once_a_group() -> None:
    """A change of another row's prompt is not seen; and the program has so many products fewer."""
    params, (tokens, positions, segments) = make_params(CONFIG), grouped_rows(CONFIG)
    run = jax.jit(hidden_states, static_argnames=("config", "group"))
    other = tokens.at[1, :L].set(0)
    np.testing.assert_array_equal(
        run(params, CONFIG, tokens, positions, segments, group=GROUP),
        run(params, CONFIG, other, positions, segments, group=GROUP),
    )

    def widest(group: Group | None) -> int:
        """Positions in the residual stream of a layer."""
        jaxpr = jax.make_jaxpr(lambda p: forward(p, CONFIG, tokens, positions, segments, group=group))(params)
        products = [eqn for eqn in equations_of(jaxpr) if eqn.primitive.name == "dot_general"]
        return max(eqn.invars[0].aval.shape[0] for eqn in products if eqn.invars[0].aval.ndim == 2)

    assert widest(None) == P * G * T
    assert widest(GROUP) == P * (L + G * N)


@pytest.mark.parametrize(
    ("rows", "shape", "expected"),
    [(8, (1, 1, 8), True), (8, (2, 1, 4), True), (8, (2, 2, 2), False), (6, (1, 1, 8), False)],
)
def test_groups_stay_on_their_devices(rows: int, shape: tuple[int, ...], expected: bool) -> None:
    """Groups of 4 rows; only `data` and `fsdp` split them."""
    mesh = jax.sharding.AbstractMesh(shape, MESH_AXES)
    with jax.sharding.use_abstract_mesh(mesh):
        assert groups_split(rows, 4) == expected
