"""Names of reward functions, until each is a component of its own."""

from research.rewards.verifiers import exact_answer, final_line

PROVIDES = {"reward": {"correct": exact_answer, "final_line": final_line}}
