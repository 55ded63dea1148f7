"""Distillation from a frozen teacher: on given responses, on the student's own, with or without more context."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from models.config import ModelConfig
from models.logprobs import hidden_divergence
from models.softmax import likeliest_token
from models.transformer import unembedding
from objectives.distillation import Divergence, Tail, distillation_loss, topk_distillation_loss
from objectives.reduce import reduce_metrics, token_mean
from research.algorithms.base import Algorithm, Frozen, Objective, Rollouts, Scalars, Summed, provides, when
from research.algorithms.context import teacher_rows
from research.config.schema import choice, number, static_number
from research.core.batch import DistillBatch, SequenceBatch
from research.core.network import Network, row_states


@dataclasses.dataclass(frozen=True)
class Distill(Algorithm[DistillBatch]):
    """A divergence to the teacher at every response token (Agarwal et al. 2024, GKD, eq. 1 and 2).

    Context distillation (Askell et al. 2021; Snell et al. 2022): the teacher also reads `context_ids`.
    """

    divergence: Divergence
    top_k: int = 0
    tail: Tail = "bucket"
    context_ids: tuple[int, ...] = dataclasses.field(default=(), compare=False)  # what only the teacher sees
    bos_id: int | None = dataclasses.field(default=None, compare=False)  # the context goes after it

    roles = ("teacher",)

    def loss(self, model: Network, batch: DistillBatch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Mean over all response tokens of the global batch, rows weighted; runs the teacher's forward pass too."""
        assert frozen.teacher is not None
        student, network = batch.student, frozen.teacher
        jsd_beta, temperature = scalars["jsd_beta"], scalars["temperature"]

        def compare(student_logits: Array, teacher_logits: Array) -> dict[str, Array]:
            student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
            every = jnp.ones(student_logits.shape[:2], bool)
            logps = jax.nn.log_softmax(student_logits)
            metrics = {
                "entropy": -jnp.sum(jnp.exp(logps) * logps, axis=-1),
                "agreement": (likeliest_token(student_logits) == likeliest_token(teacher_logits)).astype(jnp.float32),
            }
            if not self.top_k:
                options = {"mask": every, "divergence": self.divergence, "jsd_beta": jsd_beta}
                out = distillation_loss(student_logits=student_logits, teacher_logits=teacher_logits, **options)
                return {"losses": out.losses, **metrics}
            kept, ids = jax.lax.top_k(jax.nn.log_softmax(teacher_logits), self.top_k)
            out = topk_distillation_loss(
                student_topk_logps=jnp.take_along_axis(logps, ids, axis=-1),
                teacher_topk_logps=kept,
                mask=every,
                divergence=self.divergence,
                tail=self.tail,
                jsd_beta=jsd_beta,
            )
            return {"losses": out.losses, **metrics, **out.metrics}

        hidden, seen = row_states(model, student), row_states(network, batch.teacher)
        # Column t of both holds the state from which the student's token t is predicted.
        before = jnp.maximum(batch.teacher_slots - 1, 0)
        compared = hidden_divergence(
            jnp.roll(hidden, 1, axis=1),
            unembedding(model.params),
            model.config,
            jnp.take_along_axis(seen, before[:, :, None], axis=1),
            unembedding(network.params),
            network.config,
            compare,
        )
        mask, losses, weights = student.used_mask, compared.pop("losses"), student.weights
        metrics = jax.lax.stop_gradient({"divergence": losses, **compared})
        return token_mean(losses, mask, weights=weights), reduce_metrics(metrics, mask=mask, weights=weights)

    def check_model(self, config: ModelConfig) -> None:
        """Raises ValueError where more of the teacher's tokens are asked for than there are."""
        if self.top_k > config.vocab_size:
            raise ValueError(f"top_k: got {self.top_k}, expected at most the vocabulary's {config.vocab_size} tokens")

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[DistillBatch, dict[str, float]]:
        """All B rows (on-policy distillation); rewards are not read."""
        return self.from_rows(rollouts.rows(None, np.ones(len(rollouts.rewards)))), {}

    def from_rows(self, rows: SequenceBatch) -> DistillBatch:
        """On the host: prompt + response rows as the student's and the teacher's; see `teacher_rows`."""
        teacher, slots = teacher_rows(rows, self.context_ids, self.bos_id)
        return DistillBatch(rows, teacher, slots)


OPTIONS = {
    "divergence": choice("reverse_kl", "forward_kl (teacher || student), reverse_kl, jsd.", *get_args(Divergence)),
    "jsd_beta": number(
        0.5,
        "The teacher's weight in the mixture.",
        1e-3,
        1 - 1e-3,
        "at 0 and at 1 the divergence is 0 everywhere",
        used=when(divergence="jsd"),
    ),
    "temperature": number(1.0, "Divides both models' logits.", 1e-3),
    "top_k": static_number(0, "The teacher's likeliest tokens; 0 compares the whole vocabulary.", 0),
    "tail": choice(
        "bucket",
        "The other tokens, with top_k: one outcome, or left out.",
        *get_args(Tail),
        used=lambda o, _: o["top_k"] > 0,
    ),
}

PROVIDES = provides(
    Objective("distill", Distill.from_setting, OPTIONS, given="chat", own=True, reads=lambda _options: frozenset())
)
