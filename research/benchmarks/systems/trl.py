"""TRL as a system under test: SFTTrainer on examples, GRPOTrainer on prompts. Needs torch, transformers, trl, datasets.

The trainers own their loops, so a callback ends each repetition and waits there for the next.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.benchmarks.systems.channel import Channel

Work = Mapping[str, Any]

_FOREVER = 100_000


def main() -> None:
    """Serves one workload."""
    channel = Channel()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch

    from research.benchmarks.systems.transformers import make_llama

    torch.set_num_threads(channel.workload["threads"])
    torch.manual_seed(channel.workload["seed"])
    with tempfile.TemporaryDirectory() as folder:
        # From a folder: GRPOTrainer loads its reference from where the policy came from.
        make_llama(channel.workload["model"]).save_pretrained(Path(folder, "model"))
        make_tokenizer(channel.workload["model"]["vocab_size"]).save_pretrained(Path(folder, "model"))
        (grpo if channel.workload["kind"] == "grpo_iteration" else sft)(channel, Path(folder))


def make_tokenizer(vocab_size: int) -> Any:
    """A tokenizer whose word `t<id>` is the token `id`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, **{f"t{i}": i for i in range(4, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
    )


def describe(channel: Channel, model: Any) -> None:
    """Names the versions and starts the clock."""
    import torch
    import transformers
    import trl

    channel.describe(
        parameters=sum(p.numel() for p in model.parameters()),
        versions={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    )


def sft(channel: Channel, folder: Path) -> None:
    """A repetition is an epoch: batches of the examples in a new order, padded to the longest of each batch."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    work = channel.workload
    if not work["examples"]:
        raise ValueError("trl takes part on examples only; full rows are transformers' case")
    tokens = float(sum(len(each["tokens"]) for each in work["examples"]))
    rows = Dataset.from_list(
        [{"input_ids": each["tokens"], "completion_mask": each["loss_mask"]} for each in work["examples"]]
    )

    class Lap(TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            channel.lap(tokens=tokens)

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = SFTConfig(
        max_length=work["length"],
        num_train_epochs=_FOREVER,
        completion_only_loss=True,
        **_common(work, folder, work["batch_size"]),
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Lap()],
    )
    describe(channel, model)
    trainer.train()


def grpo(channel: Channel, folder: Path) -> None:
    """A repetition is a few iterations: generate, reward, log-probs of the reference, one update."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    work = channel.workload
    rows, length, iterations = (
        work["prompts_per_step"] * work["group_size"],
        work["max_new_tokens"],
        work["iterations"],
    )
    prompts = Dataset.from_list([{"prompt": " ".join(f"t{i}" for i in ids)} for ids in work["prompts"]])

    def even(completions: list[str], **_: Any) -> list[float]:
        ids = [[int(word[1:]) for word in text.split() if word[0] == "t"] for text in completions]
        return [sum(i % 2 == 0 for i in each) / max(len(each), 1) for each in ids]

    class Lap(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step % iterations == 0:
                channel.lap(tokens=float(iterations * rows * length))

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = GRPOConfig(
        num_generations=work["group_size"],
        max_completion_length=length,
        max_steps=_FOREVER,
        beta=work["objective"]["beta"],
        disable_dropout=True,
        generation_kwargs={"min_new_tokens": length},
        **_common(work, folder, rows),
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[even],
        args=config,
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Lap()],
    )
    describe(channel, model)
    trainer.train()


def _common(work: Work, folder: Path, rows: int) -> dict[str, Any]:
    """What keeps a trainer from doing anything but train."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": rows,
        "learning_rate": work["optimizer"]["learning_rate"],
        "use_cpu": work["platform"] == "cpu",
        "bf16": work["model"]["compute_dtype"] == "bfloat16",
        "gradient_checkpointing": work["model"]["remat"] != "none",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": _FOREVER,
        "disable_tqdm": True,
        "seed": work["seed"],
    }


if __name__ == "__main__":
    main()
