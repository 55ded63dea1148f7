"""Prompt in, text out, streaming to the terminal.

Examples:
  python -m launch.sample --stage=runs/quickstart/stages/rl-0123456789ab --prompt='3+4-5'
  python -m launch.sample --stage=... --prompt='The module' --raw --temperature=0.8 --stop=$'\\n\\n' --stop='def '
  python -m launch.sample --stage=... --prompt='3+4-5' --best_of=16 --scorer=runs/ttc/stages/prm-0123456789ab
  python -m launch.sample --stage=... --prompt='Who wrote it?' --json_schema=person.json --n=4
  python -m launch.sample --stage=... --prompt='3+4-5' --choice=yes --choice=no --echo
  python -m launch.sample --stage=... --prompt='What is 17*23?' --tools=calculator,search --corpus=facts.jsonl
  python -m launch.sample --stage=... --prompt='The module' --raw --draft=runs/draft/stages/pretrain-0123456789ab

`--stage` is the folder of any finished or interrupted stage. Without `--prompt`, each line of standard input is
a prompt.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import jax
import numpy as np
from absl import flags

from launch import common, generation
from launch.common import given, refuse
from objectives.prm import StepReduction
from research.config.schema import expect
from research.evals.scorers import Scorer, score_samples
from research.sampling.limits import SAMPLES
from research.sampling.rows import Constraint, Row, choice
from research.sampling.streaming import TextDelta, TextGenerator, in_order
from research.train.stored import Policy, load_stage

_PROMPT = flags.DEFINE_string("prompt", None, "what to ask; default: lines of standard input")
_RAW = flags.DEFINE_bool("raw", False, "continue the text as it is, without chat markup: for a base model")
_N = flags.DEFINE_integer("n", 1, "samples shown for each prompt, drawn together", lower_bound=1)
_BEST_OF = flags.DEFINE_integer(
    "best_of", 0, "draws; --scorer's best --n are shown", lower_bound=0, upper_bound=SAMPLES
)
_SCORER = flags.DEFINE_string("scorer", None, "folder of a stage: a reward model, outcome or process scorer")
flags.DEFINE_enum("prm_score", "min", get_args(StepReduction), "a process scorer's score from its steps'")
_SLOTS = flags.DEFINE_integer("slots", 0, "samples decoded together; 0 is all of a prompt")
_ECHO = flags.DEFINE_bool("echo", False, "log-probs, in nats, of the prompt's and the completion's tokens")
_SCHEMA = flags.DEFINE_string("json_schema", None, "file of a JSON schema that completions must match")
_REGEX = flags.DEFINE_string("regex", None, "pattern that completions must match as a whole")
_CHOICE = flags.DEFINE_multi_string("choice", [], "a completion must be one of these; repeatable")
flags.adopt_module_key_flags(generation)


def main() -> None:
    """Answers every prompt."""
    _check_flags()
    settings = generation.read_settings(
        samples=_BEST_OF.value or _N.value,
        raw=_RAW.value,
        constraint=_constraint(),
        slots=_SLOTS.value,
        chunk=32 if _BEST_OF.value else 1,  # only what is streamed must come token by token
    )
    policy = generation.load()
    with jax.set_mesh(policy.mesh):
        generator = generation.make_generator(policy, settings)
        longest = policy.max_length
        if _PROMPT.value is not None:
            longest = len(generator.prompt(_PROMPT.value)) + settings.max_new_tokens
        scorer = _load_scorer(policy, longest)
        for number, text in enumerate(_prompts()):
            prompt = generator.prompt(text)
            if _ECHO.value:
                _print_table(generator, prompt, generator.prompt_logps(prompt))
            deltas = generator.stream(prompt, number)
            if scorer is None:
                _print_stream(generator, in_order(deltas, _N.value))
            else:
                _print_best(generator, scorer, prompt, deltas)
        if generator.proposals is not None and generator.proposals.forwards:
            found = generator.proposals.metrics()
            print(
                f"{found['sampler/acceptance_rate']:.0%} of the proposals accepted, "
                f"{found['sampler/tokens_per_forward']:.2f} tokens a forward pass of the model",
                file=sys.stderr,
            )


def _prompts() -> Iterator[str]:
    """--prompt, or lines of standard input; blank ones are left out and counted, unless text is continued raw."""
    if _PROMPT.value is not None:
        yield _PROMPT.value
        return
    blank = answered = 0
    for line in generation.input_lines():
        if not line.strip() and not _RAW.value:
            blank += 1
            continue
        answered += 1
        yield line
    refuse(not answered, "standard input: holds no prompt, expected one a line, or --prompt")
    if blank:
        print(f"standard input: {blank} blank lines were left out", file=sys.stderr)


def _print_stream(generator: TextGenerator, deltas: Iterable[TextDelta]) -> None:
    shown = -1
    for delta in deltas:
        if _N.value > 1 and delta.sample != shown:
            shown = delta.sample
            print(f"--- sample {shown + 1} of {_N.value} ---", flush=True)
        print(delta.text, end="", flush=True)
        if delta.ended:
            _end_sample(generator, delta.row)


def _print_best(generator: TextGenerator, scorer: Scorer, prompt: np.ndarray, deltas: Iterable[TextDelta]) -> None:
    texts = [""] * _BEST_OF.value
    rows: dict[int, Row] = {}
    for delta in deltas:
        texts[delta.sample] += delta.text
        rows[delta.sample] = delta.row
    samples = [rows[sample] for sample in range(_BEST_OF.value)]
    scores = score_samples(
        scorer,
        [prompt],
        [[(row.tokens[: row.length], row.mask[: row.length]) for row in samples]],
        max_prompt_length=len(prompt),
        max_new_tokens=generator.settings.max_new_tokens,
        pad_id=generator.tokenizer.pad_id,
        mesh=scorer.mesh,
    )[0, 0]
    for place, sample in enumerate(np.argsort(-scores, kind="stable")[: _N.value]):
        print(f"--- {place + 1} of {_BEST_OF.value}: {scorer.scores[0]} {scores[sample]:.4f} (sample {sample + 1}) ---")
        print(texts[sample], end="")
        _end_sample(generator, samples[sample])


def _end_sample(generator: TextGenerator, row: Row) -> None:
    print(flush=True)
    if _ECHO.value:
        logps = np.where(row.mask, row.policy_logps, np.nan)
        _print_table(generator, row.tokens[: row.length], logps[: row.length])


def _print_table(generator: TextGenerator, tokens: np.ndarray, logps: np.ndarray) -> None:
    """A line a token; "-" for tokens that the model did not predict: the first one, and a tool's result."""
    spelled = [generator.tokenizer.markup_bytes[token] for token in tokens]
    for token, text, logp in zip(tokens, spelled, logps, strict=True):
        try:
            shown = repr(text.decode())
        except UnicodeDecodeError:  # a part of a character
            shown = generator.tokenizer.pieces[token]
        print(f"{token:>7} {shown:<24} {'-' if np.isnan(logp) else f'{logp:.4f}':>9}", flush=True)


def _load_scorer(policy: Policy, longest: int) -> Scorer | None:
    if not _SCORER.value:
        return None
    folder = Path(_SCORER.value).resolve()
    reductions = (flags.FLAGS.prm_score,)
    scorer = load_stage(folder).scorer(policy.tokenizer, policy.mesh, length=longest, reductions=reductions)
    other = scorer.kind != "process" and given("prm_score")
    refuse(other, f"--prm_score: has no effect, expected a process scorer, got --scorer={folder}")
    return scorer


def _constraint() -> Constraint | None:
    if _CHOICE.value:
        return choice(_CHOICE.value)
    if _REGEX.value is not None:
        return Constraint("regex", _REGEX.value)
    if _SCHEMA.value is None:
        return None
    return Constraint("json_schema", common.read_text(_SCHEMA.value, "--json_schema"))


def _check_flags() -> None:
    """What does not fit together ends before anything is loaded."""
    best, scorer, n, greedy = _BEST_OF.value, _SCORER.value, _N.value, flags.FLAGS.temperature == 0
    tools, samples, raw = flags.FLAGS.tools, best or n, _RAW.value
    constraint = given("json_schema", "regex", "choice")
    others = [flag for flag in (given("regex"), given("choice")) if flag not in ("", constraint)]
    idle = constraint or given("slots")
    nothing = _PROMPT.value is not None and not _PROMPT.value.strip() and not raw
    refuse(nothing, "--prompt: got an empty text, expected a message, or --raw")
    refuse(flags.FLAGS.draft and idle, f"{idle}: does not go with --draft")
    refuse(others, f"{''.join(others[-1:])}: got {constraint} too, expected one of them")
    refuse(constraint and flags.FLAGS.stop, f"--stop: would end a completion before it matches {constraint}")
    refuse(constraint and tools, f"--tools: {constraint} leaves no room for a call, expected one of them")
    refuse(tools and raw, "--tools: calls need chat turns, expected no --raw")
    refuse(best and not scorer, "--best_of: needs a scorer, expected --scorer=<folder>")
    refuse(scorer and not best, "--scorer: has no effect without --best_of")
    refuse(scorer and raw, "--scorer: was trained on chat turns, expected no --raw")
    refuse(given("prm_score") and not scorer, "--prm_score: has no effect without --scorer")
    expect(not best or n <= best, "--n", n, f"at most --best_of={best}")
    alone = "1 at --temperature=0: greedy samples are equal"
    expect(not greedy or samples == 1, "--best_of" if best else "--n", samples, alone)
    expect(_SLOTS.value <= samples, "--slots", _SLOTS.value, f"at most the {samples} samples")


if __name__ == "__main__":
    common.run(main)
