"""Tools inside rollouts: calls are answered, results are read but never learned from, the last turn is the answer."""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.logprobs import token_logps
from research.algorithms.base import Frozen, Rollouts, completion_rows, rollout_batch
from research.algorithms.kto import KTO
from research.config.sections import Evaluation, Reward, Rollout, Sampler
from research.core.batch import UnpairedBatch
from research.core.network import Network, batch_logps
from research.data.chat import Message, render_messages, render_prompt
from research.data.pipelines import prompt_batches
from research.data.tokenizer import Tokenizer, train_tokenizer
from research.environments.calls import Call
from research.environments.interaction import Interaction, make_interaction
from research.environments.toolbox import Toolbox
from research.evals.accuracy import Accuracy
from research.evals.policy import TrainedPolicy
from research.evals.results import evaluate
from research.rewards.base import WeightedReward
from research.rewards.builtin import correct
from research.rollouts.collect import RolloutCollector
from research.rollouts.rewards import RolloutRewards
from research.rollouts.samples import Collected, rollout_metrics, shown_samples
from research.sampling import decoded
from research.sampling.engine import Stats, sample_refilled
from research.sampling.methods import SamplingMethod
from research.sampling.rows import ForceTokens, Request, Row
from research.sampling.types import STOPPED, Completions, EngineSpec, Prompts, SamplerSpec
from research.tasks.jsonl import Jsonl
from research.train.budget import Spending
from tests.models.tiny import ONE_LAYER, make_params, make_tokens, right_padded
from tests.research.algorithms.toy import MODEL, grpo, host_params, objective_scalars, quick_compilation
from tests.research.environments.conftest import call_text
from tests.research.sampling.tiny import make_prompts, make_spec, scalars

N, G = 200, 2
SAMPLER = Sampler(slots=4, chunk=8, admit=2, cache_bucket=8, int8_cache=False, weights="compute")
RECORDS = [{"prompt": "3+4", "answer": "7"}, {"prompt": "2*5", "answer": "10"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "characters.model"
    corpus = string.ascii_letters + string.digits + string.punctuation + " \n"
    return train_tokenizer([corpus], vocab_size=None, path=path, model_type="char", byte_fallback=False)


@pytest.fixture(scope="module")
def tools(tokenizer: Tokenizer) -> Interaction:
    found = make_interaction(("calculator",), {}, tokenizer, max_turns=1, max_result_tokens=40)
    assert found is not None
    return found


def turn(tokenizer: Tokenizer, content: str = "", expression: str = "") -> list[int]:
    """Tokens of a sampled turn that says something, or calls the calculator."""
    calls = (call_text(Call("calculator", {"expression": expression})),) if expression else ()
    whole = (Message("user", "?"), Message("assistant", content, "", calls))
    return render_messages(whole, tokenizer, where="r").tokens[len(render_prompt(whole[:1], tokenizer)) :].tolist()


class Engine:
    """Draws what it is told to, turn by turn, and asks what to do after each as the real one does."""

    def __init__(self, scripts: Sequence[Sequence[Sequence[int]]]) -> None:
        self.scripts, self.prompts = scripts, list[np.ndarray]()

    def __call__(self, params: Any, prompts: Prompts, numbers: Any, *, config: Any, spec: Any, callback: Any) -> Any:
        del params, numbers, config
        asked = prompts.prompt_ids >= 0
        texts = [tokens[mask] for tokens, mask in zip(prompts.tokens[asked], prompts.mask[asked], strict=True)]
        self.prompts += texts
        B = len(asked) * spec.samples_per_prompt
        out = Completions(*(np.zeros((B, spec.max_new_tokens), t) for t in (np.int32, bool, np.float32, np.float32)),
                          *np.zeros((2, B), np.int32))  # fmt: skip
        for number in range(len(texts) * spec.samples_per_prompt):
            row = Row(number, Request(texts[number // spec.samples_per_prompt], 0, 0, spec.max_new_tokens))
            for drawn in self.scripts[number]:
                put(row, drawn, drawn=True)
                row.stopped = drawn[-1] in spec.stop_tokens
                said = {} if callback is None else callback([row])
                if number not in said:
                    break
                assert len(said[number].tokens) <= spec.engine.max_forced
                put(row, said[number].tokens, drawn=False)
            for name in ("tokens", "mask", "sampler_logps", "policy_logps"):
                getattr(out, name)[number] = getattr(row, name)
            out.stop_reason[number], out.lengths[number] = row.stop_reason, row.length
        return out, Stats()


def put(row: Row, tokens: Sequence[int], *, drawn: bool) -> None:
    here = slice(row.length, row.length + len(tokens))
    row.tokens[here], row.mask[here], row.sampler_logps[here] = tokens, drawn, -float(drawn)
    row.length += len(tokens)


def scripts(tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Of "3+4": calls and answers; just answers. Of "2*5": answers only before its call; calls twice."""
    return [
        [turn(tokenizer, expression="3+4"), turn(tokenizer, "so\n#### 7")],
        [turn(tokenizer, "#### 7")],
        [turn(tokenizer, "#### 10\nlet me see", expression="ten"), turn(tokenizer, "none")],
        [turn(tokenizer, "#### 10", expression="2*5"), turn(tokenizer, "#### 10", expression="2*5")],
    ]


def spec_of(tokenizer: Tokenizer, tools: Interaction | None) -> SamplerSpec:
    return decoded.sampler_spec(
        tokenizer, SAMPLER, samples=G, max_new_tokens=N, method=SamplingMethod(), interactive=tools is not None
    )


def batches(tools: Interaction, tokenizer: Tokenizer, rows: int = 2) -> list[Mapping[str, np.ndarray]]:
    return list(
        prompt_batches(tools.prompts(RECORDS), tokenizer, prompts_per_batch=rows, max_prompt_length=900, seed=None)
    )


@pytest.fixture
def drawn(tools: Interaction, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> tuple[Collected, Spending]:
    """One iteration of the scripts, rewarded; and what it spent."""
    monkeypatch.setattr(decoded, "sample_refilled", Engine(scripts(tokenizer)))
    rewards = RolloutRewards(
        Reward(overlong_buffer=N),  # -tokens / N: shows which tokens it counts
        (WeightedReward("correct", correct),), correct, Jsonl(answer_format="mark"), group_size=G,
        max_new_tokens=N, seed=0,
    )  # fmt: skip
    collector = RolloutCollector(
        lambda _params, prompts, _number: sampled(prompts, tools, tokenizer), rewards, RECORDS,
        Rollout(prompts_per_step=2, group_size=G),
    )  # fmt: skip
    spent = Spending(MODEL)
    prompts: Any = iter(batches(tools, tokenizer))
    return collector.collect(None, prompts, spent, 0), spent  # type: ignore[arg-type]


def test_the_answer_is_what_follows_the_last_result(drawn: tuple[Collected, Spending]) -> None:
    rollouts = drawn[0].rollouts
    # Row 2 names the answer before its call only; row 3 calls once more than it may.
    assert rollouts.correct.tolist() == [True, True, False, False]
    assert rollouts.stopped.tolist() == [True, True, True, False]


def test_samples_show_the_dialogue_with_its_markup(drawn: tuple[Collected, Spending]) -> None:
    shown = [record["completion"] for record in shown_samples(drawn[0])]
    assert len(shown) == 2 and shown[1].startswith("#### 10\nlet me see<tool_call>")
    call = '<tool_call>{"arguments": {"expression": "3+4"}, "name": "calculator"}</tool_call>'
    assert shown[0].startswith(call) and shown[0].endswith("so\n#### 7<|im_end|>")
    assert "<tool_result>7</tool_result>" in shown[0] and "<tool_result>error: " in shown[1]


def test_only_drawn_tokens_are_paid_counted_and_learned_from(
    drawn: tuple[Collected, Spending], tokenizer: Tokenizer
) -> None:
    (rolled, *_), spent = drawn
    assert rolled.given is not None
    written = scripts(tokenizer)
    lengths = [sum(map(len, written[row])) for row in range(4)]
    assert rolled.lengths.tolist() == lengths and rolled.given_lengths.tolist() == rolled.given.sum(1).tolist()
    assert rolled.given.any(axis=1).tolist() == [True, False, True, True] and not (rolled.given & rolled.mask).any()
    for row, parts in enumerate(written):
        assert rolled.tokens[row][rolled.mask[row]].tolist() == [token for part in parts for token in part]
    np.testing.assert_allclose(rolled.rewards, [1, 1, 0, 0] - np.array(lengths) / N, rtol=1e-6)
    batch = rollout_batch(rolled, mask_truncated=False).sequences
    L = rolled.prompt_tokens.shape[1]
    np.testing.assert_array_equal(batch.loss_mask[:, L:], rolled.mask)
    np.testing.assert_array_equal(batch.segment_ids[:, L:] > 0, rolled.mask | rolled.given)
    for row in range(4):  # a token's position says how many are before it, results included
        real = batch.segment_ids[row] > 0
        assert batch.positions[row][real].tolist() == list(range(real.sum()))
    assert spent.tokens_sampled == sum(lengths)
    prompts, given = int(rolled.prompt_mask[::G].sum()), int(rolled.given.sum())
    context = (rolled.prompt_mask.sum() + sum(lengths) + given) / 4 / 2
    assert spent.flops == pytest.approx(MODEL.flops_per_token(context) * (sum(lengths) + given + prompts))
    metrics = rollout_metrics(drawn[0])
    assert metrics["completions/mean_length"] == np.mean(lengths)
    assert metrics["sampler_entropy_estimate"] == 1.0
    assert metrics["tools/calls"] == 3 / 4 and metrics["tools/turns"] == 3 / 4
    assert metrics["tools/error_rate"] == pytest.approx(1 / 3) and metrics["tools/errors/tool"] == 1
    assert metrics["tools/forced_tokens"] == given / 4 and metrics["tools/frac_turn_limit"] == 1 / 4


def test_a_reward_model_reads_the_results(
    tools: Interaction, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded, "sample_refilled", Engine(scripts(tokenizer)))
    (prompts,) = batches(tools, tokenizer)
    out = sampled(prompts, tools, tokenizer)
    rows = decoded.decoded_rows(prompts, out, G)
    seen = [tokenizer.decode(t[s > 0].tolist()) for t, s in zip(rows.tokens, rows.segment_ids, strict=True)]
    assert all(text.startswith("systemYou may call these tools:") for text in seen)
    assert "assistantso\n#### 7" in seen[0] and "tool7" in seen[0]
    assert not (rows.loss_mask[:, -N:] & ~out.arrays.mask).any()


def sampled(prompts: Any, tools: Interaction | None, tokenizer: Tokenizer) -> decoded.Decoded:
    return decoded.sample_prompts(
        None, prompts, None, model=None, spec=spec_of(tokenizer, tools), mesh=None, tokenizer=tokenizer,
        interaction=tools, records=RECORDS,
    )  # type: ignore[arg-type]  # fmt: skip


def test_evaluation_answers_calls_and_rows_that_fill_a_batch_are_not_drawn(
    tools: Interaction, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(scripts(tokenizer))
    monkeypatch.setattr(decoded, "sample_refilled", engine)
    how = Evaluation(
        problems=2, samples=G, k=(1,), temperature=1.0, seed=0, batch_problems=5, max_prompt_length=900,
        max_new_tokens=N,
    )  # fmt: skip
    policy = TrainedPolicy(
        None, MODEL, None, tokenizer, SAMPLER, how, Jsonl(answer_format="mark"), RECORDS, tools  # type: ignore[arg-type]
    )  # fmt: skip
    results = evaluate(policy, {"accuracy": Accuracy()}, seed=0)
    found = results.values
    assert len(engine.prompts) == 2
    assert found["eval/pass@1"].tolist() == [1.0, 0.0]
    assert found["eval/tool_calls"].tolist() == [0.5, 1.0]
    assert found["eval/tool_errors"].tolist() == [0.0, 0.5]
    assert found["eval/truncated_fraction"].tolist() == [0.0, 0.5]
    written = [sum(map(len, row)) for row in scripts(tokenizer)]
    np.testing.assert_allclose(found["eval/mean_length"], np.reshape(written, (2, G)).mean(axis=1))
    (first, second) = results.samples
    assert first["prompt"] == "3+4" and first["answer"] == "7" and first["correct"] == [1.0]
    assert first["completions"][0].endswith("so\n#### 7<|im_end|>") and second["correct"] == [0.0]


def test_without_tools_nothing_is_answered(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "sample_refilled", Engine(scripts(tokenizer)))
    (prompts,) = prompt_batches(RECORDS, tokenizer, prompts_per_batch=2, max_prompt_length=40, seed=None)
    out = sampled(prompts, None, tokenizer)
    assert out.given is None and out.turns == () and out.shown is out.texts
    assert out.lengths.tolist() == [len(row[0]) for row in scripts(tokenizer)]


def test_prompts_list_the_tools_in_one_system_turn_once(tools: Interaction) -> None:
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "3+4"}
    answers = tools.make()
    assert isinstance(answers, Toolbox)
    known = {"role": "system", "content": f"Hi. {answers.system}"}
    records: list[dict[str, Any]] = [
        {"prompt": "3+4", "answer": "7"},
        {"prompt": [system, user], "answer": "7"},
        {"prompt": [known, user], "answer": "7"},
        {"question": "3+4", "answer": "#### 7"},
        {"messages": [system, user, {"role": "assistant", "content": "7"}]},
    ]
    found = tools.prompts(records)
    contents = [answers.system, f"Be brief.\n\n{answers.system}", known["content"], answers.system]
    contents.append(f"Be brief.\n\n{answers.system}")
    assert len(found) == 5 and '"name": "calculator"' in answers.system
    for record, content, source in zip(found, contents, records, strict=True):
        assert [(m["role"], m["content"]) for m in record["prompt"]] == [("system", content), ("user", "3+4")]
        assert {key: record[key] for key in source if key != "prompt"} == {
            key: value for key, value in source.items() if key != "prompt"
        }


def test_the_trainer_scores_drawn_tokens_as_the_sampler_did() -> None:
    """Given tokens in the context, at their positions: else log-probs behind a result are off by nats."""
    new, width, spec = 14, 9, make_spec(14, 2, stops=(0, 7, 14, 21))
    spec = dataclasses.replace(
        spec, cache_bucket=8, engine=EngineSpec(slots=4, chunk=5, admit=2, prompt_bucket=4, max_forced=4)
    )
    texts = [make_tokens(ONE_LAYER, 1, n, seed=n)[0] for n in (8, 5, 3, 6, 9, 1, 7)]
    prompts = make_prompts(texts, width, list(range(10, 17)))

    def callback(rows: Sequence[Row]) -> dict[int, ForceTokens]:
        return {row.number: ForceTokens([30, 31, 32]) for row in rows if row.stopped and row.mask[: row.length].all()}

    with quick_compilation():
        out, _ = sample_refilled(
            make_params(ONE_LAYER), prompts, scalars(seed=3, step=2), config=ONE_LAYER, spec=spec, callback=callback
        )
        given = (np.arange(new) < out.lengths[:, None]) & ~out.mask
        behind = out.mask & (np.maximum.accumulate(given, axis=1))
        assert behind.sum() > 10 and out.stop_reason.max() == STOPPED
        repeated = [np.repeat(x, 2, axis=0) for x in (prompts.tokens, prompts.mask)]
        rows = completion_rows(*repeated, out.tokens, out.mask, np.ones(14), given)
        scored = batch_logps(Network(make_params(ONE_LAYER), ONE_LAYER), rows).logps[:, width:]
        np.testing.assert_allclose(np.where(out.mask, scored, 0), out.policy_logps, atol=1e-4)
        unseen = completion_rows(*repeated, out.tokens, out.mask, np.ones(14))
        wrong = np.asarray(batch_logps(Network(make_params(ONE_LAYER), ONE_LAYER), unseen).logps[:, width:])
    assert np.abs(wrong - out.policy_logps)[behind].max() > 0.1  # the test would see it


GIVEN = np.array([[3, 5], [1, 4], [2, 2], [6, 7]])
"""[first, end) of what each row of `with_results` was given; row 2 was given nothing."""


def with_results() -> Rollouts:
    """Two prompts with two completions each, three of them with results in between."""
    rng = np.random.default_rng(2)
    B, L, slots, lengths = 4, 3, 8, np.array([8, 6, 5, 8])
    at = np.arange(slots)
    given = (at >= GIVEN[:, :1]) & (at < GIVEN[:, 1:])
    mask = (at < lengths[:, None]) & ~given
    prompt_mask = np.array([[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]], bool)
    return Rollouts(
        prompt_tokens=np.where(prompt_mask, np.repeat(rng.integers(4, 24, (2, L)), 2, axis=0), 0).astype(np.int32),
        prompt_mask=prompt_mask,
        tokens=np.where(mask | given, rng.integers(4, 24, (B, slots)), 0).astype(np.int32),
        mask=mask,
        sampler_logps=np.where(mask, rng.normal(-3, 0.3, (B, slots)), 0).astype(np.float32),
        stopped=np.ones(B, bool),
        rewards=np.array([1, 0, 0.3, 0.9], np.float32),
        correct=np.array([True, False, False, True]),
        prompt_ids=np.repeat(np.arange(2, dtype=np.int32), 2),
        group_size=2,
        given=given,
    )


def loss_and_gradient(rollouts: Rollouts) -> tuple[Any, Any]:
    algorithm = grpo(group_size=2, max_new_tokens=8, kl="none")
    numbers = objective_scalars(algorithm)
    batch, _ = algorithm.from_rollouts(rollouts, 0)
    prepared = algorithm.prepare(Network(host_params(), MODEL), batch, numbers, Frozen())

    def loss(params: Any) -> tuple[Any, Any]:
        found, metrics = algorithm.loss(Network(params, MODEL), prepared, numbers, Frozen())
        return found.total / found.count, {name: each.total / each.count for name, each in metrics.items()}

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(host_params())


def by_hand(rollouts: Rollouts) -> Any:
    """The same from unpadded rows, token by token: what was given is read, and nothing else."""
    lists: list[np.ndarray] = []
    targets = np.zeros((4, 11), bool)
    old = np.zeros((4, 11), np.float32)
    for row in range(4):
        prompt = rollouts.prompt_tokens[row][rollouts.prompt_mask[row]].tolist()
        tokens = prompt
        for slot in range(8):
            if rollouts.mask[row, slot]:
                targets[row, len(tokens)], old[row, len(tokens)] = True, rollouts.sampler_logps[row, slot]
            if rollouts.mask[row, slot] or GIVEN[row, 0] <= slot < GIVEN[row, 1]:
                tokens = [*tokens, int(rollouts.tokens[row, slot])]
        lists.append(np.array(tokens))
    pairs = rollouts.rewards.reshape(2, 2)
    std = pairs.std(axis=1, ddof=1, keepdims=True)
    advantages = ((pairs - pairs.mean(axis=1, keepdims=True)) / (std + 1e-4)).reshape(-1)
    numbers = objective_scalars(grpo())

    def loss(params: Any) -> Any:
        scored, _ = token_logps(params, MODEL, *right_padded(lists, 11), temperature=numbers["temperature"])
        logps = scored.logps
        total = 0.0
        for row, slot in zip(*np.nonzero(targets), strict=True):
            ratio = jnp.exp(logps[row, slot] - old[row, slot])
            clipped = jnp.clip(ratio, 1 - numbers["clip_eps_low"], 1 + numbers["clip_eps_high"])
            total -= jnp.minimum(ratio * advantages[row], clipped * advantages[row])
        return total / targets.sum()

    return jax.jit(jax.value_and_grad(loss))(host_params())


def test_the_loss_of_an_online_step_is_the_one_masked_by_hand() -> None:
    rollouts = with_results()
    assert rollouts.given is not None
    with quick_compilation():
        (loss, metrics), gradient = loss_and_gradient(rollouts)
        expected, expected_gradient = by_hand(rollouts)
        noise = np.random.default_rng(0).normal(5, 3, rollouts.mask.shape).astype(np.float32)
        spoiled = np.where(rollouts.given, noise, rollouts.sampler_logps)
        (again, metrics_again), gradient_again = loss_and_gradient(rollouts._replace(sampler_logps=spoiled))
        _, unread = loss_and_gradient(rollouts._replace(given=None))
    assert loss == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected_gradient)
    assert again == loss and jax.tree.all(jax.tree.map(np.array_equal, gradient, gradient_again))
    assert jax.tree.all(jax.tree.map(np.array_equal, metrics, metrics_again))
    gap = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (gradient, unread)), strict=True))
    assert gap > 1e-4, "results make no difference to what is learned"


def test_a_completion_under_another_prompt_keeps_its_results() -> None:
    batch, _ = KTO().from_rollouts(with_results(), 0)
    assert isinstance(batch, UnpairedBatch)
    for name in ("tokens", "segment_ids", "loss_mask"):
        rows, mismatched = (getattr(each, name)[:, 3:] for each in (batch.rows, batch.mismatched))
        np.testing.assert_array_equal(mismatched, np.roll(rows, -2, axis=0), name)
