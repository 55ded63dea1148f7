"""What a config becomes: frozen dataclasses, checked; `research/config/resolve.py` makes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from research.config import sections
from research.config.tree import Chosen, Section, Tree
from research.core.errors import ConfigError
from research.core.optim import Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(sections.StageSection):
    """One stage, resolved: the keys of its section, and

    Attributes:
      objective, options: a `research.algorithms.base.Objective` and its own settings.
      start: name (or folder) of the stage that it starts from; "" starts from scratch.
      facts: what decides which of its keys have an effect.
      parsed: the section as it was parsed, with the components that it names.
    """

    name: str
    objective: Any
    options: Mapping[str, Any]
    start: str
    facts: sections.Facts
    parsed: Section

    @property
    def online(self) -> bool:
        """Whether the policy samples its own data."""
        return self.facts.online

    @property
    def samples(self) -> bool:
        """Whether its result is a policy that can be sampled."""
        return self.facts.policy

    @property
    def rows(self) -> int:
        """Rows (pairs, groups) of a batch; online, of a whole iteration."""
        if not self.online:
            return self.batch_size
        per_group = self.objective.rows_per_group(self.options, self.rollout.group_size)
        return self.rollout.prompts_per_step * per_group

    @property
    def updates(self) -> int:
        """Optimizer steps of one step of the loop."""
        return self.rollout.epochs * self.rollout.minibatches if self.online else 1

    def chosen(self, section: str, key: str) -> tuple[Chosen, ...]:
        """The components that a key of one of its sections names."""
        return self.parsed.sections[section].chosen[key]

    @property
    def rule(self) -> Rule:
        """The optimizer."""
        (chosen,) = self.chosen("optimizer", "name")
        return chosen.component.target

    @property
    def played(self) -> tuple[tuple[str, str], ...]:
        """(role, name of the stage that plays it) of every role that it needs; "" where none is named."""
        found: list[tuple[str, str]] = []
        for role in sorted(self.facts.roles | self.facts.answer_roles):
            names = getattr(self.roles, role)
            found += [(role, name) for name in ((names,) if isinstance(names, str) else names or ("",))]
        return tuple(found)

    @property
    def training_inputs(self) -> tuple[str, ...]:
        """Names, or folders, of the stages whose results its training reads, the one it starts from first."""
        used = [self.start, *(name for role, name in self.played if role in self.facts.roles)]
        return tuple(dict.fromkeys(name for name in used if name))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Those, and the ones that its evaluation reads."""
        return tuple(dict.fromkeys([*self.training_inputs, *(name for _, name in self.played if name)]))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole config, validated: its sections, and

    Attributes:
      stages: each after those that it reads.
      models: the sections `model` and `teacher_model`, as far as stages use them.
      parsed: the sections as they were parsed, with the components that they name.
      tree: every key and its value.
    """

    name: str
    question: str
    stages: tuple[Stage, ...]
    models: Mapping[str, sections.Model]
    mesh: sections.Mesh
    data: sections.Data
    evaluation: sections.Evaluation
    sampler: sections.Sampler
    tools: sections.Tools
    records: sections.Records
    ablation: sections.Ablation
    parsed: Mapping[str, Section]
    tree: Tree

    @property
    def names(self) -> tuple[str, ...]:
        """The stages' names."""
        return tuple(stage.name for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """The stage of this name."""
        return next(stage for stage in self.stages if stage.name == name)

    def until(self, name: str) -> tuple[Stage, ...]:
        """The stages that the result of stage `name` needs, itself last."""
        needed = {name}
        for stage in reversed(self.stages):
            if stage.name in needed:
                needed.update(stage.inputs)
        return tuple(stage for stage in self.stages if stage.name in needed)

    def model_config(self, vocab_size: int, model: str = "model") -> ModelConfig:
        """The static model description once the vocabulary is known."""
        return make_model(self.models[model], vocab_size, model)


def make_model(section: sections.Model, vocab_size: int, name: str = "model") -> ModelConfig:
    """A ModelConfig from a model section; ConfigError if its shapes do not fit together."""
    fields = {key: value for key, value in vars(section).items() if key != "max_length"}
    try:
        return ModelConfig(vocab_size=vocab_size, **fields)
    except ValueError as error:
        raise ConfigError(f"{name}.{error}") from error
