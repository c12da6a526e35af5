"""Strict front-to-back reading of untrusted tar archives.

Python's `tarfile` takes a damaged header for the end of the archive, and an archive that is cut between two members for
a complete one. The rest would be lost silently. Here, an archive must end with two blocks of zeros and nothing after
them, every header checksum must match, and every member must be as long as its header says. Tar has no checksum of the
content of members. Compressed archives have one over everything, which is checked.
"""

from __future__ import annotations

import bz2
import gzip
import http.client
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple, Protocol

LARGEST_MEMBER = 2**30
"""Largest member in bytes that is read into memory."""

_BLOCK = 512
_CHUNK = 2**20
_LARGEST_EXTENDED_HEADER = 2**20
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_RECORD = re.compile(rb"(\d{1,10}) ")


class DamagedTarError(ValueError):
    """An archive is incomplete or not a tar archive. The message gives the reason, not the name."""


class Readable(Protocol):
    """Byte stream. Reading 0 bytes means its end."""

    def read(self, count: int, /) -> bytes: ...


class Member(NamedTuple):
    """Regular file in an archive. The content is empty if it was not requested."""

    name: str
    content: bytes


def read_members(file: IO[bytes] | Readable, size: int | None = None, *, contents: bool = True) -> Iterator[Member]:
    """Yield the regular files in a tar archive, which may be compressed with gzip, bzip2 or xz.

    Args:
        file: archive, positioned at its beginning.
        size: length of the archive in bytes, if `file` is seekable.
        contents: read the contents of members instead of skipping them.
    Raises:
        DamagedTarError: during iteration, where the archive is damaged.
    """
    blocks = _open(file, size)
    common: dict[str, str] = {}
    own: dict[str, str] = {}
    place = "the first header"
    while True:
        header = blocks.read(_BLOCK, place)
        if not any(header):
            _require_end(blocks, place)
            return
        info = _parsed(header, place)
        place = f"the header of {info.name!r}"
        if info.type in _EXTENDED or info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            if info.size > _LARGEST_EXTENDED_HEADER:
                raise DamagedTarError(f"{place} claims {info.size:,} bytes")
            content = blocks.read_padded(info.size, place)
            if info.type == tarfile.XGLTYPE:
                common |= _records(content, place)
            elif info.type in _EXTENDED:
                own |= _records(content, place)
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                own["path"] = _text(content.partition(b"\0")[0])
            continue
        member, own = common | own, {}
        name = member.get("path", info.name)
        place = f"member {name!r}"
        _require_plain(info, member, place)
        length = _length(info, member, place)
        if info.type in _REGULAR:
            if length > LARGEST_MEMBER:
                raise DamagedTarError(f"{place} claims {length:,} bytes; up to {LARGEST_MEMBER:,} are read")
            if contents:
                yield Member(name, blocks.read_padded(length, place))
            else:
                blocks.skip_padded(length, place)
                yield Member(name, b"")
        elif info.type not in _WITHOUT_CONTENT:
            blocks.skip_padded(length, place)
        place = f"the header after member {name!r}"


class _Blocks:
    """Reader of exact numbers of bytes.

    Args:
        stream: stream to read from.
        left: number of remaining bytes of a seekable stream; None: unknown. Larger claims are rejected.
    """

    def __init__(self, stream: Readable, left: int | None) -> None:
        self._stream = stream
        self._left = left

    def read(self, count: int, place: str) -> bytes:
        self._take(count, place)
        # A stream may return less than requested, and a claim of more than it has must not be trusted.
        content = self.pull(min(count, _CHUNK))
        if len(content) < count:
            gathered = bytearray(content)
            while len(gathered) < count and (more := self.pull(min(count - len(gathered), _CHUNK))):
                gathered += more
            content = bytes(gathered)
        if len(content) < count:
            raise DamagedTarError(f"unexpected end of data in {place}")
        return content

    def read_padded(self, count: int, place: str) -> bytes:
        content = self.read(count, place)
        self.read(-count % _BLOCK, place)
        return content

    def skip_padded(self, count: int, place: str) -> None:
        count += -count % _BLOCK
        if self._left is not None:
            self._take(count, place)
            self._stream.seek(count, 1)  # type: ignore[attr-defined]  # a file, whose length is known
            return
        while count:
            count -= len(self.read(min(count, _CHUNK), place))

    def pull(self, count: int) -> bytes:
        """Return up to `count` bytes, or none at the end."""
        try:
            return self._stream.read(count) if count else b""
        except (OSError, EOFError, zlib.error, lzma.LZMAError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DamagedTarError(" ".join(reason.split())) from error

    def _take(self, count: int, place: str) -> None:
        if self._left is None:
            return
        if count > self._left:
            raise DamagedTarError(f"unexpected end of data in {place}")
        self._left -= count


class _Rewound:
    """Stream whose first bytes have been read already."""

    def __init__(self, first: bytes, stream: Readable) -> None:
        self._first = first
        self._stream = stream

    def read(self, count: int) -> bytes:
        if self._first:
            given, self._first = self._first[:count], self._first[count:]
            return given
        return self._stream.read(count)


def _open(file: IO[bytes] | Readable, size: int | None) -> _Blocks:
    first = b""
    plain = _Blocks(file, None)
    while len(first) < 6 and (more := plain.pull(6 - len(first))):
        first += more
    if not first:
        raise DamagedTarError("it is empty")
    rewound = _Rewound(first, file)
    if first.startswith(b"\x1f\x8b"):
        return _Blocks(gzip.GzipFile(fileobj=rewound, mode="rb"), None)  # type: ignore[call-overload]  # it only reads
    if first.startswith(b"BZh"):
        return _Blocks(bz2.BZ2File(rewound), None)  # type: ignore[call-overload]
    if first.startswith(b"\xfd7zXZ"):
        return _Blocks(lzma.LZMAFile(rewound), None)  # type: ignore[arg-type]
    if size is None:
        return _Blocks(rewound, None)
    file.seek(0)  # type: ignore[union-attr]
    return _Blocks(file, size)


def _parsed(header: bytes, place: str) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        if place == "the first header":
            raise DamagedTarError("it is not a tar archive, or its first header is damaged") from error
        raise DamagedTarError(f"{place} is damaged: {error}") from error
    if info.size < 0:
        raise DamagedTarError(f"{place} claims {info.size} bytes")
    return info


def _require_end(blocks: _Blocks, place: str) -> None:
    """Require the second block of zeros, and then only zeros to the end of the stream."""
    if any(blocks.read(_BLOCK, f"{place} (the archive's end)")):
        raise DamagedTarError(f"{place} is a block of zeros, and the archive goes on after it")
    while rest := blocks.pull(_CHUNK):
        if any(rest):
            raise DamagedTarError(f"there is more after the archive's end ({place})")


def _require_plain(info: tarfile.TarInfo, member: dict[str, str], place: str) -> None:
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in member):
        raise DamagedTarError(f"{place} is a sparse file, which is not supported")


def _length(info: tarfile.TarInfo, member: dict[str, str], place: str) -> int:
    told = member.get("size")
    if told is None:
        return info.size
    if not (told.isascii() and told.isdigit() and len(told) < 20):
        raise DamagedTarError(f"{place} claims a size of {told[:20]!r}")
    return int(told)


def _records(content: bytes, place: str) -> dict[str, str]:
    """Return the records of an extended header: "LENGTH KEYWORD=VALUE\n", where LENGTH counts the whole record."""
    records: dict[str, str] = {}
    start = 0
    while start < len(content) and content[start]:
        found = _RECORD.match(content, start)
        end = start + int(found[1]) if found else start
        if found is None or not found.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise DamagedTarError(f"{place} is damaged: its records do not fit its length")
        keyword, equals, value = content[found.end() : end - 1].partition(b"=")
        if not equals:
            raise DamagedTarError(f"{place} is damaged: a record has no value")
        records[_text(keyword)] = _text(value).rstrip("/") if keyword == b"path" else _text(value)
        start = end
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
