"""Speculative decoding measured: plain decoding and each way of proposing, in turn on the same prompts, row by row.

Example:
  python -m launch.speculate --stage=runs/speculative/stages/target-0123456789ab --output=runs/speculative/figures \
      --draft=runs/speculative/stages/draft-0123456789ab,ngram --draft_tokens=2,3,4 --temperature=0,1

Prompts are problems held out from the stage's own training, whose worked answers are long enough.
Writes to --output: speculative.md (the table) and speculative.json (every repetition).
Compare only numbers of one run.
"""

import os
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich import get_console
from rich.markdown import Markdown

from launch import common
from research.comparisons.speculative import PLAIN, compare, problem_prompts, records, table
from research.core.files import make_folder, write_json_atomic, write_text_atomic
from research.core.mesh import make_mesh
from research.core.progress import Progress
from research.core.versions import collect_versions
from research.sampling.drafts import Draft
from research.sampling.limits import DRAFT_TOKENS
from research.sampling.methods import SamplingMethod
from research.sampling.types import SamplerSpec, make_scalars
from research.train.stored import load_policy

_STAGE = flags.DEFINE_string("stage", None, "the target's folder: <workdir>/stages/<name>-<hash>", required=True)
_DRAFT = flags.DEFINE_list("draft", None, f"folders of smaller models' stages; {common.NGRAM}: n-grams", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "folder to write to", required=True)
_DRAFT_TOKENS = flags.DEFINE_list("draft_tokens", ["2", "3", "4"], "proposals a round, each tried")
_TEMPERATURE = flags.DEFINE_list("temperature", ["0", "1"], "each tried; 0 is greedy")
_REPETITIONS = flags.DEFINE_integer("repetitions", 16, "each on its own prompt", lower_bound=2, upper_bound=10_000)
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_length", 32, "tokens; longer problems are passed over", lower_bound=2)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "tokens of every completion", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the sampler", lower_bound=0, upper_bound=2**31 - 1)


def main() -> None:
    """Prints the table; the rest is in --output."""
    counts = common.integers("draft_tokens", high=DRAFT_TOKENS)
    scalars = {t: make_scalars(seed=_SEED.value, temperature=t) for t in common.numbers("temperature")}
    folder, output = Path(_STAGE.value).resolve(), make_folder(Path(_OUTPUT.value))
    policy = load_policy(folder, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    common.check_context(policy, _PROMPT_TOKENS.value, _TOKENS.value)
    prompts = problem_prompts(
        common.sources_of(policy, folder).held_out,
        policy.tokenizer,
        count=_REPETITIONS.value,
        length=_PROMPT_TOKENS.value,
        new_tokens=_TOKENS.value,
    )
    load = os.getloadavg()[0]
    drafts: dict[str, Draft] = {}
    parameters = {PLAIN: policy.model.num_params()}
    for number, path in enumerate(_DRAFT.value, 1):
        draft = common.load_draft(path, policy, counts[0])
        name = path if path == common.NGRAM else f"draft {number}"
        if draft.config is not None:
            parameters[name] = draft.config.num_params()
        for k in counts:
            drafts[f"{name}, {k}"] = draft.replace(tokens=k)
    trials: list[dict[str, Any]] = []
    with jax.set_mesh(policy.mesh), Progress("speculate", total=len(scalars), unit="temperatures") as progress:
        for temperature, draws in scalars.items():
            method = SamplingMethod(greedy=temperature == 0)
            spec = SamplerSpec(_TOKENS.value, 1, (), policy.tokenizer.pad_id, method)
            timings = compare(policy.params, prompts, drafts, draws, config=policy.model, spec=spec)
            trials += records(timings, temperature)
            progress.advance(1)
    run = {
        "stage": str(folder),
        "drafts": list(_DRAFT.value),
        "parameters": parameters,
        "load_average_before": load,
        "versions": collect_versions(),
    }
    write_json_atomic(output / "speculative.json", {"run": run, "trials": trials})
    write_text_atomic(output / "speculative.md", table(trials))
    get_console().print(Markdown(table(trials)))
    get_console().print(f"wrote {output / 'speculative.json'} and {output / 'speculative.md'}")


if __name__ == "__main__":
    common.run(main)
