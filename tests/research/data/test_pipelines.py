"""Determinism, bit-exact resume, masking, packing without contamination, and refused inputs."""

import json
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from research.core.errors import DataError
from research.data.judged import judged_batches
from research.data.pipelines import prompt_batches, sft_batches, text_batches
from research.data.report import Limits

PAIRS = [{"prompt": f"question {n}?", "chosen": f"good {n} " * (1 + n % 4), "rejected": f"bad {n}"} for n in range(30)]


def pair_batches(records, tokenizer, *, seed=None, batch_size=4, limits=Limits(), name="preferences"):  # noqa: B008
    return judged_batches(
        "preferences", records, tokenizer, batch_size=batch_size, length=64, seed=seed, name=name, limits=limits
    )


@pytest.fixture
def make(tokenizer, arithmetic_records, text_records):
    """Every training pipeline by name, from a seed."""
    return {
        "text": lambda seed: text_batches([text_records], tokenizer, weights=[1.0], batch_size=4, length=32, seed=seed),
        "mixture": lambda seed: text_batches(
            [text_records[:20], text_records[20:]], tokenizer, weights=[0.75, 0.25], batch_size=4, length=32, seed=seed
        ),
        "packed": lambda seed: sft_batches(
            arithmetic_records, tokenizer, batch_size=4, length=96, seed=seed, packing=True
        ),
        "buckets": lambda seed: sft_batches(
            arithmetic_records, tokenizer, batch_size=4, length=96, seed=seed, packing=False
        ),
        "pairs": lambda seed: pair_batches(PAIRS, tokenizer, seed=seed),
        "prompts": lambda seed: prompt_batches(
            arithmetic_records, tokenizer, prompts_per_batch=4, max_prompt_length=40, seed=seed
        ),
    }


PIPELINES = ["text", "mixture", "packed", "buckets", "pairs", "prompts"]


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", PIPELINES)
def test_resume_is_bit_identical_and_the_seed_decides(make, name):
    whole = list(islice(make[name](7), 400))  # several epochs of each
    again = iter(make[name](7))
    for stop in (0, 1, 90, 333):
        state = None
        iterator = iter(make[name](7))
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        again.set_state(state)  # also backwards, on an iterator in use
        assert all(same(next(again), batch) for batch in whole[stop : stop + 20])
    assert not all(map(same, whole[:5], islice(make[name](8), 5)))


@pytest.mark.parametrize("name", PIPELINES)
def test_shapes_and_dtypes(make, name):
    for batch in islice(make[name](0), 50):
        for key, value in batch.items():
            floats = key in ("margins", "soft_labels")
            expected = np.float32 if floats else np.bool_ if key.endswith("mask") else np.int32
            assert value.dtype == expected, key
            assert len(value) == 4


def test_each_epoch_is_every_prompt_once_in_a_new_order(tokenizer, arithmetic_records):
    records = arithmetic_records[:40]
    batches = iter(prompt_batches(records, tokenizer, prompts_per_batch=8, max_prompt_length=40, seed=0))
    epochs = [np.concatenate([next(batches)["prompt_id"] for _ in range(5)]) for _ in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_no_prompt_repeats_within_a_batch_when_the_count_does_not_divide(tokenizer, arithmetic_records):
    pipeline = prompt_batches(arithmetic_records[:10], tokenizer, prompts_per_batch=7, max_prompt_length=40, seed=0)
    seen = set()
    for batch in islice(pipeline, 20):
        assert len(set(batch["prompt_id"].tolist())) == 7
        seen |= set(batch["prompt_id"].tolist())
    assert seen == set(range(10))


def test_prompts_are_left_padded_and_name_their_record(tokenizer, arithmetic_records):
    pipeline = prompt_batches(arithmetic_records, tokenizer, prompts_per_batch=4, max_prompt_length=40, seed=0)
    for batch in islice(pipeline, 5):
        for tokens, mask, index in zip(batch["prompt_tokens"], batch["prompt_mask"], batch["prompt_id"], strict=True):
            assert not mask[: 40 - mask.sum()].any() and mask[40 - mask.sum() :].all()
            text = tokenizer.decode(tokens[mask].tolist(), show_markup=True)
            question = arithmetic_records[index]["prompt"]
            assert text == (f"<bos><|im_start|>user<|im_sep|>{question}<|im_end|><|im_start|>assistant<|im_sep|>")
            assert (tokens[~mask] == tokenizer.pad_id).all()


def segments(batch, prefix=""):
    """(tokens, mask) of each segment; also proves that segments are contiguous and padding is masked."""
    for row in range(len(batch[f"{prefix}tokens"])):
        ids = batch[f"{prefix}segment_ids"][row]
        count = int(ids.max())
        used = int((ids > 0).sum())
        assert (np.diff(ids[:used]) >= 0).all() and (ids[used:] == 0).all()
        assert set(ids[:used].tolist()) == set(range(1, count + 1))
        assert not batch[f"{prefix}loss_mask"][row][used:].any()
        for segment in range(1, count + 1):
            where = ids == segment
            positions = batch[f"{prefix}positions"][row][where]
            np.testing.assert_array_equal(positions, np.arange(where.sum()))
            mask = batch[f"{prefix}loss_mask"][row][where]
            assert not mask[0]
            yield batch[f"{prefix}tokens"][row][where], mask


@pytest.mark.parametrize("name", ["packed", "buckets"])
def test_an_sft_epoch_is_every_response_once_and_nothing_else(make, name, tokenizer, arithmetic_records):
    expected = sorted((record["prompt"], record["completion"]) for record in arithmetic_records)
    found = []
    batches = iter(make[name](0))
    while len(found) < len(expected):
        for tokens, mask in segments(next(batches)):
            assert tokens[0] == tokenizer.bos_id and (tokens == tokenizer.bos_id).sum() == 1
            shown = tokenizer.decode(tokens[mask].tolist(), show_markup=True)
            assert shown.endswith("<|im_end|>")
            prompt = tokenizer.decode(tokens[~mask].tolist(), show_markup=True)
            found.append((prompt.split("<|im_sep|>")[1].removesuffix("<|im_end|><|im_start|>assistant"), shown))
    assert sorted((prompt, shown.removesuffix("<|im_end|>")) for prompt, shown in found[: len(expected)]) == expected


def test_packing_fills_rows(tokenizer, arithmetic_records):
    pipeline = sft_batches(arithmetic_records, tokenizer, batch_size=4, length=256, seed=0, packing=True)
    fills = [(batch["segment_ids"] > 0).mean() for batch in islice(pipeline, 20)]
    assert np.mean(fills) > 0.9


def test_an_epoch_of_buckets_has_few_shapes(make):
    assert {batch["tokens"].shape[1] for batch in islice(make["buckets"](0), 75)} <= {24, 48, 96}


def test_text_segments_hold_one_document_each(make, tokenizer):
    for name in ("text", "mixture"):
        for batch in islice(make[name](0), 60):
            for tokens, mask in segments(batch):
                assert mask[1:].all()
                words = tokenizer.decode(tokens.tolist()).split()
                numbers = {word for word in words[1:-1] if word.isdigit()}
                assert len(numbers) <= 1, words
                assert (tokens[1:] != tokenizer.bos_id).all()  # BOS only where a document starts
                assert (tokens[:-1] != tokenizer.eos_id).all()


def test_a_text_epoch_is_every_token_once(tokenizer, text_records):
    ids = [[tokenizer.bos_id, *tokenizer.encode(record["text"]), tokenizer.eos_id] for record in text_records]
    expected = np.bincount(np.concatenate(ids), minlength=tokenizer.vocab_size)
    batches = iter(text_batches([text_records], tokenizer, weights=[1], batch_size=1, length=32, seed=0))
    rows = -(-int(expected.sum()) // 32)
    for _ in range(2):
        epoch = [next(batches) for _ in range(rows)]
        tokens = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in epoch])
        np.testing.assert_array_equal(np.bincount(tokens, minlength=tokenizer.vocab_size), expected)


def test_mixture_keeps_its_proportions(tokenizer):
    sources = [[{"text": "a" * 300}], [{"text": "b" * 300}]]
    pipeline = text_batches(sources, tokenizer, weights=[0.8, 0.2], batch_size=10, length=16, seed=0)
    letter = tokenizer.encode("ab")
    rows = np.concatenate([batch["tokens"] for batch in islice(pipeline, 20)])
    share = (rows == letter[0]).any(axis=1).mean() if len(letter) == 2 else None
    assert share is None or abs(share - 0.8) < 0.02
    assert len(letter) == 2


def test_preference_rows_mask_the_prompt(make, tokenizer):
    for batch in islice(make["pairs"](0), 8):
        for side, key in (("chosen_", "chosen"), ("rejected_", "rejected")):
            shown = [tokenizer.decode(tokens[mask].tolist()) for tokens, mask in segments(batch, side)]
            assert len(shown) == 4 and set(shown) <= {pair[key] for pair in PAIRS}
        np.testing.assert_array_equal(batch["chosen_tokens"][:, :10], batch["rejected_tokens"][:, :10])


def test_margins_and_soft_labels_stay_with_their_pair(tokenizer):
    records = [
        {**pair, "margin": n / 4, "label_probability": 1 - n / 64} if n % 2 else pair for n, pair in enumerate(PAIRS)
    ]
    batches = [*islice(pair_batches(records, tokenizer, seed=0), 15), *pair_batches(records, tokenizer)]
    for batch in batches:
        rows = zip(
            batch["chosen_tokens"], batch["chosen_loss_mask"], batch["margins"], batch["soft_labels"], strict=True
        )
        for tokens, mask, margin, label in rows:
            if not mask.any():
                assert (margin, label) == (0, 1)
                continue
            n = int(tokenizer.decode(tokens[mask].tolist()).split()[1])
            assert (margin, label) == ((n / 4, 1 - n / 64) if n % 2 else (0, 1))


def test_truncated_responses_are_counted_and_those_without_a_target_left_out(tokenizer):
    records = [{"prompt": "p" * 200, "completion": "x"}, {"prompt": "p", "completion": "yes " * 40}, PAIR]
    shape = {"batch_size": 1, "length": 64, "seed": 0, "packing": False, "limits": Limits("truncate", 0.5)}
    pipeline = sft_batches(records, tokenizer, **shape)
    assert (pipeline.report.records, pipeline.report.kept) == (3, 2)
    assert pipeline.report.dropped == {"prompt too long": 1}
    assert pipeline.report.changed == {"truncated": 1, "end of turn lost": 1}
    for batch in islice(pipeline, 6):
        assert batch["loss_mask"].any()
    same_start = [{"prompt": "p", "chosen": "a" * 99, "rejected": "a" * 98}, PAIRS[0]]
    pairs = pair_batches(same_start, tokenizer, batch_size=1, seed=0, limits=Limits("truncate", 0.5))
    assert (pairs.report.kept, pairs.report.dropped) == (1, {"answers equal once cut": 1})
    with pytest.raises(DataError, match="sft: 1 of 1 records do not fit 64 tokens .*which are all"):
        sft_batches(records[:1], tokenizer, **shape)
    with pytest.raises(DataError, match="preferences: 1 of 1 records do not fit 64 tokens"):
        pair_batches(same_start[:1], tokenizer, batch_size=1, seed=0, limits=Limits("truncate", 0.5))


PAIR = {"prompt": "p", "completion": "short"}


def test_evaluation_is_one_ordered_pass_with_an_empty_tail(tokenizer, arithmetic_records, text_records):
    records = arithmetic_records[:10]
    batches = list(sft_batches(records, tokenizer, batch_size=4, length=96, seed=None))
    assert [batch["tokens"].shape for batch in batches] == [(4, 96)] * 3
    shown = [tokenizer.decode(tokens[mask].tolist()) for batch in batches for tokens, mask in segments(batch)]
    assert shown == [record["completion"] for record in records]
    assert not batches[-1]["segment_ids"][2:].any() and not batches[-1]["loss_mask"][2:].any()

    prompts = list(prompt_batches(records, tokenizer, prompts_per_batch=4, max_prompt_length=40, seed=None))
    assert np.concatenate([batch["prompt_id"] for batch in prompts]).tolist() == [*range(10), -1, -1]
    assert not prompts[-1]["prompt_mask"][2:].any()

    pairs = list(pair_batches(PAIRS, tokenizer, batch_size=8))
    assert len(pairs) == 4 and not pairs[-1]["chosen_segment_ids"][6:].any()

    pipeline = text_batches([text_records], tokenizer, batch_size=4, length=32, seed=None)
    rows = [list(pipeline), list(pipeline)]
    assert all(map(same, *rows))
    counted = sum(int((batch["segment_ids"] > 0).sum()) for batch in rows[0])
    assert counted == pipeline.report.sizes["tokens"]


def test_bad_requests_are_named(tokenizer, arithmetic_records):
    records = [*arithmetic_records[:3], {"prompt": "1+" * 40 + "1"}]
    with pytest.raises(
        DataError, match="gsm: record 3: the prompt has 9[0-9] tokens, expected at most max_prompt_length = 40"
    ):
        prompt_batches(records, tokenizer, prompts_per_batch=2, max_prompt_length=40, seed=0, name="gsm")
    with pytest.raises(DataError, match="holds 3 prompts, expected at least prompts_per_batch = 9"):
        prompt_batches(records[:3], tokenizer, prompts_per_batch=9, max_prompt_length=40, seed=0)
    with pytest.raises(DataError, match="record 0: the prompt is empty or ends with an assistant turn"):
        one = [{"messages": [{"role": "assistant", "content": "x"}]}]
        prompt_batches(one, tokenizer, prompts_per_batch=1, max_prompt_length=40, seed=0)
    with pytest.raises(DataError, match="text: record 0: found the keys prompt, completion, answer, expected"):
        text_batches([records], tokenizer, weights=[1], batch_size=1, length=8, seed=0)
    with pytest.raises(DataError, match="text: holds no documents"):
        text_batches([[]], tokenizer, weights=[1], batch_size=1, length=8, seed=0)


def test_the_data_modules_need_no_jax_and_no_tensorflow():
    script = (
        "import sys\n"
        "sys.modules['jax'] = None\n"
        "import research.data.judged, research.data.files, research.data.text_corpus, research.tasks.jsonl\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
