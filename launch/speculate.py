"""Speculative decoding measured: plain decoding and each way of proposing, in turn on the same prompts, row by row.

Example:
  python -m launch.speculate --stage=runs/speculative/stages/target-0123456789ab --output=runs/speculative/figures \
      --draft=runs/speculative/stages/draft-0123456789ab,ngram --draft_tokens=2,3,4 --temperature=0,1

Prompts are held out from the stage's own training: beginnings of texts, or whole problems as rollouts pose them.
Writes to --output: speculative.json (every repetition) and speculative.png (speed-up against proposals a round).
Compare only numbers of one run.
"""

import dataclasses
import os
from pathlib import Path

import jax
from absl import flags
from rich import get_console

from launch import common
from models.config import ModelConfig
from research.benchmarks.speculative import (
    PLAIN,
    Trial,
    compare,
    problem_prompts,
    show,
    text_prompts,
    trials_of,
    write,
)
from research.core.errors import ConfigError
from research.core.files import make_folder
from research.core.mesh import make_mesh
from research.core.progress import Progress
from research.core.versions import collect_versions
from research.sampling.limits import DRAFT_TOKENS
from research.sampling.methods import SamplingMethod
from research.sampling.speculative import Draft
from research.sampling.types import SamplerSpec, make_scalars
from research.train.chain import load_policy

_STAGE = flags.DEFINE_string(
    "stage", None, "folder of the target's stage: <workdir>/stages/<name>-<hash>", required=True
)
_DRAFT = flags.DEFINE_list(
    "draft",
    None,
    f"folders of smaller models' stages, and {common.NGRAM} for n-grams of the text",
    required=True,
)
_OUTPUT = flags.DEFINE_string("output", None, "folder to write to", required=True)
_DRAFT_TOKENS = flags.DEFINE_list("draft_tokens", ["2", "3", "4"], "proposals a round, each tried")
_TEMPERATURE = flags.DEFINE_list("temperature", ["0", "1"], "each tried; 0 is greedy")
_PROMPTS = flags.DEFINE_enum(
    "prompts",
    "text",
    ("text", "problems"),
    "beginnings of texts, or problems with answers that are long enough",
)
_REPETITIONS = flags.DEFINE_integer(
    "repetitions", 16, "each on its own prompt", lower_bound=2, upper_bound=10_000
)
_PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_length", 32, "tokens; longer problems are passed over", lower_bound=2
)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "tokens of every completion", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the sampler", lower_bound=0, upper_bound=2**31 - 1)


def main() -> None:
    """Prints the table; the rest is in --output."""
    counts = common.integers("draft_tokens", high=DRAFT_TOKENS)
    scalars = [make_scalars(seed=_SEED.value, temperature=value) for value in common.numbers("temperature")]
    folder, output = Path(_STAGE.value).resolve(), make_folder(Path(_OUTPUT.value))
    policy = load_policy(folder, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    longest = _PROMPT_TOKENS.value + _TOKENS.value
    if longest > policy.max_length:
        raise ConfigError(
            f"--max_new_tokens: got {_TOKENS.value} after {_PROMPT_TOKENS.value} tokens of prompt, expected a sum "
            f"of at most {policy.max_length}, the model's context"
        )
    sources = common.sources_of(policy, folder)
    if _PROMPTS.value == "problems":
        prompts = problem_prompts(
            sources.held_out,
            policy.tokenizer,
            count=_REPETITIONS.value,
            length=_PROMPT_TOKENS.value,
            new_tokens=_TOKENS.value,
        )
    else:
        prompts = text_prompts(
            sources.text.validation,
            policy.tokenizer,
            count=_REPETITIONS.value,
            length=_PROMPT_TOKENS.value,
            longest=longest,
        )
    load = os.getloadavg()[0]
    drafts: dict[tuple[str, int], Draft] = {}
    for number, path in enumerate(_DRAFT.value):
        draft = common.load_draft(path, policy, counts[0])
        name = path if path == common.NGRAM else f"draft {number + 1}"
        for k in counts:
            drafts[name, k] = draft._replace(spec=dataclasses.replace(draft.spec, draft_tokens=k))
    names = {f"{name}, {k}": (name, k) for name, k in drafts}
    trials: list[Trial] = []
    with (
        jax.set_mesh(policy.mesh),
        Progress("speculate", total=len(scalars), unit="temperatures") as progress,
    ):
        for temperature, draws in zip(common.numbers("temperature"), scalars, strict=True):
            timings = compare(
                policy.params,
                prompts,
                {name: drafts[key] for name, key in names.items()},
                draws,
                config=policy.model,
                spec=SamplerSpec(
                    _TOKENS.value, 1, (), policy.tokenizer.pad_id, SamplingMethod(greedy=temperature == 0)
                ),
            )
            trials += trials_of(timings, names, temperature)
            progress.advance(1)
    show(trials, get_console())
    parameters = {
        name: draft.spec.draft.num_params()
        for (name, _), draft in drafts.items()
        if isinstance(draft.spec.draft, ModelConfig)
    }
    run = {
        "stage": str(folder),
        "drafts": list(_DRAFT.value),
        "parameters": {PLAIN: policy.model.num_params(), **parameters},
        "load_average_before": load,
        "versions": collect_versions(),
    }
    for written in write(trials, output, run=run):
        get_console().print(f"wrote {written}")


if __name__ == "__main__":
    common.run(main)
