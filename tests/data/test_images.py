"""Reading one image, whatever is in the file."""

from __future__ import annotations

import os
import pickle
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image

from gatewise.data.images.reading import UnreadableImageError, read_image, to_rgb
from gatewise.errors import UserError

# Red on the left, blue on the right, so that a turned picture shows.
WIDTH, HEIGHT = 4, 2


def two_colors() -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:, : WIDTH // 2, 0] = 255
    pixels[:, WIDTH // 2 :, 2] = 255
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_png_mode_becomes_rgb(mode):
    image = Image.fromarray(np.full((2, 3), 0x8000, np.uint16)) if mode == "I;16" else Image.new(mode, (3, 2), 1)
    read = read_image(encoded(image))
    assert read.mode == "RGB"
    assert read.size == (3, 2)


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "CMYK"), ("JPEG", "L"), ("TIFF", "F"), ("TIFF", "I"), ("GIF", "P")]
)
def test_modes_of_other_formats_become_rgb(kind, mode):
    read = read_image(encoded(Image.new(mode, (3, 2), 1), kind))
    assert read.mode == "RGB"
    assert read.size == (3, 2)


def test_16_bit_grays_keep_their_upper_byte():
    image = Image.fromarray(np.array([[0, 0x12FF, 0xFFFF]], dtype=np.uint16))
    assert np.asarray(read_image(encoded(image)))[0, :, 0].tolist() == [0, 0x12, 0xFF]


@pytest.mark.parametrize(
    ("values", "expected"), [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 128.0, 300.0], [0, 128, 255])]
)
def test_floating_point_grays_are_fractions_or_bytes(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert np.asarray(to_rgb(image))[0, :, 1].tolist() == expected


def test_transparency_shows_white_below():
    clear_black = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert np.asarray(read_image(encoded(clear_black))).min() == 255


def test_a_transparent_palette_entry_shows_white_below():
    image = Image.new("P", (2, 2), 3)
    assert np.asarray(read_image(encoded(image, "GIF", transparency=3))).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    # What a camera held that way stores, by the inverse of the operation that the standard names.
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.rotate(180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.rotate(90, expand=True),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.rotate(270, expand=True),
    }[orientation](two_colors())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert np.array_equal(np.asarray(read_image(encoded(stored, exif=exif))), np.asarray(two_colors()))


def test_an_unknown_orientation_is_left_alone():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 99
    assert read_image(encoded(two_colors(), exif=exif)).size == (WIDTH, HEIGHT)


def test_unicode_paths_are_read(tmp_path: Path):
    path = tmp_path / "Straßen-猫 🐈.png"
    two_colors().save(path)
    assert read_image(path).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not an image"), (b"this is text", "not an image"), (b"\xff\xd8\xff", "not an image")],
)
def test_what_is_no_image_is_named_with_the_reason(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=rf"broken\.jpg cannot be read as an image \({reason}"):
        read_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_a_truncated_image_is_unreadable(kind: str):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, kind)
    with pytest.raises(UnreadableImageError):
        read_image(whole[: len(whole) // 2], "half")


def test_a_missing_file_is_a_users_mistake(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere\.png cannot be read as an image \(no such file\)"):
        read_image(tmp_path / "nowhere.png")


def test_a_folder_is_no_image(tmp_path: Path):
    with pytest.raises(UnreadableImageError, match="is a directory"):
        read_image(tmp_path)


# Pillow itself warns above the limit, and refuses above twice the limit.
@pytest.mark.parametrize("limit", [3, 7])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, limit: int):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UnreadableImageError, match=r"(4 x 2|8) pixels.* bomb"):
        read_image(encoded(two_colors()))


def test_postscript_under_the_name_of_a_photograph_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(program))
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 2\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UnreadableImageError, match=r"photo\.jpg cannot be read as an image \(not an image"):
        read_image(path)
    assert not started.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
def test_a_fifo_is_no_image(tmp_path: Path):
    def stop(*_: object) -> None:
        raise TimeoutError("waited for the other end of a FIFO")

    fifo = tmp_path / "pipe.png"
    os.mkfifo(fifo)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    try:
        with pytest.raises(UnreadableImageError, match=r"pipe\.png cannot be read as an image \(not a regular file\)"):
            read_image(fifo)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_name_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    two_colors().save(tmp_path / "~nobody.png")
    monkeypatch.chdir(tmp_path)
    assert read_image("~nobody.png").size == (WIDTH, HEIGHT)


# What Pillow notices in a TIFF file and passes over.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_mutated_images_are_read_or_unreadable_and_never_large(kind: str):
    noise = np.random.RandomState(1)
    whole = encoded(Image.fromarray(noise.randint(0, 255, (24, 32, 3), dtype=np.uint8)), kind)
    draw = random.Random(kind)
    unreadable = 0
    with bounded_memory(2**31):
        for _ in range(40):
            mutated = bytearray(whole[: draw.randrange(1, len(whole))] if draw.random() < 0.3 else whole)
            for _ in range(draw.randrange(1, 5)):
                # Headers are where sizes stand.
                mutated[draw.randrange(min(len(mutated), draw.choice([64, len(mutated)])))] = draw.randrange(256)
            try:
                read = read_image(bytes(mutated), "mutated")
            except UnreadableImageError:
                unreadable += 1
            else:
                assert read.mode == "RGB"
    assert unreadable > 0


@contextmanager
def bounded_memory(further: int) -> Iterator[None]:
    """Let this process take so many bytes of addresses more than it has."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("this system does not tell how many addresses a process has")
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + further, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_error_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(UnreadableImageError("a.jpg", "truncated")))
    assert (error.name, error.reason, str(error)) == (
        "a.jpg",
        "truncated",
        "a.jpg cannot be read as an image (truncated)",
    )
