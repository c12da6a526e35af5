"""From text to tokens and back: bytes, or any tokenizer of Hugging Face's format (a `tokenizer.json`)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatewise.data._module import optional_module
from gatewise.errors import Failure, UserError, unknown_name

BYTES = "bytes"
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
"""How tokenizers call the token that ends a document; the first that one has is taken."""

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes that a character of UTF-8 has at most."""


class Tokenizer(ABC):
    """Text to tokens and back.

    Attributes:
        vocab_size: every token is below it.
        end_of_text: the token that is put behind every document.
    """

    vocab_size: int
    end_of_text: int

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Iterator[NDArray[np.integer]]:
        """The tokens of each text, without `end_of_text`."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is no text becomes U+FFFD, and `end_of_text` nothing."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain values that `restore_tokenizer` makes the same tokenizer of."""

    @property
    def identity(self) -> str:
        """Different for tokenizers that may give different tokens."""
        return hashlib.sha256(repr(sorted(self.describe().items())).encode()).hexdigest()


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8. A document ends with byte 0, which text does not hold (and is left out where it does)."""

    vocab_size = 256
    end_of_text = 0

    def encode(self, texts: Sequence[str]) -> Iterator[NDArray[np.integer]]:
        for text in texts:
            # Half a surrogate pair, which some sources hold, is no character.
            yield np.frombuffer(text.replace("\0", "").encode("utf-8", "replace"), dtype=np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token).decode("utf-8", "replace")

    def describe(self) -> dict[str, Any]:
        return {"kind": BYTES}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer in Hugging Face's format.

    Args:
        content: of its `tokenizer.json`.
        end_of_text: the name of the token that ends a document; found by the usual names if not given.
    Raises:
        MissingExtraError: if the package `tokenizers` is not installed.
        UserError: if the content is no tokenizer, or has no such token.
    """

    def __init__(self, content: str, end_of_text: str | None = None) -> None:
        tokenizers = optional_module("tokenizers")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        # The package raises plain exceptions.
        except Exception as error:
            raise UserError(f"this is no tokenizer.json: {error}") from error
        # Cutting and filling up are for batches of sentences; a corpus is read whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())
        names = END_OF_TEXT_NAMES if end_of_text is None else (end_of_text,)
        name = next((name for name in names if name in vocabulary), None)
        if name is None and end_of_text is not None:
            raise unknown_name("token of the tokenizer", end_of_text, vocabulary)
        if name is None:
            raise UserError(f"the tokenizer has none of {', '.join(END_OF_TEXT_NAMES)}: name its own as end_of_text")
        self._end_name: str = name
        self.end_of_text = vocabulary[name]

    def encode(self, texts: Sequence[str]) -> Iterator[NDArray[np.integer]]:
        for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False):
            yield np.asarray(encoding.ids, dtype=np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([token for token in tokens if token != self.end_of_text])

    def describe(self) -> dict[str, Any]:
        return {"kind": "huggingface", "content": self._tokenizer.to_str(), "end_of_text": self._end_name}


def open_tokenizer(name: str, end_of_text: str | None = None) -> Tokenizer:
    """The tokenizer that a user names.

    Args:
        name: "bytes"; a `tokenizer.json` or a folder with one; or a name on the hub.
        end_of_text: the name of the token that ends a document, where that is not clear.
    Raises:
        UserError: if there is none of that name, or it cannot be read.
        Failure: if the hub cannot be reached.
    """
    if name == BYTES:
        if end_of_text is not None:
            raise UserError("the byte tokenizer ends documents with byte 0: leave end_of_text out")
        return ByteTokenizer()
    try:
        return HuggingFaceTokenizer(_find(name).read_text(encoding="utf-8"), end_of_text)
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"tokenizer {name!r} cannot be read: {error}") from error


def restore_tokenizer(description: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `describe` described."""
    if description["kind"] == BYTES:
        return ByteTokenizer()
    return HuggingFaceTokenizer(description["content"], description["end_of_text"])


class StreamDecoder:
    """Text of tokens that come one by one: what is certain is given as soon as it is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Tokens that have been told, kept as context (some tokenizers put a space between, or none in front), and those
        # that have not.
        self._told: list[int] = []
        self._open: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._open.append(token)
        text = self._text()
        # An unfinished character looks like a wrong one until the rest of its bytes are there.
        if text.endswith(_REPLACEMENT) and len(self._open) < _LONGEST_CHARACTER:
            return ""
        return self.flush()

    def flush(self) -> str:
        """The text of what is left, finished or not."""
        text = self._text()
        self._told, self._open = self._open, []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._told)
        return self._tokenizer.decode([*self._told, *self._open])[len(before) :]


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return path / "tokenizer.json"
        raise UserError(f"{name} holds no tokenizer.json")
    if path.suffix == ".json" or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no tokenizer at {name!r}: expected 'bytes', a tokenizer.json, its folder, or a hub name")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    hub = optional_module("huggingface_hub")
    errors = optional_module("huggingface_hub.errors")
    try:
        return Path(hub.hf_hub_download(name, "tokenizer.json"))
    except errors.LocalEntryNotFoundError as error:
        raise Failure(
            f"cannot reach the hub for the tokenizer of {name!r}, and it is not in the local cache"
        ) from error
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the hub has no tokenizer.json of {name!r}: {first}") from error
