"""Dynamic sampling: which groups are replaced, up to which budget, and that rows stay whole."""

import numpy as np
import pytest

from research.rewards.base import RewardError
from research.rollouts.collect import replace_equal_groups
from research.rollouts.samples import Collected
from tests.objectives.cases import SEEDS
from tests.research.algorithms.toy import rollouts

G = 4


def drawn(rewards: np.ndarray, first_prompt: int = 0) -> Collected:
    """A batch of groups with these rewards; every array names its row."""
    B = rewards.size
    made = rollouts(rewards.reshape(-1), 1 + np.arange(B) % 8, group_size=rewards.shape[1])
    made = made._replace(
        prompt_ids=first_prompt + made.prompt_ids,
        step_rewards=np.full((B, 8), first_prompt, np.float32) + np.arange(B, dtype=np.float32)[:, None],
        advantage_scale=np.arange(B, dtype=np.float32) + 100 * first_prompt,
        given=np.arange(8) == (first_prompt + np.arange(B)[:, None]) % 8,
    )
    texts = [f"{first_prompt}:{row}" for row in range(B)]
    prompts = [f"{first_prompt + row // G}?" for row in range(B)]
    errors = (RewardError(first_prompt, "mine", "no"),)
    return Collected(made, -made.rewards, texts, prompts, {"reward/score": float(rewards.mean())}, (), errors)


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_of_equal_rewards_are_replaced_up_to_the_budget(seed: int) -> None:
    """A loop over groups in the order drawn: the first P that teach something, then the first that do not."""
    rng = np.random.default_rng(seed)
    P, rounds = int(rng.integers(1, 5)), int(rng.integers(0, 4))
    chance = rng.choice([0.0, 0.3, 0.7, 1.0])
    tables = [
        np.where(rng.random((P, 1)) < chance, np.arange(G) % 2, rng.integers(0, 2, (P, 1))).astype(np.float32)
        for _ in range(rounds + 1)
    ]
    asked: list[int] = []

    def draw(number: int) -> Collected:
        asked.append(number)
        return drawn(tables[number], 10 * number)

    found = replace_equal_groups(draw, prompts=P, rounds=rounds)
    useful, useless, used = [], [], 0
    for used, table in enumerate(tables, 1):
        for p in range(P):
            name = (10 * (used - 1) + p, table[p])
            (useful if len(set(table[p])) > 1 else useless).append(name)
        if len(useful) >= P:
            break
    if rounds == 0:
        expected, used = [(p, tables[0][p]) for p in range(P)], 1
    else:
        expected = (useful + useless)[:P]
        cost = {key.split("/")[1]: value for key, value in found.metrics.items() if "dynamic" in key}
        assert cost == {
            "rounds": used,
            "groups_drawn": used * P,
            "groups_useful": len(useful),
            "groups_unfilled": max(0, P - len(useful)),
        }
    assert asked == list(range(used))  # never the same draws twice
    assert found.rollouts.prompt_ids[::G].tolist() == [name for name, _ in expected]
    np.testing.assert_array_equal(found.rollouts.rewards, np.concatenate([r for _, r in expected]))
    assert found.metrics["reward/score"] == pytest.approx(np.mean([t.mean() for t in tables[:used]]))
    assert [error.prompt_id for error in found.errors] == [10 * i for i in range(used)]


def test_all_arrays_of_a_row_move_with_its_group() -> None:
    equal, mixed = np.ones(G), np.arange(G) % 2
    draws = [drawn(np.stack([equal, mixed, equal])), drawn(np.stack([mixed, equal, mixed]), 10)]
    found = replace_equal_groups(lambda number: draws[number], prompts=3, rounds=1)
    sources = [(draws[0], 1), (draws[1], 0), (draws[1], 2)]
    rows = [(source, group * G + i) for source, group in sources for i in range(G)]
    for name, values in found.rollouts._asdict().items():
        if name in ("group_size", "step_mask"):
            continue
        expected = np.stack([getattr(source.rollouts, name)[row] for source, row in rows])
        np.testing.assert_array_equal(values, expected, err_msg=name)
    assert found.texts == [source.texts[row] for source, row in rows]
    assert found.prompts == [source.prompts[row] for source, row in rows]
    assert found.gold.tolist() == [source.gold[row] for source, row in rows]
    assert found.rollouts.group_size == G and found.rollouts.step_mask is None
