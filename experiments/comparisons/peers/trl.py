"""TRL as a system under test: SFTTrainer on examples, GRPOTrainer on prompts. Needs torch, transformers, trl, datasets.

The trainers own their loops, so a callback ends each repetition and waits there for the next.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import trl
from datasets import Dataset
from peers.transformers import make_llama, versions
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback

Work = Mapping[str, Any]

_FOREVER = 100_000


def main(work: Work, say: Callable[..., None]) -> None:
    """Serves one workload."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(work["threads"])
    torch.manual_seed(work["seed"])
    with tempfile.TemporaryDirectory() as name:
        # From a folder: GRPOTrainer loads its reference from where the policy came from.
        folder = Path(name)
        make_llama(work).save_pretrained(folder / "model")
        make_tokenizer(work["vocab_size"]).save_pretrained(folder / "model")
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        trainer = (grpo if work["kind"] == "grpo" else sft)(work, say, folder, model)
        parameters = sum(p.numel() for p in model.parameters())
        say(parameters=parameters, versions={**versions(), "trl": trl.__version__})
        trainer.train()


def make_tokenizer(vocab_size: int) -> Any:
    """A tokenizer whose word `t<id>` is the token `id`."""
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, **{f"t{i}": i for i in range(4, vocab_size)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
    )


def sft(work: Work, say: Callable[..., None], folder: Path, model: Any) -> Any:
    """A repetition is an epoch: batches of the examples in a new order, padded to the longest of each batch."""
    assert work["examples"], "trl takes part on examples only; full rows are transformers' case"
    rows = [{"input_ids": e["tokens"], "completion_mask": e["loss_mask"]} for e in work["examples"]]
    tokens = sum(len(e["tokens"]) for e in work["examples"])

    class Repetition(TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            say(tokens=tokens)

    config = trl.SFTConfig(
        max_length=work["length"],
        num_train_epochs=_FOREVER,
        completion_only_loss=True,
        **_common(work, folder, work["batch_size"]),
    )
    return trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Repetition()],
    )


def grpo(work: Work, say: Callable[..., None], folder: Path, model: Any) -> Any:
    """A repetition is a few iterations: generate, reward, log-probs of the reference, one update."""
    rows, length, iterations = (work["batch_size"] * work["group_size"], work["max_new_tokens"], work["iterations"])
    prompts = [{"prompt": " ".join(f"t{i}" for i in ids)} for ids in work["prompts"]]

    def even(completions: list[str], **_: Any) -> list[float]:
        ids = [[int(word[1:]) for word in text.split() if word[0] == "t"] for text in completions]
        return [sum(i % 2 == 0 for i in each) / max(len(each), 1) for each in ids]

    class Repetition(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step % iterations == 0:
                say(tokens=iterations * rows * length)

    config = trl.GRPOConfig(
        num_generations=work["group_size"],
        max_completion_length=length,
        max_steps=_FOREVER,
        beta=work["beta"],
        disable_dropout=True,
        generation_kwargs={"min_new_tokens": length},
        **_common(work, folder, rows),
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=[even],
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Repetition()],
    )


def _common(work: Work, folder: Path, rows: int) -> dict[str, Any]:
    """What keeps a trainer from doing anything but train."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": rows,
        "learning_rate": work["learning_rate"],
        "use_cpu": work["platform"] == "cpu",
        "bf16": work["model"]["compute_dtype"] == "bfloat16",
        "gradient_checkpointing": work["model"]["remat"] != "none",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": _FOREVER,
        "disable_tqdm": True,
        "seed": work["seed"],
    }
