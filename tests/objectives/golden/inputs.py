"""Random inputs that both sides get: 52 cases of one shape a family, so that ours runs as one `vmap`.

Token 0 is padding *and* end of sequence. A row is a prompt of one to four tokens, a completion, padding. The
completion may fill the row, be cut at its end (no end token), or be a single token.
Shapes: C cases, B pairs or rows, T target slots (one fewer than tokens), V vocabulary, S = 2 sides.
"""

import numpy as np

CASES = 52
PAD = EOS = 0
PAIRS = (4, 6)  # B, T
SMALL = (2, 4)  # B, T where logits are differentiated
VOCABULARY = 5
PROMPTS, GROUP, COMPLETION = 2, 3, 6


def make_inputs() -> dict[str, np.ndarray]:
    """Every input array, by "family/name"."""
    families = {
        "pairs": _pairs,
        "logits": _logits,
        "unpaired": _unpaired,
        "scores": _scores,
        "rollouts": _rollouts,
        "teacher": _teacher,
    }
    arrays = {}
    for index, (family, make) in enumerate(families.items()):
        cases = [make(np.random.default_rng([index, seed]), seed) for seed in range(CASES)]
        for name in cases[0]:
            arrays[f"{family}/{name}"] = np.stack([case[name] for case in cases])
    return arrays


def rows(rng: np.random.Generator, shape: tuple[int, ...], slots: int) -> dict[str, np.ndarray]:
    """Tokens `[*shape, 2 slots + 1]`, prompt and completion lengths `[*shape]`, all before truncation.

    `mask` `[*shape, slots]`, after truncation to slots + 1 tokens, is True where token t + 1 is a completion's.
    """
    prompt = np.broadcast_to(rng.integers(1, slots - 1, shape[-1]), shape)  # two sides share their prompt
    kind = rng.integers(4, size=shape)
    room = slots + 1 - prompt
    completion = np.where(kind == 0, 1, np.where(kind == 1, room, rng.integers(1, slots + 1, shape)))
    tokens = rng.integers(1, VOCABULARY, (*shape, 2 * slots + 1))
    slot = np.arange(2 * slots + 1)
    first_side = tokens[0] if len(shape) == 2 else tokens
    tokens = np.where(slot < prompt[..., None], first_side, tokens)
    length = (prompt + completion)[..., None]
    tokens = np.where((slot == length - 1) & (kind != 3)[..., None], EOS, tokens)  # kind 3: no end token
    tokens = np.where(slot < length, tokens, PAD)
    mask = (slot >= prompt[..., None]) & (slot < length)
    return {
        "tokens": tokens.astype(np.int8),
        "prompt": prompt.astype(np.int8),
        "completion": completion.astype(np.int8),
        "mask": mask[..., 1 : slots + 1],
    }


def _logps(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return -rng.exponential(1.0, shape).astype(np.float32)


def _near(rng: np.random.Generator, values: np.ndarray, scale: float) -> np.ndarray:
    return (values + rng.normal(scale=scale, size=values.shape)).astype(np.float32)


def _pairs(rng: np.random.Generator, seed: int) -> dict[str, np.ndarray]:
    case = rows(rng, (2, PAIRS[0]), PAIRS[1])
    policy = _logps(rng, 2, *PAIRS)
    ref = policy.copy() if seed % 13 == 0 else _near(rng, policy, 0.5)  # the first step of a run
    return case | {"policy": policy, "ref": ref, "log_collision": -_logps(rng, 2, *PAIRS) - 1.0}


def _logits(rng: np.random.Generator, seed: int) -> dict[str, np.ndarray]:
    del seed
    B, T = SMALL
    return rows(rng, (2, B), T) | {"logits": rng.normal(size=(2, B, T + 1, VOCABULARY)).astype(np.float32)}


def _unpaired(rng: np.random.Generator, seed: int) -> dict[str, np.ndarray]:
    B, T = PAIRS
    case, mismatched = rows(rng, (B,), T), rows(rng, (B,), T)
    policy, kl_policy = _logps(rng, B, T), _logps(rng, B, T)
    shift = -0.5 if seed % 2 else 0.5  # a reference point that is clipped at zero, or not
    desirable = rng.random(B) < 0.5
    if seed % 9 < 2:
        desirable[:] = seed % 9 == 0
    return (
        case
        | {f"kl_{name}": value for name, value in mismatched.items()}
        | {"policy": policy, "ref_logps": _near(rng, np.where(case["mask"], policy, 0).sum(-1), 1.0)}
        | {
            "kl_policy": kl_policy,
            "kl_ref_logps": _near(rng, np.where(mismatched["mask"], kl_policy, 0).sum(-1) - shift, 0.3),
        }
        | {"desirable": desirable}
    )


def _scores(rng: np.random.Generator, seed: int) -> dict[str, np.ndarray]:
    scores = rng.normal(scale=2.0, size=(2, PAIRS[0])).astype(np.float32)
    if seed % 7 == 0:
        scores[1] = scores[0]
    return {"scores": scores, "margins": rng.exponential(size=PAIRS[0]).astype(np.float32)}


def _rollouts(rng: np.random.Generator, seed: int) -> dict[str, np.ndarray]:
    N = PROMPTS * GROUP
    length = np.where(rng.random(N) < 0.2, 1, rng.integers(1, COMPLETION + 1, N))
    stopped = (rng.random(N) < 0.7) | (length < COMPLETION)
    if seed % 5 == 0:
        stopped[:] = True
    slot = np.arange(COMPLETION)
    tokens = rng.integers(1, VOCABULARY, (N, COMPLETION))
    ends = (slot == length[:, None] - 1) & stopped[:, None]
    tokens = np.where(ends | (slot >= length[:, None]), EOS, tokens)
    rewards = rng.integers(2, size=N) if seed % 2 else rng.normal(size=N)
    if seed % 4 == 0:
        rewards[:GROUP] = rewards[0]  # one group without a spread
    if seed % 8 == 0:
        rewards[:] = 0.1  # none at all
    old = _logps(rng, N, COMPLETION)
    policy = old.copy() if seed % 13 == 0 else _near(rng, old, 0.3)  # the first update of an iteration
    return {
        "tokens": tokens.astype(np.int8),
        "mask": slot < length[:, None],
        "stopped": stopped,
        "policy": policy,
        "old": old,
        "ref": _near(rng, old, 0.3),
        "sampler": _near(rng, old, 0.3),
        "entropy": rng.exponential(size=(N, COMPLETION)).astype(np.float32),
        "rewards": rewards.astype(np.float32),
        "advantages": rng.choice([-1.5, -0.2, 0.0, 0.3, 2.0], N).astype(np.float32),
        "token_advantages": rng.normal(size=(N, COMPLETION)).astype(np.float32),
    }


def _teacher(rng: np.random.Generator, seed: int) -> dict[str, np.ndarray]:
    B, T = SMALL
    mask = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
    student, teacher = rng.normal(scale=1.5, size=(2, B, T, VOCABULARY)).astype(np.float32)
    if seed % 13 == 0:
        teacher = student.copy()
    return {"student": student, "teacher": teacher, "mask": mask}
