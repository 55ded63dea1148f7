"""Exact match on problems: pass@k (unbiased), majority@k, with error bars over problems.

Example:
  python -m launch.evaluate --stage=runs/quickstart/stages/rl-0123456789ab --samples=8 --k=1,4,8
  python -m launch.evaluate --stage=... --problems=gsm8k_test.jsonl --temperature=0 --samples=1 --k=1

Without `--problems`, the problems held out from that stage's own training are used.
"""

from pathlib import Path

import jax
from absl import flags
from rich import print as show

from launch import common
from research.config.bridge import old_verifier
from research.config.sections import Sampler
from research.core.errors import ConfigError
from research.core.files import write_json_atomic
from research.environments.tool_use import tools_of
from research.evals.problems import sampler_spec, score_problems
from research.sampling.limits import SAMPLES
from research.sampling.methods import SamplingMethod
from research.sampling.types import make_scalars
from research.tasks.sources import View
from research.train.chain import load_policy

_STAGE = flags.DEFINE_string(
    "stage", None, "folder of a stage: <workdir>/stages/<name>-<hash>", required=True
)
_PROBLEMS = flags.DEFINE_string("problems", None, "JSONL of problems (prompt/completion, messages, GSM8K)")
_LIMIT = flags.DEFINE_integer(
    "limit", 256, "evaluate only the first so many problems; 0 is all", lower_bound=0
)
_SAMPLES = flags.DEFINE_integer("samples", 4, "completions a problem", lower_bound=1, upper_bound=SAMPLES)
_K = flags.DEFINE_list("k", ["1", "4"], "the k of pass@k and maj@k, each at most --samples")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy")
_PROMPT_TOKENS = flags.DEFINE_integer("max_prompt_length", 256, "longest prompt, tokens", lower_bound=1)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "longest completion, tokens", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_problems", 32, "problems sampled at a time", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the sampler", lower_bound=0, upper_bound=2**31 - 1)
_OUTPUT = flags.DEFINE_string("output", None, "write every completion and all metrics to this JSON file")


def main() -> None:
    """Prints each metric with its standard error and 95% interval."""
    ks = common.integers("k", high=_SAMPLES.value, because=f"--samples={_SAMPLES.value}")
    scalars = make_scalars(seed=_SEED.value, temperature=_TEMPERATURE.value)
    greedy = _TEMPERATURE.value == 0
    if greedy and _SAMPLES.value > 1:
        raise ConfigError(
            f"--samples: got {_SAMPLES.value}, expected 1 at --temperature=0: greedy samples are equal"
        )
    folder = Path(_STAGE.value).resolve()
    policy = load_policy(folder)
    limit = policy.max_length
    if _PROMPT_TOKENS.value + _TOKENS.value > limit:
        raise ConfigError(
            f"--max_new_tokens: got {_TOKENS.value} after prompts of up to {_PROMPT_TOKENS.value} tokens, "
            f"expected a sum of at most {limit}, the model's context"
        )
    tools = tools_of(policy.experiment, policy.tokenizer)
    spec = sampler_spec(
        policy.tokenizer,
        Sampler(**policy.experiment["sampler"]),
        samples=_SAMPLES.value,
        max_new_tokens=_TOKENS.value,
        method=SamplingMethod(greedy=greedy),
        tools=tools,
    )
    with jax.set_mesh(policy.mesh):
        found = score_problems(
            policy.params,
            View(common.held_out_problems(_PROBLEMS.value, policy, folder), _LIMIT.value),
            spec,
            scalars,
            model=policy.model,
            mesh=policy.mesh,
            tokenizer=policy.tokenizer,
            batch_problems=_BATCH.value,
            max_prompt_length=_PROMPT_TOKENS.value,
            verifier=old_verifier(policy.experiment["evaluation"]["correct"]),
            ks=ks,
            tools=tools,
        )
    show(f"{len(found.problems)} problems, {_SAMPLES.value} samples each, temperature {_TEMPERATURE.value:g}")
    for name, estimate in found.estimates.items():
        show(
            f"  {name}: {estimate.mean:.4f} (95% interval over problems {estimate.low:.4f} to {estimate.high:.4f})"
        )
    if _OUTPUT.value:
        problems = [
            {
                "prompt": problem.name,
                "answer": problem.answer,
                "completions": [completion.text for completion in problem.completions],
                "correct": list(problem.correct),
            }
            for problem in found.problems
        ]
        write_json_atomic(_OUTPUT.value, {"metrics": found.metrics, "problems": problems})


if __name__ == "__main__":
    common.run(main)
