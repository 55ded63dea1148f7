"""TRL's own trainers on a tiny Llama for a few optimizer steps: what they read and what they became.

Needs torch, transformers and trl. Everything is on one CPU in float32 without dropout; the rows are text of a
word-level tokenizer whose padding token is its end token (except where a reward head must find the end).
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from models.config import ModelConfig

STEPS = 3
BETA, TEMPERATURE, GROUP = 0.2, 0.9, 4
EPSILON, GRPO_RATE = 0.1, 3e-4
"""Such that after one step some ratios are inside of the clip and some outside."""
OPTIMIZER = {
    "learning_rate": 3e-3,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
}
PAD, END = 1, 0


class Recording(NamedTuple):
    """One training run.

    Attributes:
      batches: what each step's loss was given, as NumPy arrays.
      losses: each step's loss.
      states: the parameters after each step, by transformers' names.
    """

    batches: list[dict[str, np.ndarray]]
    losses: list[float]
    states: list[dict[str, np.ndarray]]


def sft(config: ModelConfig, state: dict[str, np.ndarray], folder: Path) -> Recording:
    """Prompts and completions, completion tokens only."""
    texts = [{"prompt": words(i, 3 + i % 3), "completion": words(40 + i, 1 + i % 5)} for i in range(12)]
    args = SFTConfig(**arguments(folder))
    return record(SFTTrainer, causal(config, state), args, texts, tokenizer(config))


def dpo(config: ModelConfig, state: dict[str, np.ndarray], folder: Path) -> Recording:
    """Pairs; the reference is the starting policy."""
    texts = [
        {"prompt": words(i, 2 + i % 3)} | {"chosen": words(40 + i, 1 + i % 5), "rejected": words(80 + i, 1 + i % 4)}
        for i in range(12)
    ]
    args = DPOConfig(**arguments(folder), beta=BETA)
    return record(DPOTrainer, causal(config, state), args, texts, tokenizer(config), ref_model=causal(config, state))


def grpo(config: ModelConfig, state: dict[str, np.ndarray], folder: Path, corrected: bool = False) -> Recording:
    """Three updates on one batch of its own samples: the ratio leaves 1, and some of it is clipped."""
    texts = [{"prompt": words(i, 2 + i % 3)} for i in range(2)]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [paid(ids) for ids in completion_ids]

    args = GRPOConfig(
        **arguments(folder, batch_size=2 * GROUP) | {"learning_rate": GRPO_RATE},
        beta=BETA,
        temperature=TEMPERATURE,
        num_generations=GROUP,
        num_iterations=STEPS,
        max_completion_length=6,
        loss_type="grpo",
        epsilon=EPSILON,
        use_bias_correction_kl=corrected,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"},
    )
    causal(config, state).save_pretrained(folder / "start")  # the trainer reads its reference from there
    model = LlamaForCausalLM.from_pretrained(folder / "start", attn_implementation="eager")
    return record(GRPOTrainer, model, args, texts, tokenizer(config), reward_funcs=reward)


def grpo_corrected(config: ModelConfig, state: dict[str, np.ndarray], folder: Path) -> Recording:
    """With TRL's default, a KL term times the ratio."""
    return grpo(config, state, folder, corrected=True)


def paid(completion: list[int]) -> float:
    """A reward that has little to do with anything."""
    return sum(t % 3 == 0 for t in completion) - 0.1 * len(completion)


def reward_model(config: ModelConfig, state: dict[str, np.ndarray], folder: Path) -> Recording:
    """Pairs with margins; transformers finds a row's last token by its id, so padding has its own."""
    texts = [
        {"prompt": words(i, 2 + i % 3), "margin": 0.1 * (i % 4)}
        | {"chosen": words(40 + i, 1 + i % 5), "rejected": words(80 + i, 1 + i % 4)}
        for i in range(12)
    ]
    model = LlamaForSequenceClassification(llama_config(config, num_labels=1, pad_token_id=PAD))
    load(model, state)
    args = RewardConfig(**arguments(folder), center_rewards_coefficient=0.05)
    return record(RewardTrainer, model, args, texts, tokenizer(config, pad=PAD))


def step_scorer(config: ModelConfig, state: dict[str, np.ndarray], folder: Path) -> Recording:
    """Token classification; TRL 1.16 ships no PRM trainer, and the one it had left the loss to transformers."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        ids = rng.integers(2, config.vocab_size, 4 + i % 5).tolist()
        labels = [int(rng.integers(2)) if t in (2, len(ids) - 1) else -100 for t in range(len(ids))]
        rows.append({"input_ids": ids, "labels": labels})
    model = LlamaForTokenClassification(llama_config(config, num_labels=2, classifier_dropout=0.0))
    model.score = torch.nn.Linear(config.d_model, 2, bias=False)  # ours has no bias
    load(model, state)
    args = TrainingArguments(**arguments(folder), remove_unused_columns=False)
    return record(Trainer, model, args, rows, None, data_collator=pad_right)


def words(seed: int, length: int) -> str:
    """Words of the tokenizer, a space before the first, so that texts join at a token's edge."""
    ids = np.random.default_rng(seed).integers(2, 40, length)
    return "".join(f" w{i:03d}" for i in ids)


def tokenizer(config: ModelConfig, pad: int = END) -> PreTrainedTokenizerFast:
    """One token a word."""
    names = [f"w{i:03d}" for i in range(config.vocab_size)]  # no name within another: special ones are cut out
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[2]))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=names[END], pad_token=names[pad])


def llama_config(config: ModelConfig, **extra: Any) -> LlamaConfig:
    """The same shapes."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        attention_dropout=0.0,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END,
        attn_implementation="eager",
        **{"pad_token_id": END} | extra,
    )


def causal(config: ModelConfig, state: dict[str, np.ndarray]) -> LlamaForCausalLM:
    """A language model with the given parameters."""
    model = LlamaForCausalLM(llama_config(config))
    load(model, state)
    return model


def load(model: torch.nn.Module, state: dict[str, np.ndarray]) -> None:
    """Every parameter is given; only a tied read-out has no entry of its own."""
    tensors = {name: torch.tensor(value) for name, value in state.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"state: missing {missing}, unexpected {unexpected}")


def arguments(folder: Path, batch_size: int = 4) -> dict[str, Any]:
    """What all trainers are told: AdamW at a constant rate, clipped, float32."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": batch_size,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
        **OPTIMIZER,
    }


def pad_right(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Token ids, labels and the attention mask of rows of unequal length."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": END, "labels": -100, "attention_mask": 0}
    full = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in full])
        for name, value in fill.items()
    }


def record(owner: Any, model: Any, args: Any, rows: list[dict[str, Any]], processing: Any, **extra: Any) -> Recording:
    """Trains, and keeps what each call of `compute_loss` was given and what each step left behind."""
    recording = Recording([], [], [])

    class Recorded(owner):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
            tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
            recording.batches.append({name: x.detach().numpy().copy() for name, x in tensors.items()})
            found = super().compute_loss(model, inputs, *more, **options)
            recording.losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            del args, state, control
            kept = {name: x.detach().numpy().copy() for name, x in model.named_parameters()}
            recording.states.append(kept)

    torch.manual_seed(0)
    if processing is not None:
        extra["processing_class"] = processing
    trainer = Recorded(model=model, args=args, train_dataset=Dataset.from_list(rows), callbacks=[Keep()], **extra)
    trainer.train()
    return recording
