"""Tokenizers: bytes, or any tokenizer in Hugging Face's format (a `tokenizer.json`)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatewise.data.module import expanded, optional_module
from gatewise.errors import Failure, UserError, unknown_name
from gatewise.files import read_text

BYTES = "bytes"
LARGEST_FILE = 2**28
"""Largest accepted `tokenizer.json` in bytes."""

LARGEST_VOCABULARY = 2**24
"""Largest accepted vocabulary, because a network has a row per token."""

END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
"""Usual names of the token that ends a document. The first one that a tokenizer has is used."""

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4
"""Largest number of bytes of a character in UTF-8."""


class Tokenizer(ABC):
    """Conversion of text to tokens and back.

    Attributes:
        vocab_size: size of the vocabulary; every token is below it.
        end_of_text: token that is appended to every document.
    """

    vocab_size: int
    end_of_text: int

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Iterator[NDArray[np.integer]]:
        """Return the tokens of each text, without `end_of_text`."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens. Invalid text becomes U+FFFD, and `end_of_text` is left out."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return plain values from which `restore_tokenizer` makes the same tokenizer."""

    @property
    def identity(self) -> str:
        """Identifier that differs between tokenizers with possibly different tokens."""
        return hashlib.sha256(repr(sorted(self.describe().items())).encode()).hexdigest()


class ByteTokenizer(Tokenizer):
    """Bytes of UTF-8 as tokens. A document ends with byte 0, which is removed if it occurs in text."""

    vocab_size = 256
    end_of_text = 0

    def encode(self, texts: Sequence[str]) -> Iterator[NDArray[np.integer]]:
        for text in texts:
            # Half a surrogate pair, which some sources contain, is not a character.
            yield np.frombuffer(text.replace("\0", "").encode("utf-8", "replace"), dtype=np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token).decode("utf-8", "replace")

    def describe(self) -> dict[str, Any]:
        return {"kind": BYTES}


class HuggingFaceTokenizer(Tokenizer):
    """Tokenizer in Hugging Face's format.

    Args:
        content: content of the `tokenizer.json`.
        end_of_text: name of the token that ends a document; None: found by its usual names.
    Raises:
        MissingExtraError: if the package `tokenizers` is not installed.
        UserError: if the content is not a tokenizer or has no such token.
    """

    def __init__(self, content: str, end_of_text: str | None = None) -> None:
        tokenizers = optional_module("tokenizers")
        with _wrapped("this is not a tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
            # Truncation and padding are for batches of sentences. A corpus is read whole.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError("this is not a tokenizer.json: its vocabulary is empty")
        self.vocab_size = 1 + max(vocabulary.values())
        if self.vocab_size > LARGEST_VOCABULARY:
            raise UserError(
                f"this tokenizer.json is not accepted: it has token {self.vocab_size - 1:,}, and a vocabulary may "
                f"have {LARGEST_VOCABULARY:,}"
            )
        names = END_OF_TEXT_NAMES if end_of_text is None else (end_of_text,)
        name = next((name for name in names if name in vocabulary), None)
        if name is None and end_of_text is not None:
            raise unknown_name("token of the tokenizer", end_of_text, vocabulary)
        if name is None:
            raise UserError(f"the tokenizer has none of {', '.join(END_OF_TEXT_NAMES)}: name its own as end_of_text")
        self._end_name: str = name
        self.end_of_text = vocabulary[name]

    def encode(self, texts: Sequence[str]) -> Iterator[NDArray[np.integer]]:
        with _wrapped("the tokenizer cannot encode a text"):
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for encoding in encodings:
            yield np.asarray(encoding.ids, dtype=np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        told = [token for token in tokens if token != self.end_of_text]
        with _wrapped("the tokenizer cannot decode these tokens"):
            return self._tokenizer.decode(told)

    def describe(self) -> dict[str, Any]:
        return {"kind": "huggingface", "content": self._tokenizer.to_str(), "end_of_text": self._end_name}


def open_tokenizer(name: str, end_of_text: str | None = None) -> Tokenizer:
    """Load the tokenizer that a user names.

    Args:
        name: "bytes", path of a `tokenizer.json` or of a folder with one, or name on the hub.
        end_of_text: name of the token that ends a document; None: found by its usual names.
    Raises:
        UserError: if there is none of that name, or it cannot be read.
        Failure: if the hub cannot be reached.
    """
    if name == BYTES:
        if end_of_text is not None:
            raise UserError("the byte tokenizer ends documents with byte 0: leave out end_of_text")
        return ByteTokenizer()
    try:
        path = _find(name)
    # A name that is too long, a folder without permission.
    except OSError as error:
        raise UserError(f"tokenizer {name[:80]!r} cannot be read: {error.strerror or error}") from error
    return HuggingFaceTokenizer(_content(name, path), end_of_text)


def restore_tokenizer(description: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that `describe` described.

    Raises:
        UserError: if the description is not one.
    """
    kind = description.get("kind") if isinstance(description, Mapping) else None
    if kind == BYTES:
        return ByteTokenizer()
    if kind != "huggingface":
        raise UserError(f"the tokenizer is described wrongly: expected kind 'bytes' or 'huggingface', not {kind!r:.60}")
    content, end_of_text = description.get("content"), description.get("end_of_text")
    if not isinstance(content, str) or not (end_of_text is None or isinstance(end_of_text, str)):
        raise UserError("the tokenizer is described wrongly: expected texts as content and end_of_text")
    return HuggingFaceTokenizer(content, end_of_text)


class StreamDecoder:
    """Decoder of tokens that arrive one by one, which returns text as soon as it is final."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Tokens already returned, kept as context (some tokenizers put a space between tokens, or none in front), and
        # pending tokens.
        self._told: list[int] = []
        self._open: list[int] = []

    def push(self, token: int) -> str:
        """Return the text that this token completes."""
        self._open.append(token)
        text = self._text()
        # An incomplete character looks invalid until the rest of its bytes arrive.
        if text.endswith(_REPLACEMENT) and len(self._open) < _LONGEST_CHARACTER:
            return ""
        return self.flush()

    def flush(self) -> str:
        """Return the remaining text, complete or not."""
        text = self._text()
        self._told, self._open = self._open, []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._told)
        return self._tokenizer.decode([*self._told, *self._open])[len(before) :]


def _content(name: str, path: Path) -> str:
    try:
        return read_text(path, "file", LARGEST_FILE)
    except UserError as error:
        raise UserError(f"tokenizer {name!r} cannot be read: {error}") from error


@contextmanager
def _wrapped(problem: str) -> Iterator[None]:
    """Convert exceptions of calls into the package `tokenizers`, which raises plain ones, to `UserError`."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{problem}: {_first_line(error)}") from error
    except BaseException as error:
        # A panic of its Rust code, which is not an `Exception`.
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{problem}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _find(name: str) -> Path:
    path = expanded(name)
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
        raise UserError(f"the hub has no tokenizer.json of {name!r}: {_first_line(error)}") from error
    # A full disk, a broken connection: the client's own exceptions vary with its version.
    except Exception as error:
        raise Failure(f"cannot fetch the tokenizer of {name!r} from the hub: {_first_line(error)}") from error
