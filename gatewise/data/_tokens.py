"""Tokens on disk: written once, memory-mapped ever after.

cache/tokens/3f.../
    tokens.bin       all documents one after the other, each with its end-of-text token
    documents.npy    where each begins, and where the last ends
    bytes.npy        how many bytes of UTF-8 each is as text
    about.json       what it was made of
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gatewise.data._corpus import documents
from gatewise.data.tokenizers import Tokenizer
from gatewise.errors import Failure, UserError

_FORMAT = 1
_TEXTS_AT_A_TIME = 512
_log = logging.getLogger("gatewise.data")


class TokenFile:
    """The memory-mapped tokens of documents.

    Attributes:
        starts: where each document begins, and where the last ends: int64 (documents + 1,).
        bytes: bytes of UTF-8 of each document, int64 (documents,).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts: NDArray[np.int64] = np.load(folder / "documents.npy", allow_pickle=False)
        self.bytes: NDArray[np.int64] = np.load(folder / "bytes.npy", allow_pickle=False)
        self._dtype = np.dtype(json.loads((folder / "about.json").read_text(encoding="utf-8"))["dtype"])
        self._mapped: NDArray[Any] | None = None
        size = (folder / "tokens.bin").stat().st_size
        if size != int(self.starts[-1]) * self._dtype.itemsize:
            raise UserError(f"the token cache {folder} is damaged ({size} bytes of tokens); delete it")

    @property
    def tokens(self) -> NDArray[Any]:
        """All tokens, unsigned (N,)."""
        if self._mapped is None:
            self._mapped = np.memmap(self.folder / "tokens.bin", dtype=self._dtype, mode="r")
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        # A worker maps the file itself: pickled, the map would be copied.
        return {**self.__dict__, "_mapped": None}


class TokenStream:
    """Pieces of a token file, one after the other, as one sequence.

    Args:
        file: where the tokens are.
        starts: where each piece begins in the file, int64 (pieces,).
        lengths: how long it is.
    """

    def __init__(self, file: TokenFile, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self._file = file
        self._starts = starts
        self._ends = np.cumsum(lengths)

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return str(self._file.folder)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens `start` to `stop` of the sequence."""
        out = np.empty(stop - start, dtype=np.int64)
        piece, done = int(np.searchsorted(self._ends, start, side="right")), 0
        while done < len(out):
            before = int(self._ends[piece - 1]) if piece else 0
            offset = start + done - before
            count = min(len(out) - done, int(self._ends[piece]) - before - offset)
            place = int(self._starts[piece]) + offset
            out[done : done + count] = self._file.tokens[place : place + count]
            piece, done = piece + 1, done + count
        return out

    def bytes(self) -> float:
        """Bytes of UTF-8 that it is as text; of a document that was cut, in proportion."""
        lengths = np.diff(self._ends, prepend=0)
        document = np.searchsorted(self._file.starts, self._starts, side="right") - 1
        whole = np.diff(self._file.starts)[document]
        return float((self._file.bytes[document] * (lengths / whole)).sum())


class Extent(NamedTuple):
    """A range of positions in a stream."""

    start: int
    stop: int


def cut(file: TokenFile, order: NDArray[np.int64], extent: Extent) -> TokenStream:
    """The documents of a file in this order, as one sequence, and of it a part."""
    starts, ends = file.starts[:-1][order], np.cumsum(np.diff(file.starts)[order])
    begins = np.concatenate([[0], ends[:-1]])
    low, high = np.maximum(begins, extent.start), np.minimum(ends, extent.stop)
    kept = high > low
    return TokenStream(file, (starts + low - begins)[kept], (high - low)[kept])


def tokenized(files: Sequence[Path], tokenizer: Tokenizer, text_column: str, cache: Path) -> TokenFile:
    """The tokens of these files, from the cache or made now.

    Raises:
        UserError: if a file cannot be read, or they hold no text.
        Failure: if the cache cannot be written.
    """
    about = {
        "format": _FORMAT,
        "files": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "tokenizer": tokenizer.identity,
        "text_column": text_column,
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / "tokens" / key
    if not folder.is_dir():
        _log.info("tokenizing %d files into %s", len(files), folder)
        _make(folder, files, tokenizer, text_column)
    return TokenFile(folder)


def _make(folder: Path, files: Sequence[Path], tokenizer: Tokenizer, text_column: str) -> None:
    """Write the folder whole or not at all; of several processes that do, the first to finish counts."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        _write(temporary, files, tokenizer, text_column)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        raise Failure(f"cannot write the token cache {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, files: Sequence[Path], tokenizer: Tokenizer, text_column: str) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    lengths, sizes = [], []
    texts = chain.from_iterable(documents(path, text_column) for path in files)
    with (folder / "tokens.bin").open("wb") as out:
        for some in _in_groups(texts):
            for text, tokens in zip(some, tokenizer.encode(some), strict=True):
                if not len(tokens):
                    continue
                np.append(tokens, tokenizer.end_of_text).astype(dtype).tofile(out)
                lengths.append(len(tokens) + 1)
                sizes.append(len(text.encode("utf-8", "replace")))
    if not lengths:
        raise UserError(f"there is no text in the {len(files)} files of the corpus, the first: {files[0]}")
    np.save(folder / "documents.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(folder / "bytes.npy", np.asarray(sizes, dtype=np.int64))
    about = {
        "dtype": dtype.name,
        "tokens": sum(lengths),
        "documents": len(lengths),
        "vocab_size": tokenizer.vocab_size,
        "files": [str(path) for path in files],
    }
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _in_groups(texts: Iterator[str]) -> Iterator[list[str]]:
    while some := list(islice(texts, _TEXTS_AT_A_TIME)):
        yield some
