"""EvoNorm's operators: values and gradients of the CPU path, precision, what compilers get, and errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops import evonorm as module
from gatewise.ops.evonorm import cpu, evonorm_b, evonorm_b_reference, evonorm_s, evonorm_s_reference, small

SERIES_S = {
    "S0": {"gated": True, "centered": True},
    "S1": {"gated": True, "centered": True},
    "S2": {"gated": True, "centered": False},
    "S0a off": {"gated": False, "centered": True},
    "S2a off": {"gated": False, "centered": False},
}
SERIES_B = {
    "B0": {"member": "B0"},
    "B1": {"member": "B1", "centered": False},
    "B1 centered": {"member": "B1"},
    "B2": {"member": "B2", "centered": False},
    "B2 centered": {"member": "B2"},
}
LAYERS = [*SERIES_S, *SERIES_B, *(f"{name}, running" for name in SERIES_B)]


def functions(layer: str, channels: int, groups: int = 1):
    """Operator and definition as functions of x, weight, bias and, where the layer has it, v."""
    if layer in SERIES_S:
        fields = SERIES_S[layer] | {"groups": groups}
        return partial(evonorm_s, **fields), partial(evonorm_s_reference, **fields)
    name, _, running = layer.partition(", ")

    def call(function, x, weight, bias, v=None):
        dtype = torch.promote_types(x.dtype, torch.float32)
        given = torch.linspace(0.5, 2, channels, dtype=dtype) if running else None
        return function(x, weight, bias, v, given, **SERIES_B[name])[0]

    return partial(call, evonorm_b), partial(call, evonorm_b_reference)


def make(layer: str, shape=(2, 4, 3, 5), dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    names = 4 if layer.startswith(("S0", "B0")) and "off" not in layer else 3
    shapes = [shape, *[shape[1:2]] * (names - 1)]
    tensors = [torch.randn(one, generator=draw, dtype=torch.float64) for one in shapes]
    tensors[0] += 0.5
    return [tensor.to(dtype) for tensor in tensors]


def results(function, tensors):
    """Output and gradients for x and all parameters."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * cotangent).sum(), leaves)]


def assert_close(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * (1 + theirs.abs().max())


@settings(max_examples=60, deadline=None)
@given(
    layer=st.sampled_from(LAYERS),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 3),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels_last=st.booleans(),
    block=st.sampled_from([1, 20, 1 << 18]),
)
def test_values_and_gradients_equal_the_definition(layer, batch, groups, width, size, channels_last, block):
    tensors = make(layer, (batch, groups * width, *size))
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    ours, theirs = functions(layer, groups * width, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_BLOCK", block)
        found = results(ours, tensors)
    # A group of one value has a deviation of sqrt(eps), and the root amplifies what float64 rounds by 300.
    assert_close(found, results(theirs, tensors), 1e-9)


@pytest.mark.parametrize("largest", [0, 1 << 20], ids=["in blocks", "at once"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_inference_equals_the_definition_and_leaves_its_input_alone(layer, channels_last, largest, monkeypatch):
    monkeypatch.setattr(small, "LARGEST", largest)
    tensors = make(layer, (2, 6, 7, 5))
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    kept = tensors[0].clone()
    ours, theirs = functions(layer, 6, 3)
    with torch.no_grad():
        assert_close([ours(*tensors)], [theirs(*tensors)], 1e-11)
        half = ours(*(tensor.to(torch.bfloat16) for tensor in tensors))
    assert half.dtype == torch.bfloat16
    assert torch.equal(tensors[0], kept)


@pytest.mark.parametrize("layer", LAYERS)
def test_non_contiguous_inputs(layer):
    tensors = make(layer, (2, 4, 6, 5))
    tensors[0] = tensors[0].transpose(2, 3)[:, :, ::2]
    ours, theirs = functions(layer, 4, 2)
    assert_close(results(ours, tensors), results(theirs, tensors), 1e-11)


@pytest.mark.parametrize("layer", LAYERS)
def test_first_and_second_derivatives_are_right(layer):
    tensors = [tensor.requires_grad_() for tensor in make(layer, (2, 2, 2, 3))]
    function = functions(layer, 2, 1)[0]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("layer", ["S0", "B0"])
@pytest.mark.parametrize("frozen", range(4))
def test_only_wanted_gradients_are_given(layer, frozen):
    tensors = [tensor.requires_grad_(i != frozen) for i, tensor in enumerate(make(layer))]
    functions(layer, 4, 2)[0](*tensors).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [i != frozen for i in range(4)]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(layer, dtype):
    tensors = [tensor.to(dtype) for tensor in make(layer, (2, 4, 7, 5))]
    function = functions(layer, 4, 2)[0]
    half, wide = results(function, tensors), results(function, [tensor.float() for tensor in tensors])
    for ours, theirs in zip(half, wide, strict=True):
        assert ours.dtype == dtype
        # Eight bits of mantissa, and the cotangent is rounded too.
        assert (ours.float() - theirs).abs().max() < 2e-2 * theirs.abs().max()


@pytest.mark.parametrize("layer", ["S0", "S2", "B0", "B1"])
def test_statistics_of_float16_do_not_overflow(layer):
    x, *rest = make(layer, (2, 4, 8, 8), torch.float32)
    large = (300 * x).half()
    y = functions(layer, 4, 2)[0](large, *[tensor.half() for tensor in rest])
    assert y.dtype == torch.float16
    assert torch.isfinite(y).all()
    assert (large.float().square() > torch.finfo(torch.float16).max).any()


@pytest.mark.parametrize("layer", ["S0", "B0"])
def test_variances_survive_a_large_mean(layer):
    x, *rest = make(layer, (2, 4, 16, 16), torch.float32)
    ours, theirs = functions(layer, 4, 2)
    far = x + 1000
    expected = theirs(far.double(), *[tensor.double() for tensor in rest])
    # x itself has lost ten bits there, no more may go.
    assert (ours(far, *rest) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_s1_is_s0_with_v_of_one_and_s2_is_s1_for_groups_of_zero_mean():
    x, weight, bias = make("S1", (2, 4, 3, 5))
    s1 = evonorm_s(x, weight, bias, groups=2)
    torch.testing.assert_close(evonorm_s(x, weight, bias, torch.ones_like(bias), groups=2), s1)
    grouped = x.unflatten(1, (2, 2))
    centered = (grouped - grouped.mean(dim=(2, 3, 4), keepdim=True)).flatten(1, 2)
    options = {"groups": 2, "centered": False}
    torch.testing.assert_close(
        evonorm_s(centered, weight, bias, **options), evonorm_s(centered, weight, bias, groups=2)
    )


def test_b0_with_the_variance_of_its_batch_is_b0_in_training():
    x, weight, bias, v = make("B0")
    y, variance = evonorm_b(x, weight, bias, v, member="B0")
    torch.testing.assert_close(variance, x.var(dim=(0, 2, 3), correction=0))
    again, same = evonorm_b(x, weight, bias, v, variance, member="B0")
    torch.testing.assert_close(again, y)
    assert torch.equal(same, variance)


def test_s_series_does_not_see_the_rest_of_the_batch():
    x, *rest = make("S0", (3, 4, 5, 5), torch.float32)
    other = torch.cat([x[:1], 100 * x[1:]])
    first, second = (evonorm_s(one, *rest, groups=2) for one in (x, other))
    assert torch.equal(first[0], second[0])
    first, second = (evonorm_b(one, *rest, member="B0")[0] for one in (x, other))
    assert not torch.allclose(first[0], second[0], rtol=0.1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(memory_format):
    x, *rest = make("S0", (2, 4, 5, 3))
    y = evonorm_s(x.contiguous(memory_format=memory_format), *rest, groups=2)
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layer", ["S0", "B0"])
def test_the_map_alone_is_kept_for_the_backward_pass(layer):
    tensors = [tensor.requires_grad_() for tensor in make(layer, (2, 4, 16, 16))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        functions(layer, 4, 2)[0](*tensors)
    assert [tensor.numel() for tensor in kept if tensor.numel() >= 100] == [tensors[0].numel()]


@pytest.mark.untyped
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_operators_keep_the_rules_of_torch_library(memory_format):
    x, *rest = (tensor.requires_grad_() for tensor in make("S0"))
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    weight, bias, v = rest
    ops, running = torch.ops.gatewise, torch.ones(4, dtype=torch.float64)
    torch.library.opcheck(ops.evonorm_s.default, (x, weight, bias, v, 2, 1e-5, True, True))
    torch.library.opcheck(ops.evonorm_s.default, (x, weight, bias, None, 2, 1e-5, False, False))
    for fixed in (None, running):
        torch.library.opcheck(ops.evonorm_b.default, (x, weight, bias, v, fixed, "B0", 1e-5, True))
        torch.library.opcheck(ops.evonorm_b.default, (x, weight, bias, None, fixed, "B1", 1e-5, False))
    x, weight, v = (tensor.detach() for tensor in (x, weight, v))
    table = torch.ones(2, 2, dtype=torch.float64)
    torch.library.opcheck(ops.evonorm_s_backward.default, (x, x, weight, v, table, table, True))
    table = torch.ones(2, 4, dtype=torch.float64)
    arguments = (x, x, weight, v, table, table, running, running, "B0", 1e-5, True, True)
    torch.library.opcheck(ops.evonorm_b_backward.default, arguments)


@pytest.mark.untyped
@pytest.mark.parametrize("layer", ["S0", "S2", "B0", "B1, running"])
def test_it_compiles_whole(layer):
    tensors = make(layer, dtype=torch.float32)
    function = functions(layer, 4, 2)[0]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, tensors), results(function, tensors), 1e-5)


def test_kernels_are_chosen_for_cuda_alone():
    from torch._subclasses.fake_tensor import FakeTensorMode

    pytest.importorskip("triton")
    with FakeTensorMode(allow_non_fake_inputs=True):
        chosen = [
            (device, dtype)
            for device in ("cpu", "cuda")
            for dtype in (torch.float32, torch.bfloat16, torch.float64)
            if module.suits_triton(torch.empty(2, 4, 8, 8, device=device, dtype=dtype))
        ]
    assert chosen == [("cuda", torch.float32), ("cuda", torch.bfloat16)]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, p: evonorm_s(x[0], p, p, groups=2), r"\(batch, channels, height, width\), not \(4, 3, 3\)"),
        (lambda x, p: evonorm_s(x, p[:3], p, groups=2), r"weight must have one entry for each of the 4 .* not \(3,\)"),
        (lambda x, p: evonorm_s(x, p, p, p[:2], groups=2), r"v must have one entry"),
        (lambda x, p: evonorm_s(x, p, p, groups=3), "groups must divide the 4 channels, not be 3"),
        (lambda x, p: evonorm_s(x, p, p, p, groups=2, gated=False), "leave it out"),
        (lambda x, p: evonorm_b(x, p, p, member="B3"), "member must be one of B0, B1, B2, not 'B3'"),
        (lambda x, p: evonorm_b(x, p, p, member="B0"), "B0 came without it"),
        (lambda x, p: evonorm_b(x, p, p, p, member="B2"), "B2 came with it"),
        (lambda x, p: evonorm_b(x, p, p, p, member="B0", centered=False), "centered=False is for B1 and B2"),
        (lambda x, p: evonorm_b(x, p, p, None, p[:3], member="B1"), "running_var must have one entry"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 4, 3, 3), torch.ones(4))
