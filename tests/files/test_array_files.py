"""NumPy's archives and safetensors: headers are held against the data behind them."""

from __future__ import annotations

import io
import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gatewise.errors import UserError
from gatewise.files.numpy_files import read_npz
from gatewise.files.safetensors import read_safetensors


def npz(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(header, data=b"", version=1):
    text = header.encode("latin1")
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def test_arrays_come_back_equal(tmp_path):
    arrays = {
        "rows": np.arange(6.0).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "big_endian": np.arange(3, dtype=">f4"),
        "scalar": np.float16(3),
        "none": np.zeros((0, 4), dtype=np.uint8),
        "flags": np.array([True, False]),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = read_npz(tmp_path / "x.npz")
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype.isnative
            assert torch.from_numpy(found[name]).shape == array.shape


def header(shape="(3,)", kind="'<f4'", order="False"):
    return f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(header("(3000000000,)"), bytes(12)), "claims 12,000,000,000 bytes of data, and has 12"),
        (npy(header("(2,)"), bytes(12)), "claims 8 bytes"),
        (npy(header("(-3,)"), bytes(12)), "has no shape"),
        (npy(header("(3.0,)"), bytes(12)), "has no shape"),
        (npy(header(f"({'1,' * 70})"), bytes(4)), "not understood"),
        (npy(header(kind="'|O'"), bytes(24)), "holds objects"),
        (npy(header(kind="'<U4'"), bytes(48)), "holds text"),
        (npy(header(kind="'|V4'"), bytes(12)), "holds records"),
        (npy(header(kind="[('a', '<f4')]"), bytes(12)), "holds records"),
        (npy(header(kind="'<f16'"), bytes(48)), "float128"),
        (npy(header(kind="'nothing'"), bytes(12)), "NumPy does not know"),
        (npy("__import__('os').system('x')"), "not a dictionary"),
        (npy("(" * 4000), "not a dictionary"),
        (npy("{" + " " * 5000 + "}"), "header claims 5,002 bytes"),
        (npy("[1]"), "not a dictionary"),
        (npy(header(), bytes(12), version=2)[:11], "does not begin"),
        (b"nothing at all", "does not begin"),
    ],
)
def test_members_that_are_not_what_they_claim_are_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as told:
        read_npz(npz(tmp_path / "x.npz", w=content))
    assert "x.npz" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_single_array_is_told_from_an_archive(tmp_path):
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match=r"x.npz' is a single array \(.npy\)"):
        read_npz(tmp_path / "x.npz")


def test_an_archive_of_other_things_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="not an archive of arrays: it holds 'readme.txt'"):
        read_npz(tmp_path / "x.npz")


def test_a_flipped_bit_in_an_archive_is_noticed(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, w=np.full(1000, 3.0, dtype=np.float32))
    content = bytearray(buffer.getvalue())
    content[content.index(struct.pack("<10f", *[3.0] * 10)) + 500] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_npz(tmp_path / "x.npz")


def safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(count=1, start=0):
    return {"dtype": "F32", "shape": [count], "data_offsets": [start, start + 4 * count]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": entry(2)}, bytes(4), "damaged"),
        ({"w": entry(10**9)}, bytes(4), "damaged"),
        ({"": entry()}, bytes(4), "one of its tensors has no name"),
        (b'{"w": %s, "w": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4), "the name 'w' is there twice"),
        ({"w": {**entry(), "dtype": "F77"}}, bytes(4), "damaged|loaded"),
        (b"{" * 500, b"", "nested"),
        (b"\xff\xfe{", b"", "not valid JSON"),
    ],
)
def test_safetensors_headers_that_do_not_fit_are_refused(tmp_path, header, data, message):
    with pytest.raises(UserError, match=message) as told:
        read_safetensors(safetensors(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(told.value)


def test_no_truncation_of_safetensors_is_accepted(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.arange(10.0)}, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError):
            read_safetensors(path)
