"""Sampling problems on the device and reading what came back: shared by the online loop and the evaluation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from models.config import ModelConfig
from models.transformer import Params
from research.algorithms.base import completion_rows
from research.config.bridge import old_verifier
from research.config.sections import Sampler
from research.core.batch import SequenceBatch
from research.core.errors import ConfigError
from research.core.mesh import to_device
from research.data.examples import Records
from research.data.pipelines import prompt_eval_batches
from research.data.tokenizer import Tokenizer
from research.environments.tool_use import ToolUse, was_cut
from research.environments.turns import RowTurns
from research.evals.exact_match import Completion, Evaluation, Problem, score_completions
from research.evals.passk import Values, majority_at_k
from research.rewards.learned import ProcessScorer, RewardScorer
from research.rewards.verifiers import get_verifier
from research.rewards.verify import score_safely
from research.sampling.engine import sample_refilled
from research.sampling.methods import SamplingMethod
from research.sampling.rows import RowCallback
from research.sampling.sampler import sample
from research.sampling.tool_turns import ToolCallback
from research.sampling.types import (
    STOPPED,
    Completions,
    EngineSpec,
    Prompts,
    SamplerScalars,
    SamplerSpec,
    make_scalars,
)
from research.tasks.answers import extract_final_answer
from research.tasks.sources import View, answer_of, question_of
from research.train.session import StageRun


class Decoded(NamedTuple):
    """Completions on the host, rows laid out [p1, p1, ..., p2, p2], and what drawing them cost.

    Attributes:
      arrays: what was sampled.
      texts: what is verified: each completion behind the last result that it was given, without markup. A call's
        arguments and a tool's words are thus never taken for an answer.
      stopped: `[B]` bool, False where a completion was cut: at its limit of tokens, or at a call that was not
        answered.
      metrics: of the sampler.
      given: `[B, N]` bool, the results among the tokens; None without tools.
      dialogues: whole completions with their markup; None without tools.
      turns: where each sampled row stood at its end; empty without tools.
    """

    arrays: Completions
    texts: list[str]
    stopped: np.ndarray
    metrics: dict[str, float]
    given: np.ndarray | None = None
    dialogues: list[str] | None = None
    turns: tuple[RowTurns, ...] = ()

    @property
    def lengths(self) -> np.ndarray:
        """`[B]` tokens that the model drew, the stop token included."""
        return self.arrays.lengths if self.given is None else self.arrays.lengths - self.given.sum(axis=1)

    @property
    def shown(self) -> list[str]:
        """The completions as a person should read them."""
        return self.texts if self.dialogues is None else self.dialogues


def sampler_spec(
    tokenizer: Tokenizer,
    sampler: Sampler,
    *,
    samples: int,
    max_new_tokens: int,
    method: SamplingMethod,
    tools: ToolUse | None = None,
) -> SamplerSpec:
    """A chat model's rollout: it ends with the end-of-turn piece.

    Raises:
      ConfigError: tools without slots.
    """
    if tools is not None and not sampler.slots:
        raise ConfigError("sampler.slots: got 0, expected > 0 with tools")
    forced = 0 if tools is None else max_new_tokens  # results are cut to what is left of it
    return SamplerSpec(
        max_new_tokens=max_new_tokens,
        samples_per_prompt=samples,
        stop_tokens=(tokenizer.im_end_id, tokenizer.eos_id),
        pad_id=tokenizer.pad_id,
        method=method,
        cache_bucket=sampler.cache_bucket,
        int8_cache=sampler.int8_cache,
        weights=sampler.weights,
        engine=EngineSpec(sampler.slots, sampler.chunk, sampler.admit, max_forced=forced)
        if sampler.slots
        else None,
    )


def sample_prompts(
    params: Params,
    prompts: Mapping[str, np.ndarray],
    scalars: SamplerScalars,
    *,
    model: ModelConfig,
    spec: SamplerSpec,
    mesh: Any,
    tokenizer: Tokenizer,
    tools: ToolUse | None = None,
) -> Decoded:
    """Draws completions of a batch of prompts and decodes them; calls of `tools` are answered on the way."""
    batch = Prompts(prompts["prompt_tokens"], prompts["prompt_mask"], prompts["prompt_id"])
    metrics: dict[str, float] = {}
    if spec.engine is None:
        out = jax.device_get(sample(params, to_device(mesh, batch), scalars, config=model, spec=spec))
    else:
        calls = None if tools is None else ToolCallback(tools.turns(spec.max_new_tokens))
        out, metrics = _refilled(params, batch, scalars, model, spec, calls)
        if calls is not None:
            states = tuple(calls.states[row] for row in range(len(out.tokens)))
            return decode_dialogues(out, states, tokenizer, metrics)
    texts = [
        tokenizer.decode(tokens[:length].tolist())
        for tokens, length in zip(out.tokens, out.lengths, strict=True)
    ]
    return Decoded(out, texts, out.stop_reason == STOPPED, metrics)


def _refilled(
    params: Params,
    prompts: Prompts,
    scalars: SamplerScalars,
    model: ModelConfig,
    spec: SamplerSpec,
    callback: RowCallback | None,
) -> tuple[Completions, dict[str, float]]:
    """Completions by the engine, of no tokens for the rows at the end that only fill the batch: no prompt, no slot."""
    real = int((prompts.prompt_ids >= 0).sum())
    asked = jax.tree.map(lambda x: x[:real], prompts)
    out, stats = sample_refilled(params, asked, scalars, config=model, spec=spec, callback=callback)
    fill = (len(prompts.prompt_ids) - real) * spec.samples_per_prompt
    filled = jax.tree.map(lambda x: np.pad(x, ((0, fill),) + ((0, 0),) * (x.ndim - 1)), out)
    return filled, stats.metrics()


def decode_dialogues(
    out: Completions, turns: tuple[RowTurns, ...], tokenizer: Tokenizer, metrics: dict[str, float]
) -> Decoded:
    """Completions with results among their tokens."""
    N = out.tokens.shape[1]
    given = (np.arange(N) < out.lengths[:, None]) & ~out.mask
    starts = np.where(given.any(axis=1), N - given[:, ::-1].argmax(axis=1), 0)  # of the last assistant turn
    rows = [
        (tokens[:length].tolist(), int(start))
        for tokens, length, start in zip(out.tokens, out.lengths, starts, strict=True)
    ]
    cut = np.array([was_cut(state) for state in turns], bool)
    return Decoded(
        out,
        texts=[tokenizer.decode(tokens[start:]) for tokens, start in rows],
        stopped=(out.stop_reason == STOPPED) & ~cut,
        metrics=metrics,
        given=given,
        dialogues=[tokenizer.decode(tokens, show_markup=True) for tokens, _ in rows],
        turns=turns,
    )


def decoded_rows(prompts: Mapping[str, np.ndarray], out: Decoded, group_size: int) -> SequenceBatch:
    """Prompt + completion rows `[B, L + N]` of sampled completions, on the host."""
    prompt_tokens, prompt_mask = (
        np.repeat(prompts[key], group_size, axis=0) for key in ("prompt_tokens", "prompt_mask")
    )
    return completion_rows(
        prompt_tokens,
        prompt_mask,
        out.arrays.tokens,
        out.arrays.mask,
        np.ones(len(prompt_mask)),
        out.given,
        group_size=group_size,
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
        run.sampler,
        samples=how.samples,
        max_new_tokens=how.max_new_tokens,
        method=SamplingMethod(greedy=greedy),
        tools=run.tools,
    )
    scalars = make_scalars(seed=how.seed, step=0, temperature=how.temperature)
    scorer = _final_scorer(run)
    scores: list[np.ndarray] = []

    def look(prompts: Mapping[str, np.ndarray], out: Decoded) -> None:
        if scorer is not None:
            scored = scorer(decoded_rows(prompts, out, how.samples))
            scores.append(scored.reshape(-1, how.samples)[prompts["prompt_id"] >= 0])

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
        verifier=old_verifier(how.correct),
        ks=how.k,
        look=look,
        tools=run.tools,
    )
    correct = np.array([problem.correct for problem in found.problems], np.float64)
    if scorer is not None:
        best = np.concatenate(scores).argmax(axis=1)
        accuracy = correct[np.arange(len(correct)), best]
    elif run.stage.final_answer == "majority":
        votes = [problem.extracted for problem in found.problems]
        right = [problem.correct for problem in found.problems]
        accuracy = majority_at_k(votes, right, how.samples)
    else:
        accuracy = correct.mean(axis=1)
    return {**found.per_problem, "eval/accuracy": accuracy}


def _final_scorer(run: StageRun) -> Callable[[SequenceBatch], np.ndarray] | None:
    """What picks the best of a problem's samples: `[B]` scores of rows; None where nothing does."""
    stage = run.stage
    if stage.final_answer == "reward":
        networks = tuple(run.result_of(name).network for name in stage.roles.reward)
        return RewardScorer(networks, run.mesh, stage.reward.ensemble, stage.reward.variance_coef)
    if stage.final_answer == "prm":
        process = ProcessScorer(run.result_of(stage.roles.prm).network, run.mesh, run.sources.tokenizer)
        return lambda rows: process.solutions(rows, (stage.prm_score,))[0]
    return None


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
    tools: ToolUse | None = None,
) -> Evaluation:
    """Exact match, pass@k and maj@k on problems, one pass in order; `look` sees every batch of samples.

    Lengths are of the tokens that the model drew. With tools, `eval/tool_calls` and `eval/tool_errors` are calls, and
    calls that failed, of a sample.
    """
    if not len(problems):
        raise ConfigError("evaluation: there are no held-out problems, expected at least one")
    batches = prompt_eval_batches(
        problems if tools is None else tools.prompts(problems),
        tokenizer,
        prompts_per_batch=batch_problems,
        max_prompt_length=max_prompt_length,
    )
    G = spec.samples_per_prompt
    questions: list[Problem] = []
    completions: list[list[Completion]] = []
    calls: list[tuple[float, float]] = []
    for arrays in batches:
        out = sample_prompts(
            params, arrays, scalars, model=model, spec=spec, mesh=mesh, tokenizer=tokenizer, tools=tools
        )
        look(arrays, out)
        for row, prompt_id in enumerate(arrays["prompt_id"]):
            if prompt_id < 0:  # fills the last batch
                continue
            record = problems[int(prompt_id)]
            ids = arrays["prompt_tokens"][row][arrays["prompt_mask"][row]].tolist()
            questions.append(Problem(question_of(record), ids, answer_of(record)))
            group = range(row * G, (row + 1) * G)
            completions.append(
                [Completion(out.texts[i], int(out.lengths[i]), not out.stopped[i]) for i in group]
            )
            if tools is not None:
                ends = [how for i in group for _, how in out.turns[i].calls]
                calls.append((len(ends) / G, sum(how != "ok" for how in ends) / G))
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
    if calls:
        found.per_problem["eval/tool_calls"], found.per_problem["eval/tool_errors"] = np.array(calls).T
    if errors.any():  # a verifier that raises costs a sample, not the run
        found.per_problem["eval/verifier_errors"] = errors
    return found
