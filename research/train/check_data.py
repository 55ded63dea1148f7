"""Before the first step: does all that the stages and the evaluation will read fit its lengths?"""

from research.config.experiment import Experiment
from research.data.judged import check_lengths
from research.data.records import first_records
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
    reports, limits, told = (
        [],
        sources.limits,
        interaction.prompts if interaction is not None else lambda records: records,
    )
    for stage in experiment.stages:
        if stage.online:
            reports.append(
                check_lengths(
                    "prompts",
                    told(first_records(sources.problems.train, stage.data.limit)),
                    sources.tokenizer,
                    length=stage.rollout.max_prompt_length,
                    name=stage.name,
                    limits=limits,
                )
            )
        elif stage.objective.given != "text":
            reports += [make(stage, sources).report for make in (training_batches, validation_batches)]
    measured = [stage.eval_problems for stage in experiment.stages if stage.samples]
    if measured:
        how = experiment.evaluation
        reports.append(
            check_lengths(
                "prompts",
                told(first_records(sources.held_out, max(how.problems, *measured))),
                sources.tokenizer,
                length=how.max_prompt_length,
                name="evaluation",
                limits=limits,
            )
        )
    return reports
