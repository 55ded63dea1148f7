"""Which tests see a change of a module, and which changes no test can see."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Covering(NamedTuple):
    """Test files, those that catch most first, and the cases of test_properties.py (`-k`) for what survives them."""

    files: tuple[str, ...]
    cases: str = ""

    def stages(self) -> Iterator[list[str]]:
        """Arguments of pytest, one list after the other, each only where the one before found nothing."""
        for name in self.files:
            yield [name]
        if self.cases:
            yield ["tests/objectives/test_properties.py", "-k", f"({self.cases}) and (gradients or garbage)"]


def _objective(names: str, cases: str = "") -> Covering:
    return Covering(tuple(f"tests/objectives/test_{name}.py" for name in names.split()), cases)


# What the rule of `covering_tests` would not find, or would find too late.
NAMED = {
    "objectives/advantages.py": _objective("advantages gae"),
    "objectives/bradley_terry.py": _objective("bradley_terry", "bradley_terry or ranking"),
    "objectives/cpo.py": _objective("cpo", "cpo"),
    "objectives/distillation.py": _objective("distillation", "distillation"),
    "objectives/dpo.py": _objective("dpo dpo_variants", "dpo and not step"),
    "objectives/dpo_terms.py": _objective("dpo_terms dpo_variants", "dpo_forward_kl or dpo_js or dpo_alpha or ld_dpo"),
    "objectives/gae.py": _objective("gae ppo advantages"),
    "objectives/grpo.py": _objective("grpo grpo_variants", "grpo or gspo or cispo or sapo"),
    "objectives/kl.py": _objective("kl grpo_variants"),
    "objectives/kto.py": _objective("kto", "kto"),
    "objectives/next_token.py": _objective("next_token", "next_token"),
    "objectives/numerics.py": _objective("numerics", "next_token"),
    "objectives/orpo.py": _objective("orpo", "orpo"),
    "objectives/pairs.py": _objective("dpo simpo orpo dpo_variants", "simpo"),
    "objectives/ppo.py": _objective("ppo", "ppo"),
    "objectives/prm.py": _objective("prm", "prm"),
    "objectives/reduce.py": _objective("reduce", "next_token"),
    "objectives/simpo.py": _objective("simpo", "simpo"),
    "objectives/step_dpo.py": _objective("step_dpo", "step_dpo"),
    "objectives/surrogate.py": _objective("ppo grpo grpo_variants", "gspo or cispo or sapo or two_sided"),
    "models/decode/attention.py": Covering(("tests/models/decode/test_cache.py", "tests/models/test_transformer.py")),
    "models/decode/cache.py": Covering(("tests/models/decode/test_cache.py", "tests/research/sampling/test_engine.py")),
    "models/decode/rows.py": Covering(("tests/models/decode/test_cache.py", "tests/research/sampling/test_engine.py")),
    "models/kernels/products.py": Covering(
        ("tests/models/kernels/test_products.py", "tests/models/decode/test_layout.py")
    ),
    "models/kernels/cpu_blocks.py": Covering(("tests/models/kernels/test_attention.py", "tests/models/test_groups.py")),
    "research/core/interrupts.py": Covering(("tests/research/train/test_chain.py",)),
    "research/core/network.py": Covering(("tests/research/algorithms/test_losses.py",)),
    "research/sampling/decoded.py": Covering(
        ("tests/research/rollouts/test_rewards.py", "tests/research/rollouts/test_collect.py")
    ),
}
# What computes. Reports, sandboxes, environments and comparisons have tests of another kind.
ROOMS = (
    "objectives", "models", "models/decode", "models/kernels", "research/core", "research/data", "research/tasks",
    "research/rewards", "research/algorithms", "research/sampling", "research/evals", "research/rollouts",
    "research/train",
)  # fmt: skip
NOT_MUTATED: dict[str, str] = {}


def modules() -> list[str]:
    """The paths of all modules that are changed, from the root."""
    found = (path for room in ROOMS for path in sorted((ROOT / room).glob("*.py")) if path.name != "__init__.py")
    paths = (str(path.relative_to(ROOT)) for path in found)
    return [path for path in paths if path not in NOT_MUTATED]


def covering_tests(path: str) -> Covering:
    """The tests of a module: those of its name, then those of its package that import it, the shortest file first.

    Where there are none, the tests of the modules of its package that import it.
    """
    if path in NAMED:
        return NAMED[path]
    folder, _, name = path.rpartition("/")
    tests, module = ROOT / "tests" / folder, path.removesuffix(".py").replace("/", ".")
    found = sorted(_importing(tests, module), key=lambda test: (test.name != f"test_{name}", test.stat().st_size))
    found = [test for test in found if test.name.startswith("test_")]
    if not found:
        users = [str(user.relative_to(ROOT)) for user in sorted(_importing(ROOT / folder, module))]
        tests_of_users = (test for user in users for test in covering_tests(user).files)
        return Covering(tuple(dict.fromkeys(tests_of_users)))
    names = [str(test.relative_to(ROOT)) for test in found]
    if folder == "research/algorithms":  # what their options refuse
        names.append("tests/research/config/test_config.py")
    return Covering(tuple(names))


def _importing(folder: Path, module: str) -> list[Path]:
    return [file for file in folder.glob("*.py") if module in _imports(file)]


@functools.cache
def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


# Changes that change nothing, by module and the line that they leave: why no test can tell.
_FORMS = "two forms of one function, which differ by less than the rounding of what they are added to"
_DROPPED = "the selection on the next line drops the same tokens, and no gradient passes"
_UNREAD = "the value is selected away by the same condition"
EQUIVALENT = {
    (
        "models/kernels/attention.py",
        "segments = jnp.pad(segments, ((0, 0), (0, extra)), constant_values=(1))",
    ): "padding comes last, so causal attention hides it whatever its segment",
    (
        "objectives/advantages.py",
        "centered = jnp.where(steps, shifted - shifted.sum(axis=1, keepdims=True) / jnp.maximum(count, 2.0), 0.0)",
    ): "with one step the sum is of its difference to itself, 0",
    ("objectives/gae.py", "count = jnp.maximum(token_weights.sum(), 2e-08)"): "matters where nothing counts: 0 / guard",
    (
        "objectives/gae.py",
        "return jnp.where(varies, 1.0 - unexplained / jnp.where(varies, variance, 2.0), 0.0)",
    ): _UNREAD,
    ("objectives/orpo.py", "return (jnp.log(-jnp.expm1(x)))"): _FORMS,
    (
        "objectives/orpo.py",
        "return jnp.where(x > -math.log(4.0), jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))",
    ): _FORMS,
    ("objectives/prm.py", "scores = jnp.where(mask, probs, 2.0).min(axis=1)"): "a probability is at most 1",
    ("objectives/step_dpo.py", "log_ratio = (policy_logps) - masked(ref_logps, is_used)"): _DROPPED,
    ("objectives/step_dpo.py", "log_ratio = masked(policy_logps, is_used) - (ref_logps)"): _DROPPED,
}
