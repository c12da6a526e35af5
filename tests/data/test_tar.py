"""Tar archives, whole and damaged."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from gatewise.data.images import tar as _tar
from gatewise.data.images.tar import DamagedTarError, Member, read_members

FILES = [Member(f"{number:02}.{kind}", bytes([number]) * (300 * number)) for number in range(6) for kind in ("a", "b")]


def packed(files: list[Member], mode: str = "w", **options) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def unpacked(archive: bytes, *, seekable: bool = True, **options) -> list[Member]:
    file = io.BytesIO(archive)
    return list(read_members(file, len(archive) if seekable else None, **options))


class InPieces:
    """A stream that gives less than it is asked for, as connections do."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, 77))


@pytest.mark.parametrize("seekable", [True, False])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_is_read_however_it_is_compressed(mode, seekable):
    archive = packed(FILES, mode)
    assert unpacked(archive, seekable=seekable) == FILES
    assert list(read_members(InPieces(archive))) == FILES


@pytest.mark.parametrize("seekable", [True, False])
def test_contents_can_be_passed_over(seekable):
    members = unpacked(packed(FILES), seekable=seekable, contents=False)
    assert members == [Member(name, b"") for name, _ in FILES]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read(form):
    files = [Member("deep/" * 30 + "file.txt", b"1"), Member("日本/é.txt", b"2"), Member("plain.txt", b"3")]
    assert unpacked(packed(files, format=form)) == files


def test_folders_and_links_are_passed_over():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"other {kind.decode()}")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("file")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    assert unpacked(out.getvalue()) == [Member("file", b"abc")]


@pytest.mark.parametrize("contents", [True, False])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_cut_is_always_noticed(mode, contents):
    archive = packed(FILES, mode)
    end = len(archive) if mode == "w:gz" else len(archive.rstrip(b"\0")) // 512 * 512 + 1024
    for length in range(0, end, 97):
        with pytest.raises(DamagedTarError):
            unpacked(archive[:length], contents=contents)


@pytest.mark.parametrize("seekable", [True, False])
def test_a_changed_header_is_always_noticed(seekable):
    archive = packed(FILES[:4])
    headers = [archive.index(name.encode()) for name, _ in FILES[:4]]
    draw = random.Random(0)
    for _ in range(200):
        changed = bytearray(archive)
        place = draw.choice(headers) + draw.randrange(512)
        changed[place] ^= 1 << draw.randrange(8)
        try:
            found = unpacked(bytes(changed), seekable=seekable)
        except DamagedTarError:
            continue
        assert found == FILES[:4]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_changed_byte_of_a_compressed_archive_is_always_noticed(mode):
    draw = random.Random(0)
    files = [Member(name, draw.randbytes(400)) for name, _ in FILES]
    archive = packed(files, mode)
    for _ in range(60):
        changed = bytearray(archive)
        changed[draw.randrange(len(archive))] ^= 1 << draw.randrange(8)
        try:
            found = unpacked(bytes(changed))
        except DamagedTarError:
            continue
        assert found == files


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda archive: b"", "it is empty"),
        (lambda archive: b"no archive at all".ljust(600), "it is not a tar archive"),
        (lambda archive: archive + archive, "there is more after the archive's end"),
        (lambda archive: bytes(512) + archive, "the archive goes on after it"),
        (lambda archive: bytes(512), r"unexpected end of data in the first header \(the archive's end\)"),
    ],
)
def test_what_is_wrong_is_said(damage, message):
    with pytest.raises(DamagedTarError, match=message):
        unpacked(damage(packed([Member("a", b"")])))


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("seekable", [True, False])
def test_a_size_that_is_claimed_is_not_believed(kind, seekable):
    archive = header("a", 2**40, kind) + bytes(2048)
    with pytest.raises(DamagedTarError, match=r"claims 1,099,511,627,776 bytes"):
        unpacked(archive, seekable=seekable)


def test_a_member_larger_than_the_file_is_refused_before_it_is_read():
    class Unread(io.BytesIO):
        def read(self, count: int = -1) -> bytes:
            assert count <= 512
            return super().read(count)

    archive = header("a", 2**29) + bytes(2048)
    with pytest.raises(DamagedTarError, match="unexpected end of data in member 'a'"):
        list(read_members(Unread(archive), len(archive)))


def test_a_member_above_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(_tar, "LARGEST_MEMBER", 10)
    with pytest.raises(DamagedTarError, match="member 'a' claims 11 bytes; up to 10 are read"):
        unpacked(packed([Member("a", bytes(11))]))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (b"999 path=a\n", "its records do not fit its length"),
        (b"11 path=abc ", "its records do not fit its length"),
        (b"9 nothing", "its records do not fit its length"),
        (b"10 nothing\n", "its records do not fit its length"),
        (b"11 nothing\n", "a record has no value"),
        (b"12 size=1e3\n", "claims a size of '1e3'"),
        (b"22 GNU.sparse.major=1\n", "is a sparse file"),
    ],
)
def test_extended_headers_are_checked(records, message):
    archive = header("x", len(records), tarfile.XHDTYPE) + records.ljust(512, b"\0") + header("a", 0) + bytes(1024)
    with pytest.raises(DamagedTarError, match=message):
        unpacked(archive)
