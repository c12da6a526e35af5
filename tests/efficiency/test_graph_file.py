"""A network as plain data computes bit for bit what its graph did, and nothing else can be put into its place."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn

from gatewise.efficiency.acceleration.graph_file import read_graph, write_graph
from gatewise.errors import Failure, UserError
from gatewise.files import parse_json
from tests.conftest import small_language_model, small_model

pytestmark = pytest.mark.untyped


def round_trip(network, x):
    """The network after it was written and read."""
    content, tensors = write_graph(network, x)
    return read_graph(parse_json(json.dumps(content, allow_nan=False), "graph"), load(save(tensors)))


def exported(network, x):
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        return torch.export.export(network, (x,), dynamic_shapes=shapes).module()


class Arguments(nn.Module):
    """Arguments of all kinds: infinities, dtypes, texts, lists with holes, sizes that follow the batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.arange(4.0), persistent=False)
        self.table = torch.tensor([1.5, -2.0, 0.25, 3.0], dtype=torch.float64)

    def forward(self, x):
        batch, width = x.shape[0], x.shape[1]
        mask = torch.arange(width, device=x.device) > 2
        x = x.masked_fill(mask, float("-inf")).softmax(dim=-1)
        x = torch.einsum("bi,bj->bij", x, x + self.shift).to(torch.float64) * self.table
        x = F.pad(x[:, ::2, 1:], (1, 0), mode="constant", value=0.5)
        x = x.reshape(batch * x.shape[1], -1).view(batch, -1).float()
        return F.gelu(x, approximate="tanh")[:, torch.tensor([0, 2, 1])] + torch.ones(batch, 3)


class Fenced(nn.Module):
    """A block that is kept out of reduced precision, and one without gradients."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            low, high = (self.first(x) * 2).chunk(2, dim=1)
        return self.second(torch.cat([high, low], dim=1))


class Tied(nn.Module):
    """One parameter under two names, and one in channels-last memory."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.conv(x.reshape(-1, 4, 1, 1).expand(-1, -1, 2, 2)).mean((2, 3))
        return self.second(self.first(x))


@pytest.mark.parametrize("network", [Arguments(), Fenced(), Tied()], ids=lambda network: type(network).__name__)
def test_a_module_computes_the_same_for_any_batch(network):
    example = torch.randn(1, 4)
    found, graph = round_trip(network.eval(), example), exported(network, torch.randn(2, 4))
    for size in (1, 2, 5):
        x = torch.randn(size, 4)
        assert torch.equal(found(x), graph(x))
        assert torch.equal(found(x), network(x))


@pytest.mark.parametrize("name", ["mobilenetv2_035", "rmt_b", "unireplknet_a"])
def test_image_networks_compute_the_same_for_any_batch(name):
    network, x = small_model(name), torch.randn(2, 3, 64, 64)
    found, graph = round_trip(network, x), exported(network, x)
    for batch in (x, torch.randn(3, 3, 64, 64)):
        assert torch.equal(found(batch), graph(batch))


def test_a_language_model_computes_the_same_for_any_batch():
    network = small_language_model("gla_tiny")
    x = torch.randint(network.config.vocab_size, (2, 16))
    found, graph = round_trip(network, x), exported(network, x)
    for batch in (x, torch.randint(network.config.vocab_size, (3, 16))):
        assert torch.equal(found(batch), graph(batch))


def test_a_shared_tensor_is_written_once_and_memory_keeps_its_order():
    content, tensors = write_graph(Tied().eval(), torch.randn(1, 4))
    assert sorted(tuple(tensor.shape) for tensor in tensors.values()) == [(4,), (4, 3, 3, 4), (4, 4)]
    found = read_graph(content, tensors)
    weight = next(parameter for parameter in found.parameters() if parameter.ndim == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    # Matrix products choose their kernel by this.
    assert weight.requires_grad


def test_parameters_follow_into_another_dtype_and_constants_do_not():
    content, tensors = write_graph(Arguments().eval(), torch.randn(1, 4))
    found = read_graph(content, tensors).to(torch.bfloat16)
    assert {buffer.dtype for buffer in found.buffers()} == {torch.bfloat16}
    constants = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
    assert torch.float64 in {constant.dtype for constant in constants}


class Branching(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class Reduced(nn.Module):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.T


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x + 1, x + 2


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Branching(), "block of kind cond"),
        (Reduced(), "block of kind wrap_with_autocast"),
        (TwoOutputs(), "returns 2 values"),
    ],
)
def test_what_a_file_cannot_hold_is_named(network, message):
    with pytest.raises(Failure, match=rf"^the network cannot be written: .*{message}[^\n]*$"):
        write_graph(network.eval(), torch.randn(2, 4))


@pytest.fixture
def plain():
    """A graph by hand: relu(x) + weight."""
    content = {
        "tensors": [{"name": "weight", "kind": "parameter"}],
        "nodes": [
            {"input": True},
            {"tensor": 0},
            {"call": "aten::relu", "args": [{"node": 0}], "kwargs": {}},
            {"call": "aten::add.Tensor", "args": [{"node": 2}, {"node": 1}], "kwargs": {"alpha": 2}},
        ],
        "output": 3,
    }
    return content, {"weight": torch.tensor([1.0, 2.0])}


def test_a_graph_by_hand_is_built(plain):
    found = read_graph(*plain)
    torch.testing.assert_close(found(torch.tensor([[-1.0, 3.0]])), torch.tensor([[2.0, 7.0]]))


REFUSED = [
    *("aten::from_file", "aten::save", "aten::set_.source_Storage", "aten::set_", "aten::resize_", "aten::data"),
    *("aten::_resize_output_", "aten::as_strided_", "aten::record_stream", "aten::requires_grad_", "aten::_print"),
    *("aten::add.out", "aten::__class__", "aten::__init__", "aten::default", "aten::nothing", "aten::relu.nothing"),
    *("aten::relu.default", "prims::resize", "prims::inductor_seeds", "prims::_make_token", "gatewise::nothing"),
    *("mine::relu", "torch.ops.load_library", "aten::load_library", "torch.load", "torch.hub.load", "os.system"),
    *("builtins.eval", "operator.attrgetter", "operator.pow", "operator.call", "math.__loader__.load_module"),
    *("subprocess.run", "", "__import__('os').system('true')"),
]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_no_file_calls_anything_but_operators_that_compute(plain, name):
    content, tensors = plain
    content["nodes"][2]["call"] = name
    with pytest.raises(UserError, match=r"^node 2: its graph calls [^\n]*$"):
        read_graph(content, tensors)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"call": "aten::relu", "args": [{"node": 0}, 1], "kwargs": {}},
            "aten::relu 2 arguments, and it takes 1",
        ),
        ({"call": "aten::relu", "args": [], "kwargs": {}}, "leaves out the argument 'self' of aten::relu"),
        ({"call": "aten::relu", "args": [{"node": 0}], "kwargs": {"x": 1}}, "argument 'x' that is unknown"),
        (
            {"call": "aten::relu", "args": [{"node": 0}], "kwargs": {"self": 1}},
            "'self' that is .* given twice",
        ),
        ({"call": "aten::relu", "args": ["x"], "kwargs": {}}, "gives aten::relu the text 'x' as self"),
        (
            {"call": "aten::gelu", "args": [{"node": 0}], "kwargs": {"approximate": "/etc/passwd"}},
            "gives aten::gelu the text '/etc/passwd' as approximate",
        ),
        ({"call": "aten::reshape", "args": [{"node": 0}, ["none"]], "kwargs": {}}, "the text 'none' as shape"),
        ({"call": "operator.mul", "args": [[0], 9], "kwargs": {}}, "with something other than sizes"),
        ({"call": "operator.getitem", "args": [{"node": 0}, {"slice": [0, 1, None]}], "kwargs": {}}, "than sizes"),
        ({"call": "operator.getitem", "args": [{"node": 0}, 0.5], "kwargs": {}}, "an item by something other"),
        ({"call": "aten::relu", "args": [{"node": 2}], "kwargs": {}}, "there is no node 2 to refer to"),
        ({"call": "aten::relu", "args": [{"node": -1}], "kwargs": {}}, "there is no node -1"),
        ({"call": "aten::relu", "args": [{"node": True}], "kwargs": {}}, "there is no node True"),
        ({"call": "aten::relu", "args": [{"code": "1"}], "kwargs": {}}, "one known tag"),
        ({"call": "aten::relu", "args": [{"node": 0, "float": "inf"}], "kwargs": {}}, "one known tag"),
        ({"call": "aten::relu", "args": [{"dtype": "os"}], "kwargs": {}}, "there is no dtype 'os'"),
        ({"call": "aten::relu", "args": [{"dtype": []}], "kwargs": {}}, r"there is no dtype \[\]"),
        ({"call": "aten::relu", "args": [{"float": "1e9"}], "kwargs": {}}, "there is no number '1e9'"),
        ({"call": "aten::relu", "args": [{"device": "meta"}], "kwargs": {}}, "a device must be one of cpu, cuda"),
        ({"call": "aten::relu", "args": [2**63], "kwargs": {}}, "more than 64 bits"),
        ({"call": "aten::relu", "args": [[[[[[1]]]]]], "kwargs": {}}, "expected a list, nested at most 4 deep"),
        ({"call": "aten::relu", "args": [{"slice": [1, 2]}], "kwargs": {}}, "a slice has three numbers"),
        ({"call": "aten::relu", "args": [{"node": 0}]}, "a call must have the fields call, args, kwargs"),
        ({"call": "aten::relu", "args": {}, "kwargs": {}}, "args of a call must be a list"),
        ({"tensor": 1}, "there is no tensor 1"),
        ({"tensor": "weight"}, "tensor of a tensor's node must be a int"),
        ([], "a call must have the fields"),
    ],
)
def test_a_call_must_fit_the_operator(plain, call, message):
    content, tensors = plain
    content["nodes"][2] = call
    with pytest.raises(UserError, match=rf"^node 2: [^\n]*{message}[^\n]*$"):
        read_graph(content, tensors)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("output", 4, "there is no node 4"),
        ("output", "3", "output of a graph must be a int"),
        ("nodes", [], "there is no node 3"),
        ("nodes", [{"tensor": 0}], "the first node of a graph must be its input"),
        ("tensors", [], "names 0 tensors, and the file holds 1"),
        ("tensors", [{"name": "weight", "kind": "parameter"}] * 2, "names 2 tensors, and the file holds 1"),
        ("tensors", [{"name": "other", "kind": "buffer"}], "is called 'other', which the file does not hold"),
        ("tensors", [{"name": "weight", "kind": "module"}], "must be one of parameter, buffer, constant"),
        ("tensors", [{"name": "weight", "kind": "buffer", "order": [1]}], r"has 1 axes, and its order is \[1\]"),
        ("tensors", [{"name": "weight", "kind": "buffer", "order": [False]}], "its order is"),
        ("extra", 1, "a graph must have the fields"),
    ],
)
def test_a_graph_must_be_whole(plain, field, value, message):
    content, tensors = plain
    with pytest.raises(UserError, match=message):
        read_graph(content | {field: value}, tensors)
