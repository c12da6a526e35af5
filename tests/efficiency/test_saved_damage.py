"""No plan file runs code, and no damaged one is loaded as something else."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random

import numpy as np
import pytest
import torch

from gatewise.efficiency import load_optimized, optimize
from gatewise.errors import Failure, UserError
from tests.efficiency.conftest import Tiny, settle
from tests.efficiency.plan_files import change, members, set_field, write

pytestmark = pytest.mark.untyped


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The members of a plan that holds a graph."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("plan") / "plan.zip"
    return members(optimize(settle(Tiny()), torch.randn(1, 3, 16, 16), plans=[]).save(path))


@pytest.fixture
def plan(content, tmp_path):
    write(tmp_path / "plan.zip", content)
    return tmp_path / "plan.zip"


@pytest.fixture
def sentinel(tmp_path):
    """A file that exists once anything was executed."""
    return tmp_path / "executed"


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize(
    "name", ["network.pt2", "data.pkl", "network.safetensors", "network.json", "example.safetensors"]
)
def test_a_pickle_is_never_read(plan, content, sentinel, name):
    write(plan, content | {name: pickle.dumps(Payload(f"touch {sentinel}"))})
    with pytest.raises(UserError, match=r"^[^\n]*plan.zip[^\n]*$"):
        load_optimized(plan)
    assert not sentinel.exists()


def calls_for(sentinel):
    """Calls that would leave the sentinel."""
    return {
        "a file": {"call": "aten::from_file", "args": [str(sentinel), True, 4], "kwargs": {}},
        "a library": {"call": "torch.ops.load_library", "args": [str(sentinel)], "kwargs": {}},
        "a library in a namespace": {"call": "aten::load_library", "args": [str(sentinel)], "kwargs": {}},
        "a shell": {"call": "os.system", "args": [f"touch {sentinel}"], "kwargs": {}},
        "an expression": {"call": f"__import__('os').system('touch {sentinel}')", "args": [], "kwargs": {}},
        "an expression as a size": {
            "call": "aten::reshape",
            "args": [{"node": 0}, [f"__import__('os').system('touch {sentinel}')"]],
            "kwargs": {},
        },
        "an expression as a dtype": {
            "call": "aten::to.dtype",
            "args": [{"node": 0}, {"dtype": f"__import__('os').system('touch {sentinel}')"}],
            "kwargs": {},
        },
        "an expression as a name": {
            "call": "aten::relu",
            "args": [{"node": 0}],
            "kwargs": {f"x=__import__('os').system('touch {sentinel}')": 1},
        },
    }


@pytest.mark.parametrize("kind", calls_for("."))
def test_a_call_that_would_leave_a_trace_is_refused(plan, sentinel, kind):
    def insert(data):
        graph = json.loads(data)
        graph["nodes"].append(calls_for(sentinel)[kind])
        return json.dumps(graph | {"output": len(graph["nodes"]) - 1})

    change(plan, "network.json", insert)
    with pytest.raises(UserError, match=r"^[^\n]*plan.zip is not accepted: node \d+: [^\n]*$"):
        load_optimized(plan)
    assert not sentinel.exists()


def test_the_name_of_a_tensor_is_no_code(plan, sentinel):
    def rename(data):
        graph = json.loads(data)
        graph["tensors"][0]["name"] = f"__import__('os').system('touch {sentinel}')"
        return json.dumps(graph)

    change(plan, "network.json", rename)
    with pytest.raises(UserError, match="which the file does not hold"):
        load_optimized(plan)
    assert not sentinel.exists()


def test_an_earlier_format_is_refused_before_its_network_is_read(plan, content, sentinel):
    header = json.loads(content["plan.json"]) | {"format": 1}
    old = {"plan.json": json.dumps(header), "network.pt2": pickle.dumps(Payload(f"touch {sentinel}"))}
    write(plan, old)
    with pytest.raises(UserError, match="has format 1; this version reads format 2: optimize the network and save"):
        load_optimized(plan)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("report",), [], "the report of .* must be a mapping"),
        (("report", "threads"), True, r"\.threads must be an integer, not True"),
        (("report", "threads"), 0, r"\.threads must be in 1\.\."),
        (("report", "tolerance"), float("nan"), r"\.tolerance must be in"),
        (("report", "tolerance"), "1e-4", r"\.tolerance must be a number"),
        (("report", "device"), "disk", "'disk', which is not a device"),
        (("report", "device"), "meta", "plans are for cpu and cuda devices"),
        (("report", "plans"), [], "must have one chosen plan"),
        (("report", "plans"), [{}], r"\.plans\[0\] has no field 'name'"),
        (("report", "plans"), 5, r"\.plans must be a list"),
        (("report", "plans", 0, "status"), "best", r"\.plans\[0\]\.status must be one of chosen, slower"),
        (("report", "plans", 0, "ratio"), {"median": 1.0}, r"\.plans\[0\]\.ratio has no field"),
        (("report", "plans", 0, "code"), "x", r"\.plans\[0\] has an unknown field 'code'"),
        (("report", "input_shape"), [1, 3, 8, 8], "its example is not a batch of shape"),
        (("report", "input_shape"), [1, 3, 16, -16], r"\.input_shape\[3\] must be in 1\.\."),
        (("format",), [2], r"has format \[2\]"),
        (("extra",), 1, "its header has the fields"),
    ],
)
def test_a_wrong_field_of_the_header_is_named(plan, keys, value, message):
    change(plan, "plan.json", lambda data: set_field(data, *keys, value=value))
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        load_optimized(plan)


def test_a_size_that_a_header_claims_is_not_allocated(plan):
    import struct

    claim = json.dumps({"x": {"dtype": "F32", "shape": [3 * 2**30], "data_offsets": [0, 12 * 2**30]}}).encode()
    change(plan, "network.safetensors", lambda data: struct.pack("<Q", len(claim)) + claim)
    with pytest.raises(UserError, match="network.safetensors of .* is not a safetensors file, or is damaged"):
        load_optimized(plan)


def test_external_data_and_operators_from_elsewhere_are_refused(content, plan):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def onnx_plan(domain, external):
        node = helper.make_node("Relu", ["x"], ["y"], domain=domain)
        info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in "xy"]
        weight = numpy_helper.from_array(np.ones(1, np.float32), "w")
        if external:
            onnx.external_data_helper.set_external_data(weight, "/etc/passwd")
        graph = helper.make_graph([node], "g", info[:1], info[1:], [weight])
        header = json.loads(content["plan.json"])
        header["plan"] = "onnxruntime"
        network = {"network.onnx": helper.make_model(graph).SerializeToString()}
        return {"plan.json": json.dumps(header), "example.safetensors": content["example.safetensors"], **network}

    write(plan, onnx_plan("", external=True))
    with pytest.raises(UserError, match="its tensor 'w' is in another file"):
        load_optimized(plan)
    write(plan, onnx_plan("com.mine", external=False))
    with pytest.raises(UserError, match="its operator 'Relu' is of the domain 'com.mine'"):
        load_optimized(plan)


def load_or_refuse(path):
    """The loaded network, or None for one that was refused."""
    try:
        return load_optimized(path)
    except (UserError, Failure):
        return None


def test_no_truncated_plan_is_loaded(plan):
    whole = plan.read_bytes()
    for length in random.Random(0).sample(range(len(whole)), 30):
        plan.write_bytes(whole[:length])
        assert load_or_refuse(plan) is None


def test_no_plan_with_a_flipped_bit_is_loaded_as_something_else(plan):
    whole = plan.read_bytes()
    draw, x = random.Random(1), torch.randn(2, 3, 16, 16)
    expected, refused = load_optimized(plan)(x), 0
    for place in draw.sample(range(len(whole)), 30):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        plan.write_bytes(damaged)
        found = load_or_refuse(plan)
        # A flag or a date in the archive's directory changes nothing of the content.
        assert found is None or torch.equal(found(x), expected)
        refused += found is None
    assert refused >= 20


def test_a_full_disk_leaves_the_plan_that_was_there(plan, monkeypatch):
    loaded, before = load_optimized(plan), plan.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gatewise.files.writing.os.fsync", full)
    with pytest.raises(Failure, match="cannot write .*plan.zip: No space left on device"):
        loaded.save(plan)
    assert plan.read_bytes() == before
    assert [entry.name for entry in plan.parent.iterdir()] == ["plan.zip"]
