"""The standard library's documentation is read without importing it, in one order."""

import pytest

from research.core.errors import DataError
from research.data.stdlib_docs import read_stdlib_docs, stdlib_fingerprint


def library(tmp_path):
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'b': 'Topic B.', 'a': 'Topic A.'}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "ignored.py").write_text('"""Tests."""\nnot python')
    (tmp_path / "zoo.py").write_text(
        '"""A zoo."""\nraise SystemExit("imported!")\n'
        'class Cage:\n    """Holds one."""\n    def open(self, slowly=True):\n        """Opens it."""\n'
    )
    (tmp_path / "quiet.py").write_text("x = 1\n")
    return tmp_path


def test_documents_names_and_order(tmp_path):
    docs = read_stdlib_docs(root=library(tmp_path), max_bytes=0)
    assert [name for name, _ in docs] == ["topic/a", "topic/b", "module/zoo"]
    assert docs[0] == ("topic/a", "Topic A.\n")
    assert docs[2][1] == ("zoo\n\nA zoo.\n\n\nCage\n\nHolds one.\n\n\nCage.open(self, slowly=True)\n\nOpens it.\n")
    assert read_stdlib_docs(root=tmp_path, max_bytes=0) == docs


def test_cap_hash_and_errors(tmp_path):
    root = library(tmp_path)
    assert [name for name, _ in read_stdlib_docs(root=root, max_bytes=12)] == ["topic/a"]
    before = stdlib_fingerprint(root)
    assert before["python"].startswith("3.")
    (root / "quiet.py").write_text('"""Loud."""\n')
    assert stdlib_fingerprint(root) != before
    with pytest.raises(DataError, match="found no standard library documentation within max_bytes = 3"):
        read_stdlib_docs(root=root, max_bytes=3)
    (root / "broken.py").write_text("def (")
    with pytest.raises(DataError, match=r"broken\.py: the standard library module cannot be parsed"):
        read_stdlib_docs(root=root, max_bytes=0)


def test_the_real_library_capped():
    docs = read_stdlib_docs(max_bytes=300_000)
    assert 250_000 < sum(len(text.encode()) for _, text in docs) <= 300_000
