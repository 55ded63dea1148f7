"""JSON schemas before they are compiled: what could only fail in the middle of a completion is refused or left out.

llguidance itself refuses the keywords that it cannot follow. It counts a repeated key twice, and with a vocabulary
without byte fallback it starts towards texts that no pieces spell.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from research.core.errors import ConfigError

_ONE = ("items", "additionalProperties", "additionalItems", "contains")
_MANY = ("items", "prefixItems", "allOf", "anyOf", "oneOf")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_UNSPELLED = "cannot be spelled with this vocabulary, which has no byte fallback"


def json_text(value: Any) -> str:
    """JSON without escapes that it does not need, or blanks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def prepare_schema(
    schema: Any, *, spells: Callable[[str], bool], satisfiable: Callable[[Any], bool], alphabet: str | None
) -> Any:
    """The schema of those values of a schema that the vocabulary can spell.

    Args:
      schema: parsed JSON; what is malformed is left to llguidance's messages.
      spells: whether tokens spell a text.
      satisfiable: whether a value of a schema exists.
      alphabet: regex of the texts that a vocabulary without byte fallback spells; None where it spells all.

    Raises:
      ConfigError: a value or property that the schema demands cannot be spelled, or `minProperties` exceeds the
        properties required, of which repeated keys would make up the rest.
    """
    if not isinstance(schema, dict):
        return schema
    walk = partial(prepare_schema, spells=spells, satisfiable=satisfiable, alphabet=alphabet)
    out = dict(schema)
    out |= {key: walk(out[key]) for key in _ONE if isinstance(out.get(key), dict)}
    out |= {key: [walk(inner) for inner in out[key]] for key in _MANY if isinstance(out.get(key), list)}
    for key in _NAMED:
        if isinstance(out.get(key), dict):
            out[key] = {name: walk(inner) for name, inner in out[key].items()}
    required = out.get("required", []) if isinstance(out.get("required"), list) else []
    least = out.get("minProperties", 0)
    if isinstance(least, int) and least > len(set(map(str, required))):
        raise ConfigError(
            f"constraint: json_schema: minProperties: got {least}, expected at most the {len(required)} properties "
            "required because a completion could repeat a key to reach it."
        )
    if alphabet is None:
        return out
    for what, values in (("required property", required), ("const", [out["const"]] if "const" in out else [])):
        for value in values:
            if not spells(json_text(value)):
                raise ConfigError(f"constraint: json_schema: {what} {json_text(value)} {_UNSPELLED}.")
    if isinstance(out.get("properties"), dict):
        out["properties"] = {name: inner for name, inner in out["properties"].items() if spells(json_text(name))}
    if isinstance(out.get("patternProperties"), dict):
        out["patternProperties"] = {
            pattern: inner
            for pattern, inner in out["patternProperties"].items()
            if satisfiable({"type": "string", "pattern": pattern})
            <= satisfiable({"type": "string", "pattern": pattern, "allOf": [{"pattern": f"^{alphabet}$"}]})
        }
    if isinstance(out.get("enum"), list) and out["enum"]:
        out["enum"] = [value for value in out["enum"] if spells(json_text(value))]
        if not out["enum"]:
            raise ConfigError(f"constraint: json_schema: every value of enum {json_text(schema['enum'])} {_UNSPELLED}.")
    if "pattern" in out or "format" in out:
        out["allOf"] = [*out.get("allOf", []), {"pattern": f"^{alphabet}$"}]
    return out
