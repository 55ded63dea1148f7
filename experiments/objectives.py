"""Which objective makes the most of one SFT checkpoint and the same number of samples?

Varies: the objective of the last stage (and what pays or teaches it), all from one SFT checkpoint. Those that
  sample draw at most 4,096 completions; sft, dpo_given and prm_rerank learn from given data in as many updates.
Command: python -m launch.ablate --config=experiments/objectives.py:toy --workdir=runs/objectives
Hardware: 2 CPU cores (toy); 64 TPU v5p chips (pod, with data.tokenizer.path and the paths of data.problems,
  data.preferences and data.steps set).
Time: toy 58 minutes beside test suites on the same cores; pod not run.
Result: arms that learn from the verifier or the teacher end far above the control, those of learned scorers between
  (experiments/LOG.md).
"""

from ml_collections import ConfigDict

from experiments import base, quickstart

_TERSE = {"transform": "terse", "terse": {"fraction": 0.5}}
_RM = "rl.roles.reward=reward"
_SFT = ("rl.objective.name=sft", "rl.data.limit=2000", "rl.data.transform=terse", "rl.data.terse.fraction=0.5")

ARMS = {
    "sft": _SFT,
    "rejection_sampling": ("rl.objective.name=rejection_sampling",),
    "dpo_given": ("rl.objective.name=dpo", "rl.data.source=given"),
    "dpo": ("rl.objective.name=dpo",),
    "ipo": ("rl.objective.name=dpo", "rl.objective.dpo.loss_type=ipo"),
    "kto": ("rl.objective.name=kto",),
    "orpo": ("rl.objective.name=orpo",),
    "simpo": ("rl.objective.name=simpo",),
    "ppo_reward_model": ("rl.objective.name=ppo", "rl.reward.source=model", _RM, "rl.roles.value=reward"),
    "ppo": ("rl.objective.name=ppo",),
    "grpo": (),
    "dr_grpo": ("rl.objective.name=dr_grpo",),
    # At most as many groups as the others draw: half of them, and as many again to replace the useless ones.
    "dapo": (
        "rl.objective.name=dapo",
        "rl.rollout.prompts_per_step=16",
        "rl.rollout.resample_rounds=1",
        "rl.reward.overlong_buffer=8",
    ),
    "rloo": ("rl.objective.name=rloo",),
    "gspo": ("rl.objective.name=gspo",),
    "cispo": ("rl.objective.name=cispo",),
    "distill": ("rl.objective.name=distill", "rl.roles.teacher=teacher_sft"),
    "prm_rerank": (
        *_SFT,
        "rl.final_answer=prm",
        "rl.prm_score=mean",  # min, prod and last chose bare answers in an earlier run: one step, and no doubt in it
        "rl.roles.prm=prm",
    ),
    "prm_dense": ("rl.reward.step_coef=0.25", "rl.roles.prm=prm"),
}
"""The control first: more fine-tuning on the same data."""


def get_config(arg: str = "toy") -> ConfigDict:
    """All objectives; `arg` is toy or pod."""
    if arg not in ("", "toy", "pod"):
        raise ValueError(f"objectives: got {arg!r}, expected toy or pod")
    config = base.get_config()
    config.name = "objectives"
    config.question = "Which objective makes the most of one SFT checkpoint and the same number of samples?"
    config.stages = ("pretrain", "sft", "teacher_pretrain", "teacher_sft", "reward", "prm", "rl")
    others = {"teacher_pretrain": "next_token", "teacher_sft": "sft", "reward": "reward_model", "prm": "prm"}
    config.update({name: base.stage(objective) for name, objective in others.items()})
    for name in ("teacher_pretrain", "teacher_sft"):
        config[name].model = "teacher_model"
    config.ablation.control = "sft"
    config.ablation.metric = "eval/accuracy"  # of the answer that the system gives; reranking picks one of four
    config.ablation.arms = dict(ARMS)
    (_pod if arg == "pod" else _toy)(config)
    return config


def _toy(config: ConfigDict) -> None:
    """The quickstart's model and data; a teacher three times as large."""
    quickstart.fine_tuned(config)
    quickstart.reinforced(config)
    config.rl.update({"length": 68, "eval_every": 8})

    config.teacher_model.update(base.decoder(layers=4, d_model=128, heads=4, d_ff=384))
    config.teacher_pretrain.update(config.pretrain)
    config.teacher_pretrain.steps = 1000
    config.teacher_pretrain.optimizer.learning_rate = 2e-3
    # Half of the student's demonstrations leave the steps out, as people's do; the teacher's never.
    config.teacher_sft.update({"steps": 150, "batch_size": 32, "length": 64, "log_every": 25})
    config.teacher_sft.data.limit = 2_000
    config.teacher_sft.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 10})

    for name in ("reward", "prm"):
        stage = config[name]
        stage.update({"steps": 300, "batch_size": 32, "length": 64, "log_every": 50, "eval_batches": 8})
        stage.optimizer.update({"learning_rate": 5e-4, "warmup_steps": 20})
        stage.data.update(_TERSE)  # scorers that never saw a bare answer take it for a safe one
    config.reward.objective.reward_model = {"center_coef": 0.01}


def _pod(config: ConfigDict) -> None:
    """An 8B student and a 32B teacher on a file of problems; chains of thought of up to 2,048 tokens."""
    config.model.update(base.decoder(layers=32, d_model=4096, heads=32, d_ff=14336, kv_heads=8))
    config.teacher_model.update(base.decoder(layers=64, d_model=5120, heads=40, d_ff=27648, kv_heads=8))
    for model in (config.model, config.teacher_model):
        model.update({"scan_layers": True, "remat": "full", "compute_dtype": "bfloat16", "max_length": 4096})
        model.update({"tie_embeddings": False, "rope_theta": 500_000.0, "logprob_chunk": 256})
    config.mesh.update({"data": 1, "fsdp": -1})
    config.data.problems.task = "jsonl"
    config.data.tokenizer.vocab_size = 32_000

    for name in ("pretrain", "teacher_pretrain"):
        stage = config[name]
        stage.update({"steps": 20_000, "batch_size": 1024, "length": 4096})
        stage.optimizer.update({"learning_rate": 3e-4, "warmup_steps": 1_000})
    for name in ("sft", "teacher_sft", "reward", "prm"):
        stage = config[name]
        stage.update({"steps": 1_000, "batch_size": 128, "length": 2048})
        stage.optimizer.update({"learning_rate": 1e-5, "warmup_steps": 50, "adamw": {"weight_decay": 0.0}})

    rl, lengths = config.rl, {"max_prompt_length": 512, "max_new_tokens": 2048}
    rl.update({"steps": 400, "batch_size": 1024, "length": 2560, "log_every": 1, "eval_every": 50})
    rl.update({"eval_problems": 256, "micro_batches": 4})
    rl.optimizer.update({"learning_rate": 1e-6, "schedule": "constant", "adamw": {"weight_decay": 0.0}})
    rl.rollout.update({"prompts_per_step": 128, "group_size": 16, **lengths})
    config.evaluation.update({"problems": 1024, "samples": 8, "k": (1, 8), **lengths})
    config.ablation.arms = {
        **ARMS,
        "sft": ("rl.objective.name=sft",),
        "prm_rerank": ("rl.objective.name=sft", "rl.final_answer=prm", "rl.roles.prm=prm"),
        "dapo": (
            "rl.objective.name=dapo",
            "rl.rollout.prompts_per_step=64",
            "rl.rollout.resample_rounds=1",
            "rl.reward.overlong_buffer=512",
        ),
    }
