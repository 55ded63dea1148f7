"""Measures a policy on held-out problems: pass@k (unbiased), majority@k, with error bars over problems.

Examples:
  python -m launch.evaluate --stage=runs/quickstart/stages/rl-0123456789ab --samples=8 --k=1,4,8
  python -m launch.evaluate --stage=... --problems=gsm8k_test.jsonl --temperature=0 --samples=1 --k=1
  python -m launch.evaluate --stage=... --evaluators=accuracy,validation_loss,my_evaluator.py:Politeness

Without `--problems`, the problems held out from that stage's own training are used.
"""

import jax
from absl import flags
from rich import print as show

from launch import common, policies
from research.config.references import find
from research.config.schema import expect
from research.core.files import check_writable, write_json_atomic
from research.core.metrics import encode_numbers
from research.evals.base import Need
from research.evals.passk import mean_with_error
from research.evals.results import checkable, completions, evaluate, fitting
from research.sampling.limits import check_temperature

policies.define_flags(samples=4)
_K = flags.DEFINE_list("k", ["1", "4"], "the k of pass@k and maj@k, each at most --samples")
_EVALUATORS = flags.DEFINE_list("evaluators", ["accuracy"], "names or references, each with its default options")
_OUTPUT = flags.DEFINE_string("output", None, "write all metrics and completions to this JSON file")


def main() -> None:
    """Prints each metric with its standard error and 95% interval."""
    given = flags.FLAGS
    ks = common.integers("k", high=given.samples, because=f"--samples={given.samples}")
    check_temperature(given.temperature)
    several = given.temperature == 0 and given.samples > 1
    expect(not several, "--samples", given.samples, "1 at --temperature=0: greedy samples are equal")
    evaluators = {}
    for reference in _EVALUATORS.value:
        component = find("evaluator", reference, "--evaluators")
        defaults = {name: option.default for name, option in component.options.items()}
        evaluators[component.name] = component.make(defaults)
    policy = policies.load(ks)
    if _OUTPUT.value is not None:
        check_writable(_OUTPUT.value)
    missing: dict[Need, str] = {"pairs": "a launcher has no pairs of preferences"}
    if not checkable(policy.task, policy.records):
        missing["answers"] = "the problems have no answers that could be checked"
    runs, said = fitting(evaluators, missing)
    for sentence in said:
        show(sentence)
    with jax.set_mesh(policy.mesh):
        results = evaluate(policy, runs, given.seed)
        problems = completions(policy, len(policy.records), given.samples)
    show(f"{len(policy.records)} problems, {given.samples} samples each, temperature {given.temperature:g}")
    for name, values in results.values.items():
        mean = mean_with_error(values)
        show(f"  {name}: {mean.mean:.4f} (95% interval over examples {mean.low:.4f} to {mean.high:.4f})")
    if _OUTPUT.value is not None:
        record = {"metrics": results.metrics, "values": results.values, "problems": problems}
        write_json_atomic(_OUTPUT.value, encode_numbers(record))


if __name__ == "__main__":
    common.run(main)
