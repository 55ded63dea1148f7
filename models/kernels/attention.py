"""The attention of training and scoring: one function, which chooses the kernel.

Shapes: B batch, T time, H heads, K kv heads, N head_dim; with groups (`models.groups`) rows are folded.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.config import AttentionKernel
from models.groups import Group, fold, unfold
from models.kernels import cpu_blocks, dot_product, splash
from models.kernels.dispatch import Platform, log_choice, target_platform

Attend = Callable[[Array, Array, Array, Array], Array]


class Kernel(NamedTuple):
    """An implementation of causal attention within segments."""

    attend: Attend  # from q, k, v and segment ids to the output
    platforms: tuple[Platform, ...] = get_args(Platform)  # where it runs
    multiple: int = 1  # T must be a multiple of it; rows are padded
    refusal: Callable[[jnp.dtype, int], str] = lambda _dtype, _head_dim: ""  # why it cannot serve; "" where it can
    attend_groups: Callable[[Array, Array, Array, Array, Group], Array] | None = None  # of folded rows; None unfolds

    def run(self, q: Array, k: Array, v: Array, segments: Array, group: Group | None) -> Array:
        """The kernel on rows of any length, folded or not."""
        if group is None:
            return self._padded(q, k, v, segments)
        if self.attend_groups is not None:
            return self.attend_groups(q, k, v, segments, group)
        return fold(self._padded(*(unfold(x, group) for x in (q, k, v, segments))), group)

    def _padded(self, q: Array, k: Array, v: Array, segments: Array) -> Array:
        """Slots of padding come last and are a segment of their own: no other slot sees them."""
        T = q.shape[1]
        extra = -T % self.multiple
        if not extra:
            return self.attend(q, k, v, segments)
        q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q, k, v))
        segments = jnp.pad(segments, ((0, 0), (0, extra)), constant_values=-1)
        return self.attend(q, k, v, segments)[:, :T]


KERNELS: dict[str, Kernel] = {
    "splash": Kernel(splash.attention, ("tpu",), 128, splash.refusal),
    "cudnn": Kernel(partial(dot_product.attention, implementation="cudnn"), ("gpu",), 2, dot_product.refusal),
    "cpu_blocks": Kernel(cpu_blocks.attention, attend_groups=cpu_blocks.grouped_attention),
    # Scores are recomputed in the backward pass, not kept.
    "xla": Kernel(jax.checkpoint(partial(dot_product.attention, implementation="xla"))),
}
_FASTEST: dict[Platform, str] = {"tpu": "splash", "gpu": "cudnn", "cpu": "cpu_blocks"}
_LOWERED_AS = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}


def self_attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BTKN: Float[Array, "B T K N"],
    v_BTKN: Float[Array, "B T K N"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    kernel: AttentionKernel = "auto",
    group: Group | None = None,
) -> Float[Array, "B T H N"]:
    """Causal attention within segments, with a float32 softmax.

    Slots of padding (segment 0) attend to earlier padding, as any segment does. With `group` the rows are folded.

    `kernel` forces a kernel by its name; "auto" takes the platform's fastest, or plain XLA where that one cannot serve.
    A program traced with "auto" may be lowered for any platform.

    Raises:
      ValueError: the forced kernel cannot serve.
    """
    T, N, dtype, target = q_BTHN.shape[1], q_BTHN.shape[3], q_BTHN.dtype, target_platform()
    if group is not None:
        T = group.prompt + (T - group.prompt) // group.size
    name, refusal = choose_kernel(kernel, target, dtype=dtype, head_dim=N)
    padded = T + -T % KERNELS[name].multiple
    note = f", rows padded from {T} to {padded} slots" if padded > T else ""
    note += f", because {refusal}" if refusal else ""
    log_choice(f"attention: {name} on {target} for {dtype} and head_dim={N}{note}", fallback=bool(refusal))
    args = (q_BTHN, k_BTKN, v_BTKN, segment_ids_BT)
    run = {each: partial(KERNELS[each].run, group=group) for each in KERNELS}
    if kernel != "auto":
        return run[name](*args)
    names = {each: choose_kernel("auto", each, dtype=dtype, head_dim=N)[0] for each in _FASTEST}
    fastest = {_LOWERED_AS[each]: run[name] for each, name in names.items() if name != "xla"}
    return jax.lax.platform_dependent(*args, **fastest, default=run["xla"])


def choose_kernel(wanted: AttentionKernel, platform: Platform, *, dtype: jnp.dtype, head_dim: int) -> tuple[str, str]:
    """The kernel for a platform, and why it is not the fastest one ("" where it is).

    Raises:
      ValueError: the wanted one cannot serve.
    """
    name = _FASTEST[platform] if wanted == "auto" else wanted
    refusal = KERNELS[name].refusal(dtype, head_dim)
    if platform not in KERNELS[name].platforms:
        refusal = f"it runs on {', '.join(KERNELS[name].platforms)} and this program is for {platform}"
    if not refusal:
        return name, ""
    if wanted != "auto":
        raise ValueError(f"attention_kernel: got {wanted!r}, expected another one or auto because {refusal}")
    return "xla", f"{name} cannot serve: {refusal}"
