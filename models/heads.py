"""Scorers: a transformer whose hidden states go to a small linear head instead of the vocabulary.

Shapes: B batch, T time, D model, O outputs. A scorer's parameters are {"trunk", "head"}; the trunk has the policy's
parameter tree.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.config import ModelConfig
from models.groups import Group
from models.layers import AuxSums
from models.transformer import Params, forward, init_params

STEP_HEAD_STD = 0.02  # the usual standard deviation of a new classification head
VALUE_HEAD_STD = 0.0  # all values are 0 at first, so the first advantages are the returns


class ScoreHead(nn.Module):
    """`h W` without a bias, which cancels in a preference and is redundant in a softmax."""

    outputs: int  # O, 1 for a reward or a value, 2 for the classes of a step
    std: float  # of the initial W
    param_dtype: str  # of the stored W

    @nn.compact
    def __call__(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T O"]:
        """Float32 outputs of a float32 product, whatever the compute dtype: small differences of scores matter."""
        B, T, D = hidden_BTD.shape
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), ("embed", None))
        w_DO: Any = self.param("w", init, (D, self.outputs), jnp.dtype(self.param_dtype))
        flat = hidden_BTD.astype(jnp.float32).reshape(-1, D)
        out = jnp.matmul(flat, w_DO.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return out.reshape(B, T, self.outputs)


def reward_head_std(config: ModelConfig) -> float:
    """`1 / sqrt(D + 1)`: initial scores of about unit variance, since hidden states are normalised.

    Source: Stiennon et al. 2020; Huang et al. 2024.
    """
    return float((config.d_model + 1) ** -0.5)


def init_head(config: ModelConfig, key: jax.Array, *, outputs: int, head_std: float) -> Params:
    """A head's parameters, boxed with their logical axis names; see `ScoreHead`."""
    dummy = jnp.zeros((1, 1, config.d_model))
    return ScoreHead(outputs, head_std, config.param_dtype).init(key, dummy)["params"]


def init_scorer(config: ModelConfig, key: jax.Array, *, outputs: int, head_std: float) -> Params:
    """A fresh scorer {"trunk", "head"}, boxed; see `ScoreHead`."""
    trunk_key, head_key = jax.random.split(key)
    head = init_head(config, head_key, outputs=outputs, head_std=head_std)
    return {"trunk": init_params(config, trunk_key), "head": head}


def scorer_outputs(
    params: Params,
    config: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    group: Group | None = None,
) -> tuple[Float[Array, "B T O"], AuxSums]:
    """Float32 outputs after reading each token, and auxiliary sums; `out[b, t]` knows `tokens[b, :t + 1]`.

    `params` are {"trunk", "head"}, unboxed; the rest is as `forward` takes it.
    """
    hidden_BTD, aux = forward(params["trunk"], config, tokens_BT, positions_BT, segment_ids_BT, group=group)
    head = ScoreHead(params["head"]["w"].shape[1], 0.0, config.param_dtype)
    out: Any = head.apply({"params": params["head"]}, hidden_BTD)
    return out, aux


def last_token_scores(outputs_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """The score of each row, read at its last token inside the bool mask; 0 for a row without one.

    The mask is `segment_ids > 0` of rows of one sequence, padded on any side.

    Source: Ouyang et al. 2022, Section 3.5 (a scalar for prompt and response); Huang et al. 2024 read it at the
    response's last token, never at padding.
    """
    if jnp.issubdtype(mask_BT.dtype, jnp.floating):
        raise TypeError(f"mask: got dtype {mask_BT.dtype}, expected bool")
    mask_BT = mask_BT.astype(bool)
    slots = jnp.arange(mask_BT.shape[1])[None, :]
    last_B = jnp.max(jnp.where(mask_BT, slots, -1), axis=1)
    # A masked sum, not a gather: exactly one slot of a row is hit, and whatever padding holds is never touched.
    return jnp.sum(jnp.where(slots == last_B[:, None], outputs_BT.astype(jnp.float32), 0.0), axis=1)


def state_values(outputs_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """`v[b, t] = out[b, t - 1]`: the value of the state that token t is drawn from; 0 at t = 0.

    Aligned with `TokenLogps.logps`: the value and the log-prob at t belong to the same action.
    """
    return jnp.pad(outputs_BT.astype(jnp.float32)[:, :-1], ((0, 0), (1, 0)))
