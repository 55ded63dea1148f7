"""The quickstart at toy size: every stage and every arm in seconds. Also runnable, for tests that kill it."""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from experiments import quickstart

EVERY_STEP = 1e-9
"""Minutes between checkpoints: so few that each step has one."""


def tiny_config() -> ConfigDict:
    """A config with the quickstart's keys and stages, small enough for a test."""
    config = quickstart.get_config()
    config.model.update({"num_layers": 2, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "d_ff": 64})
    config.data.validation_one_in = 5
    config.data.text.max_bytes = 100_000
    config.data.problems.arithmetic.update({"train": 400, "test": 40, "max_steps": 2})
    config.data.tokenizer.vocab_size = 384
    config.pretrain.update({"steps": 6, "batch_size": 8, "length": 64, "log_every": 2, "eval_batches": 2})
    config.sft.update({"steps": 6, "batch_size": 8, "length": 64, "log_every": 2, "eval_batches": 2})
    config.sft.data.limit = 100
    config.rl.update({"steps": 4, "batch_size": 8, "length": 64, "log_every": 1, "eval_every": 2, "eval_problems": 8})
    config.rl.rollout.update({"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 24, "max_prompt_length": 40})
    config.rl.objective.dpo = {"pairs_per_prompt": 2}
    config.evaluation.update(
        {"problems": 8, "samples": 4, "k": (1, 4), "batch_problems": 8, "max_prompt_length": 40, "max_new_tokens": 24}
    )
    config.ablation.seeds = (0, 1)
    return config


def resumable_config(steps: int) -> ConfigDict:
    """A GRPO run with a reference and two updates a rollout, that saves at every iteration."""
    config = tiny_config()
    config.rl.update({"steps": steps, "checkpoint_every": EVERY_STEP, "eval_every": 10})
    config.rl.objective.grpo.beta = 0.01
    config.rl.rollout.epochs = 2
    # Untrained models are never right: reward the format's last line, so that there is something to learn.
    config.rl.reward.functions = ("final_line",)
    return config


if __name__ == "__main__":
    from research.config.resolve import resolve
    from research.core.interrupts import Interrupted, Interrupts, end
    from research.train.chain import run_chain

    interrupts = Interrupts()
    interrupts.install()
    try:
        run_chain(resolve(resumable_config(int(sys.argv[2]))), Path(sys.argv[1]), interrupts=interrupts)
    except Interrupted as stop:
        end(stop.number, str(stop))
