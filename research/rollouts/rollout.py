"""One iteration's samples: drawn, verified, paid, and drawn again where a group teaches nothing."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from research.algorithms.base import Rollouts
from research.config.bridge import old_verifier
from research.config.sections import Reward
from research.core.network import Network
from research.environments.turns import RowTurns, turn_metrics
from research.evals.problems import Decoded, decoded_rows, sample_prompts, sampler_scalars, sampler_spec
from research.rewards.learned import ProcessScorer, RewardScorer
from research.rewards.normalization import RunningNorm, fit_norm
from research.rewards.shaping import shape, shaping_of
from research.rewards.verifiers import get_verifier
from research.rewards.verify import score_safely
from research.rollouts.curriculum import CurriculumSampler
from research.sampling.methods import SamplingMethod
from research.tasks.sources import View, answer_of, question_of
from research.train.session import Session, StageRun

_ERRORS = "reward/verifier_errors"
_SHOWN = 4
"""Prompts of each logged iteration whose first completion goes into samples.jsonl."""


class Drawn(NamedTuple):
    """Paid samples of one batch of prompts.

    Attributes:
      rollouts: what is learned from.
      gold: `[B]` float32, the verifier's rewards, 0 for a completion that never stopped.
      texts: B decoded completions, whole and with their markup where tools may be called.
      metrics: means of this batch.
      turns: where each row stood at its end, those thrown away included; empty without tools.
    """

    rollouts: Rollouts
    gold: np.ndarray
    texts: list[str]
    metrics: dict[str, float]
    turns: tuple[RowTurns, ...] = ()


class Roller:
    """Draws and pays samples as a stage says; keeps the running statistics of its scores."""

    def __init__(self, run: StageRun, problems: View) -> None:
        """Opens the verifier and loads the reward models, if any."""
        self.run, self.problems = run, problems
        self.reward: Reward = run.stage.reward
        self.norm = RunningNorm()
        self.verifier = get_verifier(old_verifier(self.reward.functions[0]))
        how, roles = self.reward, run.stage.roles
        self.scorer: RewardScorer | None = None
        self.steps: ProcessScorer | None = None
        networks: tuple[Network, ...] = ()
        if how.source == "model":
            networks = tuple(run.result_of(name).network for name in roles.reward)
            self.scorer = RewardScorer(networks, run.mesh, how.ensemble, how.variance_coef)
        if how.step_coef > 0:
            network = run.result_of(roles.prm).network
            self.steps = ProcessScorer(network, run.mesh, run.sources.tokenizer)
            networks = (*networks, network)
        self.models = tuple(network.config for network in networks)

    def get_state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        return self.norm.record()

    def set_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_state`."""
        self.norm = RunningNorm.restored(state)

    def roll(self, session: Session, step: int) -> Drawn:
        """P groups, those with equal rewards replaced by fresh ones while the budget of rounds lasts.

        Source: dynamic sampling, DAPO, Yu et al. 2025, Section 3.2. What is drawn and thrown away is spent too.
        """
        how = self.run.stage.rollout
        rounds = how.resample_rounds + 1
        first = self._draw(session, step * rounds)
        if rounds == 1:
            return first
        useful: list[Drawn] = []
        spare: list[Drawn] = []
        batch, used, drawn = first, 1, [first]
        while True:
            for group in split_groups(batch):
                (useful if np.ptp(group.rollouts.rewards) > 0 else spare).append(group)
            if len(useful) >= how.prompts_per_step or used == rounds:
                break
            batch, used = self._draw(session, step * rounds + used), used + 1
            drawn.append(batch)
        kept = [*useful, *spare][: how.prompts_per_step]
        cost = {
            "dynamic_sampling/rounds": float(used),
            "dynamic_sampling/groups_drawn": float(len(useful) + len(spare)),
            "dynamic_sampling/groups_useful": float(len(useful)),
            "dynamic_sampling/groups_unfilled": float(max(0, how.prompts_per_step - len(useful))),
        }
        metrics = {
            key: float((np.sum if key == _ERRORS else np.mean)([each.metrics[key] for each in drawn]))
            for key in first.metrics
        }
        turns = tuple(state for each in drawn for state in each.turns)
        return join_groups(kept, {**metrics, **cost})._replace(turns=turns)

    def _draw(self, session: Session, sampler_step: int) -> Drawn:
        run, stage = self.run, self.run.stage
        how, G = stage.rollout, stage.rollout.group_size
        prompts = next(session.data)
        out = sample_prompts(
            session.policy,
            prompts,
            sampler_scalars(seed=stage.seed, step=sampler_step, temperature=how.temperature, top_p=how.top_p),
            model=run.model,
            spec=sampler_spec(
                run.sources.tokenizer,
                run.sampler,
                samples=G,
                max_new_tokens=how.max_new_tokens,
                method=SamplingMethod(top_k=how.top_k, nucleus=how.top_p < 1.0),
                tools=run.tools,
            ),
            mesh=run.mesh,
            tokenizer=run.sources.tokenizer,
            tools=run.tools,
        )
        drawn = self._pay(session, prompts, out)
        rollouts = drawn.rollouts
        if isinstance(session.data, CurriculumSampler):
            session.data.curriculum.update(rollouts.prompt_ids, rollouts.correct)
        # Results are read, as prompts are: they cost a forward pass, and nobody samples them.
        tokens, given = int(rollouts.lengths.sum()), int(rollouts.given_lengths.sum())
        completions = rollouts.lengths + rollouts.given_lengths
        context = float(rollouts.prompt_mask.sum(axis=1).mean() + completions.mean()) / 2
        session.spent.sampled(
            completions=len(rollouts.rewards),
            tokens=tokens,
            prompt_tokens=int(prompts["prompt_mask"].sum()) + given,
            context=context,
        )
        for model in self.models:
            real_tokens = tokens + given + int(rollouts.prompt_mask.sum())
            session.spent.forward(model=model, real_tokens=real_tokens, context=context)
        return drawn

    def _pay(self, session: Session, prompts: Mapping[str, np.ndarray], out: Decoded) -> Drawn:
        G, spec = self.run.stage.rollout.group_size, shaping_of(self.reward)
        prompt_ids = np.repeat(prompts["prompt_id"], G)
        answers = [answer_of(self.problems[int(index)]) for index in prompts["prompt_id"]]
        verified = score_safely(
            out.texts,
            [answer for answer in answers for _ in range(G)],
            self.verifier,
            prompt_ids=prompt_ids,
            error_reward=self.reward.unknown,
        )
        if verified.errors:
            said = session.note.setdefault("verifier_errors", [])
            said += [error._asdict() for error in verified.errors][: max(0, 20 - len(said))]
            session.progress.say(
                f"verifier: {len(verified.errors)} samples raised, e.g. {verified.errors[0]}"
            )
        gold = np.where(out.stopped, verified.rewards, np.float32(0.0))  # what never ends is not right
        if self.scorer is None:
            scores, correct = gold, gold >= 1.0
        else:  # the verifier's score is logged but not used for training
            scores = self.scorer(decoded_rows(prompts, out, G))
            groups = scores.reshape(-1, G) - scores[::G, None]  # equal scores give exactly 0
            correct = (groups > groups.mean(axis=1, keepdims=True)).reshape(-1)
        unfitted = spec.normalize == "reference" and not self.norm.count
        # The policy is still its own reference; scores that do not differ say nothing of their scale.
        if unfitted:
            self.norm = fit_norm(scores) if np.ptp(scores) > 0 else RunningNorm().updated(scores)
        paid = shape(
            scores,
            correct=correct,
            texts=out.texts,
            lengths=out.lengths,
            stopped=out.stopped,
            group_size=G,
            max_new_tokens=self.run.stage.rollout.max_new_tokens,
            spec=spec,
            state=self.norm,
        )
        self.norm = RunningNorm() if unfitted and np.ptp(scores) == 0 else paid.state
        step_rewards, ends, metrics = None, None, paid.metrics()
        if self.steps is not None:
            probs, ends = self.steps.steps(decoded_rows(prompts, out, G))
            length = prompts["prompt_tokens"].shape[1]
            ends, probs = ends[:, length:], probs[:, length:]
            step_rewards = np.float32(self.reward.step_coef) * probs
            metrics["reward/steps"] = float(step_rewards.sum(axis=1).mean())
        metrics[_ERRORS] = float(len(verified.errors))
        metrics.update(out.metrics)
        rollouts = Rollouts(
            prompt_tokens=np.repeat(prompts["prompt_tokens"], G, axis=0),
            prompt_mask=np.repeat(prompts["prompt_mask"], G, axis=0),
            tokens=out.arrays.tokens,
            mask=out.arrays.mask,
            sampler_logps=out.arrays.sampler_logps,
            stopped=out.stopped,
            rewards=paid.rewards,
            correct=correct,
            prompt_ids=prompt_ids,
            group_size=G,
            step_rewards=step_rewards,
            step_mask=ends,
            advantage_scale=paid.advantage_scale,
            given=out.given,
        )
        return Drawn(rollouts, gold, out.shown, metrics, out.turns)

    def samples(self, drawn: Drawn) -> list[dict[str, Any]]:
        """The first completion of the first prompts, for a person to read."""
        found = []
        for first in range(0, len(drawn.texts), drawn.rollouts.group_size)[:_SHOWN]:
            prompt_id = int(drawn.rollouts.prompt_ids[first])
            found.append(
                {
                    "prompt": question_of(self.problems[prompt_id]),
                    "completion": drawn.texts[first],
                    "reward": float(drawn.rollouts.rewards[first]),
                    "gold": float(drawn.gold[first]),
                    "stopped": bool(drawn.rollouts.stopped[first]),
                    "sampler_logps": float(drawn.rollouts.sampler_logps[first].sum()),
                }
            )
        return found


def split_groups(drawn: Drawn) -> list[Drawn]:
    """One a prompt."""
    G = drawn.rollouts.group_size
    groups = []
    for start in range(0, len(drawn.texts), G):
        rows = slice(start, start + G)
        arrays: dict[str, Any] = {key: value[rows] for key, value in _arrays(drawn.rollouts).items()}
        groups.append(Drawn(drawn.rollouts._replace(**arrays), drawn.gold[rows], drawn.texts[rows], {}))
    return groups


def join_groups(groups: list[Drawn], metrics: dict[str, float]) -> Drawn:
    """The inverse of `split_groups`."""
    first = groups[0].rollouts
    arrays: dict[str, Any] = {
        key: np.concatenate([getattr(group.rollouts, key) for group in groups]) for key in _arrays(first)
    }
    texts = [text for group in groups for text in group.texts]
    gold = np.concatenate([group.gold for group in groups])
    return Drawn(first._replace(**arrays), gold, texts, metrics)


def _arrays(rollouts: Rollouts) -> dict[str, Any]:
    return {key: value for key, value in rollouts._asdict().items() if isinstance(value, np.ndarray)}


def rollout_metrics(drawn: Drawn) -> dict[str, float]:
    """What every online run logs about its samples, whatever it learns from them.

    Lengths and entropy are of the tokens that the policy drew; `tools/forced_tokens` counts those it was given.
    """
    rollouts = drawn.rollouts
    lengths, right = rollouts.lengths, drawn.gold >= 1.0
    groups = rollouts.rewards.reshape(-1, rollouts.group_size)
    metrics = {
        **drawn.metrics,
        **(turn_metrics(drawn.turns) if drawn.turns else {}),
        "reward/mean": float(rollouts.rewards.mean()),
        "reward/std": float(rollouts.rewards.std()),
        "reward/best_of_group": float(groups.max(axis=1).mean()),
        "reward/gold": float(drawn.gold.mean()),
        "frac_reward_zero_std": float((np.ptp(groups, axis=1) == 0).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/truncated_fraction": float(1.0 - rollouts.stopped.mean()),
        "sampler_entropy_estimate": float(-rollouts.sampler_logps.sum() / max(lengths.sum(), 1)),
    }
    for name, rows in (("right", right), ("wrong", ~right)):
        if rows.any():
            metrics[f"completions/mean_length_{name}"] = float(lengths[rows].mean())
    return metrics
