"""How far do more samples carry one fine-tuned policy, and which scorer picks best among them?

Varies: nothing in training: one policy (`sft`) and three scorers that start from it, a Bradley-Terry reward model
  (`reward`), an outcome scorer (`orm`) and a process scorer (`prm`). What varies is N, and who chooses.
Command: python -m launch.train --config=experiments/test_time_compute.py --workdir=runs/test_time_compute
  python -m launch.scale --stage=runs/test_time_compute/stages/sft-... --output=runs/test_time_compute/scaling
  --scorers=runs/test_time_compute/stages/reward-...,.../orm-...,.../prm-... --prm_score=min,mean --samples=64
  --max_prompt_length=24 --max_new_tokens=44
Hardware: 2 CPU cores.
Time: 25 minutes to train and 13 to sample, score and draw, beside other work on the same cores.
Result: accuracy of one sample 48%; of 64, majority 96.5% and pass@64 99.2%. Best of N by `reward` or the mean of `prm`
  ends where it began: 82% at N = 8, 47% and 43% at N = 64; by `orm` or the least sure step of `prm` it falls from
  the first N on, to 4%: they prefer bare answers.
"""

from ml_collections import ConfigDict

from experiments import base, quickstart


def get_config(arg: str = "") -> ConfigDict:
    """The quickstart's policy and three scorers; `arg` is not used."""
    config = base.get_config(arg)
    config.name = "test_time_compute"
    config.question = "How far do more samples carry a policy, and which scorer picks best among them?"
    config.stages = ("pretrain", "sft", "reward", "orm", "prm")
    for name, objective in (("reward", "reward_model"), ("orm", "orm"), ("prm", "prm")):
        config[name] = base.stage(objective)
    quickstart.fine_tuned(config)  # half of the answers come without their steps, so samples differ in kind
    for name in ("reward", "orm", "prm"):
        stage = config[name]
        stage.update({"steps": 300, "batch_size": 32, "length": 64, "log_every": 50, "eval_batches": 8})
        stage.optimizer.update({"learning_rate": 5e-4, "warmup_steps": 20})
    # Scorers of steps must know bare answers too; both see the same solutions.
    for name in ("orm", "prm"):
        config[name].data.update({"transform": "terse", "terse": {"fraction": 0.5}})
    config.reward.objective.reward_model = {"center_coef": 0.01}
    return config
