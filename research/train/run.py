"""What a stage's run is given."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from models.config import ModelConfig
from models.transformer import Params
from research.config.experiment import Stage
from research.config.sections import Evaluation, Sampler
from research.core.interrupts import Interrupts
from research.core.network import Network
from research.core.stages import StageDir
from research.core.state import Layout, fresh_policy, grow, policy_of
from research.environments.interaction import Interaction
from research.evals.base import Evaluator
from research.rewards.base import RewardFunction
from research.tasks.sources import Sources


@dataclasses.dataclass(frozen=True)
class StageRun:
    """Everything a loop is given.

    Attributes:
      stage: the resolved stage.
      folder: where it writes.
      model: static model description.
      mesh: the devices.
      sources: the data.
      evaluation: how policies are measured.
      sampler: how completions are computed.
      result_of: loads what another stage has trained, by name: fresh buffers at every call.
      label: what the progress bar says.
      yardstick: what says whether a completion is right, whatever is optimised.
      evaluators: what measures its policy, by name; those that can.
      curve_evaluation: identity of these measurements.
      interrupts: says when to save and to stop.
      sinks: where metrics go besides files.
      extends: folder of the finished stage whose whole state this one continues, if any.
      interaction: what answers the policy while it is sampled, if anything.
    """

    stage: Stage
    folder: StageDir
    model: ModelConfig
    mesh: Mesh
    sources: Sources
    evaluation: Evaluation
    sampler: Sampler
    result_of: Callable[[str], "StageResult"]
    label: str
    yardstick: RewardFunction
    interrupts: Interrupts
    evaluators: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)
    curve_evaluation: str = ""
    sinks: tuple[str, ...] = ()
    extends: Path | None = None
    interaction: Interaction | None = None

    def initial_params(self, layout: Layout) -> Params:
        """What training starts from: the result of another stage, with fresh heads where it has none."""
        stage = self.stage
        if not stage.start:
            policy = fresh_policy(self.model, self.mesh, stage.seed)
        else:
            start = self.result_of(stage.start)
            if start.layout == layout:
                return start.network.params
            policy = policy_of(start.network.params, start.layout)
        value = None
        if layout == "actor_critic" and stage.roles.value:
            value = self.result_of(stage.roles.value).network.params
        return grow(policy, self.model, self.mesh, layout, stage.seed, value)

    def policy(self, name: str) -> Network:
        """A finished stage's policy."""
        found = self.result_of(name)
        return Network(policy_of(found.network.params, found.layout), found.network.config)


class StageResult(NamedTuple):
    """What a finished stage has trained."""

    network: Network
    layout: Layout
