"""Names of evaluators, until each is a component of its own."""

from research.evals.exact_match import score_completions

PROVIDES = {"evaluator": {"accuracy": score_completions}}
