"""The difficulty filter against a loop, and batches of what it keeps: full, distinct, deterministic, resumable."""

import json

import numpy as np
import pytest

from research.core.errors import CheckpointError, DataError
from research.data.pipelines import Pipeline
from research.data.streams import prompt_groups
from research.rollouts.curriculum import Curriculum, CurriculumSampler
from tests.objectives.cases import SEEDS

N, P = 23, 4


class Source:
    """Endless batches in a fresh order each epoch, without its remainder, as the pipeline's."""

    def __init__(self, size=N, batch=P):
        self.size, self.batch, self.state = size, batch, {"position": 0}

    def __next__(self):
        epoch, place = divmod(self.state["position"], self.size // self.batch)
        order = np.random.default_rng(epoch).permutation(self.size)
        ids = order[place * self.batch : (place + 1) * self.batch]
        self.state["position"] += 1
        return {"prompt_id": ids.astype(np.int32), "prompt_tokens": np.stack([ids, ids + 1], axis=1)}

    def get_state(self):
        return self.state  # not a copy

    def set_state(self, state):
        self.state["position"] = state["position"]


class Rows(Source):
    """Always prompts 0 to 3, in order."""

    def __next__(self):
        return {"prompt_id": np.arange(4)}


def made(seed=0, *, band=(0.2, 0.8), retry=0.1, batch_size=P, max_skipped=40, size=N):
    curriculum = Curriculum(size, band=band, retry=retry)
    return CurriculumSampler(Source(size), curriculum, batch_size=batch_size, max_skipped=max_skipped, seed=seed)


def step(sampler, difficulty):
    """One iteration: a batch, four completions of each prompt, an update. The ids that were drawn."""
    ids = next(sampler)["prompt_id"]
    rng = np.random.default_rng(int(ids.sum()))
    sampler.curriculum.update(np.repeat(ids, 4), rng.random(4 * len(ids)) < np.repeat(difficulty[ids], 4))
    return ids.tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_pass_rates_decay_at_each_visit(seed):
    rng = np.random.default_rng(seed)
    size, decay = int(rng.integers(1, 6)), float(rng.choice([0.0, 0.3, 1.0]))
    low, high = sorted(rng.choice([0.0, 0.25, 0.5, 0.75, 1.0], 2))
    curriculum = Curriculum(size, band=(low, high), decay=decay, retry=0.0)
    visits = {i: [] for i in range(size)}
    for _ in range(rng.integers(0, 6)):
        ids = rng.integers(size, size=rng.integers(0, 9))
        correct = rng.random(len(ids)) < 0.5
        curriculum.update(ids, correct)
        for i in set(ids.tolist()):
            visits[i].append((int((ids == i).sum()), int(correct[ids == i].sum())))
    rates, kept = curriculum.pass_rates(), curriculum.in_band()
    for i, history in visits.items():
        if not history:
            assert np.isnan(rates[i]) and kept[i]
            continue
        weights = [decay ** (len(history) - 1 - age) for age in range(len(history))]
        seen = sum(w * n for w, (n, _) in zip(weights, history, strict=True))
        solved = sum(w * k for w, (_, k) in zip(weights, history, strict=True))
        assert rates[i] == pytest.approx(solved / seen)
        assert kept[i] == (low <= rates[i] <= high)


def test_the_band_includes_its_bounds():
    curriculum = Curriculum(3, band=(0.25, 0.5), retry=0.0)
    curriculum.update(np.repeat([0, 1, 2], 4), np.array([1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0], bool))
    assert curriculum.in_band().tolist() == [True, True, False]


def test_a_prompt_that_the_model_learns_leaves_the_band_and_one_it_forgets_returns():
    curriculum = Curriculum(1, band=(0.2, 0.8), decay=0.5, retry=0.0)
    inside = []
    for right in (4, 4, 4, 0, 0, 0, 0):
        curriculum.update(np.zeros(4, int), np.arange(4) < right)
        inside.append(bool(curriculum.in_band()[0]))
    assert inside == [False, False, False, True, True, False, False]


@pytest.mark.parametrize("seed", SEEDS)
def test_state_survives_json_and_is_compact(seed):
    rng = np.random.default_rng(seed)
    curriculum = Curriculum(50, band=(0.2, 0.8), decay=0.7)
    for _ in range(3):
        curriculum.update(rng.integers(50, size=30), rng.random(30) < 0.4)
    again = Curriculum(50, band=(0.2, 0.8), decay=0.7)
    again.set_state(json.loads(json.dumps(curriculum.get_state())))
    ids = rng.integers(50, size=30)
    for one in (curriculum, again):
        one.update(ids, np.ones(30, bool))
    np.testing.assert_array_equal(again.pass_rates(), curriculum.pass_rates())


def test_a_hundred_thousand_prompts_fit_in_a_checkpoint():
    curriculum = Curriculum(100_000, band=(0.2, 0.8))
    rng = np.random.default_rng(0)
    for _ in range(3):
        curriculum.update(np.repeat(np.arange(100_000), 4), rng.random(400_000) < 0.4)
    assert len(json.dumps(curriculum.get_state())) < 1_000_000


@pytest.mark.parametrize("seed", SEEDS)
def test_batches_are_full_and_hold_no_prompt_twice(seed):
    rng = np.random.default_rng(seed)
    sampler = made(seed, batch_size=int(rng.integers(1, 8)), max_skipped=int(rng.integers(0, 30)), retry=0.05)
    difficulty = rng.random(N) * (rng.random(N) < 0.5)
    for _ in range(15):
        before = sampler.curriculum.in_band()
        batch = next(sampler)
        ids, metrics = batch["prompt_id"], sampler.metrics()
        assert batch["prompt_tokens"].shape == (sampler.batch_size, 2) and ids.dtype == np.int32
        assert (batch["prompt_tokens"] == np.stack([ids, ids + 1], axis=1)).all()
        assert len(set(ids.tolist())) == len(ids)
        outside = metrics["curriculum/retried"] + metrics["curriculum/forced"]
        assert (~before[ids]).sum() == outside
        assert metrics["curriculum/skipped"] <= sampler.max_skipped
        if metrics["curriculum/forced"]:
            assert metrics["curriculum/skipped"] == sampler.max_skipped
        sampler.curriculum.update(np.repeat(ids, 4), rng.random(4 * len(ids)) < np.repeat(difficulty[ids], 4))


def test_a_band_of_everything_passes_the_source_through():
    sampler, source = made(band=(0.0, 1.0)), Source()
    for _ in range(3 * (N // P)):
        batch = next(source)
        for key, values in next(sampler).items():
            np.testing.assert_array_equal(values, batch[key])
        sampler.curriculum.update(batch["prompt_id"], np.zeros(P, bool))
        assert sampler.metrics()["curriculum/skipped"] == 0


def test_hopeless_and_solved_prompts_are_left_out():
    sampler = made(retry=0.0, max_skipped=1000)
    sampler.curriculum.update(np.zeros(4, int), np.zeros(4, bool))
    assert sampler.metrics()["curriculum/tried_fraction"] == pytest.approx(1 / N)
    assert sampler.metrics()["curriculum/in_band_fraction"] == 0.0
    difficulty = np.where(np.arange(N) < 6, 0.5, np.where(np.arange(N) < 12, 0.0, 1.0))
    sampler.curriculum.update(np.repeat(np.arange(N), 100), np.tile(np.arange(100), N) < 100 * difficulty.repeat(100))
    drawn = [i for _ in range(10) for i in next(sampler)["prompt_id"]]
    assert set(drawn) == set(range(6))
    assert sampler.metrics()["curriculum/in_band_fraction"] == pytest.approx(6 / N)
    assert sampler.metrics()["curriculum/tried_fraction"] == 1.0


def test_where_nothing_is_in_the_band_the_cap_keeps_training_going():
    sampler = made(retry=0.0, max_skipped=5)
    sampler.curriculum.update(np.arange(N), np.zeros(N, bool))
    next(sampler)
    metrics = sampler.metrics()
    assert (metrics["curriculum/skipped"], metrics["curriculum/forced"]) == (5, P)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_resumed_run_draws_the_same_prompts(seed):
    rng = np.random.default_rng(seed)
    difficulty = rng.random(N) * (rng.random(N) < 0.6)
    sizes = {"batch_size": int(rng.integers(1, 7)), "max_skipped": int(rng.integers(0, 30))}
    whole = made(seed, **sizes)
    drawn = [step(whole, difficulty) for _ in range(12)]
    cut = int(rng.integers(0, 12))
    first = made(seed, **sizes)
    assert [step(first, difficulty) for _ in range(cut)] == drawn[:cut]
    second = made(seed, **sizes)
    next(second)  # restored over whatever it has done
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert second.get_state() == first.get_state()
    assert [step(second, difficulty) for _ in range(12 - cut)] == drawn[cut:]
    assert second.get_state() == whole.get_state()


def test_each_row_of_each_batch_has_its_own_chance_of_a_retry():
    sampler = made(retry=0.25, batch_size=1, max_skipped=1000)
    sampler.source = Rows()
    sampler.curriculum.update(np.arange(N), np.zeros(N, bool))
    counts = np.bincount([int(next(sampler)["prompt_id"][0]) for _ in range(2000)], minlength=4)
    np.testing.assert_allclose(counts / 2000, 0.25, atol=0.04)


def test_the_seed_decides_the_retries():
    drawn = []
    for seed in (0, 0, 1):
        sampler = made(seed, retry=0.3, max_skipped=1000)
        sampler.curriculum.update(np.arange(N), np.zeros(N, bool))
        drawn.append([next(sampler)["prompt_id"].tolist() for _ in range(5)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_it_stands_in_for_the_pipelines_own_iterator():
    import grain  # noqa: PLC0415 - as the pipeline builds it

    def fresh():
        rows = prompt_groups(N, P, lambda index: {"prompt_id": np.array(index, np.int32)}, 0)
        pipeline = Pipeline(grain.MapDataset.source(rows).to_iter_dataset(grain.ReadOptions(num_threads=0)), {})
        return CurriculumSampler(iter(pipeline), Curriculum(N, band=(0.2, 0.8)), batch_size=3, max_skipped=40, seed=0)

    difficulty = np.linspace(0, 1, N)
    whole, first, second = fresh(), fresh(), fresh()
    drawn = [step(whole, difficulty) for _ in range(10)]
    for _ in range(4):
        step(first, difficulty)
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert [step(second, difficulty) for _ in range(6)] == drawn[4:]


def test_too_few_distinct_prompts_are_refused_and_not_waited_for():
    with pytest.raises(DataError, match="curriculum: got 4 distinct prompts in 4 passes .* batch_size = 5"):
        next(made(size=4, batch_size=5))


def test_a_state_of_other_data_is_refused():
    with pytest.raises(CheckpointError, match="holds 4 prompts, expected the data's 3"):
        Curriculum(3, band=(0.0, 1.0)).set_state(Curriculum(4, band=(0.0, 1.0)).get_state())
