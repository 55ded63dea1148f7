"""A policy to be measured, from flags: shared by launch.evaluate and launch.scale."""

from functools import partial
from pathlib import Path

from absl import flags
from rich import print as show

from launch import common
from research.config.sections import Evaluation
from research.core.mesh import check_rows
from research.data.jsonl import read_records
from research.data.pipelines import sft_batches
from research.data.records import first_records
from research.data.report import Limits
from research.data.store import Prepared
from research.evals.policy import TrainedPolicy
from research.rewards.builtin import correct
from research.sampling.limits import SAMPLES
from research.tasks.base import Task
from research.tasks.jsonl import Jsonl
from research.train.setup import interaction_of
from research.train.stored import load_policy

_SAME = ("samples", "temperature", "seed", "max_prompt_length", "max_new_tokens", "batch_problems")
"""Flags that are keys of `evaluation` too."""


def define_flags(*, samples: int) -> None:
    """Which policy, which problems, and how they are sampled; `samples` is that flag's default."""
    flags.DEFINE_string("stage", None, "folder of a stage: <workdir>/stages/<name>-<hash>", required=True)
    flags.DEFINE_string("problems", None, "JSONL of problems (prompt/completion, messages, GSM8K)")
    flags.DEFINE_integer("limit", 256, "only the first so many problems; 0 is all", lower_bound=0)
    flags.DEFINE_integer("samples", samples, "completions a problem", lower_bound=1, upper_bound=SAMPLES)
    flags.DEFINE_float("temperature", 1.0, "0 is greedy")
    flags.DEFINE_integer("max_prompt_length", 256, "longest prompt, tokens", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 256, "longest completion, tokens", lower_bound=1)
    flags.DEFINE_integer("batch_problems", 32, "problems sampled at a time", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the sampler", lower_bound=0, upper_bound=2**31 - 1)


def stage_folder() -> Path:
    """The folder that --stage names."""
    return Path(flags.FLAGS.stage).resolve()


def load(ks: tuple[int, ...]) -> TrainedPolicy:
    """The policy that the flags name, with its problems; `ks` are those of pass@k.

    Raises:
      ConfigError: prompts and completions are longer than the model's context, or batches do not fit the devices.
      DataError, WorkdirError, CheckpointError: a file or the stage cannot be read.
    """
    given, folder = flags.FLAGS, stage_folder()
    loaded = load_policy(folder)
    check_rows(loaded.mesh, "--batch_problems", given.batch_problems)
    common.check_context(loaded, given.max_prompt_length, given.max_new_tokens)
    if given.problems:
        found = [record for _, record in read_records(given.problems)]
        task: Task
        task, sentence = Jsonl(path=given.problems).fit(Prepared(found, found, ""))
        show(f"{given.problems}: {sentence}")
        records = first_records(found, given.limit)
    else:
        sources = common.sources_of(loaded, folder)
        task, records = sources.task, first_records(sources.held_out, given.limit)
    experiment = loaded.experiment
    yardstick = experiment.parsed["evaluation"].chosen["correct"]
    return TrainedPolicy(
        params=loaded.params,
        model=loaded.model,
        mesh=loaded.mesh,
        tokenizer=loaded.tokenizer,
        sampler=experiment.sampler,
        settings=Evaluation(problems=len(records), k=ks, **{name: getattr(given, name) for name in _SAME}),
        task=task,
        records=records,
        limits=Limits("error"),
        yardstick=yardstick[0].make() if yardstick else correct,
        interaction=interaction_of(experiment.tree["tools"], loaded.tokenizer),
        row_arrays=partial(
            sft_batches, records, loaded.tokenizer, batch_size=given.batch_problems, length=loaded.max_length, seed=None
        ),
    )
