"""The static description of a decoder-only transformer."""

import dataclasses
import math
from typing import Literal, get_args

Remat = Literal["none", "dots", "full"]
AttentionKernel = Literal["auto", "splash", "cudnn", "xla", "cpu_blocks"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer; options of a family's attention and MLP are added here.

    Attributes:
      rope_theta: base of the rotary frequencies.
      mlp: kind of the feed-forward block.
    """

    rope_theta: float
    mlp: Literal["swiglu"] = "swiglu"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder; hashable, so it is a static argument of every jitted function.

    Attributes:
      vocab_size: V, number of token ids.
      num_layers: L.
      d_model: D, width of the residual stream.
      num_heads: H, query heads.
      num_kv_heads: K, key and value heads; divides H (grouped-query attention, Ainslie et al. 2023).
      head_dim: N, width of one head; even, because rotary embeddings rotate pairs.
      d_ff: F, hidden width of the SwiGLU block.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon inside RMSNorm.
      tie_embeddings: the LM head is the transposed input embedding.
      scan_layers: loop over layers in the compiled program (compile time independent of depth: pods) or unroll them
        (faster on CPU). The parameters are the same.
      remat: what the backward pass recomputes: nothing, all but matrix products, or each whole block.
      param_dtype: dtype of the stored parameters.
      compute_dtype: dtype of matrix products; norms, softmax and logits are float32 regardless.
      logprob_chunk: time positions whose logits exist at once in the log-prob function, at most.
      attention_kernel: which attention training and scoring run; "auto" is the fastest one that can serve, any other
        is an error where it cannot (`models.kernels.attention`). Affects speed and rounding.

    Raises:
      ValueError: a value out of its range, or shapes that do not fit together.
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
        values = vars(self)

        def require(name: str, holds: bool, expected: str) -> None:
            if not holds:
                raise ValueError(f"{name}: got {values[name]!r}, expected {expected}")

        for name in _SIZES:
            require(name, values[name] >= 1, "at least 1 because it is a size")
        for name, why in _POSITIVE.items():
            positive = math.isfinite(values[name]) and values[name] > 0
            require(name, positive, f"a finite number above 0 because {why}")
        for name, choices in _CHOICES.items():
            require(name, values[name] in choices, f"one of {', '.join(choices)}")
        require(
            "num_kv_heads",
            self.num_heads % self.num_kv_heads == 0,
            f"a divisor of num_heads={self.num_heads} because each key head serves an equal group of query heads",
        )
        require("head_dim", self.head_dim % 2 == 0, "an even number because rotary embeddings rotate pairs")

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """The options of each layer, first to last; a scan over layers needs them to be equal."""
        return (LayerConfig(self.rope_theta),) * self.num_layers

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


_SIZES = (
    "vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "logprob_chunk",
)  # fmt: skip
_POSITIVE = {
    "rope_theta": "rotary frequencies are its negative powers",
    "norm_eps": "RMSNorm of zeros divides by its root",
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "remat": get_args(Remat),
    "param_dtype": get_args(Dtype),
    "compute_dtype": get_args(Dtype),
    "attention_kernel": get_args(AttentionKernel),
}
