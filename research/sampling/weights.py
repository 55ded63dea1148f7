"""The policy's parameters laid out for sampling: in the compute dtype, in bfloat16, or in int8.

Once per update of the policy: cast or quantized, fused, and on a mesh resharded from the layout of training to that
of decoding (`models.decode.layout`).
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from models.decode.layout import decode_params
from models.transformer import Params
from research.core.errors import ConfigError

Weights = Literal["compute", "bfloat16", "int8"]
"""Dtype of the layers' matrices in memory; they are multiplied in the compute dtype."""


def sampling_params(params: Params, config: ModelConfig, weights: Weights) -> Params:
    """Parameters to sample with; those that are laid out already are returned unchanged.

    With int8, each output of a layer's matrix has one scale, its largest magnitude over 127.5; embedding and LM head
    stay. Sampler and trainer log-probs then differ: see the log-prob gap metric, and correct with `importance`.

    Raises:
      ConfigError: int8 without the package qwix.
    """
    if weights != "int8":
        return decode_params(params, config, dtype=jnp.bfloat16 if weights == "bfloat16" else None)
    try:
        import qwix
    except ImportError as error:
        raise ConfigError("sampler.weights: int8 needs the package qwix: pip install 'temper[int8]'.") from error

    def quantize(w: Float[Array, "..."], outputs: tuple[int, ...]) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
        found = qwix.quantize(w.astype(jnp.float32), jnp.int8, channelwise_axes=outputs)
        return found.qvalue, found.scale.reshape([w.shape[axis] for axis in outputs])

    return decode_params(params, config, quantize=quantize)
