"""What a stage trains: its state, the frozen models beside it, and the jitted steps on both."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from models.config import ModelConfig
from models.transformer import Params
from research.algorithms.base import Algorithm, Frozen, Scalars
from research.core.batch import Batch
from research.core.errors import DivergedError
from research.core.mesh import to_device
from research.core.network import Network
from research.core.state import TrainState, abstract_state, policy_of, state_from_params
from research.train.budget import Spending
from research.train.build import build, float32
from research.train.run import StageRun
from research.train.step import eval_step, prepare_step, train_step


class Learner:
    """The state of one stage in training."""

    state: TrainState  # parameters and optimizer; set by `start` or `restore`

    def __init__(self, run: StageRun) -> None:
        """Without a state."""
        self.run = run
        self.algorithm, self.scalars = build(run.stage, run.sources.tokenizer)  # static and traced
        self.layout = self.algorithm.layout
        self.spent = Spending(run.model)
        self.moved = False  # whether the policy has left the parameters that the stage started from
        self._frozen: Frozen | None = None

    @property
    def abstract(self) -> TrainState:
        """Shapes and shardings of the state."""
        return abstract_state(self.run.model, self.run.mesh, self.run.stage.rule, self.layout)

    def start(self) -> None:
        """A fresh optimizer on what the stage starts from; DivergedError if some of that is not finite."""
        run = self.run
        params = run.initial_params(self.layout)
        if not _all_finite(params):
            raise DivergedError(
                f"{run.stage.name}: starts from parameters that are not all finite, expected a result of "
                f"{run.stage.start or 'the initialisation'} that did not diverge"
            )
        self.state = state_from_params(params, run.model, run.mesh, run.stage.rule, self.layout)

    def restore(self, state: TrainState, record: Mapping[str, Any], *, moved: bool) -> None:
        """Goes on from a checkpoint."""
        self.state, self.moved = state, moved
        self.spent.restore(record["spent"])
        self._set(float32(record["objective_scalars"]))

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the state."""
        scalars = {key: float(value) for key, value in self.scalars.objective.items()}
        return {"spent": self.spent.record(), "objective_scalars": scalars}

    @property
    def policy(self) -> Params:
        """The policy as it is now."""
        return policy_of(self.state.params, self.layout)

    def frozen(self) -> Frozen:
        """The frozen models that the algorithm asks for; until the first update the policy may be its own reference."""
        if self._frozen is not None:
            return self._frozen
        roles, found = self.run.stage.roles, Frozen()
        if "teacher" in self.algorithm.roles:
            found = found.replace(teacher=self.run.result_of(roles.teacher).policy)
        if "reference" in self.algorithm.roles:
            own = roles.reference in ("", self.run.stage.start)
            if own and not self.moved:
                return found.replace(reference=Network(self.policy, self.run.model))  # no second copy yet
            found = found.replace(reference=self.run.result_of(roles.reference or self.run.stage.start).policy)
        self._frozen = found
        return found

    def prepare(self, batch: Batch, counts: Mapping[str, Any] | None) -> Batch:
        """The global batch on the device, with what is computed once on it.

        `counts` is what it spends; None where it is evaluated only.
        """
        batch = to_device(self.run.mesh, batch)
        if not self.algorithm.prepares:
            return batch
        frozen = self.frozen()
        if counts is not None and frozen.reference is not None:
            self._forward(frozen.reference.config, counts)
        if counts is not None and self.layout == "actor_critic":
            self._forward(self.run.model, counts)
        return prepare_step(self.state.params, batch, self.scalars.objective, frozen, **self._static(self.algorithm))

    def update(self, batch: Batch, counts: Mapping[str, Any]) -> dict[str, Any]:
        """One optimizer step on a prepared batch; returns its metrics."""
        frozen = self._loss_models()
        if frozen.teacher is not None:
            self._forward(frozen.teacher.config, counts)
        static = self._static(self.algorithm.for_update)
        micro_batches = self.run.stage.micro_batches
        self.state, metrics = train_step(self.state, batch, self.scalars, frozen, **static, micro_batches=micro_batches)
        self.moved = True
        self.spent.trained(**counts, networks=2 if self.layout == "actor_critic" else 1)
        return metrics

    def measure(self, batch: Batch) -> dict[str, Any]:
        """Loss and metrics of a prepared batch as sums, without learning from it."""
        static = self._static(self.algorithm.for_update)
        return eval_step(self.state.params, batch, self.scalars.objective, self._loss_models(), **static)

    def adapt(self, metrics: Mapping[str, float], completions: int) -> None:
        """Lets the algorithm's controllers set the next iteration's scalars."""
        self._set(self.algorithm.adapt(self.scalars.objective, metrics, completions))

    def _static(self, algorithm: Algorithm) -> dict[str, Any]:
        return {"algorithm": algorithm, "config": self.run.model}

    def _set(self, objective: Scalars) -> None:
        self.scalars = self.scalars._replace(objective={**self.scalars.objective, **objective})

    def _loss_models(self) -> Frozen:
        """The frozen models that the loss itself reads: a teacher. Reference log-probs are precomputed in `prepare`."""
        if "teacher" not in self.algorithm.roles:
            return Frozen()
        return self.frozen().replace(reference=None)

    def _forward(self, model: ModelConfig, counts: Mapping[str, Any]) -> None:
        self.spent.forward(model=model, real_tokens=counts["real_tokens"], context=counts["context"])


@jax.jit
def _all_finite(params: Params) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
