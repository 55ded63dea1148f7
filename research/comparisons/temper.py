"""Temper as a system under test: the sampler, the train step and an iteration of GRPO as the loops run them.

On a CPU, rows are split over one XLA device a core. Token ids come from the workload, so no tokenizer takes part;
everything else is the code of a run.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.config import ModelConfig
from research.algorithms.base import Algorithm, Frozen, Rollouts
from research.config.experiment import make_model
from research.config.optimizers import ADAMW, COSINE
from research.config.references import find
from research.config.schema import Key
from research.config.sections import Model
from research.config.tree import parse_section
from research.core.batch import SequenceBatch
from research.core.mesh import make_mesh, to_device
from research.core.network import Network
from research.core.optim import OptimizerScalars
from research.core.state import TrainState, fresh_policy, state_from_params
from research.data.chat import Rendered
from research.data.examples import Examples
from research.data.pipelines import batched
from research.data.report import DataReport
from research.data.streams import packed_rows
from research.sampling.engine import Engine
from research.sampling.methods import SamplingMethod
from research.sampling.programs import layout_program
from research.sampling.rows import Request
from research.sampling.sampler import sample
from research.sampling.types import EngineSpec, Prompts, SamplerSpec, make_scalars
from research.train.build import float32
from research.train.step import StepScalars, prepare_step, train_step

Work = Mapping[str, Any]
Run = Callable[[], int]
"""One repetition; returns its useful tokens."""
PAD = 0


def main(work: Work, say: Callable[..., None]) -> None:
    """Serves one workload."""
    devices = 1
    if work["platform"] == "cpu" and work["batch_size"] % work["threads"] == 0:
        devices = work["threads"]
        jax.config.update("jax_num_cpu_devices", devices)
    mesh = make_mesh(devices, 1, 1, devices=jax.devices(work["platform"])[:devices])
    with jax.set_mesh(mesh):
        parameters, run = build(work, mesh)
        names = ("jax", "jaxlib", "flax", "optax")
        say(parameters=parameters, versions={name: importlib.metadata.version(name) for name in names})
        while True:
            tokens = run()
            stats = mesh.devices.flat[0].memory_stats()  # None on a CPU
            say(tokens=tokens, **({"peak_bytes": stats["peak_bytes_in_use"]} if stats else {}))


def build(work: Work, mesh: Mesh) -> tuple[int, Run]:
    """The model's parameters, counted, and what a repetition does."""
    config = make_model(parse_section(Model, work["model"]).value, work["vocab_size"])
    state = state_from_params(fresh_policy(config, mesh, work["seed"]), config, mesh, ADAMW)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    kinds = {"rollout": rollout, "train": train, "grpo": grpo}
    return parameters, kinds[work["kind"]](work, config, mesh, state)


def rollout(work: Work, config: ModelConfig, mesh: Mesh, state: TrainState) -> Run:
    """Draws a completion of its wanted length for each prompt: batch by batch, or where lengths differ by slots."""
    tokens, lengths = np.array(work["prompts"], np.int32), np.array(work["lengths"], np.int32)
    size, new, ids = work["batch_size"], work["max_new_tokens"], np.arange(len(tokens), dtype=np.int32)
    spec = SamplerSpec(
        new, 1, (), PAD, SamplingMethod(greedy=work["greedy"]), work["cache_bucket"], engine=EngineSpec(size)
    )
    at_once = dataclasses.replace(spec, engine=None)
    # Before the clock starts: it belongs to an update of the policy, where `grpo` below pays for it.
    params, steps = layout_program(state.params, config=config, weights=spec.weights), count()

    def batches(step: int) -> Iterator[int]:
        scalars = make_scalars(seed=work["seed"], step=step)
        for start in range(0, len(tokens), size):
            rows = slice(start, start + size)
            batch = to_device(mesh, Prompts(tokens[rows], np.ones_like(tokens[rows], bool), ids[rows]))
            out = jax.device_get(sample(params, batch, scalars, config=config, spec=at_once))
            yield int(out.lengths.sum())

    def slots(step: int) -> Iterator[int]:
        engine = Engine(params, make_scalars(seed=work["seed"], step=step), config=config, spec=spec)
        wanted = enumerate(zip(tokens, lengths.tolist(), strict=True))
        requests = [Request(prompt, number, 0, length) for number, (prompt, length) in wanted]
        return (row.length for row in engine.run(requests))

    draw = batches if (lengths == new).all() else slots

    def run() -> int:
        drawn = sum(draw(next(steps)))
        assert drawn == lengths.sum(), f"drew {drawn} tokens, expected {lengths.sum()}"
        return drawn

    return run


def train(work: Work, config: ModelConfig, mesh: Mesh, state: TrainState) -> Run:
    """Takes optimizer steps: on full rows of random tokens, or on packed examples."""
    algorithm, scalars = objective_of("sft" if work["examples"] else "next_token", work["learning_rate"])
    batches, steps = packed(work) if work["examples"] else (full(work), work["steps"])
    kept = [state]

    def run() -> int:
        tokens, state = 0, kept.pop()
        for batch in islice(batches, steps):
            tokens += int((batch.segment_ids > 0).sum())
            state, metrics = train_step(state, to_device(mesh, batch), scalars, algorithm=algorithm, config=config)
        kept.append(jax.block_until_ready(state))
        assert np.isfinite(metrics["loss"]), "the loss is not finite"
        return tokens

    return run


def full(work: Work) -> Iterator[SequenceBatch]:
    """Rows of random tokens without end, each row one sequence."""
    rng, shape = np.random.default_rng(work["seed"]), (work["batch_size"], work["length"])
    positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    fixed = {"loss_mask": positions > 0, "segment_ids": np.ones(shape, np.int32), "positions": positions}
    while True:
        yield SequenceBatch.from_arrays({"tokens": rng.integers(0, work["vocab_size"], shape, np.int32), **fixed})


def packed(work: Work) -> tuple[Iterator[SequenceBatch], int]:
    """The examples' batches without end, packed as in fine-tuning, and how many hold about a pass."""
    rendered = [
        Rendered(np.array(each["tokens"], np.int32), np.array(each["loss_mask"], bool), 0) for each in work["examples"]
    ]
    n, size, length = len(rendered), work["batch_size"], work["length"]
    examples = Examples(rendered, DataReport("examples", n, n))
    rows = grain.MapDataset.source(packed_rows(examples, length, work["seed"], PAD))
    return map(SequenceBatch.from_arrays, batched(rows, size)), -(-int(examples.lengths.sum()) // (size * length))


def grpo(work: Work, config: ModelConfig, mesh: Mesh, state: TrainState) -> Run:
    """Iterations: sample, reward, log-probs of the reference, one update."""
    G, P, N = work["group_size"], work["batch_size"], work["max_new_tokens"]
    algorithm, scalars = objective_of("grpo", work["learning_rate"], G, N, beta=work["beta"])
    tokens = np.array(work["prompts"], np.int32)
    mask, spec = (np.ones((P, tokens.shape[1]), bool), SamplerSpec(N, G, (), PAD, cache_bucket=work["cache_bucket"]))
    frozen = Frozen(reference=Network(jax.tree.map(jnp.copy, state.params), config))
    kept, steps = [state], count()

    def iterate(state: TrainState, step: int) -> TrainState:
        ids = np.arange(step * P, (step + 1) * P, dtype=np.int32) % len(tokens)
        prompts, draws = Prompts(tokens[ids], mask, ids), make_scalars(seed=work["seed"], step=step)
        out = jax.device_get(sample(state.params, to_device(mesh, prompts), draws, config=config, spec=spec))
        rewards = (out.tokens % 2 == 0).mean(axis=1, where=out.mask).astype(np.float32)
        rollouts = Rollouts(
            prompt_tokens=np.repeat(prompts.tokens, G, axis=0),
            prompt_mask=np.repeat(mask, G, axis=0),
            tokens=out.tokens,
            mask=out.mask,
            sampler_logps=out.sampler_logps,
            stopped=np.ones(P * G, bool),
            rewards=rewards,
            correct=rewards >= 1.0,
            prompt_ids=np.repeat(ids, G),
            group_size=G,
        )
        batch, _ = algorithm.from_rollouts(rollouts, step)
        batch, how = to_device(mesh, batch), scalars.objective
        batch = prepare_step(state.params, batch, how, frozen, algorithm=algorithm, config=config)
        state, metrics = train_step(state, batch, scalars, algorithm=algorithm.for_update, config=config)
        assert np.isfinite(metrics["loss"]), "the loss is not finite"
        return state

    def run() -> int:
        for _ in range(work["iterations"]):
            kept.append(iterate(kept.pop(), next(steps)))
        jax.block_until_ready(kept[0])
        return work["iterations"] * P * G * N

    return run


def objective_of(
    name: str, learning_rate: float, group_size: int = 0, max_new_tokens: int = 1, **given: float
) -> tuple[Algorithm, StepScalars]:
    """An algorithm and its numbers, all but those given at their defaults; on own samples where groups have a size."""
    objective = find("objective", name, "objective").target
    options = {**defaults(objective.options), **given}
    traced = {key: options[key] for key, option in objective.options.items() if option.traced}
    traced |= {"temperature": 1.0} if group_size else {}
    scalars = OptimizerScalars(
        learning_rate=np.float32(learning_rate),
        warmup_steps=np.float32(10),
        decay_steps=np.float32(1e6),
        clip_norm=np.float32(1.0),
        rule_options=float32(defaults(ADAMW.options)),
        schedule_options=float32(defaults(COSINE.options)),
        rule=ADAMW,
        schedule=COSINE,
    )
    algorithm = objective.static(options, group_size > 0, max(group_size, 1), max_new_tokens)
    return algorithm, StepScalars(scalars, float32(traced))


def defaults(options: Mapping[str, Key]) -> dict[str, Any]:
    """What keys are where nobody sets them."""
    return {name: option.default for name, option in options.items()}
