"""PyTorch's files: what a file claims is held against what it has, before anything is loaded."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch

from gatewise.errors import UserError
from gatewise.files.torch_files import read_torch

LEGACY = {"_use_new_zipfile_serialization": False}
FORMATS = pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])


def saved(path, content, options=()):
    torch.save(content, path, **dict(options))
    return path


def repacked(path, name, change):
    """The archive with one member changed, and every checksum right."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, change(content) if member.endswith(name) else content)
    return path


@FORMATS
def test_what_training_saves_comes_back_equal(tmp_path, options):
    base = torch.arange(12.0).reshape(3, 4)
    layer = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    content = {
        "views": [base, base.T, base[1:], base[:, 2], torch.ones(1).expand(5), torch.zeros(0, 3), torch.tensor(2)],
        "state": layer.state_dict(),
        "parameter": torch.nn.Parameter(base),
        "optimizer": optimizer.state_dict(),
        "scheduler": Counter([1, 2, 2]),
        "args": argparse.Namespace(lr=0.1, words=["a"]),
        "plain": (1, -2, 1.5, 10**30, None, True, "text", b"\xff", {1, 2}, 2j, OrderedDict(a=1)),
        "torch": [torch.Size([1, 2]), torch.float32, torch.device("cpu")],
    }
    path = saved(tmp_path / "x.pth", content, options)
    with torch.serialization.safe_globals([argparse.Namespace]):
        expected = torch.load(path, weights_only=True)
    found = read_torch(path)
    assert str(found) == str(expected)
    assert [view.stride() for view in found["views"]] == [view.stride() for view in content["views"]]
    assert found["views"][0].data_ptr() == found["views"][1].data_ptr()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "int8", "bool", "complex64", "float8_e4m3fn"])
def test_tensors_of_every_type_are_read(tmp_path, dtype):
    tensor = torch.ones(3).to(getattr(torch, dtype))
    found = read_torch(saved(tmp_path / "x.pth", tensor))
    assert found.dtype == tensor.dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_a_flipped_bit_is_noticed(tmp_path):
    path = saved(tmp_path / "x.pth", {"w": torch.full((1000,), 3.0)})
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<10f", *[3.0] * 10)) + 500] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_torch(path)


@FORMATS
def test_no_truncation_is_accepted(tmp_path, options):
    path = saved(tmp_path / "x.pth", {"w": torch.zeros(50), "b": torch.zeros(3)}, options)
    content = path.read_bytes()
    for length in range(0, len(content) - 1, 37):
        path.write_bytes(content[:length])
        with pytest.raises(UserError):
            read_torch(path)


def larger(number):
    """Replaces 1000 elements by more in a pickle."""
    return lambda content: content.replace(b"M" + struct.pack("<H", 1000), b"J" + struct.pack("<i", number))


def test_a_storage_that_is_smaller_than_claimed_is_not_allocated(tmp_path):
    path = repacked(saved(tmp_path / "x.pth", {"w": torch.zeros(1000)}), "data.pkl", larger(2**30))
    with pytest.raises(UserError, match=r"x.pth' is damaged: a tensor lies in the storage '0', whose size is 4,000"):
        read_torch(path)


def test_a_legacy_storage_that_is_larger_than_the_file_is_not_allocated(tmp_path):
    path = saved(tmp_path / "x.pth", {"w": torch.zeros(1000)}, LEGACY)
    path.write_bytes(larger(2**30)(path.read_bytes()))
    with pytest.raises(UserError, match="not as large as that"):
        read_torch(path)


@FORMATS
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, options):
    path = saved(tmp_path / "x.pth", {"w": torch.zeros(1000)[10:500]}, options)

    def shift(content):
        return content.replace(b"K\x0a", b"K\xff").replace(b"M" + struct.pack("<H", 490), b"M" + struct.pack("<H", 990))

    path = repacked(path, "data.pkl", shift) if not options else path
    if options:
        path.write_bytes(shift(path.read_bytes()))
    with pytest.raises(UserError, match="takes 4,980 bytes of a storage of 4,000"):
        read_torch(path)


def test_one_element_that_claims_to_be_many_is_refused(tmp_path):
    path = saved(tmp_path / "x.pth", {"w": torch.zeros(1).expand(10**12)})
    with pytest.raises(UserError, match=r"claim to be tensors of 4,000,000,000,000"):
        read_torch(path)


@FORMATS
def test_a_container_inside_itself_is_refused(tmp_path, options):
    content = {}
    content["model"] = content
    with pytest.raises(UserError, match="its 'model' contains itself"):
        read_torch(saved(tmp_path / "x.pth", content, options))


def nested(levels, width):
    content = [torch.zeros(1)]
    for _ in range(levels):
        content = [content] * width
    return content


@pytest.mark.parametrize(("levels", "width", "message"), [(150, 1, "more than 100 levels"), (60, 2, "20,000,000")])
def test_nesting_and_repetition_are_bounded(tmp_path, levels, width, message):
    with pytest.raises(UserError, match=message):
        read_torch(saved(tmp_path / "x.pth", nested(levels, width)))


def deep_tuple_key():
    """A pickle of {((((...)))): 1}; to hash the key in C would overflow the stack."""
    return b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."


def endless_copies():
    """A dictionary of 2,000 items, copied 200,000 times by six bytes each."""
    items = b"".join(b"M" + struct.pack("<H", number) + b"N" for number in range(2000))
    one = b"ccollections\nOrderedDict\nh\x00\x85R0"
    return b"\x80\x02}(" + items + b"uq\x00" + one * 20_000 + b"."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (deep_tuple_key(), "a dictionary whose key is a tuple"),
        (endless_copies(), "pickle instruction 48"),
        (endless_copies().replace(b"R0", b"R"), "copies the same values"),
        (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "it wants to call bytearray"),
        (b"\x80\x02ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.", "it wants to call torch.FloatStorage"),
        (b"\x80\x02ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R.", "it wants to call torch.Tensor"),
        (b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsNsb.", "set the attributes items"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "breaks off"),
        (b"\x80\x02h\x05.", "refers to a value that is not there"),
        (b"\x80\x02e.", "ends a container"),
        (b"\x80\x02NN\x86NR.", "not a function"),
    ],
)
def test_pickles_that_exhaust_memory_or_confuse_are_refused(tmp_path, content, message):
    path = repacked(saved(tmp_path / "x.pth", {"w": torch.zeros(1)}), "data.pkl", lambda _: content)
    with pytest.raises(UserError, match=message) as told:
        read_torch(path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        (lambda: torch.zeros(3, device="meta"), "meta"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unusual_tensors_are_refused_with_their_key(tmp_path, make, kind):
    path = saved(tmp_path / "x.pth", {"model": {"head": make()}})
    with pytest.raises(UserError, match=rf"holds a {kind}.* tensor at 'model.head'"):
        read_torch(path)


@FORMATS
def test_functions_are_named_and_not_imported(tmp_path, options):
    with pytest.raises(UserError, match=r"is refused: it wants to load posix.system;") as told:
        read_torch(saved(tmp_path / "x.pth", {"f": os.system}, options))
    assert "weights_only" not in str(told.value)


@pytest.mark.filterwarnings("ignore")
def test_programs_of_torchscript_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "x.pth")
    with pytest.raises(UserError, match="TorchScript archive"):
        read_torch(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a file of weights"),
        (b"a text", "not a file of weights"),
        (b"PK\x03\x04 and nothing", "zip archive"),
        (pickle.dumps({"a": 1}, 2), "not a file of weights"),
        (pickle.dumps({"a": 1}), "pickle instruction"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_torch(tmp_path / "x.pth")


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code = f"from gatewise.files.torch_files import read_torch; read_torch({str(tmp_path / 'pipe')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "not a regular file" in done.stderr
