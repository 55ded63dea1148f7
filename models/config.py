"""The static description of a decoder-only transformer."""

import dataclasses
from typing import Literal

Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder; hashable, so it is a static argument of every jitted function.

    Attributes:
      vocab_size: V, number of token ids.
      num_layers: L.
      d_model: D, width of the residual stream.
      num_heads: H, query heads.
      num_kv_heads: K, key and value heads; divides H (grouped-query attention, Ainslie et al. 2023).
      head_dim: width of one head; even, because rotary embeddings turn pairs.
      d_ff: F, hidden width of the SwiGLU block.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon inside RMSNorm.
      tie_embeddings: read logits out with the input embedding.
      scan_layers: `lax.scan` over layers (compile time independent of depth: pods) or unrolled (faster on
        CPU). The parameters are the same.
      remat: what the backward pass recomputes: nothing, all but matrix products, or each whole block.
      param_dtype: dtype of the stored parameters.
      compute_dtype: dtype of matrix products; norms, softmax and logits are float32 regardless.
      logprob_chunk: time positions whose logits exist at once in the log-prob function, at most.
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
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    logprob_chunk: int = 128

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: got {self.num_kv_heads}, expected a divisor of num_heads={self.num_heads} "
                "because each key head serves an equal group of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, expected an even number for rotary embeddings")

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
