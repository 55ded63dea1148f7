"""Before the first step: does all that the stages and the evaluation will read fit its lengths?"""

from research.config.experiment import Experiment
from research.data.judged import check_lengths
from research.data.records import Records, View
from research.data.report import DataReport
from research.environments.interaction import Interaction
from research.tasks.sources import Sources
from research.train.batches import training_batches, validation_batches


def check_data(experiment: Experiment, sources: Sources, interaction: Interaction | None) -> list[DataReport]:
    """What will become of the records of every stage, training and held out, and of the evaluation's prompts.

    Texts for pretraining fit any length: they are cut into rows.

    Raises:
      DataError: names the file and record that does not fit, or says how many do not.
    """

    def prompts(records: Records, length: int, name: str) -> DataReport:
        told = records if interaction is None else interaction.prompts(records)
        return check_lengths("prompts", told, sources.tokenizer, length=length, name=name, limits=sources.limits)

    reports, how = [], experiment.evaluation
    for stage in experiment.stages:
        if stage.online:
            shown = View(sources.problems.train, stage.data.limit)
            reports.append(prompts(shown, stage.rollout.max_prompt_length, stage.name))
        elif stage.objective.given != "text":
            reports += [make(stage, sources).report for make in (training_batches, validation_batches)]
    measured = [stage.eval_problems for stage in experiment.stages if stage.samples]
    if measured:
        shown = View(sources.held_out, max(how.problems, *measured))
        reports.append(prompts(shown, how.max_prompt_length, "evaluation"))
    return reports
