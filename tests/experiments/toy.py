"""Any experiment at toy size: its stages, objectives and options stay, everything that takes time shrinks."""

import json
import string
from pathlib import Path

from ml_collections import ConfigDict

from research.analysis.glossary import describe
from research.core.metrics import METRICS, PERFORMANCE, load_metrics

DOCUMENTS = 40
PROBLEMS = 40


def write_data(folder: Path) -> tuple[Path, Path]:
    """A text corpus that has every printable character, and a JSONL file of problems."""
    text, problems = folder / "text.jsonl", folder / "problems.jsonl"
    letters = string.ascii_letters + string.digits + string.punctuation + " \n"
    lines = [json.dumps({"text": f"doc {i} {letters}"}) for i in range(DOCUMENTS)]
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [json.dumps({"prompt": f"{i}+1", "completion": f"so {i + 1}\n#### {i + 1}"}) for i in range(PROBLEMS)]
    problems.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return text, problems


def shrink(config: ConfigDict, folder: Path) -> ConfigDict:
    """Two steps of each stage on two layers; all experiments share one vocabulary and so one compilation."""
    text, problems = write_data(folder)
    config = config.copy_and_resolve_references()
    for model in (config.model, config.teacher_model):
        model.update({"num_layers": 2, "d_model": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "d_ff": 32})
        model.update({"max_length": 64, "scan_layers": False, "remat": "none", "compute_dtype": "float32"})
    config.data.validation_one_in = 5
    config.data.text = {"path": str(text)}
    config.data.tokenizer.update({"path": "", "model_type": "char", "vocab_size": 0})
    config.data.problems.jsonl = {"path": str(problems)}
    arithmetic = {"train": 64, "test": 16, "min_steps": 2, "max_steps": 2}
    config.data.problems.arithmetic = {**config.data.problems.get("arithmetic", {}), **arithmetic}
    for kind in ("preferences", "rankings", "steps"):
        config.data[kind].update({"train": 48, "validation": 8})
    lengths = {"max_prompt_length": 32, "max_new_tokens": 8}
    for name in config.stages:
        stage = config[name]
        stage.update({"steps": 2, "batch_size": 8, "length": 56, "log_every": 1, "eval_every": 0})
        stage.update({"eval_batches": 1, "eval_problems": 8, "checkpoint_every": 0.0})
        stage.data.limit = min(stage.data.get("limit", 0), 32)
        stage.rollout.update({"prompts_per_step": 8, "group_size": 4, **lengths})
        for name in ("dpo", "orpo", "simpo", "cpo"):
            stage.objective[name] = {**stage.objective.get(name, {}), "pairs_per_prompt": 2}
        stage.objective.rejection_sampling = {"keep_per_prompt": 2}
    config.evaluation.update({"problems": 8, "samples": 4, "k": (1, 4), "batch_problems": 8, **lengths})
    config.ablation.seeds = (0,)
    return config


def undescribed(workdir: Path) -> set[str]:
    """The metrics that any stage of a working directory has logged and that the glossary does not explain."""
    files = [path for name in (METRICS, PERFORMANCE) for path in (workdir / "stages").glob(f"*/{name}")]
    logged = {name for path in files for row in load_metrics(path) for name in row} - {"step"}
    assert logged, f"{workdir}: nothing was logged"
    return {name for name in logged if describe(name) is None}
