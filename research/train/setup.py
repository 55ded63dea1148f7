"""Before the first step: data, devices and models of an experiment, and all that can be checked without training."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh

from models.config import ModelConfig
from research.config.checks import PLAYERS
from research.config.experiment import Experiment, Stage
from research.config.tree import Tree
from research.core.errors import ConfigError
from research.core.mesh import check_rows, make_mesh
from research.core.progress import say
from research.core.sinks import check_sinks
from research.core.state import abstract_params
from research.data.examples import prompt_examples
from research.data.records import Records, first_records
from research.data.tokenizer import Tokenizer
from research.environments.interaction import Interaction, make_interaction
from research.rewards.base import RewardFunction
from research.rewards.builtin import correct
from research.tasks.sources import Sources
from research.train.batches import training_batches, validation_batches
from research.train.build import build, context_ids
from research.train.memory import check_memory
from research.train.stored import TrainedStage, load_finished


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all stages of an experiment share."""

    sources: Sources
    mesh: Mesh
    models: Mapping[str, ModelConfig]  # by section, vocabulary included
    yardstick: RewardFunction  # what says whether a completion is right: `evaluation.correct`, or the task's own
    interaction: Interaction | None = None  # what answers policies while they are sampled
    folders: Mapping[str, TrainedStage] = dataclasses.field(default_factory=dict)  # stages named by their folders


def set_up(experiment: Experiment, workdir: Path) -> Setup:
    """Prepares the data, trains the tokenizer and checks that everything fits the devices and one another.

    Prepared data are addressed by content and shared by all runs of a working directory.

    Raises:
      ConfigError: rows or the model do not divide over the mesh; a folder holds nothing that could be used here.
      DataError: a file or record cannot be used.
    """
    check_sinks(experiment.records.sinks)
    sizes = experiment.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    check_rows(mesh, "evaluation.batch_problems", experiment.evaluation.batch_problems)
    for stage in experiment.stages:
        if stage.online:
            how, key = stage.rollout, f"{stage.name}.rollout.prompts_per_step"
            check_rows(mesh, key, how.prompts_per_step, minibatches=how.minibatches)
            check_rows(mesh, key, stage.rows, stage.micro_batches, how.minibatches)
        else:
            check_rows(mesh, f"{stage.name}.batch_size", stage.rows, stage.micro_batches)
    sources = Sources.of(experiment, workdir / "data")
    for note in sources.notes(tuple(dict.fromkeys(kind for stage in experiment.stages for kind in kinds_of(stage)))):
        say(note)
    models = {name: experiment.model_config(sources.tokenizer.vocab_size, name) for name in experiment.models}
    for model in models.values():
        abstract_params(model, mesh)
    folders: dict[str, TrainedStage] = {}
    for stage in experiment.stages:
        sources.versions(kinds_of(stage))
        try:
            build(stage, sources.tokenizer)[0].check_model(models[stage.model])
        except ValueError as error:
            raise ConfigError(f"{stage.name}.objective.{stage.objective.name}.{error}") from error
        folders |= _folders(experiment, stage, sources.tokenizer)
        _check_context(experiment, stage, sources.tokenizer, folders)
        check_memory(stage, models[stage.model], mesh)
    interaction = interaction_of(experiment.tree["tools"], sources.tokenizer)
    _check_lengths(experiment, sources, interaction)
    yardstick = experiment.parsed["evaluation"].chosen["correct"]
    return Setup(sources, mesh, models, yardstick[0].make() if yardstick else correct, interaction, folders)


def _check_lengths(experiment: Experiment, sources: Sources, interaction: Interaction | None) -> None:
    """Raises DataError where records of a stage, or the evaluation's prompts, do not fit their lengths.

    Texts for pretraining fit any length: they are cut into rows.
    """

    def check_prompts(records: Records, length: int, name: str) -> None:
        told = records if interaction is None else interaction.prompts(records)
        prompt_examples(told, sources.tokenizer, length=length, name=name, limits=sources.limits)

    for stage in experiment.stages:
        if stage.online:
            records = first_records(sources.problems.train, stage.data.limit)
            check_prompts(records, stage.rollout.max_prompt_length, stage.name)
        elif stage.objective.given != "text":
            for make in (training_batches, validation_batches):
                make(stage, sources)
    measured = [stage.eval_problems for stage in experiment.stages if stage.samples]
    if measured:
        how = experiment.evaluation
        check_prompts(
            first_records(sources.held_out, max(how.problems, *measured)), how.max_prompt_length, "evaluation"
        )


def interaction_of(section: Tree, tokenizer: Tokenizer) -> Interaction | None:
    """What the `tools` section of a config names."""
    return make_interaction(
        section["names"],
        {name: options for name, options in section.items() if isinstance(options, Mapping)},
        tokenizer,
        max_turns=section["max_turns"],
        max_result_tokens=section["max_result_tokens"],
        environment=section["environment"],
    )


def _folders(experiment: Experiment, stage: Stage, tokenizer: Tokenizer) -> dict[str, TrainedStage]:
    """The finished stages that a stage names by their folders."""
    found: dict[str, TrainedStage] = {}
    uses = [("start_from", stage.start), ("extend", stage.extend), *((f"roles.{r}", n) for r, n in stage.played)]
    for use, name in uses:
        if "/" not in name and use != "extend" or not name:
            continue
        key, trains = f"{stage.name}.{use}", stage.facts.trains
        there = found[name] = load_finished(Path(name), key)
        same = use in ("start_from", "extend", "roles.reference", "roles.value")
        there.check_same(key, experiment, stage.model if same else "", tokenizer)
        own = (trains,) if use == "extend" else (trains, "policy", "actor_critic")
        layouts = PLAYERS.get(use.removeprefix("roles."), own)
        if (layout := there.algorithm.layout) not in layouts:
            raise ConfigError(f"{key}: {name} has trained a {layout}, expected a {' or '.join(layouts)}")
    return found


def _check_context(
    experiment: Experiment, stage: Stage, tokenizer: Tokenizer, folders: Mapping[str, TrainedStage]
) -> None:
    """A teacher must be able to read its longer rows."""
    if "teacher" not in stage.facts.roles:
        return
    how, extra = stage.rollout, len(context_ids(stage.data.context, tokenizer))
    rows = how.max_prompt_length + how.max_new_tokens if stage.online else stage.length
    name = stage.roles.teacher
    there = folders.get(name)
    limit = there.max_length if there else experiment.models[experiment.stage(name).model].max_length
    if rows + extra > limit:
        raise ConfigError(
            f"{stage.name}.data.context: got {extra} tokens before rows of {rows}, expected at most "
            f"the {limit} that the teacher can read, together"
        )


def kinds_of(stage: Stage) -> tuple[str, ...]:
    """Which data a stage reads."""
    kind = stage.objective.given
    if stage.online or kind is None or kind == "chat":
        return ("problems",)
    if kind != "text":
        return (kind,)
    text = ("text",) if stage.data.text_weight > 0 else ()
    return text + (("problems",) if stage.data.problems_weight > 0 else ())
