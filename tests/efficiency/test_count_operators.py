"""Operators cost what the definitions say, forward and backward, and views cost nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gatewise.efficiency import count


class Apply(nn.Module):
    """A function as a network."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return self.function(x, *self.parameters())


def operators(function, x, **parameters):
    return count(Apply(function, **parameters), x).operators


@pytest.mark.parametrize(
    ("stride", "groups", "bias", "dilation"), [(1, 1, False, 1), (2, 4, True, 1), (1, 8, True, 2), (2, 1, True, 1)]
)
@pytest.mark.parametrize(("dtype", "u"), [(None, 4), ("bf16", 2), ("int8", 1), (torch.float16, 2)])
def test_convolutions_cost_what_the_equations_say(stride, groups, bias, dilation, dtype, u):
    n, c, h, w, k, r = 2, 8, 13, 11, 16, 3
    conv = nn.Conv2d(c, k, r, stride, dilation, dilation, groups, bias)
    x = torch.randn(n, c, h, w)
    p, q = conv(x).shape[2:]
    (entry,) = count(conv, x, dtype=dtype).operators
    assert entry.macs == n * p * q * k * (c // groups) * r * r
    assert entry.bias_macs == (0.5 * n * p * q * k if bias else 0)
    assert entry.weight_bytes == u * k * (c // groups) * r * r
    assert entry.bytes_read == u * (n * c * h * w + k * (c // groups) * r * r + (k if bias else 0))
    assert entry.bytes_written == u * n * p * q * k
    assert entry.element_size == u
    assert entry.intensity == 2 * (entry.macs + entry.bias_macs) / (entry.bytes_read + entry.bytes_written)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_maps_of_any_memory_order_are_one_product(bias):
    linear = nn.Linear(6, 10, bias)
    for x in (torch.randn(4, 6), torch.randn(2, 5, 6), torch.randn(2, 6, 5).transpose(1, 2)):
        cost = count(linear, x)
        rows = x.numel() // 6
        assert cost.macs == rows * 60
        assert cost.bias_macs == (0.5 * rows * 10 if bias else 0)
        (product,) = [entry for entry in cost.operators if entry.macs]
        assert product.weight_bytes == 4 * 60


def test_attention_reads_its_inputs_and_writes_its_output_once():
    q = torch.randn(2, 3, 7, 8)
    entries = operators(lambda x: F.scaled_dot_product_attention(x, x + 1, x + 2), q)
    attention = entries[-1]
    assert sum(entry.macs for entry in entries) == attention.macs == 2 * 3 * 2 * 7 * 7 * 8
    assert attention.bytes_read == 3 * 4 * q.numel()


@pytest.mark.parametrize(
    ("function", "shape", "macs"),
    [
        (lambda x: torch.mv(x, x[0]), (5, 5), 25),
        (lambda x: torch.dot(x[0], x[1]), (2, 7), 7),
        (lambda x: torch.cdist(x, x), (4, 3), 4 * 4 * 3),
        (lambda x: torch.einsum("bij,bkj->bik", x, x), (2, 3, 4), 2 * 3 * 3 * 4),
        (lambda x: torch.addbmm(x[0], x, x), (2, 3, 3), 2 * 27),
    ],
)
def test_products_that_are_no_layers_count_too(function, shape, macs):
    assert count(Apply(function), torch.randn(shape)).macs == macs


def test_bilinear_and_recurrent_layers_count():
    bilinear, other = nn.Bilinear(3, 4, 5), torch.randn(2, 4)
    assert count(Apply(lambda x: bilinear(x, other)), torch.randn(2, 3)).macs == 2 * 3 * 4 * 5
    x = torch.randn(2, 7, 6)
    for layer, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        found = count(layer(6, 5, num_layers=2, batch_first=True), x).macs
        assert found == 2 * 7 * gates * (5 * 6 + 5 * 5 + 2 * 5 * 5), layer.__name__


def test_transformer_layers_are_counted_by_their_operators():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    macs = 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8
    assert count(layer, torch.randn(1, 5, 8)).macs == macs
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(2, -1),
        lambda x: x.transpose(1, 2).permute(0, 2, 1),
        lambda x: x[:, 1:].unflatten(2, (2, 2)),
        lambda x: x[:1].expand(9, 3, 4),
        lambda x: x.chunk(3, 1)[0].squeeze(1).detach(),
    ],
)
def test_views_move_nothing(view):
    assert operators(view, torch.randn(2, 3, 4)) == ()


def test_moving_is_not_free():
    (clone,) = operators(lambda x: x.transpose(1, 2).reshape(2, 12), torch.randn(2, 3, 4))
    assert (clone.macs, clone.bytes_read, clone.bytes_written) == (0, 96, 96)
    (cat,) = operators(lambda x: torch.cat([x, x[:, :1]], 1), torch.randn(2, 3, 4))
    assert cat.bytes_written == 2 * 4 * 4 * 4
    (zeros, copied) = operators(lambda x: torch.zeros(2, 9).index_copy(1, torch.arange(3), x), torch.randn(2, 3))[::2]
    assert (zeros.bytes_read, zeros.bytes_written, copied.bytes_written) == (0, 72, 72)


def test_parts_of_a_tensor_are_read_and_expanded_ones_once():
    (half,) = operators(lambda x: x[:, :2].exp(), torch.randn(2, 4))
    assert (half.bytes_read, half.bytes_written) == (16, 16)
    (added,) = operators(lambda x: x[:1].expand(5, 4) + 1, torch.randn(2, 4))
    assert (added.bytes_read, added.bytes_written) == (16, 80)
    (square,) = operators(lambda x: x * x, torch.randn(2, 4))
    assert square.bytes_read == 32
    (both,) = operators(lambda x: x + x.T, torch.randn(4, 4))
    assert both.bytes_read == 64


def test_writing_in_place_reads_and_writes_and_overwriting_writes_alone():
    _, relu = operators(lambda x: x.clone().relu_(), torch.randn(2, 4))
    assert (relu.bytes_read, relu.bytes_written) == (32, 32)
    _, fill = operators(lambda x: x.clone().fill_(1.0), torch.randn(2, 4))
    assert (fill.bytes_read, fill.bytes_written) == (0, 32)
    (copied,) = operators(lambda x: torch.empty(2, 4).copy_(x), torch.randn(2, 4))
    assert (copied.bytes_read, copied.bytes_written) == (32, 32)


def test_integers_keep_their_size_in_any_dtype():
    cost = count(nn.Embedding(50, 8), torch.zeros(2, 6, dtype=torch.int64), dtype="int8")
    assert cost.operators[0].bytes_read == 12 * 8 + 12 * 8  # rows of one byte per number, indices of eight
    assert cost.operators[0].bytes_written == 12 * 8


def test_places_are_told_by_module_and_stage():
    inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    cost = count(nn.Sequential(inner, nn.Linear(4, 2)), torch.randn(3, 4))
    assert [(entry.name, entry.module, entry.stage) for entry in cost.operators] == [
        ("mm", "0.0", "0"),
        ("relu", "0.1", "0"),
        ("addmm", "1", "1"),
    ]


def test_the_backward_pass_of_a_convolution_is_three_kernels():
    n, c, h, w, k, r, groups = 2, 8, 9, 7, 8, 3, 4
    network = nn.Sequential(nn.Conv2d(c, c, 1), nn.Conv2d(c, k, r, padding=1, groups=groups))
    cost = count(network, torch.randn(n, c, h, w), backward=True)
    last = {entry.role: entry for entry in cost.operators if entry.phase == "backward" and entry.module == "1"}
    macs, maps, weight = n * c * h * w * (c // groups) * r * r, 4 * n * c * h * w, 4 * k * (c // groups) * r * r
    assert [last[role].macs for role in ("grad-input", "grad-weight", "grad-bias")] == [macs, macs, 0]
    assert last["grad-bias"].bias_macs == 0.5 * n * k * h * w
    assert (last["grad-input"].bytes_read, last["grad-input"].bytes_written) == (maps + weight, maps)
    assert (last["grad-weight"].bytes_read, last["grad-weight"].bytes_written) == (2 * maps, weight)
    first = [entry.role for entry in cost.operators if entry.phase == "backward" and entry.module == "0"]
    assert first == ["grad-weight", "grad-bias"]  # nobody asks for the gradient of the images
    assert cost.macs == macs + n * c * h * w * c
    assert cost.backward_macs == 2 * macs + n * c * h * w * c


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_a_convolution_take_as_much_as_its_output(stride):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 12, 3, stride, 1, groups=2))
    cost = count(network, torch.randn(1, 3, 8, 8), backward=True)
    forward = next(entry.macs for entry in cost.operators if entry.module == "1")
    assert [entry.macs for entry in cost.operators if entry.module == "1"] == [forward, forward, forward, 0]


def test_the_backward_pass_of_linear_maps():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    cost = count(network, torch.randn(5, 6), backward=True)
    found = {(entry.module, entry.role): entry for entry in cost.operators if entry.phase == "backward"}
    assert found["2", "grad-input"].macs == found["2", "grad-weight"].macs == 5 * 8 * 3
    assert found["2", "grad-input"].bytes_read == 4 * (5 * 3 + 8 * 3)
    assert found["2", "grad-bias"].bias_macs == 0.5 * 5 * 3
    assert ("0", "grad-input") not in found
    assert cost.backward_macs == 2 * 5 * 8 * 3 + 5 * 6 * 8
    assert {entry.stage for entry in cost.operators} == {"0", "1", "2"}


def test_saved_bytes_are_what_autograd_keeps():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    # The input of the first map, and the output of the activation, which is the input of the second.
    assert count(network, torch.randn(5, 6), backward=True).saved_bytes == 4 * (5 * 6 + 5 * 8)
    assert count(network, torch.randn(5, 6), backward=True, dtype="bf16").saved_bytes == 2 * (5 * 6 + 5 * 8)
    assert count(network, torch.randn(5, 6)).saved_bytes is None
    network[0].requires_grad_(False)
    assert count(network, torch.randn(5, 6), backward=True).saved_bytes == 4 * 5 * 8


def test_saved_bytes_agree_with_pytorchs_own_hooks_and_with_no_storage(tiny):
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held = {tensor.untyped_storage().data_ptr() for tensor in (*tiny.parameters(), *tiny.buffers())}
    images = torch.randn(2, 3, 16, 16)
    tiny.train()
    found = count(tiny, images, backward=True).saved_bytes
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = tiny(images)
    assert found == sum(size for address, size in storages.items() if address not in held)
    assert output.requires_grad  # the graph, and so every storage, lives until here
    assert count(tiny.to("meta"), images.to("meta"), backward=True).saved_bytes == found


def test_recomputed_activations_are_paid_for_and_not_saved():
    class Recomputing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    network, x = Recomputing(), torch.randn(3, 4)
    kept, plain = count(network, x, backward=True), count(network.inner, x, backward=True)
    assert kept.macs == plain.macs
    assert kept.backward_macs > plain.backward_macs
    assert kept.saved_bytes < plain.saved_bytes


def test_training_leaves_the_network_and_the_random_state_as_they_were(tiny, images):
    tiny = nn.Sequential(tiny, nn.Dropout(0.5)).eval()
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (count(tiny, images, backward=True) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in tiny.state_dict().items())
    assert not any(module.training for module in tiny.modules())
    assert all(parameter.grad is None for parameter in tiny.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())


def test_without_a_gradient_there_is_no_backward_pass():
    with pytest.raises(ValueError, match="no parameter of the network requires a gradient"):
        count(nn.Linear(3, 3).requires_grad_(False), torch.randn(2, 3), backward=True)


@pytest.mark.parametrize("dtype", ["float8", torch.qint8, "complex64", "int4"])
def test_unknown_dtypes_are_named(dtype):
    with pytest.raises(ValueError, match="dtype must be one of float64, float32, float16, bfloat16, int8, not"):
        count(nn.Linear(3, 3), torch.randn(2, 3), dtype=dtype)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_and_sparse_tensors_are_refused():
    with pytest.raises(ValueError, match=r"holds tensors that are torch\.qint8"):
        count(Apply(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize()), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"holds tensors that are torch\.sparse_coo"):
        count(Apply(lambda x: x.to_sparse().to_dense()), torch.randn(2, 3))


def test_a_complex_product_is_four_real_ones():
    assert count(Apply(lambda x: ((x + 1j) @ (x + 1j)).real), torch.randn(3, 3)).macs == 4 * 27


@pytest.mark.untyped
def test_operators_of_other_packages_need_a_formula():
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    @torch.library.custom_op("count_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    twice.register_fake(torch.empty_like)
    network = Apply(lambda x: torch.ops.count_test.twice(x))
    with pytest.raises(ValueError, match=r"MACs of the operator count_test\.twice\.default are unknown; register"):
        count(network, torch.randn(3, 3))
    register_flop_formula(torch.ops.count_test.twice)(lambda shape, **_: 2 * shape[0] ** 3)
    try:
        assert count(network, torch.randn(3, 3)).macs == 27
    finally:
        del flop_registry[torch.ops.count_test.twice]
