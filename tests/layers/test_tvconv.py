"""TVConv: where its kernels come from, when they are kept, and what is made of them."""

from __future__ import annotations

import copy
import io
import pickle

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gatewise.efficiency.cost.count import count
from gatewise.layers.tvconv import (
    FixedTVConv,
    TVConv,
    TVConvInvertedResidual,
    TVConvNormAct,
    TVConvOptions,
    resize_maps,
)
from gatewise.ops.translation_variant_conv import translation_variant_conv_reference

TINY = TVConvOptions(affinity_channels=2, hidden=4, hidden_layers=1)


def moved(module: nn.Module) -> nn.Module:
    """In eval mode, with every parameter off its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def layer(map_size=(5, 4), stride=1, channels=3, **fields) -> TVConv:
    options = TVConvOptions(**{"affinity_channels": 2, "hidden": 4, "hidden_layers": 1, **fields})
    return moved(TVConv(channels, map_size, stride, options))


def count_calls(module: nn.Module) -> list[int]:
    """A list that gets an entry whenever the module is called."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def by_the_equations(layer: TVConv, x: torch.Tensor) -> torch.Tensor:
    """The definition, without the layer's code."""

    def generate(generator):
        maps = layer.affinity
        for block in generator.blocks:
            maps = F.conv2d(maps, block.conv.weight, padding=1)
            if layer.options.norm:
                maps = (maps - maps.mean()) / (maps.var(unbiased=False) + 1e-5).sqrt()
                maps = maps * block.norm.weight + block.norm.bias
            maps = maps.clamp(min=0)
        return F.conv2d(maps, generator.project.weight, padding=1)[0]

    kernel = layer.options.kernel_size
    weight = generate(layer.generator).reshape(layer.channels, kernel, kernel, *layer.map_size)
    bias = None if layer.bias_generator is None else generate(layer.bias_generator)
    return translation_variant_conv_reference(x, weight, bias, stride=layer.stride)


@pytest.mark.parametrize(
    ("stride", "fields"),
    [
        (1, {}),
        (2, {"bias": True}),
        (1, {"kernel_size": 5, "hidden_layers": 0}),
        (2, {"kernel_size": 1, "hidden_layers": 2}),
        (1, {"norm": False, "affinity_channels": 1}),
    ],
)
def test_it_follows_the_equations(stride, fields):
    module = layer(stride=stride, **fields).double()
    x = torch.randn(2, 3, 5 * stride, 4 * stride, dtype=torch.float64)
    expected = by_the_equations(module, x)
    assert torch.allclose(module(x), expected, atol=1e-12)
    assert torch.allclose(module.train()(x), expected, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(module.eval()(x), expected, atol=1e-12)


def test_gradients_of_all_parameters_are_right():
    module = layer((3, 2), bias=True).double()
    names, parameters = zip(*module.named_parameters(), strict=True)
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *(p.detach().requires_grad_() for p in parameters)))


def test_affinity_starts_as_ones_and_only_the_border_tells_places_apart():
    torch.manual_seed(0)
    module = TVConv(2, (11, 11), options=TINY)
    assert torch.equal(module.affinity, torch.ones(1, 2, 11, 11))
    weight, bias = module.kernels()
    assert bias is None
    middle = weight[..., 3:-3, 3:-3]
    assert torch.allclose(middle, middle[..., :1, :1].expand_as(middle), atol=1e-6)
    assert not torch.allclose(weight[..., 0, 0], weight[..., 5, 5], atol=1e-3)


def test_the_published_defaults():
    module = TVConv(8, (12, 12))
    assert module.affinity.shape == (1, 4, 12, 12)
    assert [block.conv.weight.shape[0] for block in module.generator.blocks] == [64] * 4
    assert module.generator.project.weight.shape == (72, 64, 3, 3)
    assert module.bias_generator is None


def test_kernels_are_made_once_in_eval_mode():
    module, x = layer(), torch.randn(2, 3, 5, 4)
    calls = count_calls(module.generator)
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(module(x), expected)
        assert torch.equal(module(x[:1]), expected[:1])
    assert len(calls) == 1
    assert module.is_cached


def test_kernels_are_made_in_every_call_where_they_are_trained():
    module, x = layer(), torch.randn(2, 3, 5, 4)
    calls = count_calls(module.generator)
    module(x).sum().backward()
    module(x)
    assert len(calls) == 2
    assert module.affinity.grad.abs().sum() > 0
    with torch.no_grad():
        module.train()(x)
    assert len(calls) == 3
    assert not module.is_cached


def test_frozen_kernels_are_kept_while_the_input_is_differentiated():
    module = layer().requires_grad_(False)
    calls = count_calls(module.generator)
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    (first,) = torch.autograd.grad(module(x).square().sum(), x)
    (second,) = torch.autograd.grad(module(x).square().sum(), x)
    assert len(calls) == 1
    assert torch.equal(first, second)


def write_in_place(module):
    with torch.no_grad():
        module.affinity.mul_(2)


def step(module):
    module.train()
    module(torch.randn(2, 3, 5, 4)).square().sum().backward()
    torch.optim.AdamW(module.parameters(), lr=0.1).step()
    module.eval()


def step_without_changing_mode(module):
    module(torch.randn(2, 3, 5, 4)).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, foreach=True).step()


def load(module):
    module.load_state_dict({key: tensor + 1 for key, tensor in module.state_dict().items()})


def load_by_assignment(module):
    module.load_state_dict({key: tensor + 1 for key, tensor in module.state_dict().items()}, assign=True)


def replace_a_parameter(module):
    module.affinity = nn.Parameter(module.affinity.detach() * 3)


def replace_data(module):
    module.affinity.data = module.affinity.data * 3


def replace_the_generator(module):
    module.generator = copy.deepcopy(module.generator)
    nn.init.ones_(module.generator.project.weight)


CHANGES = [
    write_in_place,
    step,
    step_without_changing_mode,
    load,
    load_by_assignment,
    replace_a_parameter,
    replace_data,
    replace_the_generator,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_parameters_give_fresh_kernels(change):
    module, x = layer(bias=True), torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        before = module(x)
    assert module.is_cached
    change(module)
    assert not module.is_cached
    with torch.no_grad():
        after = module(x)
        assert not torch.allclose(after, before)
        assert torch.allclose(after, by_the_equations(module, x), atol=1e-5)


def test_moving_to_another_dtype_gives_fresh_kernels_of_that_dtype():
    module, x = layer(), torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        expected = module(x)
        module.double()
        assert not module.is_cached
        assert torch.allclose(module(x.double()).float(), expected, atol=1e-5)
        half = module.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 3e-2 * expected.abs().max()


def test_autocast_keeps_kernels_of_its_own_dtype():
    module, x = layer(), torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        expected = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = module(x)
        assert half.dtype == torch.bfloat16
        assert torch.equal(module(x), expected)
    assert (half.float() - expected).abs().max() < 3e-2 * expected.abs().max()


def test_half_precision_generators_compute_in_float32():
    """The mean over a map of 90,000 values near 300 is beyond float16, their sum of squares more so."""
    module = moved(TVConv(1, (300, 300), options=TVConvOptions(1, 1, 1, 0))).half()
    with torch.no_grad():
        module.affinity.mul_(300)
        assert module(torch.randn(1, 1, 300, 300).half()).isfinite().all()


def test_kernels_made_in_inference_mode_serve_outside_of_it():
    module = layer().requires_grad_(False)
    with torch.inference_mode():
        module(torch.randn(2, 3, 5, 4))
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    calls = count_calls(module.generator)
    module(x).sum().backward()
    assert x.grad is not None
    assert not calls


def test_parameters_made_in_inference_mode_have_no_versions_and_keep_nothing():
    with torch.inference_mode():
        module = layer()
        module(torch.randn(2, 3, 5, 4))
        assert not module.is_cached


def test_other_parameters_for_one_call_leave_the_kernels_alone():
    module, x = layer(), torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        expected = module(x)
        doubled = {key: 2 * tensor for key, tensor in module.state_dict().items()}
        other = torch.func.functional_call(module, doubled, (x,))
        assert not torch.allclose(other, expected)
        assert torch.equal(module(x), expected)


def test_kernels_are_no_part_of_state_copies_or_pickles():
    module, x = layer(), torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        expected = module(x)
        assert not any("kept" in key for key in module.state_dict())
        assert set(module.state_dict()) == {key for key, _ in module.named_parameters()}
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert not other.is_cached
            assert torch.equal(other(x), expected)
            other.affinity.zero_()
            assert not torch.allclose(other(x), expected)
        assert module.is_cached
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
    assert file.tell() < 4 * sum(p.numel() for p in module.parameters()) + 10_000


def test_kernels_can_be_made_ahead_and_forgotten():
    module = layer()
    calls = count_calls(module.generator)
    module.cache()
    with torch.no_grad():
        module(torch.randn(2, 3, 5, 4))
        assert len(calls) == 1
        module.uncache()
        module(torch.randn(2, 3, 5, 4))
    assert len(calls) == 2
    with pytest.raises(ValueError, match=r"in eval mode: call \.eval\(\) first"):
        module.train().cache()


@pytest.mark.parametrize(("stride", "fields"), [(1, {}), (2, {"bias": True}), (2, {"kernel_size": 5})])
def test_the_fixed_form_is_equal_and_as_cheap_as_a_depthwise_convolution(stride, fields):
    module = layer(stride=stride, **fields)
    x = torch.randn(2, 3, 5 * stride, 4 * stride)
    expected = module(x).detach()
    fixed = module.merged()
    assert isinstance(fixed, FixedTVConv)
    assert not list(fixed.parameters())
    assert (fixed(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    depthwise = nn.Conv2d(3, 3, module.options.kernel_size, stride, module.options.kernel_size // 2, groups=3)
    assert count(fixed, x).macs == count(depthwise, x).macs
    last = fixed.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(last, expected, atol=1e-5)
    saved = FixedTVConv(torch.zeros_like(fixed.weight[0]), fixed.bias, stride)
    saved.load_state_dict(fixed.state_dict())
    assert torch.equal(saved(x), fixed(x))


def test_merging_takes_the_batch_norm_along():
    unit = moved(TVConvNormAct(3, (5, 4), 2, TINY, act=nn.ReLU))
    unit.norm.running_mean.normal_()
    unit.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 10, 8)
    merged = unit.merged()
    assert isinstance(merged.norm, nn.Identity)
    assert torch.allclose(merged(x), unit(x), atol=1e-5)
    assert merged.merged() is merged
    assert isinstance(unit.conv, TVConv)


def test_an_inverted_residual_keeps_its_shortcut():
    block = moved(TVConvInvertedResidual(4, 4, 1, 6, (5, 4), TINY))
    assert block.spatial.conv.channels == 24
    nn.init.zeros_(block.project.norm.weight)
    nn.init.zeros_(block.project.norm.bias)
    x = torch.randn(2, 4, 5, 4)
    assert torch.equal(block(x), x)


def test_other_map_sizes_come_by_interpolation():
    module = layer(bias=True)
    wide = module.resized((10, 8))
    assert wide.affinity.shape == (1, 2, 10, 8)
    assert torch.equal(wide.generator.project.weight, module.generator.project.weight)
    assert wide(torch.randn(1, 3, 10, 8)).shape == (1, 3, 10, 8)
    constant = {key: torch.full_like(tensor, 2.0) for key, tensor in module.state_dict().items()}
    module.load_state_dict(constant)
    assert all(torch.allclose(tensor, torch.tensor(2.0)) for tensor in module.resized((3, 9)).state_dict().values())
    fixed = module.merged()
    assert fixed.resized((10, 8)).weight.shape == (1, 3, 3, 3, 10, 8)
    same = fixed.resized((5, 4))
    assert torch.allclose(same.weight, fixed.weight)


def test_interpolation_touches_maps_alone():
    weight = torch.randn(4, 4, 3, 3)
    assert resize_maps("spatial.conv.generator.blocks.0.conv.weight", weight, (8, 8)) is weight
    assert resize_maps("blocks.0.norm.bias", torch.randn(4, 5, 4), (8, 8)).shape == (4, 8, 8)
    assert resize_maps("affinity", torch.randn(1, 2, 5, 4), (3, 3)).shape == (1, 2, 3, 3)


@pytest.mark.untyped
@pytest.mark.parametrize("fixed", [False, True])
def test_it_compiles_and_exports_and_keeps_nothing_of_that(fixed):
    module, x = layer(stride=2, bias=True), torch.randn(2, 3, 10, 8)
    expected = module(x).detach()
    tested = module.merged() if fixed else module
    torch._dynamo.reset()
    compiled = torch.compile(tested, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        if not fixed:
            assert not module.is_cached
            module.affinity.mul_(2)
            assert torch.allclose(compiled(x), by_the_equations(module, x), atol=1e-5)
            module.affinity.div_(2)
        program = torch.export.export(tested, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert torch.allclose(program.module()(x[:1].repeat(3, 1, 1, 1)), expected[:1].repeat(3, 1, 1, 1), atol=1e-5)
        assert fixed or not module.is_cached


@pytest.mark.untyped
@pytest.mark.parametrize("fixed", [False, True])
def test_onnx_agrees_with_and_without_the_generator(fixed):
    module, x = layer(stride=2, bias=True), torch.randn(2, 3, 10, 7)
    tested = module.merged() if fixed else module
    file = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(
            tested, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
        ).save(file)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        more = torch.randn(3, 3, 10, 7)
        (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
        assert torch.allclose(torch.from_numpy(found), module(more), atol=1e-5)


@pytest.mark.untyped
def test_kept_kernels_are_not_baked_into_programs():
    module, x = layer(), torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        module(x)
        program = torch.export.export(module, (x,))
    assert len(program.constants) == 0
    assert len(program.state_dict) == len(list(module.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (5, 4)), "must be positive, not 0"),
        ((3, (0, 4)), r"not 3 and \(0, 4\)"),
        ((3, (5, 4), 3), "stride of a TVConv must be 1 or 2, not 3"),
    ],
)
def test_impossible_layers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TVConv(*arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel_size": 4}, "odd and positive, not 4"),
        ({"hidden": 0}, "positive, not 4 and 0"),
        ({"affinity_channels": 0}, "positive, not 0 and 64"),
        ({"hidden_layers": -1}, "0 or more, not -1"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TVConvOptions(**fields)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("stride", "shape", "message"),
    [
        (1, (2, 3, 6, 4), "TVConv built for 5x4 output, got 6x4"),
        (2, (2, 3, 10, 10), "TVConv built for 5x4 output, got 5x5"),
        (1, (3, 5, 4), r"maps \(batch, channels, height, width\), not \(3, 5, 4\)"),
        (1, (2, 4, 5, 4), "the 4 channels of the maps"),
    ],
)
def test_maps_of_another_size_are_refused(stride, shape, message):
    module = layer(stride=stride)
    for tested in (module, module.merged()):
        with pytest.raises(ValueError, match=message):
            tested(torch.zeros(shape))


def test_with_stride_two_both_sizes_that_give_the_map_are_taken():
    module = layer(stride=2)
    assert module(torch.randn(1, 3, 9, 7)).shape == module(torch.randn(1, 3, 10, 8)).shape == (1, 3, 5, 4)
