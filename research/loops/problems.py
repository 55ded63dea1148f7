"""Sampling problems on the device and reading what came back: shared by the online loop and the evaluation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from models.config import ModelConfig
from models.transformer import Params
from research.algorithms.base import completion_rows
from research.batch import SequenceBatch
from research.data.examples import Records
from research.data.pipelines import prompt_eval_batches
from research.data.tokenizer import Tokenizer
from research.errors import ConfigError
from research.evals.exact_match import Completion, Evaluation, Problem, score_completions
from research.evals.passk import Values, majority_at_k
from research.loops.judge import make_judge
from research.loops.session import StageRun
from research.mesh import to_device
from research.rewards.verifiers import extract_final_answer, get_verifier
from research.rewards.verify import score_safely
from research.sampling.methods import SamplingMethod
from research.sampling.sampler import STOPPED, Completions, Prompts, SamplerScalars, SamplerSpec, sample
from research.sources import View, answer_of, question_of


class Decoded(NamedTuple):
    """Completions on the host, rows laid out [p1, p1, ..., p2, p2]."""

    arrays: Completions
    texts: list[str]
    stopped: np.ndarray


def sampler_spec(
    tokenizer: Tokenizer, *, samples: int, max_new_tokens: int, method: SamplingMethod
) -> SamplerSpec:
    """A chat model's rollout: it ends with the end-of-turn piece."""
    return SamplerSpec(
        max_new_tokens=max_new_tokens,
        samples_per_prompt=samples,
        stop_tokens=(tokenizer.im_end_id, tokenizer.eos_id),
        pad_id=tokenizer.pad_id,
        method=method,
    )


def sampler_scalars(*, seed: int, step: int, temperature: float, top_p: float = 1.0) -> SamplerScalars:
    """The traced numbers of a rollout."""
    return SamplerScalars(np.int32(seed), np.int32(step), np.float32(temperature), np.float32(top_p))


def sample_prompts(
    params: Params,
    prompts: Mapping[str, np.ndarray],
    scalars: SamplerScalars,
    *,
    model: ModelConfig,
    spec: SamplerSpec,
    mesh: Any,
    tokenizer: Tokenizer,
) -> Decoded:
    """Draws completions of a batch of prompts and decodes them; markup is left out of the texts."""
    batch = Prompts(prompts["prompt_tokens"], prompts["prompt_mask"], prompts["prompt_id"])
    out = jax.device_get(sample(params, to_device(mesh, batch), scalars, config=model, spec=spec))
    texts = [
        tokenizer.decode(tokens[:length].tolist())
        for tokens, length in zip(out.tokens, out.lengths, strict=True)
    ]
    return Decoded(out, texts, out.stop_reason == STOPPED)


def decoded_rows(prompts: Mapping[str, np.ndarray], out: Decoded, group_size: int) -> SequenceBatch:
    """Prompt + completion rows `[B, L + N]` of sampled completions, on the host."""
    prompt_tokens, prompt_mask = (
        np.repeat(prompts[key], group_size, axis=0) for key in ("prompt_tokens", "prompt_mask")
    )
    return completion_rows(
        prompt_tokens, prompt_mask, out.arrays.tokens, out.arrays.mask, np.ones(len(prompt_mask))
    )


def problem_metrics(run: StageRun, params: Params, final: dict[str, float] | None = None) -> dict[str, float]:
    """A point of the learning curve: means over the first `eval_problems` held-out problems.

    Where `final` is given, all of the final evaluation's problems are sampled and their means put into it; the
    point is then of the first ones among them, so that a curve is of the same problems throughout.
    """
    count = run.stage.eval_problems
    found = evaluate_problems(run, params, count if final is None else max(count, run.evaluation.problems))
    if final is not None:
        n = run.evaluation.problems
        final.update({name: float(values[:n].mean()) for name, values in found.items()})
    return {name: float(values[:count].mean()) for name, values in found.items()}


def evaluate_problems(run: StageRun, params: Params, count: int) -> dict[str, Values]:
    """Samples the first `count` held-out problems as the evaluation section says, and scores them.

    Returns:
      By metric, one value a problem; `eval/accuracy` is that of the one answer that the stage gives to a problem
      (`final_answer`): of a sample, of the majority, or of the sample that a scorer likes best.
    """
    how = run.evaluation
    greedy = how.temperature == 0
    spec = sampler_spec(
        run.sources.tokenizer,
        samples=how.samples,
        max_new_tokens=how.max_new_tokens,
        method=SamplingMethod(greedy=greedy),
    )
    scalars = sampler_scalars(seed=how.seed, step=0, temperature=how.temperature or 1.0)
    judge = make_judge(run) if run.stage.final_answer in ("reward", "prm") else None
    scores: list[np.ndarray] = []

    def look(prompts: Mapping[str, np.ndarray], out: Decoded) -> None:
        if judge is not None:
            judged = judge(decoded_rows(prompts, out, how.samples))
            scores.append(judged.reshape(-1, how.samples)[prompts["prompt_id"] >= 0])

    found = score_problems(
        params,
        View(run.sources.held_out, count),
        spec,
        scalars,
        model=run.model,
        mesh=run.mesh,
        tokenizer=run.sources.tokenizer,
        batch_problems=how.batch_problems,
        max_prompt_length=how.max_prompt_length,
        verifier=run.sources.section["problems"]["verifier"],
        ks=how.k,
        look=look,
    )
    correct = np.array([problem.correct for problem in found.problems], np.float64)
    if judge is not None:
        best = np.concatenate(scores).argmax(axis=1)
        accuracy = correct[np.arange(len(correct)), best]
    elif run.stage.final_answer == "majority":
        votes = [problem.extracted for problem in found.problems]
        right = [problem.correct for problem in found.problems]
        accuracy = majority_at_k(votes, right, how.samples)
    else:
        accuracy = correct.mean(axis=1)
    return {**found.per_problem, "eval/accuracy": accuracy}


def score_problems(
    params: Params,
    problems: Records,
    spec: SamplerSpec,
    scalars: SamplerScalars,
    *,
    model: ModelConfig,
    mesh: Any,
    tokenizer: Tokenizer,
    batch_problems: int,
    max_prompt_length: int,
    verifier: str,
    ks: Sequence[int],
    look: Callable[[Mapping[str, np.ndarray], Decoded], None] = lambda _prompts, _out: None,
) -> Evaluation:
    """Exact match, pass@k and maj@k on problems, one pass in order; `look` sees every batch of samples."""
    if not len(problems):
        raise ConfigError("evaluation: there are no held-out problems, expected at least one")
    batches = prompt_eval_batches(
        problems, tokenizer, prompts_per_batch=batch_problems, max_prompt_length=max_prompt_length
    )
    G = spec.samples_per_prompt
    questions: list[Problem] = []
    completions: list[list[Completion]] = []
    for arrays in batches:
        out = sample_prompts(params, arrays, scalars, model=model, spec=spec, mesh=mesh, tokenizer=tokenizer)
        look(arrays, out)
        for row, prompt_id in enumerate(arrays["prompt_id"]):
            if prompt_id < 0:  # fills the last batch
                continue
            record = problems[int(prompt_id)]
            ids = arrays["prompt_tokens"][row][arrays["prompt_mask"][row]].tolist()
            questions.append(Problem(question_of(record), ids, answer_of(record)))
            group = range(row * G, (row + 1) * G)
            completions.append(
                [Completion(out.texts[i], int(out.arrays.lengths[i]), not out.stopped[i]) for i in group]
            )
    right, errors, verify = {}, np.zeros(len(questions)), get_verifier(verifier)
    for number, (problem, drawn) in enumerate(zip(questions, completions, strict=True)):
        texts, answers = [completion.text for completion in drawn], [problem.answer] * G
        scored = score_safely(texts, answers, verify, prompt_ids=[number] * G)
        errors[number] = len(scored.errors)
        right.update(
            {(text, problem.answer): r >= 1.0 for text, r in zip(texts, scored.rewards, strict=True)}
        )
    found = score_completions(
        questions,
        completions,
        verify=lambda text, answer: right[text, answer],
        extract=extract_final_answer,
        ks=ks,
    )
    if errors.any():  # a verifier that raises costs a sample, not the run
        found.per_problem["eval/verifier_errors"] = errors
    return found
