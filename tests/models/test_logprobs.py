"""Token log-probs: against the whole softmax, and without ever holding it."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from models import logprobs
from models.axes import MESH_AXES
from models.config import ModelConfig
from models.logprobs import hidden_divergence, hidden_logps, token_logps
from models.softmax import TokenLogps, compute_logits, likeliest_token
from models.transformer import forward, unembedding
from tests.models.tiny import CONFIG, UNTIED, make_params, make_tokens, plain, values_of

B, T, V = 3, 10, CONFIG.vocab_size
score = jax.jit(hidden_logps, static_argnames="config")


def with_chunk(chunk: int, config: ModelConfig = CONFIG) -> ModelConfig:
    return dataclasses.replace(config, logprob_chunk=chunk)


def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states, a read-out matrix and targets, with logits of standard deviation about 2."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, T, 32)), jnp.float32)
    unembed = jnp.asarray(0.35 * rng.standard_normal((32, V)), jnp.float32)
    return hidden, unembed, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def unchunked(hidden: jax.Array, unembed: jax.Array, targets: jax.Array, temperature: float | jax.Array) -> TokenLogps:
    """The textbook definition, `[B, T, V]` and all."""
    logits = (hidden @ unembed) / temperature
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return TokenLogps(
        jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0],
        -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1),
        jax.nn.logsumexp(logits, axis=-1),
        jnp.mean(log_probs, axis=-1),
        jax.nn.logsumexp(2 * log_probs, axis=-1),
    )


@pytest.mark.parametrize("chunk", [4, 5, 128])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_log_softmax(chunk: int, temperature: float) -> None:
    found = score(*arrays(), with_chunk(chunk), temperature=jnp.float32(temperature))
    expected = unchunked(*arrays(), temperature)
    for name, value, target in zip(TokenLogps._fields, found, expected, strict=True):
        assert value.shape == (B, T) and value.dtype == jnp.float32
        np.testing.assert_allclose(value, target, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("chunk", [4, 10])
def test_gradient_equals_the_unchunked(chunk: int) -> None:
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((len(TokenLogps._fields), B, T)), jnp.float32)
    hidden, unembed, targets = arrays()

    def total(scored: TokenLogps) -> jax.Array:
        return sum(jnp.sum(w * value) for w, value in zip(weights, scored, strict=True))

    def chunked_loss(hidden: jax.Array, unembed: jax.Array, temperature: jax.Array) -> jax.Array:
        return total(hidden_logps(hidden, unembed, targets, with_chunk(chunk), temperature=temperature))

    def plain_loss(hidden: jax.Array, unembed: jax.Array, temperature: jax.Array) -> jax.Array:
        return total(unchunked(hidden, unembed, targets, temperature))

    point = (hidden, unembed, jnp.float32(0.7))
    found = jax.jit(jax.grad(chunked_loss, argnums=(0, 1, 2)))(*point)
    expected = jax.jit(jax.grad(plain_loss, argnums=(0, 1, 2)))(*point)
    for value, target in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, target, atol=2e-5 * np.abs(target).max())


@pytest.mark.parametrize("kept", [True, False])
def test_only_few_logits_are_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    if not kept:
        monkeypatch.setattr(logprobs, "_KEPT_BYTES", B * T * V * 4 - 1)
    hidden, unembed, targets = arrays()
    _, pull_back = jax.eval_shape(
        lambda h, u: jax.vjp(lambda h, u: hidden_logps(h, u, targets, with_chunk(T)), h, u), hidden, unembed
    )
    sizes = {leaf.size for leaf in jax.tree.leaves(pull_back)}
    assert (B * T * V in sizes) == kept
    test_gradient_equals_the_unchunked(T)


class TestNeeded:
    """Only some positions are asked for: of long rows, chunks without any are left out."""

    ROWS, LENGTH, NEEDED = 4, 150, (128, 40, 0, 97)  # of each row; chunks of 64: two are needed, one is not

    def arrays(self) -> tuple[jax.Array, ...]:
        rng = np.random.default_rng(2)
        shape = (self.ROWS, self.LENGTH)
        needed = np.zeros(shape, bool)
        for row, count in zip(needed, self.NEEDED, strict=True):
            row[rng.choice(self.LENGTH, count, replace=False)] = True
        hidden = jnp.asarray(rng.standard_normal((*shape, 32)), jnp.float32)
        unembed = jnp.asarray(0.35 * rng.standard_normal((32, V)), jnp.float32)
        return hidden, unembed, jnp.asarray(rng.integers(0, V, shape), jnp.int32), jnp.asarray(needed)

    def total(self, scored: TokenLogps) -> jax.Array:
        weights = jnp.asarray(np.random.default_rng(3).standard_normal((5, self.ROWS, self.LENGTH)))
        return sum(jnp.sum(w * value) for w, value in zip(weights, scored, strict=True))

    def value_and_grad(self, hidden: jax.Array, chunk: int) -> tuple[TokenLogps, tuple[jax.Array, ...]]:
        _, unembed, targets, needed = self.arrays()

        def loss(hidden: jax.Array, unembed: jax.Array, temperature: jax.Array) -> Any:
            scored = hidden_logps(
                hidden, unembed, targets, with_chunk(chunk), temperature=temperature, needed_BT=needed
            )
            return self.total(scored), scored

        grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        gradients, scored = grad(hidden, unembed, jnp.float32(0.7))
        return scored, gradients

    @pytest.mark.parametrize("chunk", [40, 64, 128, 150])
    def test_they_and_their_gradients_equal_the_unchunked(self, chunk: int) -> None:
        hidden, unembed, targets, needed = self.arrays()
        scored, gradients = self.value_and_grad(hidden, chunk)

        def plain_loss(hidden: jax.Array, unembed: jax.Array, temperature: jax.Array) -> jax.Array:
            plain = unchunked(hidden, unembed, targets, temperature)
            return self.total(TokenLogps(*(jnp.where(needed, x, 0.0) for x in plain)))

        expected = unchunked(hidden, unembed, targets, 0.7)
        for name, value, target in zip(TokenLogps._fields, scored, expected, strict=True):
            np.testing.assert_allclose(value, jnp.where(needed, target, 0.0), atol=1e-5, err_msg=name)
        exact = jax.jit(jax.grad(plain_loss, argnums=(0, 1, 2)))(hidden, unembed, jnp.float32(0.7))
        for value, target in zip(gradients, exact, strict=True):
            np.testing.assert_allclose(value, target, atol=2e-5 * np.abs(target).max())

    @pytest.mark.parametrize(("needed", "computed"), [(128, False), (127, True)])
    @pytest.mark.parametrize("chunk", [64, 128])
    @pytest.mark.parametrize("devices", [1, 4])
    def test_a_chunk_without_any_is_not_computed(self, chunk: int, needed: int, computed: bool, devices: int) -> None:
        """NaN in the states that are not needed is read only where one of them shares a chunk with one that is."""
        hidden, unembed, targets, _ = self.arrays()
        slots = jnp.arange(self.LENGTH)
        poisoned = jnp.where((slots < needed)[:, None], hidden, jnp.nan)
        asked = jnp.broadcast_to(slots < needed, targets.shape)
        loss = lambda h, w: jnp.sum(  # noqa: E731
            hidden_logps(h, w, targets, with_chunk(chunk), needed_BT=asked).logps
        )
        mesh = jax.make_mesh((devices, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            placed = jax.device_put(poisoned, NamedSharding(mesh, PartitionSpec("data")))
            gradient = jax.jit(jax.grad(loss, argnums=1))(placed, unembed)
        assert bool(np.isnan(gradient).any()) == computed

    def test_none_at_all(self) -> None:
        hidden, unembed, targets, needed = self.arrays()
        loss = lambda h: self.total(  # noqa: E731
            hidden_logps(h, unembed, targets, with_chunk(128), needed_BT=needed & False)
        )
        value, gradient = jax.jit(jax.value_and_grad(loss))(hidden)
        assert value == 0 and not np.asarray(gradient).any()

    def test_rows_over_devices(self) -> None:
        """The same on a mesh that splits rows and vocabulary."""
        mesh = jax.make_mesh((4, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
        hidden = self.arrays()[0]
        alone = self.value_and_grad(hidden, 128)
        with jax.set_mesh(mesh):
            spread = self.value_and_grad(jax.device_put(hidden, NamedSharding(mesh, PartitionSpec("data"))), 128)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), spread, alone)


def test_is_aligned_with_the_tokens() -> None:
    """Column t speaks of token t given those before it; column 0 of nothing."""
    config = UNTIED
    params, batch = make_params(config), plain(make_tokens(config, B, T))
    found, _ = jax.jit(token_logps, static_argnames="config")(params, config, *batch, temperature=0.7)
    hidden, _ = jax.jit(forward, static_argnames="config")(params, config, *batch)
    targets = batch[0][:, 1:]
    expected = unchunked(hidden[:, :-1], unembedding(params), targets, 0.7)
    for name, value, target in zip(TokenLogps._fields, found, expected, strict=True):
        np.testing.assert_array_equal(value[:, 0], 0.0)
        np.testing.assert_allclose(value[:, 1:], target, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("first", [1, 4, T - 1])
def test_slots_before_the_first_target_are_0_and_cost_no_logits(first: int) -> None:
    params, batch = make_params(CONFIG), plain(make_tokens(CONFIG, B, T))
    config = with_chunk(T)
    run = jax.jit(token_logps, static_argnames=("config", "first"))
    whole, tail = (run(params, config, *batch, temperature=0.7, first=n)[0] for n in (0, first))
    for name, value, target in zip(TokenLogps._fields, tail, whole, strict=True):
        np.testing.assert_array_equal(value[:, :first], 0.0)
        np.testing.assert_allclose(value[:, first:], target[:, first:], atol=1e-5, err_msg=name)
    jaxpr = jax.make_jaxpr(lambda p: token_logps(p, config, *batch, first=first)[0].logps)(params)
    shapes = {aval.shape for aval in values_of(jaxpr) if hasattr(aval, "shape")}
    assert {shape for shape in shapes if len(shape) == 3 and shape[0] == B and shape[-1] == V} == {(B, T - first, V)}


def test_slots_that_are_not_needed_are_0() -> None:
    params, batch = make_params(CONFIG), plain(make_tokens(CONFIG, B, T))
    needed = jnp.asarray(np.random.default_rng(4).random((B, T)) < 0.5)
    run = jax.jit(token_logps, static_argnames=("config", "first"))
    whole, some = (run(params, CONFIG, *batch, first=3, needed_BT=x)[0] for x in (None, needed))
    for value, target in zip(some, whole, strict=True):
        np.testing.assert_allclose(value, jnp.where(needed, target, 0.0), atol=1e-6)


def test_temperature_is_traced() -> None:
    score(*arrays(), CONFIG, temperature=jnp.float32(0.5))
    before = score._cache_size()
    cold, warm = (score(*arrays(), CONFIG, temperature=jnp.float32(t)) for t in (0.25, 4.0))
    assert score._cache_size() == before
    assert (cold.entropy < warm.entropy).all()


def test_extreme_logits_stay_finite() -> None:
    hidden, unembed, targets = arrays()
    scored, gradient = jax.jit(
        jax.value_and_grad(lambda h: sum(jnp.sum(x) for x in hidden_logps(h, unembed, targets, CONFIG)))
    )(hidden * 1e4)
    assert np.isfinite(scored) and np.isfinite(gradient).all()
    certain = score(*(hidden * 1e4, unembed, jnp.argmax(hidden @ unembed, axis=-1).astype(jnp.int32)), CONFIG)
    np.testing.assert_allclose(certain.logps, 0.0, atol=1e-3)
    np.testing.assert_allclose(certain.entropy, 0.0, atol=1e-3)
    np.testing.assert_allclose(certain.log_collision, 0.0, atol=1e-3)


def test_bfloat16_logits_are_accumulated_in_float32() -> None:
    hidden, unembed, targets = arrays()
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    rounded = [np.asarray(x.astype(jnp.bfloat16), np.float64) for x in (hidden, unembed)]
    logits = compute_logits(hidden, unembed, config)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, rounded[0] @ rounded[1], atol=1e-4)
    exact = unchunked(hidden, unembed, targets, 1.0)
    np.testing.assert_allclose(score(hidden, unembed, targets, config).logps, exact.logps, atol=0.1)


class TestMemory:
    """No value computed on the way, forward or backward, is as large as `[B, T, V]`."""

    CONFIG = dataclasses.replace(CONFIG, vocab_size=600)
    LENGTH = 18

    def largest(self, chunk: int, *, gradient: bool) -> int:
        config = dataclasses.replace(self.CONFIG, logprob_chunk=chunk)
        batch = plain(make_tokens(config, B, self.LENGTH))

        def loss(params: Any) -> jax.Array:
            return sum(jnp.sum(x) for x in token_logps(params, config, *batch)[0])

        jaxpr = jax.make_jaxpr(jax.grad(loss) if gradient else loss)(make_params(self.CONFIG))
        return max(aval.size for aval in values_of(jaxpr) if hasattr(aval, "size"))

    @pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
    @pytest.mark.parametrize("chunk", [4, 6])
    def test_stays_below_all_logits(self, chunk: int, gradient: bool) -> None:
        everything = B * (self.LENGTH - 1) * self.CONFIG.vocab_size  # nothing predicts slot 0
        assert self.largest(chunk, gradient=gradient) < everything

    def test_the_walk_sees_all_logits_when_they_exist(self) -> None:
        for gradient in (False, True):
            everything = B * (self.LENGTH - 1) * self.CONFIG.vocab_size
            assert self.largest(self.LENGTH, gradient=gradient) >= everything


class TestDivergence:
    """Two models compared chunk by chunk; the teacher is wider than the student."""

    TEACHER = dataclasses.replace(CONFIG, d_model=24)

    @staticmethod
    def arrays(length: int = T) -> tuple[jax.Array, ...]:
        rng = np.random.default_rng(2)
        shapes = (B, length, 32), (32, V), (B, length, 24), (24, V)
        return tuple(jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32) for shape in shapes)

    @staticmethod
    def kl(student: jax.Array, teacher: jax.Array) -> dict[str, jax.Array]:
        p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
        agree = (student.argmax(-1) == teacher.argmax(-1)).astype(jnp.float32)
        return {"kl": jnp.sum(jnp.exp(p) * (p - q), axis=-1), "agree": agree}

    def compare(self, arrays: tuple[jax.Array, ...], chunk: int) -> dict[str, jax.Array]:
        hidden, unembed, teacher, teacher_unembed = arrays
        config = with_chunk(chunk)
        return hidden_divergence(hidden, unembed, config, teacher, teacher_unembed, self.TEACHER, self.kl)

    @pytest.mark.parametrize("chunk", [4, 5, 128])
    def test_equals_the_unchunked(self, chunk: int) -> None:
        arrays = self.arrays()
        found = jax.jit(self.compare, static_argnums=1)(arrays, chunk)
        expected = self.kl(arrays[0] @ arrays[1], arrays[2] @ arrays[3])
        for name, value in expected.items():
            assert found[name].shape == (B, T)
            np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)

    @pytest.mark.parametrize("chunk", [4, 128])
    def test_only_the_student_gets_a_gradient(self, chunk: int) -> None:
        weights = jnp.asarray(np.random.default_rng(1).standard_normal((B, T)), jnp.float32)
        plain_loss = lambda a: jnp.sum(weights * self.kl(a[0] @ a[1], a[2] @ a[3])["kl"])  # noqa: E731
        chunked_loss = lambda a: jnp.sum(weights * self.compare(a, chunk)["kl"])  # noqa: E731
        found, expected = (jax.jit(jax.grad(f))(self.arrays()) for f in (chunked_loss, plain_loss))
        for value, target in zip(found[:2], expected[:2], strict=True):
            np.testing.assert_allclose(value, target, atol=2e-5 * np.abs(target).max())
        assert not np.any(found[2]) and not np.any(found[3]) and np.any(expected[2])

    @pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
    def test_neither_model_s_logits_exist_whole(self, gradient: bool) -> None:
        length = 3 * T  # so that the logits outweigh hidden states and read-out

        def largest(chunk: int) -> int:
            loss = lambda a: jnp.sum(self.compare(a, chunk)["kl"])  # noqa: E731
            jaxpr = jax.make_jaxpr(jax.grad(loss) if gradient else loss)(self.arrays(length))
            return max(aval.size for aval in values_of(jaxpr) if hasattr(aval, "size"))

        assert largest(4) < B * length * V <= largest(length)

    def test_another_vocabulary_is_refused_by_name(self) -> None:
        other = dataclasses.replace(self.TEACHER, vocab_size=50)
        hidden, unembed, teacher, _ = self.arrays()
        with pytest.raises(ValueError, match="teacher: got a vocabulary of 50 tokens, expected the student's 40"):
            hidden_divergence(hidden, unembed, CONFIG, teacher, jnp.zeros((24, 50)), other, self.kl)


@pytest.mark.parametrize("shape", [(5,), (3, 301), (2, 4, 129), (6, 1)], ids=str)
def test_the_likeliest_token_is_the_first_of_equal_ones(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(shape))
    for logits in (
        rng.integers(-3, 3, shape).astype(np.float32),
        np.full(shape, -np.inf, np.float32),
        np.where(rng.random(shape) < 0.5, -np.inf, rng.standard_normal(shape)).astype(np.float32),
        np.where(rng.random(shape) < 0.1, np.inf, rng.standard_normal(shape)).astype(np.float32),
    ):
        found = jax.jit(likeliest_token)(logits)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, np.argmax(logits, axis=-1))


def test_the_likeliest_token_is_in_the_vocabulary_when_a_logit_is_not_a_number() -> None:
    logits = jnp.asarray([[0.0, np.nan, 1.0], [3.0, 1.0, 0.0]])
    np.testing.assert_array_equal(jax.jit(likeliest_token)(logits), [2, 0])
