"""Test-time compute: accuracy against samples and tokens, by vote, by a scorer's choice, and at best (pass@N).

Example:
  python -m launch.scale --stage=runs/ttc/stages/sft-0123456789ab --samples=64 --output=runs/ttc/scaling \
      --scorers=runs/ttc/stages/reward-0123456789ab,runs/ttc/stages/prm-0123456789ab
  python -m launch.scale --stage=... --problems=gsm8k_test.jsonl --samples=16 --n=1,4,16 --output=...

Draws --samples completions of each problem once; every curve follows from them. Writes to --output: scaling.png,
scaling.md, scaling.json (curves with their intervals) and samples.json (every completion with its scores). Without
`--problems`, the problems held out from that stage's own training are used.
"""

from pathlib import Path
from typing import get_args

import jax
from absl import flags
from rich import print as show
from rich.markdown import Markdown

from launch import common
from objectives.prm import StepReduction
from research.core.errors import ConfigError
from research.core.files import make_folder, write_json_atomic, write_text_atomic
from research.core.mesh import check_rows
from research.core.metrics import encode_numbers
from research.evals.scaling import BEST, STRATEGIES, WEIGHTED, powers_of_two, scaling_curves
from research.evals.scaling_plot import write_scaling_plot
from research.evals.scaling_report import to_json, to_markdown
from research.evals.scored_samples import sample_and_score
from research.evals.scorers import make_scorers
from research.sampling.limits import SAMPLES, check_temperature
from research.tasks.sources import View
from research.train.chain import load_policy, load_stage

_STAGE = flags.DEFINE_string(
    "stage", None, "folder of the policy's stage: <workdir>/stages/<name>-<hash>", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "folder to write to", required=True)
_SCORERS = flags.DEFINE_list("scorers", [], "folders of stages of reward models, outcome and process scorers")
_REDUCTIONS = flags.DEFINE_list(
    "prm_score",
    ["min"],
    f"a process scorer's score from its steps': some of {', '.join(get_args(StepReduction))}",
)
_STRATEGIES = flags.DEFINE_list(
    "strategies", [], f"of {', '.join(STRATEGIES)}; without it, all that the scorers allow"
)
_SAMPLES = flags.DEFINE_integer("samples", 16, "completions a problem", lower_bound=2, upper_bound=SAMPLES)
_N = flags.DEFINE_list("n", [], "samples to answer from, each at most --samples; without it, powers of two")
_TRIALS = flags.DEFINE_integer(
    "trials", 400, "draws of N samples a problem, for votes and bands", lower_bound=2, upper_bound=10**6
)
_PROBLEMS = flags.DEFINE_string("problems", None, "JSONL of problems (prompt/completion, messages, GSM8K)")
_LIMIT = flags.DEFINE_integer("limit", 256, "only the first so many problems; 0 is all", lower_bound=0)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "of the samples, > 0")
_PROMPT_TOKENS = flags.DEFINE_integer("max_prompt_length", 256, "longest prompt, tokens", lower_bound=1)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "longest completion, tokens", lower_bound=1)
_BATCH = flags.DEFINE_integer(
    "batch_problems", 32, "problems sampled, and completions scored, at a time", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "of the sampler and the draws", lower_bound=0, upper_bound=2**31 - 1)


def main() -> None:
    """Prints the tables; the rest is in --output."""
    ns, reductions = _check_flags()
    folder, output = Path(_STAGE.value).resolve(), Path(_OUTPUT.value)
    policy = load_policy(folder)
    check_rows(policy.mesh, "--batch_problems", _BATCH.value)
    length = _PROMPT_TOKENS.value + _TOKENS.value
    limit = policy.max_length
    if length > limit:
        raise ConfigError(
            f"--max_new_tokens: got {_TOKENS.value} after prompts of up to {_PROMPT_TOKENS.value} tokens, "
            f"expected a sum of at most {limit}, the model's context"
        )
    with jax.set_mesh(policy.mesh):
        scorers = make_scorers(
            [load_stage(Path(path).resolve()) for path in _SCORERS.value],
            tokenizer=policy.tokenizer,
            mesh=policy.mesh,
            length=length,
            reductions=reductions,
        )
        make_folder(output)
        drawn = sample_and_score(
            policy,
            View(common.held_out_problems(_PROBLEMS.value, policy, folder), _LIMIT.value),
            scorers,
            samples=_SAMPLES.value,
            max_prompt_length=_PROMPT_TOKENS.value,
            max_new_tokens=_TOKENS.value,
            temperature=_TEMPERATURE.value,
            batch_problems=_BATCH.value,
            seed=_SEED.value,
        )
    # Before anything can refuse them: samples are what costs.
    write_json_atomic(output / "samples.json", encode_numbers(drawn.records()))
    scaling = scaling_curves(
        correct=[problem.correct for problem in drawn.found.problems],
        answers=[problem.extracted for problem in drawn.found.problems],
        lengths=drawn.lengths,
        prompt_lengths=drawn.prompt_lengths,
        scores=drawn.scores,
        weights=drawn.weights,
        ns=ns,
        strategies=_STRATEGIES.value,
        trials=_TRIALS.value,
        seed=_SEED.value,
    )
    context = float(drawn.prompt_lengths.mean() + drawn.lengths.mean() / 2)
    run = {
        "stage": str(folder),
        "temperature": _TEMPERATURE.value,
        "max_new_tokens": _TOKENS.value,
        "truncated_fraction": drawn.found.metrics["eval/truncated_fraction"],
        "forward_flops_per_token": {
            "policy": policy.model.flops_per_token(context),
            **{scorer.name: scorer.network.config.flops_per_token(context) for scorer in scorers},
        },
    }
    title = f"Test-time compute of {folder.name.rpartition('-')[0]}, temperature {_TEMPERATURE.value:g}"
    text = to_markdown(scaling, title=title)
    write_json_atomic(output / "scaling.json", {"run": run, **to_json(scaling)})
    write_scaling_plot(scaling, output / "scaling.png", title=title)
    write_text_atomic(output / "scaling.md", text)
    show(Markdown(text))
    show(f"picture: {output / 'scaling.png'}")


def _check_flags() -> tuple[tuple[int, ...], tuple[StepReduction, ...]]:
    """The Ns and the reductions; what does not fit together ends before anything is loaded."""
    ns = powers_of_two(_SAMPLES.value)
    if _N.value:
        ns = common.integers("n", high=_SAMPLES.value, because=f"--samples={_SAMPLES.value}")
    if _TEMPERATURE.value == 0:
        raise ConfigError("--temperature: got 0, expected > 0: greedy samples are equal")
    check_temperature(_TEMPERATURE.value)
    for name in _STRATEGIES.value:
        if name not in STRATEGIES:
            raise ConfigError(f"--strategies: got {name}, expected some of {','.join(STRATEGIES)}")
        if name in (BEST, WEIGHTED) and not _SCORERS.value:
            raise ConfigError(
                f"--strategies: {name} needs a scorer, expected --scorers=<folder of a stage>[,...]"
            )
    for name in _REDUCTIONS.value:
        if name not in get_args(StepReduction):
            raise ConfigError(
                f"--prm_score: got {name}, expected some of {','.join(get_args(StepReduction))}"
            )
    return ns, tuple(how for how in get_args(StepReduction) if how in _REDUCTIONS.value)


if __name__ == "__main__":
    common.run(main)
