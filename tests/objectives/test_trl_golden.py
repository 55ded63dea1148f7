"""Ours against the numbers that TRL's own trainers computed: loss and gradient, in float32 to 1e-5.

The numbers are stored; `python -m tests.objectives.golden.regenerate` writes them anew where TRL is installed.
"""

import jax
import numpy as np
import pytest

from tests.objectives import readme
from tests.objectives.golden import ours, ours_online, ours_pairs
from tests.objectives.golden.inputs import EOS, GROUP
from tests.objectives.golden.store import LIMIT, PATH, load

ENTRIES = ours.entries()
BOUNDS = readme.printed_bounds()
WITH_LOSS = [name for name, entry in ENTRIES.items() if entry.variable is not None]


@pytest.mark.parametrize("variant", ENTRIES)
def test_ours_is_trls(variant):
    found = ours.agreement(variant)
    assert found.cases >= 50
    assert found.worst <= 1.0, f"{variant}: {found} ({ENTRIES[variant].difference or 'no stated difference'})"
    for measured, printed in zip((found.loss, found.gradient), BOUNDS[variant], strict=True):
        assert not printed or measured < float(printed.removeprefix("< ")), f"{variant}: {readme.UPDATE}"


def test_every_stored_number_is_compared_and_every_entry_has_one():
    arrays, _ = load()
    families = {entry.family for entry in ENTRIES.values()}
    outputs = {name for name in arrays if name.split("/")[0] not in families}
    expected = {f"{name}/{entry.output}" for name, entry in ENTRIES.items()}
    assert outputs == expected | {f"{name}/gradient" for name in WITH_LOSS}


def test_header_says_what_computed_the_numbers():
    _, header = load()
    assert header["trl"] == "1.16.0"
    assert set(header) == {"trl", "torch", "transformers", "numpy", "date", "command"}
    assert PATH.stat().st_size < LIMIT


def test_gradients_are_not_all_zero():
    for variant in WITH_LOSS:
        gradients = ours.stored()[f"{variant}/gradient"]
        zero = ~gradients.reshape(len(gradients), -1).any(axis=1)
        assert zero.mean() < 0.5, f"{variant}: {zero.sum()} of {len(zero)} cases have no gradient"


def test_inputs_hold_the_cases_they_promise():
    pairs, rollouts = ours.family("pairs"), ours.family("rollouts")
    counts = pairs["mask"].sum(axis=-1)
    cut = pairs["prompt"] + pairs["completion"] > pairs["mask"].shape[-1] + 1
    ends = np.take_along_axis(
        pairs["tokens"], (pairs["prompt"] + pairs["completion"] - 1)[..., None].astype(int), axis=-1
    )[..., 0]
    assert (counts == 1).any() and (counts < counts.max()).any() and cut.any() and counts.min() >= 1
    assert (ends == EOS).any() and (ends != EOS).any()  # with an end token, which is also padding, and without
    assert (pairs["policy"] == pairs["ref"]).all(axis=(1, 2, 3)).any()
    groups = rollouts["rewards"].reshape(len(rollouts["rewards"]), -1, GROUP)
    equal = (groups == groups[..., :1]).all(axis=-1)
    assert equal.all(axis=-1).any() and (equal.any(axis=-1) & ~equal.all(axis=-1)).any()
    assert (~rollouts["stopped"]).any() and (rollouts["mask"].sum(axis=-1) == 1).any()
    desirable = ours.family("unpaired")["desirable"]
    assert desirable.all(axis=-1).any() and (~desirable).all(axis=-1).any()


def test_equal_rewards_give_exactly_zero_where_trl_leaves_a_rounding_error():
    inputs = ours.family("rollouts")
    is_compared = np.asarray(jax.vmap(ours_online.has_spread)(inputs))
    got = np.asarray(jax.vmap(ours_online.advantages)(inputs))
    expected = ours.stored()["advantages/group/value"]
    assert not got[~is_compared].any()
    assert 0 < np.abs(expected[~is_compared]).max() < 1e-3


@pytest.mark.parametrize(
    ("variant", "loss"),
    [
        ("dpo/rpo", ours_pairs.plain_rpo),
        ("orpo/orpo", ours_pairs.plain_orpo),
        ("grpo/truncated_masked", ours_online.plain_truncated_masked),
        ("grpo/kl_times_sequence_ratio", ours_online.plain_kl_times_sequence_ratio),
    ],
)
def test_a_stated_difference_is_one(variant, loss):
    assert ENTRIES[variant].difference
    losses = jax.jit(jax.vmap(loss))(ours.family(ENTRIES[variant].family))
    assert np.abs(losses - ours.stored()[f"{variant}/loss"]).max() > 1e-3
