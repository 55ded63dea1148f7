"""Attention: each implementation against the textbook formula, value and gradient; what lowers where."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention
from models.attention import blocked_attention, self_attention, splash_attention
from models.axes import MESH_AXES
from tests.models.tiny import CONFIG

B, H, K, N = 2, 4, 2, 8
Attend = Callable[..., jax.Array]
AUTO = (jax.sharding.AxisType.Auto,) * 3


def arrays(
    length: int, *, kv_heads: int = K, dtype: Any = jnp.float32, width: int = N
) -> tuple[jax.Array, ...]:
    """q, k, v and a cotangent."""
    rng = np.random.default_rng(0)
    shapes = [(B, length, heads, width) for heads in (H, kv_heads, kv_heads, H)]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def packed(length: int) -> jax.Array:
    """A row of two segments and padding that begins with padding, and a row of one segment."""
    row = np.repeat([0, 1, 2, 0], [2, length // 2, length // 4, length - length // 2 - length // 4 - 2])
    return jnp.asarray(np.stack([row, np.ones(length)]), jnp.int32)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Softmax over all keys that causality and segments leave, every score in memory, float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthn,bshn->bhts", q, k) / np.sqrt(q.shape[-1])
    T = q.shape[1]
    mask = jnp.tril(jnp.ones((T, T), bool))[None] & (segments[:, :, None] == segments[:, None, :])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshn->bthn", weights, v)


def value_and_gradient(attend: Attend, inputs: tuple[jax.Array, ...], segments: jax.Array) -> list[jax.Array]:
    def run(inputs: tuple[jax.Array, ...], segments: jax.Array) -> list[jax.Array]:
        *qkv, cotangent = inputs
        out, pull_back = jax.vjp(lambda *a: attend(*a, segments).astype(jnp.float32), *qkv)
        return [out, *pull_back(cotangent.astype(jnp.float32))]

    return jax.jit(run)(inputs, segments)


def assert_close(found: list[jax.Array], expected: list[jax.Array], tolerance: float) -> None:
    for name, got, want in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0, err_msg=name)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one shorter, at a length that a test can afford."""
    monkeypatch.setattr(attention, "_LEAST_BLOCK", 8)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [5, 29])
@pytest.mark.usefixtures("small_blocks")
def test_blocks_equal_the_formula(length: int, kv_heads: int) -> None:
    inputs = arrays(length, kv_heads=kv_heads)
    for segments in (packed(length), jnp.ones((B, length), jnp.int32)):
        found = value_and_gradient(blocked_attention, inputs, segments)
        assert_close(found, value_and_gradient(plain, inputs, segments), 1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_bfloat16_has_a_float32_softmax() -> None:
    inputs = arrays(29, dtype=jnp.bfloat16)
    found = value_and_gradient(blocked_attention, inputs, packed(29))
    assert all(x.dtype == jnp.bfloat16 for x in found[1:])
    assert_close(found, value_and_gradient(plain, inputs, packed(29)), 2e-2)


def test_blocks_cover_each_query_once_and_stay_few() -> None:
    for length in (1, 127, 128, 129, 256, 1000, 4096):
        blocks = attention._blocks(length)
        assert [slot for start, end in blocks for slot in range(start, end)] == list(range(length))
        assert len(blocks) <= 8
    assert attention._blocks(256) == [(0, 128), (128, 256)]


@pytest.mark.usefixtures("small_blocks")
def test_keys_beyond_a_block_are_never_multiplied() -> None:
    def flops(attend: Attend) -> float:
        compiled = jax.jit(attend).lower(*arrays(64)[:3], packed(64)).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(blocked_attention) < 0.75 * flops(plain)


@pytest.mark.usefixtures("small_blocks")
def test_is_mapped_over_seeds() -> None:
    """A population of runs is a `vmap` over the step."""
    inputs, segments = arrays(29), packed(29)
    two = tuple(jnp.stack([x, 2 * x]) for x in inputs)
    both = jax.vmap(lambda *a: value_and_gradient(blocked_attention, a, segments))(*two)
    for index in range(2):
        alone = value_and_gradient(blocked_attention, tuple(x[index] for x in two), segments)
        assert_close([x[index] for x in both], alone, 1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_eight_devices_compute_what_one_does() -> None:
    mesh = jax.make_mesh((4, 1, 2), MESH_AXES, axis_types=AUTO)
    rng = np.random.default_rng(1)
    shapes = [(8, 24, heads, N) for heads in (H, K, K, H)]
    inputs = tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    segments = jnp.asarray(rng.integers(0, 3, (8, 1)) * (np.arange(24) > 5), jnp.int32)
    spec = jax.sharding.NamedSharding(mesh, jax.P("data", None, "tensor", None))
    with jax.set_mesh(mesh):
        split = tuple(jax.device_put(x, spec) for x in inputs)
        found = value_and_gradient(blocked_attention, split, segments)
    assert_close(found, value_and_gradient(plain, inputs, segments), 1e-5)


class TestKernels:
    """The TPU's and the GPU's own kernels: interpreted, or lowered for a platform that is not here."""

    WIDE = dataclasses.replace(CONFIG, head_dim=64)
    T = 256

    @staticmethod
    def program(width: int, length: int, dtype: Any, platform: str) -> str:
        config = dataclasses.replace(CONFIG, head_dim=width)
        inputs, segments = arrays(length, dtype=dtype, width=width), packed(length)

        def run(inputs: tuple[jax.Array, ...], segments: jax.Array) -> list[jax.Array]:
            return value_and_gradient(partial(self_attention, config=config), inputs, segments)

        return jax.jit(run).trace(inputs, segments).lower(lowering_platforms=(platform,)).as_text()

    def test_splash_equals_the_formula(self) -> None:
        inputs, segments = arrays(self.T, width=64), packed(self.T)
        attend = partial(splash_attention, interpret=True)
        found = value_and_gradient(attend, inputs, segments)
        assert_close(found, value_and_gradient(plain, inputs, segments), 1e-5)

    def test_splash_on_a_mesh_runs_on_each_device_s_rows_and_heads(self) -> None:
        inputs, segments = arrays(128, width=64), packed(128)
        mesh = jax.make_mesh((2, 1, 2), MESH_AXES, axis_types=AUTO, devices=jax.devices()[:4])
        attend = partial(splash_attention, interpret=True)
        with jax.set_mesh(mesh):
            found = jax.jit(attend)(*inputs[:3], segments)
        assert found.addressable_shards[0].data.shape == (1, 128, 2, 64)
        np.testing.assert_allclose(found, plain(*inputs[:3], segments), atol=1e-5)

    def test_one_program_takes_the_platform_s_kernel(self) -> None:
        for dtype in (jnp.float32, jnp.bfloat16):
            assert "tpu_custom_call" in self.program(64, 256, dtype, "tpu")
        for platform in ("cpu", "cuda"):
            assert "custom_call" not in self.program(64, 256, jnp.bfloat16, platform)

    @pytest.mark.parametrize(("width", "length"), [(48, 256), (64, 200)])
    def test_shapes_beyond_the_kernel_s_limits_lower_without_it(self, width: int, length: int) -> None:
        assert "custom_call" not in self.program(width, length, jnp.float32, "tpu")

    @pytest.mark.gpu
    def test_cudnn_equals_the_formula(self) -> None:
        if jax.default_backend() != "gpu":
            pytest.skip("no GPU here")
        inputs, segments = arrays(self.T, width=64, dtype=jnp.bfloat16), packed(self.T)
        assert "cudnn" in self.program(64, self.T, jnp.bfloat16, "cuda")
        attend = partial(self_attention, config=self.WIDE)
        found = value_and_gradient(attend, inputs, segments)
        assert_close(found, value_and_gradient(plain, inputs, segments), 2e-2)
