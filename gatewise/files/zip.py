"""Reading untrusted zip archives. Claimed sizes are checked before a member is read, and checksums afterwards."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from gatewise.errors import UserError
from gatewise.files.regular import require_regular

_CHUNK = 2**20
_END, _END_SIZE = b"PK\5\6", 22
_END_64, _END_64_SIZE = b"PK\6\6", 56
_LOCATOR, _LOCATOR_SIZE = b"PK\6\7", 20
_LONGEST_END = _END_SIZE + 2**16 + _LOCATOR_SIZE + _END_64_SIZE
"""Signatures and sizes of the records at the end of an archive, and where they begin at most before its end."""
MOST_MEMBERS = 100_000
LARGEST_EXPANSION = 20
"""Largest accepted ratio of uncompressed to compressed size; weights do not compress by more."""
FREE_BYTES = 64 * 2**20
"""Uncompressed size that is always accepted."""


def check_archive(path: str | Path, what: str = "archive", *, stored_only: bool = False) -> dict[str, int]:
    """Read a whole archive once and return the size in bytes of each member.

    Args:
        path: path of the archive.
        what: role of the file in error messages.
        stored_only: reject compressed members.
    Raises:
        UserError: if it is not a zip archive, a member is damaged (its CRC does not match), encrypted or named twice,
            or the sizes that it claims do not fit the file.
    """
    with _Archive(path, what, stored_only) as archive:
        for info in archive.members:
            archive.read_through(info)
        return {info.filename: info.file_size for info in archive.members}


def list_members(path: str | Path, what: str = "archive") -> dict[str, int]:
    """Return the claimed size in bytes of each member of an archive, reading only the directory.

    Raises:
        UserError: as in `check_archive`, except for damaged members.
    """
    with _Archive(path, what, stored_only=False) as archive:
        return {info.filename: info.file_size for info in archive.members}


def read_members(path: str | Path, what: str = "archive", names: Collection[str] | None = None) -> dict[str, bytes]:
    """Return the uncompressed content of members of an archive, with the checks of `check_archive`.

    Args:
        names: names of the members to read; None: all.
    """
    with _Archive(path, what, stored_only=False) as archive:
        wanted = [info for info in archive.members if names is None or info.filename in names]
        return {info.filename: archive.read_through(info, keep=True) for info in wanted}


def each_member(path: str | Path, what: str = "archive") -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of one member after the other, as `read_members` returns them all at once.

    Raises:
        UserError: during iteration, as in `check_archive`.
    """
    with _Archive(path, what, stored_only=False) as archive:
        for info in archive.members:
            yield info.filename, archive.read_through(info, keep=True)


class _Archive:
    """Open archive whose directory has been checked."""

    def __init__(self, path: str | Path, what: str, stored_only: bool) -> None:
        self._name = f"{what} {str(path)!r}"
        file = require_regular(path, what)
        try:
            self._zip = zipfile.ZipFile(file)
        # A damaged directory makes zipfile raise BadZipFile, OSError, ValueError, NotImplementedError, struct.error and
        # others. Whichever it is, the archive is at fault.
        except Exception as error:
            raise UserError(f"{self._name} is not a zip archive, or damaged: {error}") from error
        self.members = self._zip.infolist()
        try:
            self._check_directory(file.stat().st_size, stored_only)
        except UserError:
            self._zip.close()
            raise

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def _check_directory(self, size: int, stored_only: bool) -> None:
        self._check_end()
        if len(self.members) > MOST_MEMBERS:
            raise UserError(f"{self._name} is not accepted: it has more than {MOST_MEMBERS:,} members")
        if len({info.filename for info in self.members}) < len(self.members):
            raise UserError(f"{self._name} is damaged: two of its members have the same name")
        if sum(info.compress_size for info in self.members) > size:
            raise UserError(f"{self._name} is damaged: its members are larger than the file")
        claimed = sum(info.file_size for info in self.members)
        if claimed > LARGEST_EXPANSION * size + FREE_BYTES:
            raise UserError(f"{self._name} is not accepted: {size:,} bytes that claim to hold {claimed:,}")
        for info in self.members:
            if info.flag_bits & 0x1:
                raise UserError(f"{self._name} is not accepted: its member {info.filename!r} is encrypted")
            stored = info.compress_type == zipfile.ZIP_STORED
            if stored_only and not stored:
                raise UserError(f"{self._name} is not accepted: its member {info.filename!r} is compressed")
            if stored and info.file_size != info.compress_size:
                raise UserError(f"{self._name} is damaged: its member {info.filename!r} has two sizes")

    def _check_end(self) -> None:
        """Compare the last record with the directory: a damaged one hides members, which zipfile does not notice."""
        file = self._zip.fp
        assert file is not None
        size = file.seek(0, 2)
        start = max(0, size - _LONGEST_END)
        file.seek(start)
        tail = file.read()
        at = tail.rfind(_END)
        record = tail[at : at + _END_SIZE]
        _, _, _, _, count, length, offset, _ = struct.unpack("<4s4H2LH", record)
        position = start + at
        if tail[at - _LOCATOR_SIZE : at].startswith(_LOCATOR):
            # Of large archives the record of 64-bit numbers counts, and stands before.
            at = tail.rfind(_END_64, 0, at)
            record = tail[at : at + _END_64_SIZE] if at >= 0 else b""
            if len(record) < _END_64_SIZE:
                raise UserError(f"{self._name} is damaged: its last record is not whole")
            *_, count, length, offset = struct.unpack("<4sQ2H2L4Q", record)
            position = start + at
        if count != len(self.members) or offset + length != position:
            raise UserError(f"{self._name} is damaged: its directory does not agree with its last record")

    def read_through(self, info: zipfile.ZipInfo, keep: bool = False) -> bytes:
        """Read a member to its end, which checks its checksum, and return the content if it is to be kept."""
        kept = bytearray()
        count = 0
        try:
            with self._zip.open(info) as member:
                while chunk := member.read(_CHUNK):
                    count += len(chunk)
                    if keep:
                        kept += chunk
        # Decompressors and the reader of local headers raise errors of several kinds.
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
            raise UserError(f"{self._name} is damaged in its member {info.filename!r}: {error}") from error
        if count != info.file_size:
            raise UserError(
                f"{self._name} is damaged: its member {info.filename!r} has {count:,} of {info.file_size:,} bytes"
            )
        return bytes(kept)
