"""Ranking by BM25, ties by place, and corpora that cannot be used."""

import json
import math
import re
import sys

import pytest

from research.core.errors import ConfigError, DataError
from research.environments.calls import Call
from research.environments.search import Document, Index, Search, read_corpus
from research.environments.toolbox import Toolbox

DOCUMENTS = (
    Document("fox", "The quick brown fox jumps over the lazy dog.", "Animals"),
    Document("cats", "A cat sleeps. A cat eats. The cat dreams of a fox."),
    Document("sea", "The sea is deep and cold, and a ship is small."),
    Document("twin", "The sea is deep and cold, and a ship is small."),
    Document("7", "Ein Käse für 漢字"),
)


def bm25(documents, query, k1=1.5, b=0.75):
    """Lucene's formula, written out."""
    words = [re.findall(r"\w+", f"{each.title} {each.text}".lower()) for each in documents]
    mean = sum(map(len, words)) / len(words)
    scores = [0.0] * len(words)
    for term in re.findall(r"\w+", query.lower()):
        n = sum(term in each for each in words)
        idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
        for index, each in enumerate(words):
            tf = each.count(term)
            scores[index] += idf * tf / (tf + k1 * (1 - b + b * len(each) / mean))
    return scores


@pytest.fixture(scope="module")
def index() -> Index:
    return Index(DOCUMENTS)


@pytest.mark.parametrize("query", ["fox", "the cat", "deep sea fox", "a", "Käse 漢字", "animals", "THE the SHIP!"])
def test_scores_are_bm25(index, query):
    expected = bm25(DOCUMENTS, query)
    order = sorted((i for i, score in enumerate(expected) if score > 0), key=lambda i: (-round(expected[i], 5), i))
    found = index.top(query, k=10)
    assert [document.id for document, _ in found] == [DOCUMENTS[i].id for i in order]
    assert [score for _, score in found] == pytest.approx([expected[i] for i in order], rel=1e-5)
    assert index.top(query, k=1) == found[:1]


def test_ties_keep_the_order_of_the_corpus():
    many = [Document(str(i), "same words here") for i in range(50)]
    assert [document.id for document, _ in Index(many).top("words", 5)] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("query", ["", " ", "?!", "zebra"])
def test_nothing_matches(index, query):
    assert index.top(query, 3) == []


def test_as_a_tool(tmp_path, tokenizer):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps(vars(document)) for document in DOCUMENTS))
    tool = Search(str(corpus), results=2, max_characters=16)()
    box = Toolbox([tool], tokenizer, max_result_tokens=100)
    result = box.run(Call("search", {"query": "quick fox"}))
    assert result.how == "ok"
    assert result.text == "[fox] Animals\nThe quick brown ...\n\n[cats]\nA cat sleeps. A ..."
    assert box.run(Call("search", {"query": "zebra"})).text == "no document matches"
    assert box.run(Call("search", {"query": ["fox"]})).how == "arguments"


def test_corpora(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"text": "one", "id": "x", "title": "T"}, {"text": "two"}, {"text": "three", "id": 9}]
    path.write_text("\n".join(map(json.dumps, records)))
    assert read_corpus(path) == (Document("x", "one", "T"), Document("2", "two"), Document("9", "three"))
    path = tmp_path / "a.txt"
    path.write_text("\n\nfirst\nline\n \t\nsecond\n\n\n")
    assert read_corpus(path) == (Document("1", "first\nline"), Document("2", "second"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"title": "b"}', "a.jsonl:2: found the keys title, expected a non-empty text"),
        ("a.jsonl", b'{"text": " "}', "a.jsonl:1: found the keys text, expected a non-empty text"),
        ("a.jsonl", b'{"text": "a", "id": 1}\n{"text": "b", "id": "1"}', "two documents have the id '1'"),
        ("a.jsonl", b"", "holds no records"),
        ("a.txt", b" \n\n", "a.txt: holds no documents"),
        ("a.txt", b"\xff\xfe\xfa", "a.txt: is not UTF-8 text"),
        ("a.txt", None, "a.txt: cannot be read"),
    ],
)
def test_bad_corpora_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_corpus(tmp_path / name)


def test_refusals(monkeypatch):
    with pytest.raises(DataError, match="the 1 documents have no words"):
        Index([Document("a", "?!")])
    with pytest.raises(ConfigError, match=r"tools\.search\.corpus: got '', expected a JSONL or text file"):
        Search()()
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match=r"bm25s is missing; pip install 'temper\[tools\]'"):
        Index(DOCUMENTS)
