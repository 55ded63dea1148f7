"""Dynamic sampling: groups whose rewards are all equal have no advantages and are replaced by groups of new prompts."""

from collections.abc import Callable

import numpy as np

from research.rollouts.samples import Collected, join_groups, split_groups


def replace_equal_groups(draw: Callable[[int], Collected], *, prompts: int, rounds: int) -> Collected:
    """Groups of P prompts, those of different rewards first, from up to `rounds` further batches.

    Source: dynamic sampling, DAPO, Yu et al. 2025, Section 3.2.

    Args:
      draw: samples a batch; called with 0, 1, ... until P groups have different rewards or `rounds` are used.
      prompts: P.
      rounds: batches after the first; 0 keeps the first as it is.
    """
    drawn = [draw(0)]
    if rounds == 0:
        return drawn[0]
    groups = split_groups(drawn[0])
    while _different(groups) < prompts and len(drawn) <= rounds:
        drawn.append(draw(len(drawn)))
        groups += split_groups(drawn[-1])
    useful = _different(groups)
    kept = sorted(groups, key=_equal)[:prompts]  # stable: in the order drawn
    metrics = {key: float(np.mean([each.metrics[key] for each in drawn])) for key in drawn[0].metrics}
    cost = {
        "dynamic_sampling/rounds": float(len(drawn)),
        "dynamic_sampling/groups_drawn": float(len(groups)),
        "dynamic_sampling/groups_useful": float(useful),
        "dynamic_sampling/groups_unfilled": float(max(0, prompts - useful)),
    }
    return join_groups(kept, metrics | cost)._replace(
        turns=tuple(state for each in drawn for state in each.turns),
        errors=tuple(error for each in drawn for error in each.errors),
    )


def _equal(group: Collected) -> bool:
    return bool(np.ptp(group.rollouts.rewards) == 0)


def _different(groups: list[Collected]) -> int:
    return sum(not _equal(group) for group in groups)
