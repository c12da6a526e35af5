"""Patterns of shards, their samples, and what can be wrong with them."""

from __future__ import annotations

import http.server
import io
import random
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gatewise.data.images import remote as _remote
from gatewise.data.images.shards import SampleReader, count_samples, expand_shards, shard_samples
from gatewise.errors import UserError

SAMPLES = 6


def shard(samples: int = SAMPLES, mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for number in range(samples):
            for extension in ("png", "cls"):
                member = tarfile.TarInfo(f"{number:04}.{extension}")
                member.size = 40 + number
                archive.addfile(member, io.BytesIO(bytes([65 + number]) * member.size))
    return out.getvalue()


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_neighbors_of_one_stem_are_a_sample(tmp_path):
    samples = list(shard_samples(written(tmp_path / "a.tar", shard(2))))
    assert [sample["__key__"] for sample in samples] == ["0000", "0001"]
    assert samples[1] == {
        "__key__": "0001",
        "__url__": str(tmp_path / "a.tar"),
        "png": b"B" * 41,
        "cls": b"B" * 41,
    }


def test_notes_on_the_shard_and_names_without_extension_are_no_samples(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("__notes__", "__notes__/a.png", "README", "a.PNG", "a.Cls", "__b.png"):
            archive.addfile(tarfile.TarInfo(name))
    path = written(tmp_path / "a.tar", out.getvalue())
    assert [sorted(key for key in sample if key != "__url__") for sample in shard_samples(path)] == [
        ["__key__", "cls", "png"],
        ["__key__", "png"],
    ]
    assert count_samples(path) == 2


def test_two_files_of_one_name_are_an_error(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("a.png", "a.cls", "a.PNG"):
            archive.addfile(tarfile.TarInfo(name))
    path = written(tmp_path / "a.tar", out.getvalue())
    with pytest.raises(UserError, match=r"a\.tar cannot be read \(sample 'a' has 'PNG' twice, after 0 samples\)"):
        list(shard_samples(path))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_mutated_shards_give_all_samples_or_an_error(tmp_path, mode):
    whole = shard(mode=mode)
    path = tmp_path / "a.tar"
    written(path, whole)
    expected = list(shard_samples(str(path)))
    assert len(expected) == count_samples(str(path)) == SAMPLES
    # Contents have no checksum in a plain archive.
    places = range(len(whole)) if mode == "w:gz" else [at for at in range(2 * SAMPLES * 1024) if at % 1024 < 512]
    draw = random.Random(mode)
    refused = 0
    for number in range(60):
        mutated = bytearray(whole)
        if number % 2:
            del mutated[draw.randrange(len(whole) if mode == "w:gz" else 2 * SAMPLES * 1024 + 1024) :]
        else:
            mutated[draw.choice(places)] ^= 1 << draw.randrange(8)
        written(path, bytes(mutated))
        for read in (lambda: list(shard_samples(str(path))), lambda: count_samples(str(path))):
            try:
                found = read()
            except UserError as error:
                refused += "a.tar cannot be read (" in str(error)
            else:
                assert found in (expected, SAMPLES)
    assert refused > 60


def test_the_error_says_how_many_samples_came_before(tmp_path):
    path = written(tmp_path / "a.tar", shard()[: 2 * 3 * 1024])
    samples = shard_samples(path)
    # The third sample may have had a file more.
    assert [next(samples)["__key__"] for _ in range(2)] == ["0000", "0001"]
    with pytest.raises(UserError, match=r"a\.tar cannot be read \(unexpected end of data in .*, after 2 samples\)"):
        next(samples)


@pytest.mark.parametrize("name", ["pipe:touch started; cat good.tar #.tar", "http:a.tar", "s4:b.tar", "~nobody.tar"])
def test_a_file_that_is_named_like_a_command_is_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / name, shard())
    [found] = expand_shards("*.tar")
    assert len(list(shard_samples(found))) == count_samples(found) == SAMPLES
    assert not (tmp_path / "started").exists()


def test_a_fifo_is_no_shard(tmp_path):
    import os

    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match="1 of 1 shards are missing"):
        expand_shards(str(tmp_path / "*.tar"))
    with pytest.raises(UserError, match="it is not a regular file"):
        count_samples(str(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{pipe:cat secrets,b}.tar", "'pipe:cat secrets.tar' is a shell command"),
        ("{0..99999999999}.tar", "stands for more than 1,000,000 shards"),
        ("{0..9" + "9" * 5000 + "}.tar", "stands for more than 1,000,000 shards"),
        ("{{0..999},{0..9}}{0..999}{a,b}.tar", "stands for more than 1,000,000 shards"),
        ("{a,b}" * 40, "stands for more than 1,000,000 shards"),
        ("{" * 5000 + "a,b" + "}" * 5000, "more than 20 braces in each other"),
        ("https://host/a b.tar", "is not a URL: it contains white space"),
        ("https://host/a.tar\n", "is not a URL: it contains white space"),
        ("gs://bucket/a'; touch started; '.tar", 'its URL contains "\'"'),
        ("scp://host/$(touch started).tar", r"its URL contains '\$'"),
    ],
)
def test_patterns_that_are_dangerous_are_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        expand_shards(pattern)


def test_the_number_of_names_is_counted_as_braces_are_expanded(monkeypatch):
    from gatewise.data.images import shards as _shards

    for pattern in ("a{0..10..3}{x,y{1..2},}", "{a}{b,c}", "{a..e}.tar", "plain", r"\{0..5}"[:2] + "x", "{10..01},"):
        assert _shards._count_expanded(pattern) <= max(1, len(_shards._expanded(pattern)))
    monkeypatch.setattr(_shards, "MOST_SHARDS", 12)
    assert len(_shards._expanded("a{0..10..3}{x,y,z}")) == 12
    with pytest.raises(UserError, match="more than 12"):
        _shards._expanded("a{0..10..3}{x,y,z{0..1}}")


@pytest.mark.parametrize("label", [b"1" * 5000, b"1e3", b"1.0", b"nan", b"-1", b"1_0", b"\xff", b""])
def test_a_label_that_is_no_class_is_a_users_mistake_in_one_short_line(label):
    read = SampleReader(("png",), "cls", 100)
    with pytest.raises(UserError, match=r"the cls of sample a:0 is not a decimal integer|has label -1, but") as caught:
        read({"__key__": "0", "__url__": "a", "png": b"", "cls": label})
    assert len(str(caught.value)) < 200


@pytest.fixture
def flaky() -> Iterator[str]:
    """The address of a server that is busy twice, and of a shard that it cuts short the first time."""
    content = shard()
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path == "/busy.tar" and len(asked) < 3:
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:5000] if self.path == "/cut.tar" else content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_busy_server_is_asked_again(flaky, monkeypatch):
    monkeypatch.setattr(_remote, "_PAUSES_S", (0.0, 0.0))
    assert len(list(shard_samples(f"{flaky}/busy.tar"))) == SAMPLES


def test_a_server_that_stays_busy_is_named(flaky, monkeypatch):
    monkeypatch.setattr(_remote, "_PAUSES_S", (0.0,))
    with pytest.raises(UserError, match=r"busy\.tar cannot be read \(HTTP Error 503"):
        list(shard_samples(f"{flaky}/busy.tar"))


def test_a_download_that_breaks_off_is_an_error(flaky):
    samples = shard_samples(f"{flaky}/cut.tar")
    with pytest.raises(UserError, match=r"cut\.tar cannot be read \(.*, after 1 sample\)"):
        list(samples)


def test_a_program_that_cannot_fetch_is_named_without_its_command_line(monkeypatch):
    webdataset = pytest.importorskip("webdataset")

    class Failing:
        def read(self, _: int) -> bytes:
            raise OSError("((['curl', '-H', 'Authorization:Bearer secret'],)): exit 22 (read)")

        def close(self) -> None:
            raise OSError("exit 22")

    monkeypatch.setitem(webdataset.gopen_schemes, "gs", lambda *_, **__: Failing())
    with pytest.raises(UserError, match="the program that fetches it failed") as caught:
        list(shard_samples("gs://bucket/a.tar"))
    assert "secret" not in str(caught.value)
