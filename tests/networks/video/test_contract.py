"""What every video network promises."""

from __future__ import annotations

import pytest
import torch

import gatewise
from gatewise.catalog.registry import families
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.efficiency.acceleration.fold import fold
from gatewise.networks.video._base import VideoNetwork
from tests.conftest import _moved, declared

SMALL = declared("video", "SMALL")
"""One small network of each family of video networks: a registered name (and "+tag") and overrides."""

SIZES = declared("video", "SIZES")
"""Legal (frames, height, width) to try, where those of most networks are not."""

STRIDES = declared("video", "STRIDES")
"""(Time, space) strides of the pyramid, where they are not those of a halving per stage."""

NORMS = (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)

each_network = pytest.mark.parametrize("name", SMALL)


def small_video_model(name, **overrides):
    """The small network of a family, in eval mode, with every parameter moved away from its initial value."""
    return _moved(gatewise.create_model(name.partition("+")[0], **{**SMALL[name], **overrides}))


def sizes(name):
    return SIZES.get(name, [(16, 64, 64), (16, 48, 80), (19, 75, 50)])


def clips(name, batch=2):
    """Random clips of the first legal size."""
    return torch.randn(batch, small_video_model(name).config.in_chans, *sizes(name)[0])


def test_every_family_is_under_test():
    under_test = {type(small_video_model(small)) for small in SMALL}
    assert {family.network for family in families() if issubclass(family.network, VideoNetwork)} == under_test


@each_network
def test_any_legal_size_gives_logits_and_a_pyramid(name):
    model = small_video_model(name)
    for size in sizes(name):
        x = torch.randn(2, model.config.in_chans, *size)
        assert model(x).shape == (2, 5)
        levels = model.forward_pyramid(x)
        assert len(levels) == len(model.feature_info)
        for level, info in zip(levels, model.feature_info, strict=True):
            assert level.shape[:2] == (2, info.channels)
            strides = (info.time_stride, info.stride, info.stride)
            for length, whole, stride in zip(level.shape[2:], size, strides, strict=True):
                assert whole // stride <= length <= -(-whole // stride)


@each_network
def test_strides_are_stated(name):
    expected = STRIDES.get(name, ((2, 4), (4, 8), (8, 16), (16, 32)))
    assert tuple((info.time_stride, info.stride) for info in small_video_model(name).feature_info) == expected


@each_network
def test_features_are_what_the_head_takes(name):
    model, x = small_video_model(name), clips(name)
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))


@each_network
def test_classifier_can_be_replaced_and_removed(name):
    model, x = small_video_model(name), clips(name)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.config.num_classes == 3
    model.reset_classifier(0)
    assert model(x).shape == (2, model.forward_features(x).shape[1])


@each_network
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels(name, channels):
    x = torch.randn(1, channels, *sizes(name)[0])
    assert small_video_model(name, in_chans=channels)(x).shape == (1, 5)


@each_network
@pytest.mark.untyped
def test_wrong_input_is_told(name):
    model = small_video_model(name)
    channels, (time, height, width) = model.config.in_chans, sizes(name)[0]
    wrong = {
        r"\(batch, channels, time, height, width\), not shape": torch.zeros(1, channels, height, width),
        r"floating-point clips, not torch.uint8": torch.zeros(1, channels, time, height, width, dtype=torch.uint8),
        f"expects {channels} channels, not {channels + 1}": torch.zeros(1, channels + 1, time, height, width),
        "height and width of at least": torch.zeros(1, channels, time, height, 0),
        "expects at least": torch.zeros(1, channels, 0, height, width),
        "at least one sample": torch.zeros(0, channels, time, height, width),
    }
    for message, x in wrong.items():
        with pytest.raises(ValueError, match=message):
            model(x)


@each_network
def test_too_small_or_short_a_clip_names_the_smallest(name):
    model = small_video_model(name)
    channels, frames, side = model.config.in_chans, model.min_frames, model.min_size
    assert model(torch.randn(1, channels, frames, side, side)).shape == (1, 5)
    if side > 1:
        with pytest.raises(ValueError, match=f"at least {side}, not {side - 1} x {side}"):
            model(torch.randn(1, channels, frames, side - 1, side))
    if frames > 1:
        with pytest.raises(ValueError, match=f"at least {frames} frames, not {frames - 1}"):
            model(torch.randn(1, channels, frames - 1, side, side))


@each_network
def test_memory_format_changes_nothing(name):
    model, x = small_video_model(name), clips(name)
    expected = model(x)
    last = model.to(memory_format=torch.channels_last)
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last_3d), x.transpose(3, 4).clone().transpose(3, 4)):
        assert torch.allclose(last(laid_out), expected, rtol=1e-4, atol=1e-5)


@each_network
def test_half_precision_stays_close(name):
    model, x = small_video_model(name), clips(name)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # Eight bits of mantissa through some twenty layers.
    for found in (mixed, half):
        assert (found.float() - expected).abs().max() < 0.15 * expected.abs().max()


def gradients(model, x):
    model.zero_grad()
    torch.manual_seed(3)
    model(x).square().sum().backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


@each_network
def test_gradient_checkpointing_equals_without(name):
    model, x = small_video_model(name, drop_path_rate=0.3).train(), clips(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = gradients(model, x)
    model.load_state_dict(state)
    model.set_grad_checkpointing()
    recomputed = gradients(model, x)
    assert all(torch.equal(recomputed[key], gradient) for key, gradient in expected.items())


@each_network
def test_gradient_checkpointing_keeps_fewer_activations(name):
    model, x = small_video_model(name).train(), clips(name)

    def saved_bytes():
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x).sum()
        return total

    without = saved_bytes()
    model.set_grad_checkpointing()
    assert saved_bytes() < 0.8 * without


@each_network
def test_every_parameter_gets_a_gradient(name):
    found = gradients(small_video_model(name).train(), clips(name, 4))
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@each_network
def test_stochastic_depth_and_dropout_act_in_training_alone(name):
    model, x = small_video_model(name, drop_path_rate=0.5, drop_rate=0.5), clips(name)
    assert torch.equal(model(x), model(x))
    model.train()
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()
    assert not torch.equal(model(x), model(x))


@each_network
def test_folding_changes_nothing_but_the_modules(name):
    model, x = small_video_model(name), clips(name)
    folded = fold(model)
    assert torch.allclose(folded(x), model(x), rtol=1e-4, atol=1e-4 * model(x).abs().max().item())
    assert not any(isinstance(module, NORMS) for module in folded.modules())


@each_network
def test_frozen_modules_stay_frozen_in_training(name):
    model = small_video_model(name)
    first, *_, last = (child for child in model.children() if any(True for _ in child.parameters()))
    model.freeze([first])
    model.train()
    assert not first.training
    assert last.training
    assert all(not parameter.requires_grad for parameter in first.parameters())


@each_network
def test_it_knows_its_name(name):
    assert small_video_model(name).variant == name.partition("+")[0]


@each_network
@pytest.mark.untyped
def test_compiles_without_a_graph_break(name):
    model, x = small_video_model(name), clips(name).requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    gradient = torch.autograd.grad(compiled(x).square().sum(), x)[0]
    # A rounding error that turns a ReLU over changes the gradient of a patch, not of the clip.
    assert (gradient - expected).norm() < 2e-2 * expected.norm()


@each_network
@pytest.mark.untyped
def test_training_and_the_pyramid_compile_without_a_graph_break(name):
    model, x = small_video_model(name, drop_path_rate=0.2).train(), clips(name)
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    compiled = torch.compile(model.forward_pyramid, fullgraph=True, backend="aot_eager")
    for level, expected in zip(compiled(x), model.forward_pyramid(x), strict=True):
        assert torch.allclose(level, expected, rtol=1e-4, atol=1e-4)


@each_network
@pytest.mark.untyped
def test_exports_with_a_dynamic_batch(name):
    model, x = small_video_model(name), clips(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for other in (x, clips(name, 5)):
        assert torch.allclose(program.module()(other), model(other), rtol=1e-4, atol=1e-5)


@each_network
@pytest.mark.untyped
def test_onnx_runs_equal_for_any_batch(name, tmp_path):
    report = export_onnx(small_video_model(name), tmp_path / "network.onnx", clips(name))
    assert report.dynamic_batch
    assert report.error < 1e-4
