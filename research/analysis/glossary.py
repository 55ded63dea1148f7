"""Every metric that is logged: its unit and what it means. `METRICS.md` is written from it:

python -m research.analysis.glossary > research/analysis/METRICS.md

`<x>` in a name stands for anything. A metric of training that is measured on held-out data is logged as `eval/NAME`.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

from research.analysis.markdown import escape, table

Entries = tuple[tuple[str, str, str], ...]

GROUPS: Mapping[str, Entries] = MappingProxyType(
    {
        "Every training step": (
            ("loss", "nats", "what is minimised, averaged as the objective says; a policy gradient's has no unit"),
            ("grad_norm", "1", "global L2 norm of the gradient, before clipping"),
            ("learning_rate", "1", "learning rate of this update"),
            ("skipped_updates", "count", "updates left out because the loss or the gradient was not finite"),
        ),
        "Training records (first row only)": (
            ("data/records", "count", "records that the stage may learn from"),
            ("data/dropped", "count", "of these, left out: too long, empty, or nothing to learn"),
            ("data/truncated", "count", "records cut to the longest row"),
            ("data/end_of_turn_lost", "count", "of these, cut inside a turn, whose end is then not learned"),
        ),
        "Next tokens (pretraining, SFT)": (
            ("nll", "nats a token", "negative log-likelihood of the target tokens; exp(nll) is the perplexity"),
            ("z_loss", "nats", "penalty on the squared log-normaliser of the logits, included in the loss"),
            ("entropy", "nats a token", "mean entropy of the policy's next-token distribution"),
            ("frac_empty_rows", "fraction", "rows without a target token"),
        ),
        "Samples (every online objective)": (
            ("reward/mean", "reward", "mean reward that is learned from, after shaping"),
            ("reward/std", "reward", "standard deviation of that reward over the batch"),
            ("reward/best_of_group", "reward", "mean over prompts of the best reward of the group"),
            ("reward/gold", "reward", "mean reward that is really wanted: the task's own check"),
            ("reward/steps", "reward", "rewards of the steps by the process reward model, summed a completion"),
            ("reward/verifier_errors", "count", "completions on which the reward function raised, paid 0"),
            ("reward/<name>", "reward", "mean of one part of the reward, as it enters the sum"),
            ("reward/<name>/unknown", "fraction", "completions for which this reward function could not tell"),
            ("reward/<name>/<statistic>", "reward", "mean, std or another statistic of one reward function alone"),
            ("frac_reward_zero_std", "fraction", "groups whose rewards are all equal: their advantages are 0"),
            ("completions/mean_length", "tokens", "mean completion, of the tokens that the policy drew"),
            ("completions/mean_length_right", "tokens", "mean length of correct completions"),
            ("completions/mean_length_wrong", "tokens", "mean length of wrong completions"),
            ("completions/truncated_fraction", "fraction", "completions cut at max_new_tokens"),
            ("sampler_entropy_estimate", "nats a token", "mean of -log p of the tokens that were drawn"),
            ("sampler_trainer_gap", "nats a token", "mean |log-prob of sampler - of trainer|, same tokens"),
            ("sampler/decode_steps", "count", "decode steps of the batch"),
            ("sampler/slot_utilization", "fraction", "slots of the decode batch that held an unfinished sequence"),
            ("sampler/prefilled_tokens", "tokens", "prompt tokens read into the cache"),
            ("sampler/target_forwards", "count", "forward passes of the policy in speculative decoding"),
            ("sampler/acceptance_rate", "fraction", "proposed draft tokens that were accepted"),
            ("sampler/tokens_per_forward", "tokens", "tokens a row gained from one forward pass of the policy"),
            ("dynamic_sampling/rounds", "count", "batches of prompts sampled to fill this one (DAPO)"),
            ("dynamic_sampling/groups_drawn", "count", "groups sampled in all"),
            ("dynamic_sampling/groups_useful", "count", "of these, groups with unequal rewards"),
            ("dynamic_sampling/groups_unfilled", "count", "places of the batch that a zero-variance group had to fill"),
            ("curriculum/tried_fraction", "fraction", "training prompts sampled at least once"),
            ("curriculum/in_band_fraction", "fraction", "of the tried prompts, those of the wanted difficulty"),
            ("curriculum/<fate>", "count", "prompts skipped, retried or forced by the difficulty filter, last batch"),
            ("selected", "count", "rejection sampling: completions that are trained on"),
            ("selected_fraction", "fraction", "rejection sampling: places of the batch that found a completion"),
            ("pairs_fraction", "fraction", "places of the batch that found a pair of unequal rewards"),
            ("desirable_fraction", "fraction", "KTO: completions that are correct, and so desirable"),
        ),
        "KL divergence": (
            ("kl/reference", "nats a completion", "KL to the reference: k1 summed over a completion"),
            ("kl_ref", "nats a token", "KL to the reference, k3 estimator (never negative), mean over tokens"),
            ("kl", "nats", "the KL estimate that the objective subtracts (KTO: of mismatched pairs)"),
            ("forward_kl", "nats a token", "KL(teacher || student)"),
            ("reverse_kl", "nats a token", "KL(student || teacher)"),
            ("divergence", "nats a token", "the divergence that distillation minimises"),
        ),
        "Policy gradients (PPO, GRPO and its family)": (
            ("log_ratio", "nats", "log of the new over the old probability of a token, mean"),
            ("ratio", "1", "new over old probability of a token, mean"),
            ("approx_kl", "nats a token", "KL of the old policy to the new one, k3 estimator"),
            ("clip_fraction", "fraction", "tokens whose gradient the clip removes"),
            ("clip_fraction_<side>", "fraction", "of these, below (low), above (high), by the dual clip (dual)"),
            ("cispo_clip_fraction", "fraction", "tokens whose importance weight CISPO caps"),
            ("sapo_gate", "1", "SAPO's gate on the ratio, mean"),
            ("importance_weight", "1", "correction for a sampler that differs from the trainer, mean"),
            ("loss/policy", "reward", "PPO: the policy's part of the loss"),
            ("loss/value", "reward squared", "PPO: the value function's part of the loss"),
            ("values", "reward", "PPO: predicted returns, mean over tokens"),
            ("returns", "reward", "PPO: targets of the value function, mean over tokens"),
            ("value_clip_fraction", "fraction", "PPO: tokens whose value error the clip replaces"),
            ("explained_variance", "1", "PPO: 1 - Var(return - value) / Var(return); 1 is perfect, <= 0 useless"),
        ),
        "Preferences and rewards": (
            ("rewards_<which>", "reward", "mean (implicit) reward of such completions"),
            ("reward_margin", "reward", "reward of the chosen minus that of the rejected one"),
            ("reward_accuracy", "fraction", "pairs whose chosen completion has the higher reward"),
            ("rewards", "reward", "mean implicit reward"),
            ("logps", "nats a completion", "log-probability of the completion, mean"),
            ("logps_<which>", "nats a completion", "log-probability of such completions, mean"),
            ("accuracy_<which>", "fraction", "KTO: desirable (undesirable) completions rewarded above (below) the KL"),
            ("nll_chosen", "nats a token", "negative log-likelihood of the chosen completions"),
            ("log_odds_ratio", "nats", "ORPO: log odds of chosen over rejected"),
            ("odds_ratio_loss", "nats", "ORPO: the contrast's part of the loss"),
            ("center", "reward squared", "reward model: penalty that keeps rewards around 0"),
            ("pairs", "count", "pairs compared: of the batch's own samples, or a prompt where candidates are ranked"),
            ("no_pair", "fraction", "rows or prompts that make no pair"),
            ("no_step", "fraction", "Step-DPO: pairs without a step to compare"),
            ("accuracy", "fraction", "process reward model: steps whose label is predicted"),
            ("step_prob", "probability", "process reward model: predicted probability that a step is right"),
            ("label", "fraction", "steps labelled right"),
        ),
        "Distillation": (
            ("student_entropy", "nats a token", "entropy of the student"),
            ("teacher_entropy", "nats a token", "entropy of the teacher"),
            ("top1_agreement", "fraction", "tokens at which student and teacher prefer the same one"),
            ("agreement", "fraction", "the same, logged in training"),
            ("<who>_topk_mass", "probability", "mass of the teacher's top-k tokens under student or teacher"),
        ),
        "Tools": (
            ("tools/turns", "count", "turns a row"),
            ("tools/calls", "count", "tool calls a row"),
            ("tools/forced_tokens", "tokens", "tokens a row that the environment wrote, not the policy"),
            ("tools/error_rate", "fraction", "calls that failed"),
            ("tools/errors/<kind>", "count", "calls that failed in this way"),
            ("tools/frac_<reason>", "fraction", "rows that ended for this reason"),
            ("tools/<name>/calls", "count", "calls of one tool a row"),
            ("tools/<name>/error_rate", "fraction", "of one tool's calls, those that failed"),
        ),
        "Evaluation on held-out problems": (
            ("eval/accuracy", "fraction", "problems whose final answer (sample, vote or reranked) is correct"),
            ("eval/pass@<k>", "fraction", "probability that at least one of k samples is correct (unbiased estimate)"),
            ("eval/maj@<k>", "fraction", "probability that the majority answer of k samples is correct"),
            ("eval/truncated_fraction", "fraction", "samples cut at max_new_tokens"),
            ("eval/mean_length", "tokens", "mean length of a sample"),
            ("eval/verifier_errors", "count", "samples of a problem on which the check raised"),
            ("eval/tool_calls", "count", "tool calls a sample"),
            ("eval/tool_errors", "count", "tool calls a sample that failed"),
        ),
        "Alarms (1 where raised)": (
            ("alarm/overfitting", "flag", "the validation loss rose at the last two evaluations"),
            ("alarm/reward_hacking", "flag", "the reward rises while the gold reward falls"),
            ("alarm/entropy_collapse", "flag", "the entropy is far below its start"),
            ("alarm/truncated", "flag", "many completions are cut"),
            ("alarm/zero_std", "flag", "most groups have equal rewards"),
            ("alarm/gap", "flag", "sampler and trainer disagree on log-probs"),
            ("alarm/kl", "flag", "the policy is far from its reference"),
            ("alarm/wrong_length", "flag", "wrong answers grow longer, relative to right ones"),
        ),
        "Performance (performance.jsonl; differs from run to run)": (
            ("seconds", "s", "wall-clock time of the stage so far, without evaluations"),
            ("tokens_per_second", "tokens/s", "tokens sampled and trained a second, since the last record"),
            ("compilations", "count", "programs compiled by this process since it entered the stage"),
        ),
    }
)  # fmt: skip


class Metric(NamedTuple):
    """An entry of the glossary."""

    name: str
    unit: str
    meaning: str


def describe(name: str) -> Metric | None:
    """The entry that explains a metric; an exact one before a pattern; None if there is none."""
    patterns = [entry for entry in _entries() if _pattern(entry.name).fullmatch(name)]
    for entry in sorted(patterns, key=lambda entry: entry.name.count("<")):
        return entry._replace(name=name)
    found = describe(name.removeprefix("eval/")) if name.startswith("eval/") else None
    return None if found is None else Metric(name, found.unit, f"on held-out data: {found.meaning}")


def glossary_table(names: Iterable[str]) -> str:
    """A Markdown table of these metrics, those without an entry as "not in the glossary"."""
    found = [describe(name) or Metric(name, "?", "not in the glossary: a component's own") for name in names]
    return table(
        ["metric", "unit", "meaning"], [[f"`{m.name}`", escape(m.unit), escape(m.meaning)] for m in found]
    )


def to_markdown() -> str:
    """The whole glossary."""
    parts = ["# Metrics", "What `metrics.jsonl`, `performance.jsonl`, TensorBoard and the reports call what they log. "
             "`<x>` stands for anything; any of these that is measured on held-out data is `eval/NAME`."]  # fmt: skip
    for title, entries in GROUPS.items():
        parts += [f"## {title}", glossary_table(name for name, _, _ in entries)]
    return "\n\n".join(parts) + "\n"


@cache
def _entries() -> tuple[Metric, ...]:
    return tuple(Metric(*entry) for entries in GROUPS.values() for entry in entries)


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"<\w+>", "[^/]+", re.escape(name)))


if __name__ == "__main__":
    print(to_markdown(), end="")
