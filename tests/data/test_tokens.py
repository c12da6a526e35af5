"""The token cache on disk: made anew where it is damaged, and never wrong."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from gatewise.data.text import tokens as _tokens
from gatewise.data.text.tokenizers import ByteTokenizer
from gatewise.data.text.tokens import DamagedCacheError, TokenFile, tokenized
from gatewise.errors import Failure

FILES = ("about.json", "bytes.bin", "documents.bin", "tokens.bin")


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.txt" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_text(f"text {number} " * (number + 1))
    return paths


@pytest.fixture
def made(corpus: list[Path], tmp_path: Path) -> TokenFile:
    return tokenized(corpus, ByteTokenizer(), "text", tmp_path / "cache")


def content_of(file: TokenFile) -> tuple[list[int], list[int], list[int]]:
    return file.tokens.tolist(), file.starts.tolist(), file.bytes.tolist()


def test_the_folder_holds_four_files(made):
    assert sorted(path.name for path in made.folder.iterdir()) == list(FILES)


def test_mutated_caches_are_whole_or_refused_and_made_anew(corpus, made, tmp_path):
    expected = content_of(made)
    whole = {name: (made.folder / name).read_bytes() for name in FILES}
    draw = random.Random(0)
    refused = 0
    for number in range(40):
        name = FILES[number % len(FILES)]
        changed = bytearray(whole[name])
        if number % 3:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        else:
            del changed[draw.randrange(len(changed)) :]
        (made.folder / name).write_bytes(changed)
        try:
            found = TokenFile(made.folder)
        except DamagedCacheError:
            refused += 1
        else:
            assert content_of(found) == expected
        assert content_of(tokenized(corpus, ByteTokenizer(), "text", tmp_path / "cache")) == expected
        for again in FILES:
            (made.folder / again).write_bytes(whole[again])
    assert refused > 30


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "object"},
        {"dtype": ["uint16"]},
        {"tokens": 2**62},
        {"tokens": 1.5},
        {"documents": 0},
        {"documents": True},
        {"documents": 10**12},
        {"tokens_crc32": None},
        {"tokens_crc32": ["a"]},
        {"tokens_crc32": []},
        {"bytes_crc32": "0"},
    ],
)
def test_a_description_that_does_not_fit_is_damage(made, fields):
    about = json.loads((made.folder / "about.json").read_text())
    (made.folder / "about.json").write_text(json.dumps({**about, **fields}))
    with pytest.raises(DamagedCacheError, match=r"the token cache .* is damaged \(.*\); delete it"):
        TokenFile(made.folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000])
def test_a_description_that_is_none_is_damage(made, text):
    (made.folder / "about.json").write_text(text)
    with pytest.raises(DamagedCacheError, match="is damaged"):
        TokenFile(made.folder)


def test_documents_that_overlap_are_damage(made):
    import zlib

    starts = made.starts.copy()
    starts[1] = starts[2]
    (made.folder / "documents.bin").write_bytes(starts.tobytes())
    about = json.loads((made.folder / "about.json").read_text())
    about["documents_crc32"] = zlib.crc32(starts.tobytes())
    (made.folder / "about.json").write_text(json.dumps(about))
    with pytest.raises(DamagedCacheError, match="documents overlap"):
        TokenFile(made.folder)


def test_a_damaged_cache_is_made_anew_with_a_word(corpus, made, tmp_path, caplog):
    expected = content_of(made)
    (made.folder / "tokens.bin").write_bytes(b"short")
    with caplog.at_level(logging.WARNING, "gatewise.data"):
        assert content_of(tokenized(corpus, ByteTokenizer(), "text", tmp_path / "cache")) == expected
    [message] = caplog.messages
    assert "is damaged (tokens.bin has 5 bytes, not" in message
    assert message.endswith("rebuilding it")


def test_a_damaged_cache_that_cannot_be_removed_is_a_failure(corpus, made, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (made.folder / "tokens.bin").write_bytes(b"short")
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(Failure, match="cannot use the token cache .*: Permission denied"):
        tokenized(corpus, ByteTokenizer(), "text", tmp_path / "cache")


def test_large_caches_are_checked_by_samples(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(_tokens, "_BLOCK", 10)
    monkeypatch.setattr(_tokens, "CHECKED_WHOLE", 20)
    monkeypatch.setattr(_tokens, "_SAMPLED", 2)
    made = tokenized(corpus, ByteTokenizer(), "text", tmp_path / "cache")
    whole = (made.folder / "tokens.bin").read_bytes()
    assert TokenFile(made.folder).tokens.tobytes() == whole
    for place in (0, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        (made.folder / "tokens.bin").write_bytes(changed)
        with pytest.raises(DamagedCacheError, match="block .* of its tokens has changed"):
            TokenFile(made.folder)


def test_what_a_killed_process_left_is_removed(corpus, made, tmp_path):
    left = made.folder.with_name(".0123.gatewise-0123456789abcdef.tmp")
    left.mkdir()
    (left / "tokens.bin").write_bytes(b"half")
    foreign = made.folder.with_name(".mine.tmp")
    foreign.mkdir()
    tokenized(corpus, ByteTokenizer(), "text", tmp_path / "cache")
    assert not left.exists()
    assert foreign.exists()


def test_a_large_vocabulary_takes_wider_tokens(corpus, tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 2**17

        def encode(self, texts):
            return (tokens.astype(np.int64) + 2**16 for tokens in super().encode(texts))

        @property
        def identity(self) -> str:
            return "wide"

    found = tokenized(corpus, Wide(), "text", tmp_path / "cache")
    assert found.tokens.dtype == np.uint32
    assert found.tokens[0] == 2**16 + ord("t")
