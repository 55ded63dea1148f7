"""Temper as a system under test: the sampler, the train step and an iteration of GRPO as the loops run them.

On a CPU, rows are split over one XLA device a core. Token ids come from the workload, so no tokenizer takes part;
everything else is the code of a run.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.config import ModelConfig
from models.transformer import Params
from research.algorithms.base import Algorithm, Frozen, Rollouts, Setting
from research.benchmarks.systems.channel import Channel
from research.config.optimizers import ADAMW, COSINE
from research.config.references import find
from research.core.batch import SequenceBatch
from research.core.mesh import make_mesh, to_device
from research.core.network import Network
from research.core.optim import OptimizerScalars
from research.core.state import TrainState, init_state
from research.data.examples import Examples
from research.data.report import DataReport
from research.data.streams import PackedStream
from research.sampling.engine import Engine
from research.sampling.methods import SamplingMethod
from research.sampling.programs import layout_program
from research.sampling.rows import Request
from research.sampling.sampler import sample
from research.sampling.types import EngineSpec, Prompts, SamplerScalars, SamplerSpec
from research.train.step import StepScalars, prepare_step, train_step

Lap = Callable[[], dict[str, float]]
Work = Mapping[str, Any]
PAD = 0


def main() -> None:
    """Serves one workload."""
    channel = Channel()
    work = channel.workload
    config = ModelConfig(**work["model"])
    devices = 1
    if work["platform"] == "cpu" and rows(work) % work["threads"] == 0:
        devices = work["threads"]
        jax.config.update("jax_num_cpu_devices", devices)
    mesh = make_mesh(devices, 1, 1, devices=jax.devices(work["platform"])[:devices])
    with jax.set_mesh(mesh):
        state = init_state(config, mesh, work["seed"], ADAMW)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        lap = LAPS[work["kind"]](work, config, mesh, state)
        del state
        names = ("jax", "jaxlib", "flax", "optax")
        channel.describe(
            parameters=parameters, versions={name: importlib.metadata.version(name) for name in names}
        )
        channel.repeat(lambda: {**lap(), **device_peak(mesh)})


def rows(work: Work) -> int:
    """Rows of the smallest batch, which are split over the devices."""
    return int(work["prompts_per_step"] if work["kind"] == "grpo_iteration" else work["batch_size"])


def device_peak(mesh: Mesh) -> dict[str, float]:
    """The most memory of the accelerator in use so far; nothing where the backend does not count it."""
    stats = mesh.devices.flat[0].memory_stats()
    return {"device_bytes": float(stats["peak_bytes_in_use"])} if stats else {}


def rollout(work: Work, config: ModelConfig, mesh: Mesh, state: TrainState) -> Lap:
    """Draws a completion of its wanted length for each prompt."""
    tokens, lengths = np.array(work["prompts"], np.int32), np.array(work["lengths"], np.int32)
    prompts = Prompts(tokens, np.ones(tokens.shape, bool), np.arange(len(tokens), dtype=np.int32))
    spec = SamplerSpec(
        work["max_new_tokens"],
        1,
        (),
        PAD,
        SamplingMethod(greedy=work["greedy"]),
        cache_bucket=work["sampler"]["cache_bucket"],
        engine=EngineSpec(work["batch_size"], work["sampler"]["chunk"], work["sampler"]["admit"]),
    )
    draw = _draw_fixed if (lengths == work["max_new_tokens"]).all() else _draw_lengths
    # Before the clock starts: it belongs to an update of the policy, where `grpo` below pays for it.
    params, steps = layout_program(state.params, config=config, weights=spec.weights), count()

    def lap() -> dict[str, float]:
        scalars = _sampler_scalars(work["seed"], next(steps))
        drawn = draw(params, prompts, lengths, scalars, config, spec, mesh)
        return {"tokens": float(drawn)}

    return lap


def _draw_fixed(
    params: Params,
    prompts: Prompts,
    lengths: np.ndarray,
    scalars: SamplerScalars,
    config: ModelConfig,
    spec: SamplerSpec,
    mesh: Mesh,
) -> int:
    """Draws `max_new_tokens` for every prompt, a batch at a time; returns the tokens drawn."""
    assert spec.engine is not None
    slots = spec.engine.slots
    drawn, spec = 0, dataclasses.replace(spec, engine=None)
    for batch in _batches(prompts, min(slots, len(lengths))):
        out = jax.device_get(sample(params, to_device(mesh, batch), scalars, config=config, spec=spec))
        drawn += int(out.lengths.sum())
    assert drawn == lengths.sum(), f"drew {drawn} tokens, expected {lengths.sum()}"
    return drawn


def _draw_lengths(
    params: Params,
    prompts: Prompts,
    lengths: np.ndarray,
    scalars: SamplerScalars,
    config: ModelConfig,
    spec: SamplerSpec,
    mesh: Mesh,
) -> int:
    """Draws completions of given lengths with the refill engine; returns the tokens drawn."""
    del mesh
    requests = [
        Request(prompt, int(prompt_id), 0, int(length))
        for prompt, prompt_id, length in zip(prompts.tokens, prompts.prompt_ids, lengths, strict=True)
    ]
    engine = Engine(params, scalars, config=config, spec=spec)
    drawn = sum(row.length for row in engine.run(requests))
    assert drawn == lengths.sum(), f"drew {drawn} tokens, expected {lengths.sum()}"
    return drawn


def _batches(prompts: Prompts, size: int) -> Iterator[Prompts]:
    for start in range(0, len(prompts.prompt_ids), size):
        yield jax.tree.map(lambda x, at=start: x[at : at + size], prompts)


def train(work: Work, config: ModelConfig, mesh: Mesh, state: TrainState) -> Lap:
    """Takes optimizer steps: on full rows of random tokens, or on packed examples."""
    name = "sft" if work["examples"] else "next_token"
    algorithm, scalars = objective_of(work, name, {"label_smoothing": 0.0, "z_loss_coef": 0.0})
    batches, steps = packed(work) if work["examples"] else (full(work, config), work["steps"])
    kept = [state]

    def lap() -> dict[str, float]:
        tokens, state = 0, kept.pop()
        for batch in islice(batches, steps):
            tokens += int((batch.segment_ids > 0).sum())
            state, metrics = train_step(
                state, to_device(mesh, batch), scalars, algorithm=algorithm, config=config
            )
        kept.append(jax.block_until_ready(state))
        assert np.isfinite(metrics["loss"]), "the loss is not finite"
        return {"tokens": float(tokens)}

    return lap


def full(work: Work, config: ModelConfig) -> Iterator[SequenceBatch]:
    """Rows of random tokens without end, each row one sequence."""
    rng = np.random.default_rng(work["seed"])
    shape = (work["batch_size"], work["length"])
    positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    ones, weights = np.ones(shape, np.int32), np.ones(shape[0], np.float32)
    while True:
        tokens = rng.integers(0, config.vocab_size, shape, np.int32)
        yield SequenceBatch(tokens, positions > 0, ones, positions, weights)


def packed(work: Work) -> tuple[Iterator[SequenceBatch], int]:
    """The examples' batches without end, packed as in fine-tuning, and how many hold about a pass."""
    tokens = [np.array(each["tokens"], np.int32) for each in work["examples"]]
    masks = [np.array(each["loss_mask"], bool) for each in work["examples"]]
    n = len(tokens)
    examples = Examples(tokens, masks, np.arange(n), DataReport("examples", n, n))
    stream = PackedStream(examples, work["length"], work["seed"], PAD)
    size = work["batch_size"]

    def batches() -> Iterator[SequenceBatch]:
        for start in count(0, size):
            rows = [stream[start + i] for i in range(size)]
            arrays = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
            yield SequenceBatch(
                tokens=arrays["tokens"],
                loss_mask=arrays["loss_mask"],
                segment_ids=arrays["segment_ids"],
                positions=arrays["positions"],
                weights=np.ones(size, np.float32),
            )

    return batches(), -(-int(examples.lengths.sum()) // (size * work["length"]))


def grpo(work: Work, config: ModelConfig, mesh: Mesh, state: TrainState) -> Lap:
    """Iterations: sample, pay, log-probs of the reference, one update."""
    G, P, N = work["group_size"], work["prompts_per_step"], work["max_new_tokens"]
    algorithm, scalars = objective_of(work, "grpo", work["objective"], online=True)
    tokens = np.array(work["prompts"], np.int32)
    mask, spec = np.ones((P, tokens.shape[1]), bool), SamplerSpec(N, G, (), PAD)
    spec = dataclasses.replace(spec, cache_bucket=work["sampler"]["cache_bucket"])
    frozen = Frozen(reference=Network(jax.tree.map(jnp.copy, state.params), config))
    kept, steps = [state], count()

    def iterate(state: TrainState, step: int) -> TrainState:
        ids = np.arange(step * P, (step + 1) * P, dtype=np.int32) % len(tokens)
        prompts = Prompts(tokens[ids], mask, ids)
        draws = _sampler_scalars(work["seed"], step)
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
        batch = prepare_step(
            state.params,
            to_device(mesh, batch),
            scalars.objective,
            frozen,
            algorithm=algorithm,
            config=config,
        )
        state, metrics = train_step(state, batch, scalars, algorithm=algorithm.for_update, config=config)
        assert np.isfinite(metrics["loss"]), "the loss is not finite"
        return state

    def lap() -> dict[str, float]:
        for _ in range(work["iterations"]):
            kept.append(iterate(kept.pop(), next(steps)))
        jax.block_until_ready(kept[0])
        return {"tokens": float(work["iterations"] * P * G * N)}

    return lap


def objective_of(
    work: Work, name: str, options: Mapping[str, Any], *, online: bool = False
) -> tuple[Algorithm, StepScalars]:
    """The algorithm and its numbers, as `research/train/build.py` makes them from a stage."""
    objective, o = find("objective", name, "objective").target, work["optimizer"]
    options = {key: option.default for key, option in objective.options.items()} | dict(options)
    algorithm = objective.make(
        Setting(options, online, work.get("group_size", 1), work.get("max_new_tokens", 1))
    )
    traced = {key: np.float32(options[key]) for key, option in objective.options.items() if option.traced}
    if online:
        traced["temperature"] = np.float32(1.0)
    numbers: dict[str, Any] = {key: np.float32(value) for key, value in {**o, "decay_steps": 1e6}.items()}
    rule = {name: numbers.pop(name) for name in ADAMW.options}
    schedule = {name: numbers.pop(name) for name in COSINE.options}
    scalars = OptimizerScalars(
        **numbers, rule_options=rule, schedule_options=schedule, rule=ADAMW, schedule=COSINE
    )
    return algorithm, StepScalars(scalars, traced)


def _sampler_scalars(seed: int, step: int) -> SamplerScalars:
    return SamplerScalars(np.int32(seed), np.int32(step), np.float32(1.0), np.float32(1.0))


LAPS: Mapping[str, Callable[[Work, ModelConfig, Mesh, TrainState], Lap]] = {
    "rollout": rollout,
    "train_step": train,
    "grpo_iteration": grpo,
}


if __name__ == "__main__":
    main()
