"""Batches of labelled steps, judged completions and rankings: what each row holds, resume, and refusals."""

import json
from itertools import islice

import numpy as np
import pytest

from research.core.errors import DataError
from research.data.judged import judged_batches
from research.data.report import Limits
from research.data.split import Split
from research.data.steps import step_split
from research.tasks.arithmetic.corruption import pair_records, ranking_records, step_records
from research.tasks.arithmetic.problems import split_items

ITEMS = split_items(23, 1, seed=0, split=Split(10))[0]
PAIRS = [record for item in ITEMS for record in pair_records(item, seed=0, max_value=99)]
STEPS = [record for item in ITEMS for record in step_records(item, seed=0, max_value=99)]
RANKINGS = [
    record
    for index, item in enumerate(ITEMS)
    for record in ranking_records(item, seed=0, max_value=99, candidates=2 + index % 3)
]
ROW = ("tokens", "loss_mask", "segment_ids", "positions")
DTYPES = {
    **dict.fromkeys(("tokens", "segment_ids", "positions", "ranks"), np.int32),
    **dict.fromkeys(("loss_mask", "desirable"), np.bool_),
    "step_labels": np.float32,
}


CUT = Limits("truncate", 1.0)


def batches_of(kind, records, tokenizer, *, seed=None, batch_size=4, length=96, **options):
    options = {"name": kind, "limits": CUT, "candidates": 4, **options}
    return judged_batches(kind, records, tokenizer, batch_size=batch_size, length=length, seed=seed, **options)


@pytest.fixture
def make(tokenizer):
    """Every training pipeline by name, from a seed."""
    records = {"steps": STEPS, "unpaired": PAIRS, "rankings": RANKINGS}
    return {kind: lambda seed, kind=kind: batches_of(kind, records[kind], tokenizer, seed=seed) for kind in records}


NAMES = ["steps", "unpaired", "rankings"]


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_identical_and_the_seed_decides(make, name):
    whole = list(islice(make[name](7), 60))  # several epochs of each
    for stop in (0, 1, 31):
        iterator = iter(make[name](7))
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        again = iter(make[name](7))
        again.set_state(state)
        assert all(same(next(again), batch) for batch in whole[stop : stop + 20])
    assert not all(map(same, whole[:5], islice(make[name](8), 5)))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes(make, name):
    shapes = {"desirable": (4,), "ranks": (4, 4)}
    for batch in islice(make[name](0), 10):
        extra = {"steps": {"step_labels"}, "unpaired": {"desirable"}, "rankings": {"ranks"}}[name]
        kl = {f"kl_{key}" for key in ROW} if name == "unpaired" else set()
        assert set(batch) == {*ROW, *extra, *kl}
        for key, value in batch.items():
            assert value.dtype == DTYPES[key.removeprefix("kl_")], key
            assert value.shape == shapes.get(key, (4, 4, 96) if name == "rankings" else (4, 96)), key


def parts(tokenizer, tokens, segment_ids):
    """(question, answer with its markup) of one row."""
    used = int((segment_ids > 0).sum())
    assert segment_ids[:used].tolist() == [1] * used
    shown = tokenizer.decode(tokens[:used].tolist(), show_markup=True)
    prompt, _, answer = shown.partition("<|im_start|>assistant<|im_sep|>")
    assert prompt.startswith("<bos><|im_start|>user<|im_sep|>") and prompt.endswith("<|im_end|>")
    return prompt.removeprefix("<bos><|im_start|>user<|im_sep|>").removesuffix("<|im_end|>"), answer


def test_each_step_is_labelled_at_its_last_token_and_nowhere_else(make, tokenizer):
    expected = sorted((r["prompt"], tuple(r["steps"]), tuple(r["labels"])) for r in STEPS)
    found = []
    batches = iter(make["steps"](0))
    while len(found) < len(STEPS):
        batch = next(batches)
        assert not batch["step_labels"][~batch["loss_mask"]].any()
        for row in range(4):
            tokens, mask = batch["tokens"][row], batch["loss_mask"][row]
            question, answer = parts(tokenizer, tokens, batch["segment_ids"][row])
            ends = np.flatnonzero(mask)
            start = int((batch["segment_ids"][row] > 0).sum()) - len(tokenizer.encode(answer[:-10])) - 1
            lines = []
            for end in ends:
                lines.append(tokenizer.decode(tokens[start : end + 1].tolist(), show_markup=True))
                start = end + 1
            assert all(line.endswith("\n") for line in lines[:-1]) and lines[-1].endswith("<|im_end|>")
            steps = tuple(line.removesuffix("<|im_end|>").strip("\n") for line in lines)
            assert list(steps) == step_split(answer.removesuffix("<|im_end|>"))
            found.append((question, steps, tuple(batch["step_labels"][row][mask].tolist())))
    assert sorted(found[: len(STEPS)]) == expected


def test_unjudged_steps_stay_in_the_text_and_out_of_the_mask(tokenizer):
    record = {"prompt": "p", "steps": ["a", "b", "c"], "labels": [None, 0.5, None]}
    (batch,) = batches_of("steps", [record], tokenizer, batch_size=1, length=32)
    (end,) = np.flatnonzero(batch["loss_mask"][0])
    assert tokenizer.decode(batch["tokens"][0][: end + 1].tolist()).endswith("a\nb\n")
    assert batch["step_labels"][0][end] == np.float32(0.5) and batch["step_labels"].sum() == 0.5
    assert parts(tokenizer, batch["tokens"][0], batch["segment_ids"][0])[1] == "a\nb\nc<|im_end|>"


def test_truncated_solutions_keep_the_labels_that_fit(tokenizer):
    long = {"prompt": "p", "steps": ["a" * 30, "b" * 30, "c"], "labels": [1, 0.5, 0]}
    short = {"prompt": "p", "steps": ["a"], "labels": [1]}
    pipeline = batches_of("steps", [long, short], tokenizer, batch_size=2, length=60)
    (batch,) = pipeline
    assert pipeline.report.kept == 2 and pipeline.report.sizes == {"labels": 2}
    assert pipeline.report.changed == {"truncated": 1, "end of turn lost": 1}
    assert batch["step_labels"].sum() == 2 and batch["loss_mask"].sum() == 2
    late = {**long, "labels": [None, None, 0]}
    lost = batches_of("steps", [late, short], tokenizer, batch_size=2, length=60)
    assert (lost.report.kept, lost.report.dropped) == (1, {"no label left": 1})
    with pytest.raises(DataError, match="steps: 1 of 1 records do not fit 12 tokens .*prompt too long"):
        batches_of("steps", [long], tokenizer, batch_size=1, length=12, seed=0)


def test_a_pair_gives_a_desirable_and_an_undesirable_row(make, tokenizer):
    expected = sorted(
        [(p["prompt"], p["chosen"], True) for p in PAIRS] + [(p["prompt"], p["rejected"], False) for p in PAIRS]
    )
    found, batches = [], iter(make["unpaired"](0))
    while len(found) < 46:
        batch = next(batches)
        for row in range(4):
            question, answer = parts(tokenizer, batch["tokens"][row], batch["segment_ids"][row])
            mask = batch["loss_mask"][row]
            assert tokenizer.decode(batch["tokens"][row][mask].tolist(), show_markup=True) == answer
            found.append((question, answer.removesuffix("<|im_end|>"), bool(batch["desirable"][row])))
    assert sorted(found[:46]) == expected


@pytest.mark.parametrize("ordered", [False, True])
def test_the_kl_rows_hold_the_next_rows_completion_under_this_rows_prompt(make, tokenizer, ordered):
    if ordered:
        batches = list(batches_of("unpaired", PAIRS, tokenizer, batch_size=4, length=96))
        assert len(batches) == 12
        for key in ("loss_mask", "segment_ids", "kl_loss_mask", "kl_segment_ids", "desirable"):
            assert not batches[-1][key][2:].any()
    else:
        batches = list(islice(make["unpaired"](3), 40))
    rows = [
        (parts(tokenizer, batch["tokens"][row], batch["segment_ids"][row]), batch, row)
        for batch in batches
        for row in range(4)
        if batch["segment_ids"][row].any()
    ]
    own = {(p["prompt"], p[side] + "<|im_end|>") for p in PAIRS for side in ("chosen", "rejected")}
    checked = 0
    for index, ((question, _), batch, row) in enumerate(rows):
        kl_question, kl_answer = parts(tokenizer, batch["kl_tokens"][row], batch["kl_segment_ids"][row])
        assert kl_question == question and (question, kl_answer) not in own
        assert kl_answer in {answer for _, answer in own}
        mask, positions = batch["kl_loss_mask"][row], batch["kl_positions"][row]
        assert tokenizer.decode(batch["kl_tokens"][row][mask].tolist(), show_markup=True) == kl_answer
        used = int((batch["kl_segment_ids"][row] > 0).sum())
        np.testing.assert_array_equal(positions[:used], np.arange(used))
        # What follows is of the same epoch, and only one more row answers this prompt.
        if index % 46 < 44 and index < len(rows) - 2:
            follower = next(r[0] for r in rows[index + 1 :] if r[0][0] != question)
            assert kl_answer == follower[1]
            checked += 1
    assert checked >= 44


def test_native_unpaired_records_need_no_partner(tokenizer):
    records = [{"prompt": f"p{n}", "completion": f"c{n}", "label": n % 3 == 0} for n in range(5)]
    (batch,) = batches_of("unpaired", records, tokenizer, batch_size=5, length=32)
    np.testing.assert_array_equal(batch["desirable"], [True, False, False, True, False])
    answers = [parts(tokenizer, batch["kl_tokens"][n], batch["kl_segment_ids"][n]) for n in range(5)]
    assert answers == [(f"p{n}", f"c{(n + 1) % 5}<|im_end|>") for n in range(5)]


def test_long_kl_rows_are_cut_and_contradictions_dropped(tokenizer):
    records = [
        {"prompt": "p" * 30, "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "c" * 90, "rejected": "d"},
        {"prompt": "r", "chosen": "e" * 90, "rejected": "e" * 91},  # equal once cut
    ]
    pipeline = batches_of("unpaired", records, tokenizer, batch_size=4, length=56)
    (batch,) = pipeline
    assert (pipeline.report.records, pipeline.report.kept) == (6, 4)
    assert pipeline.report.changed["truncated"] == 3
    assert pipeline.report.dropped == {"answers equal once cut": 2} and pipeline.report.sizes == {"desirable": 2}
    assert (batch["kl_segment_ids"] > 0).sum(axis=1).max() == 56
    question, answer = parts(tokenizer, batch["kl_tokens"][1], batch["kl_segment_ids"][1])
    assert question == "p" * 30 and set(answer) == {"c"}  # cut at the end: the prompt is whole
    assert batch["kl_loss_mask"].any(axis=1).all()


def test_ranked_candidates_keep_their_ranks_and_fill_up(make, tokenizer):
    expected = {}
    for record in RANKINGS:
        dense = sorted(set(record["ranks"]))
        expected[record["prompt"]] = sorted(
            (text, dense.index(rank)) for text, rank in zip(record["completions"], record["ranks"], strict=True)
        )
    training = list(islice(make["rankings"](0), 6))
    evaluation = list(batches_of("rankings", RANKINGS, tokenizer, batch_size=4, candidates=4, length=96))
    assert len(evaluation) == 6
    seen = set()
    for batch in training + evaluation:
        for p in range(4):
            present = batch["segment_ids"][p].any(axis=1)
            assert (batch["ranks"][p][~present] == 4).all() and not batch["loss_mask"][p][~present].any()
            if not present.any():
                continue
            rows = [
                parts(tokenizer, batch["tokens"][p, k], batch["segment_ids"][p, k]) for k in np.flatnonzero(present)
            ]
            (question,) = {question for question, _ in rows}
            found = [
                (answer.removesuffix("<|im_end|>"), int(rank))
                for (_, answer), rank in zip(rows, batch["ranks"][p][present], strict=True)
            ]
            assert sorted(found) == expected[question]
            seen.add(question)
    assert seen == set(expected)
    assert not evaluation[-1]["segment_ids"][3:].any()


def test_ranks_are_counted_from_the_best_and_ties_stay(tokenizer):
    record = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [7, -2, 7]}
    (batch,) = batches_of("rankings", [record], tokenizer, batch_size=2, candidates=5, length=32)
    np.testing.assert_array_equal(batch["ranks"], [[1, 0, 1, 5, 5], [5] * 5])
    (batch,) = batches_of("rankings", PAIRS[:1], tokenizer, batch_size=1, candidates=2, length=96)
    np.testing.assert_array_equal(batch["ranks"], [[0, 1]])


def test_rankings_that_truncation_spoils_are_counted(tokenizer):
    equal = {"prompt": "p", "completions": ["a" * 90, "a" * 91], "ranks": [0, 1]}
    fine = {"prompt": "p", "completions": ["a" * 90, "b"], "ranks": [0, 1]}
    lost = {"prompt": "p" * 90, "completions": ["a", "b"], "ranks": [0, 1]}
    pipeline = batches_of("rankings", [equal, fine, lost], tokenizer, batch_size=1, candidates=2, length=48)
    assert (pipeline.report.kept, pipeline.report.changed["truncated"]) == (1, 2)
    assert pipeline.report.dropped == {"answers equal once cut": 1, "prompt too long": 1}


def test_bad_requests_are_named(tokenizer):
    shape = {"length": 96, "seed": 0}
    with pytest.raises(DataError, match="rm: record 2: holds 4 completions, expected at most candidates = 3"):
        batches_of("rankings", RANKINGS, tokenizer, batch_size=2, candidates=3, name="rm", **shape)
    with pytest.raises(DataError, match="rankings: 1 of 1 records do not fit 8 tokens"):
        batches_of("rankings", PAIRS[:1], tokenizer, batch_size=1, candidates=2, length=8, seed=0)
    with pytest.raises(DataError, match="unpaired: its 1 records hold completions of 1 prompts"):
        batches_of("unpaired", PAIRS[:1], tokenizer, batch_size=2, **shape)
    with pytest.raises(DataError, match="prm: record 0: labels: found 1 labels for 2 steps"):
        bad = [{"prompt": "p", "steps": ["a", "b"], "labels": [1]}]
        batches_of("steps", bad, tokenizer, batch_size=2, name="prm", **shape)
    for kind in ("preferences", "unpaired", "rankings"):
        with pytest.raises(DataError, match="record 0: chosen and rejected are equal"):
            batches_of(kind, [{"prompt": "p", "chosen": "a", "rejected": "a"}], tokenizer, **shape)
        with pytest.raises(DataError, match="record 0: chosen and rejected do not continue the same prompt"):
            user = [{"role": "user", "content": text} for text in "xy"]
            good = {"role": "assistant", "content": "a"}
            other = {"role": "assistant", "content": "b"}
            batches_of(kind, [{"chosen": [user[0], good], "rejected": [user[1], other]}], tokenizer, **shape)


@pytest.mark.parametrize(("kind", "records"), [("steps", STEPS), ("unpaired", PAIRS)])
def test_a_prompt_that_is_no_prefix_is_refused(tokenizer, monkeypatch, kind, records):
    monkeypatch.setattr("research.data.chat.render_prompt", lambda *_: np.array([1, 2, 3, 4]))
    with pytest.raises(DataError, match="record 0: the prompt's tokens are not a prefix"):
        batches_of(kind, records, tokenizer)


def test_big_bench_mistake_makes_batches(tokenizer, shared_data):
    lines = (shared_data / "bbm_multistep_arithmetic.jsonl").read_text().splitlines()[:20]
    records = [json.loads(line) for line in lines]
    (batch,) = batches_of("steps", records, tokenizer, batch_size=20, length=1024)
    for row, record in enumerate(records):
        labels = batch["step_labels"][row][batch["loss_mask"][row]]
        mistake = record["mistake_index"]
        right = len(record["steps"]) if mistake is None else mistake
        assert labels.tolist() == [1.0] * right + [0.0] * (len(record["steps"]) - right)
