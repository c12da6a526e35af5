"""Tokens on disk: written once, then memory-mapped.

cache/tokens/3f.../
    tokens.bin       all documents one after the other, each with its end-of-text token
    documents.bin    start of each document, and end of the last (int64)
    bytes.bin        length of each document in bytes of UTF-8 (int64)
    about.json       source files (the first ones) and checksums

All numbers are little-endian. A damaged cache is rebuilt from the source files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gatewise.data.text.corpus import documents
from gatewise.data.text.tokenizers import Tokenizer
from gatewise.errors import Failure, UserError
from gatewise.files import atomic_folder, lock_folder, read_json, remove_leftovers, require_regular

CHECKED_WHOLE = 2**30
"""Size in bytes up to which all checksums are compared when a cache is opened, which takes 0.4 s per GB."""

_SAMPLED = 256
_NAMED_FILES = 1000
_BLOCK = 2**20
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_FORMAT = 1
_TEXTS_AT_A_TIME = 512
_log = logging.getLogger("gatewise.data")


class DamagedCacheError(UserError):
    """A token cache differs from what was written."""


class TokenFile:
    """Memory-mapped tokens of documents.

    Attributes:
        starts: start of each document, and end of the last: int64 (documents + 1,).
        bytes: length of each document in bytes of UTF-8, int64 (documents,).
    Raises:
        DamagedCacheError: if the folder differs from what was written. Of more than `CHECKED_WHOLE` bytes of tokens,
            only the length and `_SAMPLED` blocks are compared.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: NDArray[Any] | None = None
        about = _About.read(folder)
        self._dtype = about.dtype
        _check_tokens(folder / "tokens.bin", about)
        self.starts: NDArray[np.int64] = _numbers(folder / "documents.bin", about.documents + 1, about.documents_crc32)
        self.bytes: NDArray[np.int64] = _numbers(folder / "bytes.bin", about.documents, about.bytes_crc32)
        if self.starts[0] != 0 or self.starts[-1] != about.tokens or (np.diff(self.starts) < 1).any():
            raise DamagedCacheError(f"the token cache {folder} is damaged (documents overlap); delete it")

    @property
    def tokens(self) -> NDArray[Any]:
        """All tokens, as unsigned integers (N,)."""
        if self._mapped is None:
            self._mapped = np.memmap(self.folder / "tokens.bin", dtype=self._dtype, mode="r")
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        # A worker maps the file itself, because pickling would copy the map.
        return {**self.__dict__, "_mapped": None}


class TokenStream:
    """Concatenated pieces of a token file.

    Args:
        file: token file.
        starts: start of each piece in the file, int64 (pieces,).
        lengths: length of each piece, int64 (pieces,).
    """

    def __init__(self, file: TokenFile, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self._file = file
        self._starts = starts
        self._ends = np.cumsum(lengths)

    @property
    def name(self) -> str:
        """Name in messages."""
        return str(self._file.folder)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens `start` to `stop` of the sequence."""
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
        """Length as text in bytes of UTF-8. A document that was cut counts in proportion."""
        lengths = np.diff(self._ends, prepend=0)
        document = np.searchsorted(self._file.starts, self._starts, side="right") - 1
        whole = np.diff(self._file.starts)[document]
        return float((self._file.bytes[document] * (lengths / whole)).sum())


class Extent(NamedTuple):
    """Range of positions in a stream."""

    start: int
    stop: int


def cut(file: TokenFile, order: NDArray[np.int64], extent: Extent) -> TokenStream:
    """Return an extent of the documents of a file, concatenated in this order."""
    starts, ends = file.starts[:-1][order], np.cumsum(np.diff(file.starts)[order])
    begins = np.concatenate([[0], ends[:-1]])
    low, high = np.maximum(begins, extent.start), np.minimum(ends, extent.stop)
    kept = high > low
    return TokenStream(file, (starts + low - begins)[kept], (high - low)[kept])


def tokenized(files: Sequence[Path], tokenizer: Tokenizer, text_column: str, cache: Path) -> TokenFile:
    """Return the tokens of these files from the cache, which is built if it is missing or damaged.

    Raises:
        UserError: if a file cannot be read or the files contain no text.
        Failure: if the cache cannot be written.
    """
    folder = cache / "tokens" / _key(files, tokenizer, text_column)
    try:
        remove_leftovers(folder.parent)
        if folder.is_dir():
            try:
                return TokenFile(folder)
            except DamagedCacheError as error:
                _log.warning("%s; rebuilding it", str(error).removesuffix("; delete it"))
                _remove_damaged(folder)
    except OSError as error:
        raise Failure(f"cannot use the token cache {folder}: {error.strerror or error}") from error
    _log.info("tokenizing %d files into %s", len(files), folder)
    with atomic_folder(folder) as temporary:
        _write(temporary, files, tokenizer, text_column)
    return TokenFile(folder)


def _key(files: Sequence[Path], tokenizer: Tokenizer, text_column: str) -> str:
    """Return a cache key for the tokens of these files in their present state."""
    try:
        states = [(path, path.stat()) for path in files]
        about = {
            "format": _FORMAT,
            "files": [[str(path.resolve()), state.st_size, state.st_mtime_ns] for path, state in states],
            "tokenizer": tokenizer.identity,
            "text_column": text_column,
        }
    # A file that was just removed, or a loop of links.
    except (OSError, RuntimeError) as error:
        raise UserError(f"the corpus cannot be read: {error}") from error
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _remove_damaged(folder: Path) -> None:
    """Remove a cache unless another process has rebuilt it meanwhile."""
    with lock_folder(folder.parent, "token cache"):
        if not folder.is_dir():
            return
        try:
            TokenFile(folder)
        except DamagedCacheError:
            shutil.rmtree(folder)


class _About(NamedTuple):
    """Content of `about.json` about the other files."""

    dtype: np.dtype[Any]
    tokens: int
    documents: int
    tokens_crc32: list[int]
    documents_crc32: int
    bytes_crc32: int

    @classmethod
    def read(cls, folder: Path) -> _About:
        try:
            about = read_json(folder / "about.json", "description")
        except UserError as error:
            raise DamagedCacheError(f"the token cache {folder} is damaged ({error}); delete it") from error
        fields = about if isinstance(about, dict) else {}
        counts = [_count(fields, name) for name in ("tokens", "documents", "documents_crc32", "bytes_crc32")]
        dtype, sums = fields.get("dtype"), fields.get("tokens_crc32")
        if (
            not isinstance(dtype, str)
            or dtype not in _DTYPES
            or not isinstance(sums, list)
            or not 0 < counts[1] <= counts[0]
            or min(counts) < 0
        ):
            raise DamagedCacheError(f"the token cache {folder} is damaged (about.json does not describe it); delete it")
        tokens, documents, documents_crc32, bytes_crc32 = counts
        return cls(_DTYPES[dtype], tokens, documents, sums, documents_crc32, bytes_crc32)


def _count(fields: dict[str, Any], name: str) -> int:
    """Return a field if it is a count, else -1."""
    value = fields.get(name)
    return value if type(value) is int and 0 <= value < 2**48 else -1


def _check_tokens(path: Path, about: _About) -> None:
    """Compare the length, and the checksums of all or some blocks."""
    size = about.tokens * about.dtype.itemsize
    blocks = range(-(-size // _BLOCK))
    _require_size(path, size)
    if len(about.tokens_crc32) != len(blocks):
        raise DamagedCacheError(f"the token cache {path.parent} is damaged (checksums are missing); delete it")
    chosen = blocks if size <= CHECKED_WHOLE else sorted({*blocks[:: -(-len(blocks) // _SAMPLED)], blocks[-1]})
    with path.open("rb") as file:
        for block in chosen:
            file.seek(block * _BLOCK)
            if zlib.crc32(file.read(_BLOCK)) != about.tokens_crc32[block]:
                raise DamagedCacheError(
                    f"the token cache {path.parent} is damaged (block {block} of its tokens has changed); delete it"
                )


def _numbers(path: Path, count: int, crc32: int) -> NDArray[np.int64]:
    _require_size(path, 8 * count)
    content = path.read_bytes()
    if len(content) != 8 * count or zlib.crc32(content) != crc32:
        raise DamagedCacheError(f"the token cache {path.parent} is damaged ({path.name} has changed); delete it")
    return np.frombuffer(content, dtype=np.dtype("<i8"))


def _require_size(path: Path, size: int) -> None:
    try:
        found = require_regular(path, "file").stat().st_size
    except UserError as error:
        raise DamagedCacheError(f"the token cache {path.parent} is damaged ({error}); delete it") from error
    if found != size:
        raise DamagedCacheError(
            f"the token cache {path.parent} is damaged ({path.name} has {found:,} bytes, not {size:,}); delete it"
        )


class _Checksums:
    """Writer to a file that computes a checksum of each block."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._place = 0
        self.crc32: list[int] = []

    def write(self, content: bytes) -> None:
        self._file.write(content)
        view = memoryview(content)
        while view:
            room = _BLOCK - self._place % _BLOCK
            if room == _BLOCK:
                self.crc32.append(0)
            self.crc32[-1] = zlib.crc32(view[:room], self.crc32[-1])
            self._place += len(view[:room])
            view = view[room:]


def _write(folder: Path, files: Sequence[Path], tokenizer: Tokenizer, text_column: str) -> None:
    name = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    lengths, sizes = [], []
    texts = chain.from_iterable(documents(path, text_column) for path in files)
    with (folder / "tokens.bin").open("wb") as file:
        out = _Checksums(file)
        for some in _in_groups(texts):
            for text, tokens in zip(some, tokenizer.encode(some), strict=True):
                if not len(tokens):
                    continue
                out.write(np.append(tokens, tokenizer.end_of_text).astype(_DTYPES[name]).tobytes())
                lengths.append(len(tokens) + 1)
                sizes.append(len(text.encode("utf-8", "replace")))
    if not lengths:
        raise UserError(f"there is no text in the {len(files)} files of the corpus, the first: {files[0]}")
    starts = np.cumsum([0, *lengths], dtype=np.dtype("<i8")).tobytes()
    counted = np.asarray(sizes, dtype=np.dtype("<i8")).tobytes()
    (folder / "documents.bin").write_bytes(starts)
    (folder / "bytes.bin").write_bytes(counted)
    about = {
        "dtype": name,
        "tokens": sum(lengths),
        "documents": len(lengths),
        "vocab_size": tokenizer.vocab_size,
        "documents_crc32": zlib.crc32(starts),
        "bytes_crc32": zlib.crc32(counted),
        "tokens_crc32": out.crc32,
        "files": [str(path) for path in files[:_NAMED_FILES]],
    }
    (folder / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


def _in_groups(texts: Iterator[str]) -> Iterator[list[str]]:
    while some := list(islice(texts, _TEXTS_AT_A_TIME)):
        yield some
