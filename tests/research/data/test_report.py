"""Records that do not fit: refused, dropped or cut as `data.too_long` says, and counted before training."""

import numpy as np
import pytest

from research.core.errors import DataError
from research.data.judged import judged_batches
from research.data.pipelines import prompt_batches, sft_batches
from research.data.records import Selected
from research.data.report import DataReport, Limits
from research.data.store import Row, prepare

FITS = {"prompt": "p", "completion": "yes"}
LONG = {"prompt": "p", "completion": "yes " * 40}
LONG_PROMPT = {"prompt": "p" * 200, "completion": "x"}
EMPTY = {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": " "}]}
NO_CONTENT = {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": None}]}
UNTRAINED = {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "x", "weight": 0}]}
RECORDS = [FITS, LONG, LONG_PROMPT, EMPTY, NO_CONTENT, UNTRAINED, *[FITS] * 14]


def report(tokenizer, limits, records=RECORDS, kind="chat", length=64) -> DataReport:
    shape = {"name": "sft", "limits": limits, "seed": None}
    if kind == "prompts":
        return prompt_batches(records, tokenizer, prompts_per_batch=1, max_prompt_length=length, **shape).report
    shape |= {"batch_size": 1, "length": length}
    if kind == "chat":
        return sft_batches(records, tokenizer, **shape).report
    return judged_batches(kind, records, tokenizer, **shape).report


def test_drop_leaves_out_what_does_not_fit_and_says_why(tokenizer):
    found = report(tokenizer, Limits("drop", 0.5))
    assert (found.records, found.kept, found.changed) == (20, 15, {})
    assert found.dropped == {"row too long": 1, "prompt too long": 1, "empty turn": 2, "nothing to learn": 1}
    assert found.line() == (
        "sft: 20 records, 5 dropped (1 row too long, 1 prompt too long, 2 empty turn, 1 nothing to learn)"
    )
    assert found.metrics() == {
        "data/records": 20.0, "data/dropped": 5.0, "data/truncated": 0.0, "data/end_of_turn_lost": 0.0,
    }  # fmt: skip


def test_truncate_cuts_and_counts_the_lost_ends_of_turns(tokenizer):
    turns = [("user", "p"), ("assistant", "a"), ("user", "q" * 99), ("assistant", "b")]
    cut_outside = {"messages": [{"role": role, "content": content} for role, content in turns]}
    found = report(tokenizer, Limits("truncate", 0.5), [*RECORDS, cut_outside])
    assert found.changed == {"truncated": 2, "end of turn lost": 1}  # the other's first answer is whole
    assert found.dropped == {"prompt too long": 1, "empty turn": 2, "nothing to learn": 1}
    assert found.line().endswith("2 truncated (1 lost their end of turn)")
    assert found.record()["kept"] == 17 and found.record()["end of turn lost"] == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (LONG, r"sft: record 1: has \d+ tokens, expected at most length = 64, which holds not all of the response"),
        (LONG_PROMPT, r"sft: record 1: has \d+ tokens, expected at most length = 64, which holds no token of the"),
        (EMPTY, "sft: record 1: has a turn that is empty; data.too_long can drop such records"),
        (UNTRAINED, "sft: record 1: no turn of an assistant carries loss"),
    ],
)
def test_error_names_the_first_record(tokenizer, record, message):
    with pytest.raises(DataError, match=message):
        report(tokenizer, Limits("error"), [FITS, record])
    assert report(tokenizer, Limits("error"), [FITS]).line() == "sft: 1 records"


def test_file_and_line_are_named(tokenizer, tmp_path):
    rows = [Row(FITS, "train.jsonl:3"), Row(LONG, "train.jsonl:384")]
    data = prepare("chat", tmp_path, inputs={}, load=lambda: {"train": rows, "validation": rows})
    with pytest.raises(DataError, match=r"sft: train\.jsonl:384: has \d+ tokens"):
        report(tokenizer, Limits("error"), data.train)
    with pytest.raises(DataError, match=r"the first is sft: train\.jsonl:384"):
        report(tokenizer, Limits("drop", 0.1), Selected(data.train, [1, 0]))


def test_a_run_that_would_lose_too_much_refuses_to_start(tokenizer):
    assert report(tokenizer, Limits("drop", 0.25)).kept == 15
    with pytest.raises(DataError, match=r"sft: 5 of 20 records do not fit 64 tokens or are empty \(1 row too long, .*"
                       r"data\.max_dropped=0\.2; the longest has 2\d\d tokens, .*most length = 64"):  # fmt: skip
        report(tokenizer, Limits("drop", 0.2))
    with pytest.raises(DataError, match="holds no records"):
        report(tokenizer, Limits("drop", 0.2), [])


def test_batches_hold_what_is_kept(tokenizer):
    pipeline = sft_batches(RECORDS, tokenizer, batch_size=20, length=64, limits=Limits("drop", 0.5), seed=None)
    (batch,) = pipeline
    assert pipeline.report == report(tokenizer, Limits("drop", 0.5))
    assert batch["loss_mask"].any(axis=1).sum() == 15
    with pytest.raises(DataError, match="sft: record 1: has"):
        sft_batches(RECORDS, tokenizer, batch_size=2, length=64, seed=0, packing=True)


def test_prompts_that_are_left_out_do_not_move_the_numbers_of_the_others(tokenizer):
    records = [{"prompt": "long " * 30, "answer": "1"}, *({"prompt": f"p{n}", "answer": "1"} for n in range(1, 6))]
    shape = {"prompts_per_batch": 2, "max_prompt_length": 24, "limits": Limits("drop", 0.2)}
    batches = list(prompt_batches(records, tokenizer, **shape, seed=None))
    shown = {
        int(i): tokenizer.decode(tokens[mask].tolist())
        for batch in batches
        for i, tokens, mask in zip(batch["prompt_id"], batch["prompt_tokens"], batch["prompt_mask"], strict=True)
    }
    assert set(shown) == {1, 2, 3, 4, 5, -1} and all(f"p{i}" in shown[i] for i in range(1, 6))
    training = prompt_batches(records, tokenizer, seed=0, **shape)
    batch = next(iter(training))
    assert 0 not in batch["prompt_id"] and training.report.dropped == {"prompt too long": 1}
    with pytest.raises(DataError, match=r"prompts: record 0: the prompt has \d+ tokens, expected at most max_prompt_l"):
        prompt_batches(records, tokenizer, seed=0, **{**shape, "limits": Limits("error")})


def test_truncated_prompts_keep_their_start_and_their_end(tokenizer):
    records = [{"prompt": "".join(f"{n} " for n in range(40))}]
    limits = Limits("truncate", 0.0)
    pipeline = prompt_batches(records, tokenizer, prompts_per_batch=1, max_prompt_length=24, limits=limits, seed=None)
    (batch,) = pipeline
    assert batch["prompt_mask"].all() and pipeline.report.changed == {"truncated": 1}
    shown = tokenizer.decode(batch["prompt_tokens"][0].tolist(), show_markup=True)
    assert shown.startswith("<bos>") and shown.endswith(" 39 <|im_end|><|im_start|>assistant<|im_sep|>")


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("preferences", {"prompt": "p", "chosen": "a" * 200, "rejected": "b"}),
        ("unpaired", {"prompt": "p", "completion": "a" * 200, "label": True}),
        ("rankings", {"prompt": "p", "completions": ["a" * 200, "b"], "ranks": [0, 1]}),
        ("steps", {"prompt": "p", "steps": ["a" * 200], "labels": [1]}),
        ("prompts", {"prompt": "p" * 200}),
    ],
)
def test_every_kind_of_data_is_checked(tokenizer, kind, record):
    with pytest.raises(DataError, match=r"sft: record 0: .*\d+ tokens, expected at most"):
        report(tokenizer, Limits("error"), [record], kind)


def test_lengths_are_those_of_the_tokens(tokenizer):
    size = len(tokenizer.encode("yes"))
    whole = sft_batches([FITS], tokenizer, batch_size=1, length=64, seed=None)
    (batch,) = whole
    length = int((batch["segment_ids"] > 0).sum())
    assert report(tokenizer, Limits("error"), [FITS], length=length).kept == 1
    with pytest.raises(DataError, match=f"has {length} tokens, expected at most length = {length - 1}"):
        report(tokenizer, Limits("error"), [FITS], length=length - 1)
    assert whole.report.sizes == {"tokens": length, "target_tokens": size + 1}
    assert np.isclose(whole.report.metrics()["data/records"], 1.0)
