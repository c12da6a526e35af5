"""What every image network promises."""

from __future__ import annotations

import pytest
import torch

from gatewise.efficiency.acceleration.fold import fold
from tests.conftest import SMALL, declared, small_model

SIZES = declared("image", "SIZES")
"""Legal sizes to try, where those of most networks are not."""

STRIDES = declared("image", "STRIDES")
"""Strides of the pyramid, where they are not 4, 8, 16 and 32."""

UNPADDED = declared("image", "UNPADDED")
"""Networks with convolutions without padding."""

pytestmark = pytest.mark.parametrize("name", SMALL)


def sizes(name):
    return SIZES.get(name, [(64, 64), (64, 96), (75, 50), (33, 161)])


def images(name, batch=2):
    """Random images of the first legal size."""
    return torch.randn(batch, 3, *sizes(name)[0])


def test_any_legal_size_gives_logits_and_a_pyramid(name):
    model = small_model(name)
    for size in sizes(name):
        x = torch.randn(2, 3, *size)
        assert model(x).shape == (2, 5)
        levels = model.forward_pyramid(x)
        assert len(levels) == len(model.feature_info)
        for level, info in zip(levels, model.feature_info, strict=True):
            assert level.shape[:2] == (2, info.channels)
            for length, pixels in zip(level.shape[2:], size, strict=True):
                # Convolutions without padding lose a border on the way.
                lost = 4 if name in UNPADDED else 0
                assert pixels // info.stride - lost <= length <= -(-pixels // info.stride)


def test_strides_are_those_of_detectors(name):
    expected = STRIDES.get(name, (4, 8, 16, 32))
    assert tuple(info.stride for info in small_model(name).feature_info) == expected


def test_features_are_what_the_head_takes(name):
    model, x = small_model(name), images(name)
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))


def test_classifier_can_be_replaced_and_removed(name):
    model, x = small_model(name), images(name)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.config.num_classes == 3
    model.reset_classifier(0)
    assert model(x).shape == (2, model.forward_features(x).shape[1])


def test_other_channels(name):
    assert small_model(name, in_chans=1)(images(name, 1)[:, :1]).shape == (1, 5)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 64, 64), r"\(batch, channels, height, width\), not shape \(3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating-point images, not torch.uint8"),
        (torch.zeros(1, 4, 64, 64), "expects 3 channels, not 4"),
        (torch.zeros(1, 3, 64, 0), "height and width of at least"),
        (torch.zeros(0, 3, 64, 64), r"at least one sample, not a batch of shape \(0, 3, 64, 64\)"),
    ],
)
def test_wrong_input_is_told(name, x, message):
    with pytest.raises(ValueError, match=message):
        small_model(name)(x)


def test_too_small_an_image_names_the_smallest(name):
    model = small_model(name)
    smallest = model.min_size
    # Where the number of positions is fixed, another side goes with the smallest than itself.
    legal = next((size for size in SIZES.get(name, ()) if size[0] == smallest), (smallest, smallest))
    model(torch.randn(1, 3, *legal))
    if smallest > 1:
        with pytest.raises(ValueError, match=f"at least {smallest}, not {smallest - 1} x {smallest}"):
            model(torch.randn(1, 3, smallest - 1, smallest))


def test_channels_last_gives_the_same(name):
    model, x = small_model(name), images(name)
    expected = model(x)
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(last, expected, rtol=1e-4, atol=1e-5)


def test_bf16_stays_close(name):
    model, x = small_model(name), images(name)
    expected = model(x)
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # Eight bits of mantissa through some twenty layers.
    assert (half.float() - expected).abs().max() < 0.15 * expected.abs().max()


def test_autocast_stays_close(name):
    model, x = small_model(name), images(name)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert (half.float() - model(x)).abs().max() < 0.15 * model(x).abs().max()


def gradients(model, x):
    model.zero_grad()
    torch.manual_seed(3)
    model(x).square().sum().backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


def test_gradient_checkpointing_equals_without(name):
    model, x = small_model(name, drop_path_rate=0.3).train(), images(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = gradients(model, x)
    model.load_state_dict(state)
    model.set_grad_checkpointing()
    recomputed = gradients(model, x)
    assert all(torch.equal(recomputed[key], gradient) for key, gradient in expected.items())


def test_gradient_checkpointing_keeps_fewer_activations(name):
    model, x = small_model(name).train(), images(name)

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


def test_every_parameter_gets_a_gradient(name):
    found = gradients(small_model(name).train(), images(name, 4))
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_stochastic_depth_and_dropout_act_in_training_alone(name):
    model, x = small_model(name, drop_path_rate=0.5).eval(), images(name)
    assert torch.equal(model(x), model(x))
    has_drop_path = any(getattr(module, "rate", 0) > 0 for module in model.modules())
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    assert torch.equal(model(x), model(x)) != (has_drop_path or model.config.drop_rate > 0)


def test_folding_changes_nothing_but_the_modules(name):
    model, x = small_model(name), images(name)
    folded = fold(model)
    assert torch.allclose(folded(x), model(x), rtol=1e-4, atol=1e-4 * model(x).abs().max().item())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert not any(getattr(module, "scale", None) is not None for module in folded.modules())


def test_frozen_modules_stay_frozen_in_training(name):
    model = small_model(name)
    first, *_, last = (child for child in model.children() if any(True for _ in child.parameters()))
    model.freeze([first])
    model.train()
    assert not first.training
    assert last.training
    assert all(not parameter.requires_grad for parameter in first.parameters())


def test_it_knows_its_name(name):
    assert small_model(name).variant == name.partition("+")[0]
