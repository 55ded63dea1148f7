"""The new config in the words of code that still reads the old one; each function goes when its reader has moved."""

from research.config.tree import Tree


def old_data(data: Tree) -> Tree:
    """The data section as `research/tasks/sources.py` reads it."""
    one_in = data["validation_one_in"]
    problems = data["problems"]
    judged = {"kind": "arithmetic", "validation_one_in": one_in}
    return {
        "text": {**data["text"], "validation_one_in": one_in},
        "problems": {
            "kind": problems["task"],
            "path": "",
            "validation_one_in": one_in,
            **problems.get(problems["task"], {}),
        },
        **{
            name: {**judged, **data[name], "kind": "jsonl" if data[name]["path"] else "arithmetic"}
            for name in ("preferences", "rankings", "steps")
        },
        "tokenizer": data["tokenizer"],
    }


def old_verifier(correct: str) -> str:
    """The verifier's name for a reward function that says what is right."""
    return {"": "exact_answer", "correct": "exact_answer"}.get(correct, correct)


def old_tools(tools: Tree) -> Tree:
    """The tools section as `research/environments/tool_use.py` reads it."""
    search, python = tools.get("search", {}), tools.get("python", {})
    return {
        "names": tuple(tools["names"]),
        "corpus": search.get("corpus", ""),
        "max_turns": tools["max_turns"],
        "max_result_tokens": tools["max_result_tokens"],
        "search_results": search.get("results", 3),
        "isolation": python.get("isolation", "required"),
    }
