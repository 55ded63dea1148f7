"""The quickstart at toy size: every stage and every arm in seconds. Also runnable, for tests that kill it."""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from experiments import quickstart


def tiny_config() -> ConfigDict:
    """A config with the quickstart's keys and stages, small enough for a test."""
    config = quickstart.get_config().unlock()
    config.model.update(
        {"num_layers": 2, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "d_ff": 64}
    )
    config.data.text.update({"max_bytes": 100_000, "validation_one_in": 5})
    config.data.problems.update({"train": 400, "test": 40, "max_steps": 2})
    config.data.tokenizer.vocab_size = 384
    config.pretrain.update({"steps": 6, "batch_size": 8, "length": 64, "log_every": 2, "eval_batches": 2})
    config.sft.update({"steps": 6, "batch_size": 8, "length": 64, "log_every": 2, "eval_batches": 2})
    config.sft.data.limit = 100
    config.rl.update(
        {"steps": 4, "batch_size": 8, "length": 64, "log_every": 1, "eval_every": 2, "eval_problems": 8}
    )
    config.rl.rollout.update(
        {"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 24, "max_prompt_length": 40}
    )
    config.rl.objective.dpo.pairs_per_prompt = 2
    config.evaluation.update(
        {
            "problems": 8,
            "samples": 4,
            "k": (1, 4),
            "batch_problems": 8,
            "max_prompt_length": 40,
            "max_new_tokens": 24,
        }
    )
    config.ablation.seeds = (0, 1)
    return config.lock()


def resumable_config(steps: int) -> ConfigDict:
    """A GRPO run with a reference and two updates a rollout, that saves at every third iteration."""
    config = tiny_config().unlock()
    config.rl.update({"steps": steps, "checkpoint_every": 3, "eval_every": 10})
    config.rl.objective.grpo.beta = 0.01
    config.rl.rollout.epochs = 2
    # Untrained models are never right: reward the format's last line, so that there is something to learn.
    config.data.problems.verifier = "final_line"
    return config.lock()


if __name__ == "__main__":
    from research.config.resolve import resolve
    from research.train.chain import run_chain

    run_chain(resolve(resumable_config(int(sys.argv[2]))), Path(sys.argv[1]))
