from __future__ import annotations

import contextlib
import os
import struct
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatewise.errors import UserError
from gatewise.files import check_archive, parse_json, parse_yaml, read_json, read_members, read_text, require_regular

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "zero byte"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero byte":
        path = f"{path}\0"
    with pytest.raises(UserError, match="recipe"):
        require_regular(path, "recipe")


def test_a_text_that_is_too_large_or_not_utf8_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff" * 10)
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 0\)"):
        read_text(tmp_path / "x")
    with pytest.raises(UserError, match="more than 5 bytes"):
        read_text(tmp_path / "x", largest=5)


def test_yaml_reads_numbers_aliases_and_nesting():
    assert parse_yaml("lr: 1e-3\nbase: &b {x: 1}\nmore: [*b, *b]", "recipe") == {
        "lr": 1e-3,
        "base": {"x": 1},
        "more": [{"x": 1}, {"x": 1}],
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "stands for more than 200,000 values"),
        ("[" * 100_000, "nested more than 50 levels"),
        ("{a: " * 100_000, "nested more than 50 levels"),
        ("- " * 100_000 + "x", "nested more than 50 levels"),
        ("a: &a [*a]", "stands inside its own anchor"),
        ("a: *b", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        ("{[a, b]: c}", "not valid YAML"),
        ("a: \x01", "not valid YAML"),
    ],
)
def test_yaml_that_could_hurt_or_is_wrong_is_refused_in_one_line(text, reason):
    with pytest.raises(UserError, match=reason) as caught:
        parse_yaml(text, "recipe")
    assert "\n" not in str(caught.value)


@given(st.text(alphabet=" \n-:[]{}&*ab1e.,'\"!#|>%@?", max_size=60))
def test_any_yaml_text_is_read_or_refused(text):
    with contextlib.suppress(UserError):
        parse_yaml(text, "recipe")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested more than 100 levels"),
        ('{"a":' * 100_000, "nested more than 100 levels"),
        ("[1,", "not valid JSON"),
        ("NaN", "NaN is not a number in JSON"),
        ("1" * 10_000, "not valid JSON"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_json_that_could_hurt_or_is_wrong_is_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        parse_json(text, "record")


def test_brackets_in_strings_are_not_nesting(tmp_path):
    text = '{"a\\"": "' + "[" * 1000 + '"}'
    (tmp_path / "x.json").write_text(text)
    assert read_json(tmp_path / "x.json") == {'a"': "[" * 1000}


def archive(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_members_are_read_and_their_sizes_told(tmp_path):
    path = archive(tmp_path / "x.zip", a=b"1" * 10, b=b"")
    assert read_members(path) == {"a": b"1" * 10, "b": b""}
    assert read_members(path, names=["b"]) == {"b": b""}
    assert check_archive(path) == {"a": 10, "b": 0}


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    path = archive(tmp_path / "x.zip", a=b"content", b=b"more")
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with contextlib.suppress(UserError):
                # A flip may fall into a name, a date or a permission, which no checksum covers.
                assert sorted(read_members(path).values()) == [b"content", b"more"], (place, bit)


def test_a_truncated_archive_is_refused(tmp_path):
    path = archive(tmp_path / "x.zip", a=b"content")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a zip archive, or damaged"):
        read_members(path)


def test_an_archive_that_expands_too_far_is_refused_before_it_is_read(tmp_path):
    path = archive(tmp_path / "x.zip", zipfile.ZIP_DEFLATED, a=bytes(100 * 2**20))
    with pytest.raises(UserError, match="claim to hold 104,857,600"):
        read_members(path)


def test_a_claimed_size_that_the_file_does_not_have_is_refused(tmp_path):
    path = archive(tmp_path / "x.zip", a=b"content")
    content = path.read_bytes().replace(struct.pack("<II", 7, 7), struct.pack("<II", 2**31, 2**31))
    path.write_bytes(content)
    with pytest.raises(UserError, match="larger than the file"):
        read_members(path)


def test_compressed_members_are_refused_where_none_are_expected(tmp_path):
    path = archive(tmp_path / "x.zip", zipfile.ZIP_DEFLATED, a=b"content")
    with pytest.raises(UserError, match="is compressed"):
        check_archive(path, stored_only=True)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a", b"1")
        file.writestr("a", b"2")
    with pytest.raises(UserError, match="the same name"):
        check_archive(tmp_path / "x.zip")
