"""Attention: each kernel against the textbook formula, value and gradient; which one is chosen where."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.axes import MESH_AXES
from models.config import AttentionKernel
from models.kernels import cpu_blocks, dot_product, splash
from models.kernels.attention import KERNELS, Kernel, choose_kernel, self_attention
from models.kernels.dispatch import Platform, log_choice, target_platform
from models.transformer import forward
from tests.models.kernels.platforms import AUTO, on
from tests.models.tiny import ONE_LAYER, make_params, make_tokens
from tests.models.tiny import plain as plain_rows

B, H, K, N = 2, 4, 2, 8
Attend = Callable[..., jax.Array]


def arrays(length: int, *, kv_heads: int = K, dtype: Any = jnp.float32, width: int = N) -> tuple[jax.Array, ...]:
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
    monkeypatch.setattr(cpu_blocks, "_LEAST_BLOCK", 8)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [5, 29])
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", ["cpu_blocks", "xla"])
def test_kernels_equal_the_formula(length: int, kv_heads: int, kernel: str) -> None:
    inputs = arrays(length, kv_heads=kv_heads)
    for segments in (packed(length), jnp.ones((B, length), jnp.int32)):
        found = value_and_gradient(KERNELS[kernel].attend, inputs, segments)
        assert_close(found, value_and_gradient(plain, inputs, segments), 1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", ["cpu_blocks", "xla"])
def test_bfloat16_has_a_float32_softmax(kernel: str) -> None:
    inputs = arrays(29, dtype=jnp.bfloat16)
    found = value_and_gradient(KERNELS[kernel].attend, inputs, packed(29))
    assert all(x.dtype == jnp.bfloat16 for x in found[1:])
    assert_close(found, value_and_gradient(plain, inputs, packed(29)), 2e-2)


def test_blocks_cover_each_query_once_and_stay_few() -> None:
    for length in (1, 127, 128, 129, 256, 1000, 4096):
        blocks = cpu_blocks._blocks(length)
        assert [slot for start, end in blocks for slot in range(start, end)] == list(range(length))
        assert len(blocks) <= 8
    assert cpu_blocks._blocks(256) == [(0, 128), (128, 256)]


@pytest.mark.usefixtures("small_blocks")
def test_keys_beyond_a_block_are_never_multiplied() -> None:
    def flops(attend: Attend) -> float:
        compiled = jax.jit(attend).lower(*arrays(64)[:3], packed(64)).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(cpu_blocks.attention) < 0.75 * flops(plain)


@pytest.mark.usefixtures("small_blocks")
def test_is_mapped_over_seeds() -> None:
    """A population of runs is a `vmap` over the step."""
    inputs, segments = arrays(29), packed(29)
    two = tuple(jnp.stack([x, 2 * x]) for x in inputs)
    both = jax.vmap(lambda *a: value_and_gradient(cpu_blocks.attention, a, segments))(*two)
    for index in range(2):
        alone = value_and_gradient(cpu_blocks.attention, tuple(x[index] for x in two), segments)
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
        found = value_and_gradient(cpu_blocks.attention, split, segments)
    assert_close(found, value_and_gradient(plain, inputs, segments), 1e-5)


def program(attend: Attend, width: int, length: int, dtype: Any, platform: str) -> str:
    """Value and gradient lowered for a platform."""
    inputs, segments = arrays(length, dtype=dtype, width=width), packed(length)
    run = jax.jit(partial(value_and_gradient, attend))
    return run.trace(inputs, segments).lower(lowering_platforms=(platform,)).as_text()


class TestSplash:
    """The TPU's kernel: interpreted, or lowered for a platform that is not here."""

    INTERPRETED = KERNELS["splash"]._replace(attend=partial(splash.attention, interpret=True))

    def run(self, *args: jax.Array) -> jax.Array:
        return self.INTERPRETED.run(*args, None)

    @pytest.mark.parametrize("length", [256, 200, 9])
    def test_equals_the_formula_at_any_length(self, length: int) -> None:
        """200 and 9 are padded to 256 and 128."""
        inputs, segments = arrays(length, width=64), packed(length)
        found = value_and_gradient(self.run, inputs, segments)
        assert found[0].shape == inputs[0].shape
        assert_close(found, value_and_gradient(plain, inputs, segments), 1e-5)

    def test_runs_on_each_device_s_rows_and_heads(self) -> None:
        inputs, segments = arrays(120, width=64), packed(120)
        mesh = jax.make_mesh((2, 1, 2), MESH_AXES, axis_types=AUTO, devices=jax.devices()[:4])
        with jax.set_mesh(mesh):
            found = jax.jit(self.run)(*inputs[:3], segments)
        assert found.addressable_shards[0].data.shape == (1, 120, 2, 64)
        np.testing.assert_allclose(found, plain(*inputs[:3], segments), atol=1e-5)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize("length", [256, 200])
    def test_lowers_for_a_tpu(self, length: int, dtype: Any) -> None:
        assert "tpu_custom_call" in program(self_attention, 64, length, dtype, "tpu")

    def test_a_model_trains_with_it_on_a_tpu(self) -> None:
        config = dataclasses.replace(ONE_LAYER, head_dim=64)
        params, rows = make_params(config), plain_rows(make_tokens(config, 2, 20))
        grad = jax.jit(jax.grad(lambda p: jnp.sum(forward(p, config, *rows)[0])))
        assert "tpu_custom_call" in grad.trace(params).lower(lowering_platforms=("tpu",)).as_text()


class TestChoice:
    """By platform, shapes and dtype; forced by name; logged once."""

    @pytest.mark.parametrize(
        ("platform", "width", "expected", "refusal"),
        [
            ("cpu", 8, "cpu_blocks", ""),
            ("tpu", 64, "splash", ""),
            ("tpu", 48, "xla", "splash cannot serve: head_dim=48 is no multiple of 64"),
            ("gpu", 64, "xla", "cudnn cannot serve: cuDNN takes bfloat16 and float16, not float32"),
        ],
    )
    def test_by_platform_and_shape(self, platform: Platform, width: int, expected: str, refusal: str) -> None:
        found = choose_kernel("auto", platform, head_dim=width, dtype=jnp.dtype("float32"))
        assert found == (expected, refusal)

    @pytest.mark.parametrize(("width", "expected"), [(64, "cudnn"), (12, "xla"), (256, "xla")])
    def test_of_a_gpu(self, width: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dot_product.jax, "default_backend", lambda: "gpu")
        assert choose_kernel("auto", "gpu", head_dim=width, dtype=jnp.dtype("bfloat16"))[0] == expected

    def test_one_program_takes_the_kernel_of_the_platform_it_is_lowered_for(self) -> None:
        for platform in ("cpu", "cuda"):
            assert "custom_call" not in program(self_attention, 64, 256, jnp.bfloat16, platform)
        assert "custom_call" not in program(self_attention, 48, 256, jnp.float32, "tpu")

    @pytest.mark.parametrize("kernel", ["xla", "cpu_blocks"])
    def test_a_forced_kernel_runs_wherever_it_can(self, kernel: AttentionKernel) -> None:
        inputs, segments = arrays(256), packed(256)
        forced = partial(self_attention, kernel=kernel)
        one, other = (
            jax.make_jaxpr(forced)(*inputs[:3], segments),
            jax.make_jaxpr(KERNELS[kernel].attend)(*inputs[:3], segments),
        )
        assert str(one) == str(other)

    def test_forced_splash_lowers_for_a_tpu(self) -> None:
        with on("tpu"):
            text = program(partial(self_attention, kernel="splash"), 64, 200, jnp.float32, "tpu")
        assert "tpu_custom_call" in text

    @pytest.mark.parametrize(
        ("kernel", "platform", "message"),
        [
            ("splash", "cpu", "it runs on tpu and this program is for cpu"),
            ("splash", "tpu", "head_dim=8 is no multiple of 64"),
            ("cudnn", "gpu", "cuDNN takes bfloat16 and float16, not float32"),
        ],
    )
    def test_a_forced_kernel_that_cannot_serve_is_refused(
        self, kernel: AttentionKernel, platform: str, message: str
    ) -> None:
        config = dataclasses.replace(ONE_LAYER, attention_kernel=kernel)
        rows = plain_rows(make_tokens(config, 1, 4))
        with (
            on(platform),
            pytest.raises(
                ValueError, match=f"attention_kernel: got '{kernel}', expected another one or auto because {message}"
            ),
        ):
            jax.eval_shape(lambda p: forward(p, config, *rows), make_params(ONE_LAYER))

    def test_each_choice_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        log_choice.cache_clear()
        caplog.set_level(logging.INFO, logger="temper.kernels")
        for platform, width, length in [("cpu", 8, 9), ("tpu", 64, 200), ("tpu", 48, 200)] * 2:
            inputs, segments = arrays(length, width=width), packed(length)
            with on(platform):
                jax.eval_shape(self_attention, *inputs[:3], segments)
        lines = [(r.levelname, r.message) for r in caplog.records if r.message.startswith("attention")]
        assert lines == [
            ("INFO", "attention: cpu_blocks on cpu for float32 and head_dim=8"),
            ("INFO", "attention: splash on tpu for float32 and head_dim=64, rows padded from 200 to 256 slots"),
            (
                "WARNING",
                "attention: xla on tpu for float32 and head_dim=48, because splash cannot serve: head_dim=48 is no "
                "multiple of 64",
            ),
        ]

    def test_the_platform_is_the_mesh_s_or_the_default(self) -> None:
        assert target_platform() == jax.default_backend()
        for platform in get_args(Platform):
            with on(platform):
                assert target_platform() == platform


@pytest.mark.parametrize("multiple", [4, 8])
def test_padding_is_seen_by_no_slot(multiple: int) -> None:
    """Also where rows end with padding of their own, which is a segment."""
    kernel = Kernel(KERNELS["xla"].attend, multiple=multiple)
    inputs, segments = arrays(13), packed(13)
    padded = value_and_gradient(lambda *args: kernel.run(*args, None), inputs, segments)
    assert_close(padded, value_and_gradient(KERNELS["xla"].attend, inputs, segments), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [256, 201])
def test_cudnn_equals_the_formula(length: int) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU here")
    inputs, segments = arrays(length, width=64, dtype=jnp.bfloat16), packed(length)
    assert "cudnn" in program(self_attention, 64, length, jnp.bfloat16, "cuda")
    found = value_and_gradient(self_attention, inputs, segments)
    assert_close(found, value_and_gradient(plain, inputs, segments), 2e-2)
