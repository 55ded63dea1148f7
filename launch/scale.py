"""Test-time compute: accuracy against samples and tokens, by vote, by a scorer's choice, and at best (pass@N).

Examples:
  python -m launch.scale --stage=runs/ttc/stages/sft-0123456789ab --samples=64 --output=runs/ttc/scaling \
      --scorers=runs/ttc/stages/reward-0123456789ab,runs/ttc/stages/prm-0123456789ab
  python -m launch.scale --stage=... --problems=gsm8k_test.jsonl --samples=16 --n=1,4,16 --output=...

Draws --samples completions of each problem once; every curve follows from them. Writes to --output: scaling.png,
scaling.md, scaling.json (curves with their intervals) and samples.json (every completion with its scores). Without
`--problems`, the problems held out from that stage's own training are used.
"""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import jax
import numpy as np
from absl import flags
from rich import print as show
from rich.markdown import Markdown

from launch import common, policies
from launch.common import refuse
from objectives.prm import StepReduction
from research.config.schema import expect
from research.core.files import check_writable, make_folder, write_json_atomic, write_text_atomic
from research.core.metrics import encode_numbers
from research.evals.accuracy import judge
from research.evals.results import completions
from research.evals.scaling import powers_of_two, scaling_curves
from research.evals.scaling_plot import write_scaling_plot
from research.evals.scaling_report import to_json, to_markdown
from research.sampling.limits import check_temperature
from research.train.stored import load_stage

policies.define_flags(samples=16)
_OUTPUT = flags.DEFINE_string("output", None, "folder to write to", required=True)
_SCORERS = flags.DEFINE_list("scorers", [], "folders of stages of reward models, outcome and process scorers")
_REDUCTIONS = flags.DEFINE_list("prm_score", ["min"], f"of steps: some of {', '.join(get_args(StepReduction))}")
_N = flags.DEFINE_list("n", [], "samples to answer from, each at most --samples; without it, powers of two")


def main() -> None:
    """Prints the tables; the rest is in --output."""
    given = flags.FLAGS
    ns, reductions = _check_flags()
    folder = policies.stage_folder()
    policy = policies.load((1,))
    with jax.set_mesh(policy.mesh):
        length = given.max_prompt_length + given.max_new_tokens
        stages = [load_stage(Path(path).resolve()) for path in _SCORERS.value]
        scorers = [s.scorer(policy.tokenizer, policy.mesh, length=length, reductions=reductions) for s in stages]
        names = [scorer.name for scorer in scorers]
        scorers = [  # those of one name are told apart by their folders
            replace(scorer, name=stage.folder.name) if names.count(scorer.name) > 1 else scorer
            for scorer, stage in zip(scorers, stages, strict=True)
        ]
        output = make_folder(_OUTPUT.value)
        check_writable(output / "samples.json")  # samples are what costs
        groups = policy.generate(policy.records, seed=given.seed)
        judged = judge(policy, policy.records, groups)
        scores = {name: found for s in scorers for name, found in zip(s.scores, policy.scored(s, groups), strict=True)}
        problems = completions(policy, len(groups), given.samples)
    weights = {name: scorer.weights(scores[name]) for scorer in scorers for name in scorer.scores}
    lengths = np.array([[sample.length for sample in group] for group in groups])
    prompt_lengths = np.array([len(group[0].prompt) for group in groups])
    for i, problem in enumerate(problems):
        problem |= {"prompt_length": prompt_lengths[i], "lengths": lengths[i], "answers": judged.votes[i]}
        problem |= {"scores": {name: table[i] for name, table in scores.items()}}
    write_json_atomic(output / "samples.json", encode_numbers(problems))
    scaling = scaling_curves(
        correct=judged.right,
        answers=judged.votes,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        scores=scores,
        weights=weights,
        ns=ns,
        seed=given.seed,
    )
    context = float(prompt_lengths.mean() + lengths.mean() / 2)
    run = {
        "stage": str(folder),
        "temperature": given.temperature,
        "max_new_tokens": given.max_new_tokens,
        "truncated_fraction": np.mean([[not sample.stopped for sample in group] for group in groups]),
        "unknown_fraction": judged.unknown.mean(),
        "forward_flops_per_token": {
            "policy": policy.model.flops_per_token(context),
            **{s.name: s.network.config.flops_per_token(context) for s in scorers},
        },
    }
    title = f"Test-time compute of {folder.name.rpartition('-')[0]}, temperature {given.temperature:g}"
    text = to_markdown(scaling, title=title)
    write_json_atomic(output / "scaling.json", encode_numbers({"run": run, **to_json(scaling)}))
    write_scaling_plot(scaling, output / "scaling.png", title=title)
    write_text_atomic(output / "scaling.md", text)
    show(Markdown(text))
    show(f"picture: {output / 'scaling.png'}")


def _check_flags() -> tuple[tuple[int, ...], tuple[StepReduction, ...]]:
    """The Ns and the reductions; what does not fit together ends before anything is loaded."""
    samples, listed = flags.FLAGS.samples, get_args(StepReduction)
    expect(samples >= 2, "--samples", samples, "at least 2 to choose from")
    ns = common.integers("n", high=samples, because=f"--samples={samples}") if _N.value else powers_of_two(samples)
    refuse(flags.FLAGS.temperature == 0, "--temperature: got 0, expected > 0: greedy samples are equal")
    check_temperature(flags.FLAGS.temperature)
    for name in _REDUCTIONS.value:
        refuse(name not in listed, f"--prm_score: got {name}, expected some of {','.join(listed)}")
    return ns, tuple(how for how in listed if how in _REDUCTIONS.value)


if __name__ == "__main__":
    common.run(main)
