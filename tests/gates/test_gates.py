"""Reading and drawing gates."""

from __future__ import annotations

import pytest
import torch

from gatewise.errors import UserError
from gatewise.gates import capture, draw
from tests.conftest import small_model


def test_every_gated_module_is_read_in_order_and_the_network_stays_as_it_was():
    model = small_model("focalnet_tiny_srf").train()
    images = torch.randn(2, 3, 64, 64)
    readings = capture(model, images)
    assert [reading.path for reading in readings] == [
        f"stages.{stage}.blocks.{block}.modulation"
        for stage, depth in enumerate((1, 1, 2, 1))
        for block in range(depth)
    ]
    assert readings[0].maps["level 0"].shape == (2, 16, 16)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_readings_are_of_the_input_that_the_module_saw():
    model = small_model("focalnet_tiny_srf")
    images = torch.randn(1, 3, 64, 64)
    first = model.stages[0].blocks[0]
    expected = first.modulation.read_gates(first.norm1(model.stem(images)))
    assert torch.allclose(capture(model, images)[0].maps["global"], expected["global"])


def test_hooks_are_removed_when_the_network_fails():
    model = small_model("focalnet_tiny_srf")
    with pytest.raises(ValueError, match="channels"):
        capture(model, torch.zeros(1, 1, 64, 64))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_network_without_gates_is_a_users_mistake():
    with pytest.raises(UserError, match="MobileNetV2 has no gates to read"):
        capture(small_model("mobilenetv2_035"), torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_has_a_row_per_module_and_a_column_per_gate(tmp_path, channels):
    model = small_model("focalnet_tiny_srf", in_chans=channels)
    images = torch.rand(2, channels, 64, 64)
    figure = draw(images[1], capture(model, images), index=1)
    assert len(figure.axes) == 5 * (1 + 4)
    figure.savefig(tmp_path / "gates.png")
    assert (tmp_path / "gates.png").stat().st_size > 5000
