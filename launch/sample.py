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
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import jax
import numpy as np
from absl import flags

from launch import common
from objectives.prm import StepReduction
from research.core.errors import ConfigError
from research.environments.base import Toolbox
from research.environments.registry import NAMES, make_tools
from research.environments.turns import TurnLimits, Turns
from research.evals.best_of import sample_scores
from research.evals.scorers import Scorer, make_scorers
from research.sampling.constraints import Constraint, choice, json_schema, regex
from research.sampling.engine import Row
from research.sampling.session import Piece, Session, Settings, in_order, piece_bias
from research.train.chain import Policy, load_policy, load_stage

_CALLS = 4
"""Tool calls of one turn that are run; further ones are answered by an error."""

_STAGE = flags.DEFINE_string(
    "stage", None, "folder of a stage: <workdir>/stages/<name>-<hash>", required=True
)
_PROMPT = flags.DEFINE_string("prompt", None, "what to ask; default: lines of standard input")
_RAW = flags.DEFINE_bool("raw", False, "continue the text as it is, without chat markup: for a base model")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "longest completion, tokens", lower_bound=1)
_LEAST = flags.DEFINE_integer(
    "min_new_tokens", 0, "tokens before an end token may be drawn; stop strings always end", lower_bound=0
)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k most likely tokens; 0 keeps all", lower_bound=0)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "keep the smallest set of this mass", lower_bound=1e-6, upper_bound=1.0
)
_SEED = flags.DEFINE_integer("seed", 0, "of the sampler", lower_bound=0, upper_bound=2**31 - 1)
_BIAS = flags.DEFINE_multi_string(
    "logit_bias",
    [],
    'TOKEN=NUMBER added to a logit, -inf bans; a token id, or a piece\'s text: "7"=-inf, if=2',
)
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "above 1 discourages tokens already seen; 1 is off")
_STOP = flags.DEFINE_multi_string("stop", [], "a text that ends a completion and is not shown; repeatable")
_N = flags.DEFINE_integer("n", 1, "samples shown for each prompt, drawn together", lower_bound=1)
_BEST_OF = flags.DEFINE_integer(
    "best_of", 0, "draw so many and show the --n that --scorer likes best", lower_bound=0
)
_SCORER = flags.DEFINE_string("scorer", None, "folder of a stage: a reward model, outcome or process scorer")
_REDUCTION = flags.DEFINE_enum(
    "prm_score", "min", get_args(StepReduction), "a process scorer's score from its steps'"
)
_SLOTS = flags.DEFINE_integer("slots", 0, "samples decoded together; 0 is all of a prompt", lower_bound=0)
_ECHO = flags.DEFINE_bool("echo", False, "log-probs, in nats, of the prompt's and the completion's tokens")
_SCHEMA = flags.DEFINE_string("json_schema", None, "file of a JSON schema that completions must match")
_REGEX = flags.DEFINE_string("regex", None, "pattern that completions must match as a whole")
_CHOICE = flags.DEFINE_multi_string("choice", [], "a completion must be one of these; repeatable")
_TOOLS = flags.DEFINE_list("tools", [], f"tools that the model may call: some of {','.join(NAMES)}")
_CORPUS = flags.DEFINE_string("corpus", None, "JSONL or text file that the tool 'search' searches")
_TURNS = flags.DEFINE_integer(
    "max_turns", 4, "turns with tool calls that are answered; then the row ends", lower_bound=1
)
_RESULT = flags.DEFINE_integer(
    "max_result_tokens", 256, "of one tool's result; the rest is cut", lower_bound=1
)
_DRAFT = flags.DEFINE_string(
    "draft",
    None,
    f"speculative decoding: folder of a smaller model's stage, or {common.NGRAM} for a look-up in the text; the "
    "completions' distribution stays the model's, and they come whole",
)
_DRAFT_TOKENS = flags.DEFINE_integer(
    "draft_tokens", 4, "proposals between two looks of the model", lower_bound=1
)


def main() -> None:
    """Answers every prompt."""
    _check_flags()
    constraint = _constraint()
    policy = load_policy(Path(_STAGE.value))
    with jax.set_mesh(policy.mesh):
        session = _session(policy, constraint)
        if _PROMPT.value is not None:
            longest = len(session.prompt(_PROMPT.value)) + _TOKENS.value
        else:
            longest = policy.max_length
        scorer = _load_scorer(policy, longest)
        prompts = [_PROMPT.value] if _PROMPT.value is not None else (line.rstrip("\n") for line in sys.stdin)
        for number, text in enumerate(prompts):
            prompt = session.prompt(text)
            if _ECHO.value:
                _print_table(session, prompt, session.prompt_logps(prompt))
            pieces = session.draw(prompt, number)
            if scorer is None:
                _print_stream(session, in_order(pieces, _N.value))
            else:
                _print_best(session, scorer, prompt, pieces)
        if session.proposals is not None and session.proposals.forwards:
            found = session.proposals.metrics()
            print(
                f"{found['sampler/acceptance_rate']:.0%} of the proposals accepted, "
                f"{found['sampler/tokens_per_forward']:.2f} tokens from one look of the model",
                file=sys.stderr,
            )


def _print_stream(session: Session, pieces: Iterable[Piece]) -> None:
    begun = -1
    for piece in pieces:
        if _N.value > 1 and piece.sample != begun:
            begun = piece.sample
            print(f"--- sample {begun + 1} of {_N.value} ---", flush=True)
        print(piece.text, end="", flush=True)
        if piece.row is not None:
            _end_sample(session, piece.row)


def _print_best(session: Session, scorer: Scorer, prompt: np.ndarray, pieces: Iterable[Piece]) -> None:
    texts = [""] * _BEST_OF.value
    rows: dict[int, Row] = {}
    for piece in pieces:
        texts[piece.sample] += piece.text
        if piece.row is not None:
            rows[piece.sample] = piece.row
    samples = [rows[sample] for sample in range(_BEST_OF.value)]
    scores = sample_scores(
        scorer, prompt, samples, max_new_tokens=_TOKENS.value, pad_id=session.tokenizer.pad_id
    )
    for place, sample in enumerate(np.argsort(-scores, kind="stable")[: _N.value]):
        print(
            f"--- {place + 1} of {_BEST_OF.value}: {scorer.scores[0]} {scores[sample]:.4f} (sample {sample + 1}) ---"
        )
        print(texts[sample], end="")
        _end_sample(session, samples[sample])


def _end_sample(session: Session, row: Row) -> None:
    print(flush=True)
    if _ECHO.value:
        logps = np.where(row.mask, row.policy_logps, np.nan)
        _print_table(session, row.tokens[: row.length], logps[: row.length])


def _print_table(session: Session, tokens: np.ndarray, logps: np.ndarray) -> None:
    """A line a token; "-" where the model was not asked: the first token, and what a tool said."""
    spelled = [session.tokenizer.markup_bytes[token] for token in tokens]
    for token, text, logp in zip(tokens, spelled, logps, strict=True):
        try:
            shown = repr(text.decode())
        except UnicodeDecodeError:  # a part of a character
            shown = session.tokenizer.pieces[token]
        print(f"{token:>7} {shown:<24} {'-' if np.isnan(logp) else f'{logp:.4f}':>9}", flush=True)


def _session(policy: Policy, constraint: Constraint | None) -> Session:
    settings = Settings(
        samples=_BEST_OF.value or _N.value,
        max_new_tokens=_TOKENS.value,
        raw=_RAW.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        stops=tuple(_STOP.value),
        logit_bias=piece_bias(_BIAS.value, policy.tokenizer),
        repetition_penalty=_PENALTY.value,
        min_new_tokens=_LEAST.value,
        constraint=constraint,
        slots=_SLOTS.value,
        chunk=32 if _BEST_OF.value else 1,  # only what is streamed must be looked at after each token
    )
    turns = None
    if _TOOLS.value:
        tools = make_tools(_TOOLS.value, corpus=_CORPUS.value)
        box = Toolbox(tools, policy.tokenizer, max_result_tokens=min(_RESULT.value, _TOKENS.value))
        turns = Turns(box, TurnLimits(_TURNS.value, _CALLS, _TOKENS.value))
    return Session(
        policy.params,
        policy.model,
        policy.tokenizer,
        max_length=policy.max_length,
        settings=settings,
        turns=turns,
        draft=common.load_draft(_DRAFT.value, policy, _DRAFT_TOKENS.value) if _DRAFT.value else None,
    )


def _load_scorer(policy: Policy, longest: int) -> Scorer | None:
    if not _SCORER.value:
        return None
    folder = Path(_SCORER.value).resolve()
    (scorer,) = make_scorers(
        [load_stage(folder)],
        tokenizer=policy.tokenizer,
        mesh=policy.mesh,
        length=longest,
        reductions=[how for how in get_args(StepReduction) if how == _REDUCTION.value],
    )
    if scorer.kind != "process" and flags.FLAGS["prm_score"].present:
        raise ConfigError(f"--prm_score: has no effect, expected a process scorer, got --scorer={folder}")
    return scorer


def _constraint() -> Constraint | None:
    if _CHOICE.value:
        return choice(_CHOICE.value)
    if _REGEX.value is not None:
        return regex(_REGEX.value)
    if _SCHEMA.value is None:
        return None
    try:
        return json_schema(Path(_SCHEMA.value).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"--json_schema: {_SCHEMA.value}: is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise ConfigError(f"--json_schema: {_SCHEMA.value}: cannot be read ({error.strerror})") from error


def _check_flags() -> None:
    """What does not fit together ends before anything is loaded."""
    samples, greedy, tools = _BEST_OF.value or _N.value, _TEMPERATURE.value == 0, _TOOLS.value
    constraints = [f"--{name}" for name in ("json_schema", "regex", "choice") if flags.FLAGS[name].present]
    constraint = constraints[0] if constraints else ""
    idle = [f"--{name}" for name in ("corpus", "max_turns", "max_result_tokens") if flags.FLAGS[name].present]
    steering = ("tools", "json_schema", "regex", "choice", "logit_bias", "repetition_penalty")
    whole = ("min_new_tokens", "slots")
    controlled = [f"--{name}" for name in (*steering, *whole) if flags.FLAGS[name].present]
    rules = (
        (_DRAFT.value and controlled, f"{''.join(controlled[:1])}: does not go with --draft"),
        (
            flags.FLAGS["draft_tokens"].present and not _DRAFT.value,
            "--draft_tokens: has no effect without --draft",
        ),
        (len(constraints) > 1, f"{''.join(constraints[-1:])}: got {constraint} too, expected one of them"),
        (constraint and _STOP.value, f"--stop: would end a completion before it matches {constraint}"),
        (constraint and tools, f"--tools: {constraint} leaves no room for a call, expected one of them"),
        (tools and _RAW.value, "--tools: calls need chat turns, expected no --raw"),
        (idle and not tools, f"{''.join(idle[:1])}: has no effect without --tools"),
        ("search" in tools and not _CORPUS.value, "--tools: search needs a corpus, expected --corpus=FILE"),
        (_CORPUS.value and "search" not in tools, "--corpus: has no effect, expected search among --tools"),
        (_BEST_OF.value and not _SCORER.value, "--best_of: needs a scorer, expected --scorer=<folder>"),
        (_SCORER.value and not _BEST_OF.value, "--scorer: has no effect without --best_of"),
        (_SCORER.value and _RAW.value, "--scorer: was trained on chat turns, expected no --raw"),
        (
            flags.FLAGS["prm_score"].present and not _SCORER.value,
            "--prm_score: has no effect without --scorer",
        ),
        (
            _BEST_OF.value and _N.value > _BEST_OF.value,
            f"--n: got {_N.value}, expected at most --best_of={_BEST_OF.value}",
        ),
        (
            greedy and samples > 1,
            f"--{'best_of' if _BEST_OF.value else 'n'}: got {samples}, expected 1 at --temperature=0: greedy "
            "samples are equal",
        ),
        (greedy and _TOP_K.value, "--top_k: has no effect at --temperature=0"),
        (greedy and _TOP_P.value < 1.0, "--top_p: has no effect at --temperature=0"),
        (_SLOTS.value > samples, f"--slots: got {_SLOTS.value}, expected at most the {samples} samples"),
        (
            _LEAST.value >= _TOKENS.value,
            f"--min_new_tokens: got {_LEAST.value}, expected less than --max_new_tokens={_TOKENS.value}",
        ),
        ("" in _STOP.value, "--stop: got an empty text, expected at least one character"),
        (
            not 0 < _PENALTY.value < float("inf"),
            f"--repetition_penalty: got {_PENALTY.value:g}, expected a number above 0",
        ),
    )
    for wrong, sentence in rules:
        if wrong:
            raise ConfigError(sentence)


if __name__ == "__main__":
    common.run(main)
