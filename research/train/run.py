"""What a stage's run is given."""

import dataclasses
from collections.abc import Callable, Mapping

from jax.sharding import Mesh

from models.config import ModelConfig
from models.transformer import Params
from research.config.experiment import Experiment, Stage
from research.core.interrupts import Interrupts
from research.core.stages import StageDir
from research.core.state import Layout, fresh_policy, grow
from research.evals.base import Evaluator
from research.tasks.sources import Sources
from research.train.setup import Setup
from research.train.stored import StageResult


@dataclasses.dataclass(frozen=True)
class StageRun:
    """Everything a loop is given."""

    stage: Stage
    folder: StageDir  # where it writes
    experiment: Experiment
    setup: Setup
    result_of: Callable[[str], StageResult]  # loads what another stage has trained, by name: fresh buffers every time
    label: str  # what the progress bar says
    interrupts: Interrupts  # says when to save and to stop
    evaluators: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)  # those that can measure its policy
    curve_evaluation: str = ""  # identity of their measurements

    @property
    def model(self) -> ModelConfig:
        """Static model description."""
        return self.setup.models[self.stage.model]

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.setup.mesh

    @property
    def sources(self) -> Sources:
        """The data."""
        return self.setup.sources

    def initial_params(self, layout: Layout) -> Params:
        """What training starts from: the result of another stage, with fresh heads where it has none."""
        stage = self.stage
        if not stage.start:
            policy = fresh_policy(self.model, self.mesh, stage.seed)
        else:
            start = self.result_of(stage.start)
            if start.layout == layout:
                return start.network.params
            policy = start.policy.params
        value = None
        if layout == "actor_critic" and stage.roles.value:
            value = self.result_of(stage.roles.value).network.params
        return grow(policy, self.model, self.mesh, layout, stage.seed, value)
