from __future__ import annotations

import json
import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatewise.data.text.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    StreamDecoder,
    open_tokenizer,
    restore_tokenizer,
)
from gatewise.errors import MissingExtraError, UserError

# Word pieces of a byte-level tokenizer, in Hugging Face's format: bytes as visible characters, a few merges.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


def byte_level(end: str = "<|endoftext|>") -> str:
    hidden = iter(range(256, 512))
    letters = {byte: chr(byte) if byte in VISIBLE else chr(next(hidden)) for byte in range(256)}
    vocabulary = {letter: byte for byte, letter in letters.items()}
    merges = [("t", "h"), ("th", "e"), (letters[32], "the")]
    vocabulary |= {"".join(pair): 256 + index for index, pair in enumerate(merges)}
    added = {"id": 259, "content": end, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": None,
            "added_tokens": [added | {"special": True}],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocabulary,
                "merges": [" ".join(pair) for pair in merges],
            },
        }
    )


@pytest.fixture
def hugging_face(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra `data` is not installed")
    (tmp_path / "tokenizer.json").write_text(byte_level())
    return open_tokenizer(str(tmp_path))


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_bytes_give_the_text_back(text):
    tokenizer = ByteTokenizer()
    [tokens] = tokenizer.encode([text])
    assert tokens.tolist() == list(text.encode())
    assert tokenizer.decode([*tokens.tolist(), tokenizer.end_of_text]) == text


def test_byte_0_is_left_for_the_ends_of_documents():
    [tokens] = ByteTokenizer().encode(["a\0b"])
    assert tokens.tolist() == list(b"ab")


def test_half_a_surrogate_pair_is_replaced():
    [tokens] = ByteTokenizer().encode(["a\ud800b"])
    assert bytes(tokens.tolist()) == b"a?b"


def test_a_tokenizer_file_gives_its_tokens_without_cutting_and_gives_the_text_back(hugging_face):
    text = "the thé of the then\n  the"
    [tokens] = hugging_face.encode([text])
    assert len(tokens) > 4
    assert 258 in tokens
    assert len(tokens) < len(text.encode())
    assert hugging_face.decode([*tokens.tolist(), hugging_face.end_of_text]) == text
    assert (hugging_face.vocab_size, hugging_face.end_of_text) == (260, 259)


@pytest.mark.parametrize("kind", ["bytes", "hugging face"])
def test_a_tokenizer_is_restored_from_its_description(kind, request):
    tokenizer = ByteTokenizer() if kind == "bytes" else request.getfixturevalue("hugging_face")
    again = restore_tokenizer(json.loads(json.dumps(tokenizer.describe())))
    [tokens], [same] = tokenizer.encode(["the é"]), again.encode(["the é"])
    assert same.tolist() == tokens.tolist()
    assert again.identity == tokenizer.identity
    assert again.end_of_text == tokenizer.end_of_text


def test_different_tokenizers_have_different_identities(hugging_face):
    assert hugging_face.identity != ByteTokenizer().identity


def test_the_end_of_documents_can_be_named(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra `data` is not installed")
    path = tmp_path / "own.json"
    path.write_text(byte_level("<fin>"))
    assert open_tokenizer(str(path), "<fin>").end_of_text == 259
    with pytest.raises(UserError, match="name its own as end_of_text"):
        open_tokenizer(str(path))
    with pytest.raises(UserError, match="unknown token of the tokenizer '<finn>'; did you mean '<fin>'"):
        open_tokenizer(str(path), "<finn>")


def test_a_file_that_is_no_tokenizer_is_a_users_mistake(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra `data` is not installed")
    path = tmp_path / "wrong.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        open_tokenizer(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        open_tokenizer(str(path))


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no tokenizer at"):
        open_tokenizer(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="leave out end_of_text"):
        open_tokenizer("bytes", "x")


def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text(byte_level())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"tokenizers is not installed; pip install 'gatewise\[data\]'"):
        open_tokenizer(str(tmp_path))


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_a_stream_of_bytes_gives_characters_as_soon_as_they_are_whole(text):
    decoder = StreamDecoder(ByteTokenizer())
    pieces = [decoder.push(token) for token in text.encode()]
    assert "".join(pieces) == text
    assert decoder.flush() == ""


def test_a_stream_that_is_no_text_does_not_wait_for_ever():
    decoder = StreamDecoder(ByteTokenizer())
    pieces = [decoder.push(token) for token in [255] * 9 + [65]]
    assert "".join(pieces) + decoder.flush() == "\ufffd" * 9 + "A"
    assert pieces[3] != ""


def test_a_stream_of_word_pieces_is_the_text(hugging_face):
    text = "the thé of the then"
    [tokens] = hugging_face.encode([text])
    decoder = StreamDecoder(hugging_face)
    assert "".join(decoder.push(token) for token in tokens.tolist()) + decoder.flush() == text


@pytest.mark.parametrize(
    "description",
    [
        None,
        [],
        {},
        {"kind": "sentencepiece"},
        {"kind": ["bytes"]},
        {"kind": "huggingface"},
        {"kind": "huggingface", "content": 3, "end_of_text": None},
        {"kind": "huggingface", "content": "{}", "end_of_text": 3},
    ],
)
def test_a_description_that_is_wrong_is_a_users_mistake(description):
    with pytest.raises(UserError, match="the tokenizer is described wrongly: expected"):
        restore_tokenizer(description)


def test_mutated_tokenizers_work_or_are_a_users_mistake():
    pytest.importorskip("tokenizers", reason="the extra `data` is not installed")
    whole = byte_level()
    draw = random.Random(0)
    refused = 0
    for number in range(60):
        place = draw.randrange(len(whole))
        content = whole[:place] if number % 3 == 0 else whole[:place] + draw.choice('0a"{[}],:-') + whole[place + 1 :]
        try:
            tokenizer = restore_tokenizer({"kind": "huggingface", "content": content, "end_of_text": None})
            [tokens] = tokenizer.encode(["the text"])
            tokenizer.decode(tokens.tolist())
        except UserError as error:
            refused += "\n" not in str(error)
    assert refused > 20


def word_level(vocabulary: dict[str, int]) -> str:
    whole = json.loads(byte_level())
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    return json.dumps({**whole, "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model})


def test_a_vocabulary_that_no_network_has_room_for_is_refused():
    pytest.importorskip("tokenizers", reason="the extra `data` is not installed")
    with pytest.raises(UserError, match=r"it has token 4,000,000,000, and a vocabulary may have 16,777,216"):
        HuggingFaceTokenizer(word_level({"</s>": 4_000_000_000}))


def test_an_empty_vocabulary_is_refused():
    pytest.importorskip("tokenizers", reason="the extra `data` is not installed")
    with pytest.raises(UserError, match=r"this is not a tokenizer\.json: its vocabulary is empty"):
        HuggingFaceTokenizer(word_level({}))


def test_a_text_that_the_vocabulary_cannot_say_is_a_users_mistake():
    pytest.importorskip("tokenizers", reason="the extra `data` is not installed")
    tokenizer = HuggingFaceTokenizer(word_level({"</s>": 0, "known": 1}))
    with pytest.raises(UserError, match="the tokenizer cannot encode a text: .*Missing"):
        list(tokenizer.encode(["unknown"]))


def test_a_panic_of_the_package_is_a_users_mistake_and_an_interrupt_is_not(monkeypatch):
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `data` is not installed")

    class PanicException(BaseException):
        """As Rust's panics come."""

    class Broken:
        raised: BaseException

        @classmethod
        def from_str(cls, content: str) -> None:
            raise cls.raised

    monkeypatch.setattr(tokenizers, "Tokenizer", Broken)
    Broken.raised = PanicException("index out of bounds\nsecond line")
    with pytest.raises(UserError, match=r"^this is not a tokenizer\.json: index out of bounds$"):
        HuggingFaceTokenizer("{}")
    Broken.raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        HuggingFaceTokenizer("{}")


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-has-this-name"])
def test_a_name_that_cannot_be_is_a_users_mistake(name):
    with pytest.raises(UserError, match="cannot be read|names a home folder"):
        open_tokenizer(name)
