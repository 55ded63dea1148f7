"""Round trips for any text, markup that text cannot produce, and readable training errors."""

import pickle
import random

import pytest

from research.core.errors import DataError
from research.data.tokenizer import IM_END, MARKUP, Tokenizer, load_tokenizer, train_tokenizer
from tests.research.data.conftest import PROSE

ALPHABETS = ("ab \n", " \t\r\n\x00\u2581", "xyz<|im_end|>0123", "é😀漢\u0301\u200b\ufeff\u2028 a", "".join(MARKUP))


def random_texts(count: int):
    rng = random.Random(0)
    for index in range(count):
        alphabet = ALPHABETS[index % len(ALPHABETS)]
        yield "".join(rng.choice(alphabet) for _ in range(rng.randrange(40)))
    for _ in range(count):
        points = (rng.randrange(0x110000) for _ in range(rng.randrange(12)))
        yield "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def test_every_text_round_trips_and_never_yields_markup(tokenizer):
    markup = {tokenizer.piece_id(name) for name in MARKUP} | {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    for text in [*random_texts(400), "", " ", "\u2581", PROSE, *MARKUP, *(f"a{name}b" for name in MARKUP)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not markup & set(ids), text


def test_markup_is_shown_on_request_only(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.im_end_id]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, show_markup=True) == f"<bos>hi{IM_END}"
    assert tokenizer.piece_id(IM_END) == tokenizer.im_end_id
    with pytest.raises(DataError, match="no piece '<nope>'"):
        tokenizer.piece_id("<nope>")


def test_digits_and_newlines_are_single_pieces(tokenizer, tmp_path):
    assert [tokenizer.pieces[token] for token in tokenizer.encode("1234")] == list("1234")
    numbers = train_tokenizer(["12 1234 12 1212\n\n1212 a b\n\n"] * 50, vocab_size=284, path=tmp_path / "n.model")
    assert [numbers.pieces[token] for token in numbers.encode("1212")] == list("1212")
    assert not any("\n" in piece for piece in numbers.pieces if piece != "\n")
    ids = tokenizer.encode("a\n\nb\n")
    assert ids.count(tokenizer.piece_id("\n")) == 3
    assert not any("\n" in piece for piece in tokenizer.pieces if piece != "\n")


def test_training_is_deterministic_and_survives_save_load_and_pickle(tokenizer, tmp_path):
    again = train_tokenizer(iter([PROSE * 3]), vocab_size=400, path=tmp_path / "again.model")
    assert again == tokenizer
    assert load_tokenizer(tmp_path / "again.model").encode(PROSE) == tokenizer.encode(PROSE)
    assert pickle.loads(pickle.dumps(tokenizer)).encode("x") == tokenizer.encode("x")
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]


def test_vocabulary_size_errors_state_the_size_that_works(tmp_path):
    path = tmp_path / "t.model"
    with pytest.raises(DataError, match=r"vocab_size 200 is too small .* at least (\d+)\.") as small:
        train_tokenizer([PROSE], vocab_size=200, path=path)
    least = int(str(small.value).rstrip(".").split()[-1])
    with pytest.raises(DataError, match=r"vocab_size 90000 is too large .* at most \d+\.") as large:
        train_tokenizer([PROSE], vocab_size=90_000, path=path)
    most = int(str(large.value).rstrip(".").split()[-1])
    assert not path.exists()
    for size in (least, most):
        assert train_tokenizer([PROSE], vocab_size=size, path=path).vocab_size == size
    with pytest.raises(DataError, match="training corpus is empty"):
        train_tokenizer(["", "\n"], vocab_size=400, path=path)
    with pytest.raises(DataError, match="vocab_size must be given"):
        train_tokenizer([PROSE], vocab_size=None, path=path)


def test_missing_corrupt_and_foreign_models(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"none\.model: the tokenizer cannot be read"):
        load_tokenizer(tmp_path / "none.model")
    for data in (b"", b"not a model", tokenizer.model[: len(tokenizer.model) // 2]):
        (tmp_path / "bad.model").write_bytes(data)
        with pytest.raises(DataError, match=r"bad\.model: "):
            load_tokenizer(tmp_path / "bad.model")


def test_what_is_wrong_with_a_model_is_one_sentence_and_no_log(tmp_path, tokenizer, capfd):
    path = tmp_path / "bad.model"
    flipped = bytearray(tokenizer.model)
    flipped[flipped.index(b"assistant") if b"assistant" in flipped else flipped.index(b"the")] ^= 0x80  # no UTF-8
    foreign = tokenizer.model.replace(b"<|im_sep|>", b"<|im_sap|>")
    for data, message in (
        (b"", "holds no pieces"),
        (bytes(flipped), "is not a SentencePiece model, or is damaged"),
        (foreign, r"pieces lack the markup <\|im_sep\|>"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"bad\.model: .*{message}"):
            load_tokenizer(path)
    with pytest.raises(DataError, match=r"a\\x00b': the tokenizer cannot be read"):
        load_tokenizer("a\0b")
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_of_another_hash_is_refused(tmp_path, tokenizer):
    path = tmp_path / "t.model"
    tokenizer.save(path)
    assert load_tokenizer(path, sha256=tokenizer.sha256) == load_tokenizer(path, sha256=tokenizer.sha256[:16])
    changed = bytearray(tokenizer.model)
    changed[-20] ^= 1
    path.write_bytes(changed)
    with pytest.raises(DataError, match=r"t\.model: is damaged, its hash is not"):
        load_tokenizer(path, sha256=tokenizer.sha256)


def test_pure_character_vocabulary(tmp_path):
    text = "to be, or not to be\n"
    characters = train_tokenizer(
        [text],
        vocab_size=None,
        path=tmp_path / "c.model",
        model_type="char",
        byte_fallback=False,
        required_characters="",
    )
    ids = characters.encode(text)
    assert len(ids) == len(text)
    assert characters.decode(ids) == text
    for missing in ("z", "\u2581"):
        with pytest.raises(DataError, match=f"character '{missing}' is not in this vocabulary"):
            characters.encode(f"to {missing} be")


def test_shakespeare_as_characters(tmp_path, shared_data):
    text = (shared_data / "tinyshakespeare.txt").read_text()
    characters = train_tokenizer(
        [text],
        vocab_size=None,
        path=tmp_path / "c.model",
        model_type="char",
        byte_fallback=False,
        required_characters="",
    )
    assert characters.vocab_size == 65 + len(MARKUP) + 4  # nanoGPT's 65, markup, and pad/bos/eos/unk
    assert characters.decode(characters.encode(text)) == text


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(DataError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")


def test_tokenizer_is_frozen(tokenizer):
    with pytest.raises(AttributeError):
        tokenizer.model = b""
    assert isinstance(tokenizer, Tokenizer)
