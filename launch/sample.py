"""Prompt in, text out, streaming to the terminal.

Example:
  python -m launch.sample --stage=runs/quickstart/stages/rl-0123456789ab --prompt='3+4-5'
  python -m launch.sample --stage=... --prompt='The module' --raw --temperature=0.8 --max_new_tokens=100

`--stage` is the folder of any finished or interrupted stage. Without `--prompt`, each line of standard input is
a prompt.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags

from launch import common
from research.data.chat import Message, render_prompt
from research.errors import ConfigError
from research.loops.chain import Policy, load_policy
from research.loops.problems import sampler_scalars
from research.sampling.methods import SamplingMethod
from research.sampling.sampler import Prompts, SamplerSpec, sample_stream

_STAGE = flags.DEFINE_string(
    "stage", None, "folder of a stage: <workdir>/stages/<name>-<hash>", required=True
)
_PROMPT = flags.DEFINE_string("prompt", None, "what to ask; default: lines of standard input")
_RAW = flags.DEFINE_bool("raw", False, "continue the text as it is, without chat markup: for a base model")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "longest completion, tokens", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k most likely tokens; 0 keeps all", lower_bound=0)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "keep the smallest set of this mass", lower_bound=1e-6, upper_bound=1.0
)
_SEED = flags.DEFINE_integer("seed", 0, "of the sampler", lower_bound=0, upper_bound=2**31 - 1)

_BUCKET = 32
"""Prompt lengths are rounded up to a multiple of this, so that few shapes are compiled."""


def main() -> None:
    """Answers every prompt."""
    policy = load_policy(Path(_STAGE.value))
    with jax.set_mesh(policy.mesh):
        prompts = [_PROMPT.value] if _PROMPT.value is not None else (line.rstrip("\n") for line in sys.stdin)
        for number, prompt in enumerate(prompts):
            for piece in _stream(policy, prompt, number):
                print(piece, end="", flush=True)
            print(flush=True)


def _stream(policy: Policy, prompt: str, number: int) -> Iterator[str]:
    tokenizer = policy.tokenizer
    if _RAW.value:
        tokens = np.array([tokenizer.bos_id, *tokenizer.encode(prompt)], np.int32)
    else:
        tokens = render_prompt([Message("user", prompt)], tokenizer)
    limit = policy.experiment["model"]["max_length"] - _TOKENS.value
    if len(tokens) > limit:
        raise ConfigError(
            f"--prompt: has {len(tokens)} tokens, expected at most {limit} because the context is "
            f"{policy.experiment['model']['max_length']} and --max_new_tokens={_TOKENS.value}"
        )
    padded = -(-len(tokens) // _BUCKET) * _BUCKET
    row = np.full((1, padded), tokenizer.pad_id, np.int32)
    row[0, padded - len(tokens) :] = tokens
    mask = np.arange(padded)[None, :] >= padded - len(tokens)
    method = SamplingMethod(greedy=_TEMPERATURE.value == 0, top_k=_TOP_K.value, nucleus=_TOP_P.value < 1.0)
    stops = (tokenizer.eos_id,) if _RAW.value else (tokenizer.im_end_id, tokenizer.eos_id)
    spec = SamplerSpec(_TOKENS.value, 1, stops, tokenizer.pad_id, method)
    scalars = sampler_scalars(
        seed=_SEED.value, step=0, temperature=_TEMPERATURE.value or 1.0, top_p=_TOP_P.value
    )
    decoder = tokenizer.stream()
    prompts = Prompts(row, mask, np.array([number], np.int32))
    for t, so_far in enumerate(
        sample_stream(policy.params, prompts, scalars, config=policy.model, spec=spec)
    ):
        yield decoder.push(int(so_far.tokens[0, t]))
    yield decoder.finish()


if __name__ == "__main__":
    common.run(main)
