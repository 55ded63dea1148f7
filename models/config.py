"""The static description of a decoder-only transformer."""

import dataclasses
import math
from typing import Literal, get_args, get_origin, get_type_hints

Remat = Literal["none", "dots", "full"]
AttentionKernel = Literal["auto", "splash", "cudnn", "xla", "cpu_blocks"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder; hashable, so it is a static argument of every jitted function.

    Attributes:
      vocab_size, num_layers, d_model: V, number of token ids; L; D, width of the residual stream.
      num_heads, num_kv_heads: H query heads, K key and value heads; K divides H (grouped-query attention, Ainslie
        et al. 2023).
      head_dim, d_ff: N, width of one head, even; F, hidden width of the SwiGLU block.
      rope_theta, norm_eps: base of the rotary frequencies; epsilon inside RMSNorm.
      tie_embeddings: the LM head is the transposed input embedding.
      scan_layers: loop over layers in the compiled program (compile time independent of depth: pods) or unroll them
        (faster on CPU). The parameters are the same.
      remat: what the backward pass recomputes: nothing, all but matrix products, or each whole block.
      param_dtype, compute_dtype: of the stored parameters; of matrix products (norms, softmax and logits are float32).
      logprob_chunk: time positions whose logits exist at once in the log-prob function, at most.
      attention_kernel: which attention training and scoring run; "auto" is the fastest one that can serve, any other is
        an error where it cannot (`models.kernels.attention`). Affects speed and rounding.

    Raises ValueError on a value out of its range, or shapes that do not fit together.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    scan_layers: bool = False
    remat: Remat = "none"
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    logprob_chunk: int = 128
    attention_kernel: AttentionKernel = "auto"

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, expected: str) -> None:
            if not holds:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is int:
                require(name, value >= 1, "at least 1 because it is a size")
            elif kind is float:
                positive = math.isfinite(value) and value > 0
                require(name, positive, f"a finite number above 0 because {_WHY_POSITIVE[name]}")
            elif get_origin(kind) is Literal:
                require(name, value in get_args(kind), f"one of {', '.join(get_args(kind))}")
        require(
            "num_kv_heads",
            self.num_heads % self.num_kv_heads == 0,
            f"a divisor of num_heads={self.num_heads} because each key head serves an equal group of query heads",
        )
        require("head_dim", self.head_dim % 2 == 0, "an even number because rotary embeddings rotate pairs")

    def num_params(self) -> int:
        """Number of parameters, embeddings included."""
        attention = self.d_model * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        block = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
        tables = 1 if self.tie_embeddings else 2
        return self.num_layers * block + tables * self.vocab_size * self.d_model + self.d_model

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs per token at a mean context of `context` tokens; training costs three times this.

        Two per parameter that is multiplied (the embedding look-up is not) plus attention's two products.
        """
        looked_up = 0 if self.tie_embeddings else self.vocab_size * self.d_model
        matmul = 2.0 * (self.num_params() - looked_up)
        return matmul + 4.0 * self.num_layers * self.num_heads * self.head_dim * context


_WHY_POSITIVE = {
    "rope_theta": "rotary frequencies are its negative powers",
    "norm_eps": "RMSNorm of zeros divides by its root",
}
