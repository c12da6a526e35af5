"""Quantization-aware training. The worked example is in tests/fingerprints/quantization."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

from gatewise.layers import quantization_aware as parts
from gatewise.methods import find_method
from gatewise.methods.quantization_aware import float_network, prepare_qat
from gatewise.ops.quantize import fake_quantize, signal_to_noise, weight_grid
from tests.conftest import small_model
from tests.methods.quantization import Small, images, prepared, ranges, train

EXAMPLE = json.loads((Path(__file__).parents[1] / "fingerprints/quantization/bn-fold-qat.json").read_text())


# The worked example


def example_norm():
    given = EXAMPLE["inputs"]
    norm = nn.BatchNorm2d(3, eps=EXAMPLE["config"]["eps"]).double()
    for own, name in (
        (norm.weight, "gamma"),
        (norm.bias, "beta"),
        (norm.running_mean, "running_mean"),
        (norm.running_var, "running_var"),
    ):
        own.data.copy_(torch.tensor(given[name], dtype=torch.float64))
    weight = torch.tensor(given["W"], dtype=torch.float64)[:, :, None, None]
    return norm, weight, torch.tensor(given["x"], dtype=torch.float64)


def expect(actual, name):
    expected = torch.tensor(EXAMPLE["outputs"][name], dtype=torch.float64)
    torch.testing.assert_close(actual.detach().reshape(expected.shape), expected, rtol=0, atol=1e-9)


def test_the_worked_example_of_batch_norm_on_quantized_weights():
    norm, weight, x = example_norm()

    def apply(w):
        return F.conv2d(x, w)

    folded = parts.folded_weight(weight, norm)
    expect(folded, "folded_weight")
    rounded = fake_quantize(folded, weight_grid(folded, EXAMPLE["config"]["weight_bits"]))
    expect(rounded, "folded_weight_quantized")
    before, seen = parts.norm_with_batch_statistics(apply, weight, None, norm, rounded)
    expect(seen.mean, "batch_mean")
    expect(seen.variance, "batch_var")
    expect((seen.variance + norm.eps).sqrt() / parts.deviation(norm), "correction_c")
    expect(before, "output_before_freeze")
    expect(parts.norm_with_long_term_statistics(apply, rounded, parts.folded_bias(None, norm)), "output_after_freeze")
    exact, _ = parts.norm_with_batch_statistics(apply, weight, None, norm, folded)
    plain = norm.train()(apply(weight))
    expect(plain, "float_train_output")
    expect((before - plain).abs().max(), "max_diff_before_freeze_vs_float")
    assert (exact - plain).abs().max() <= max(1e-9, EXAMPLE["outputs"]["max_diff_unquantized_vs_float"])


# Batch norm


@pytest.mark.parametrize("bias", [False, True])
def test_without_rounding_the_corrected_path_is_batch_norm_in_training(bias):
    conv, norm = nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5)
    nn.init.uniform_(norm.weight, -2, 2), nn.init.normal_(norm.bias), norm.running_var.uniform_(0.3, 3)
    plain_conv, plain_norm = copy.deepcopy(conv), copy.deepcopy(norm)
    x = images()
    expected = plain_norm(plain_conv(x))
    folded = parts.folded_weight(conv.weight, norm)
    actual, seen = parts.norm_with_batch_statistics(
        lambda w: conv._conv_forward(x, w, None), conv.weight, conv.bias, norm, folded
    )
    parts.update_statistics(norm, seen, norm.momentum)
    # The correction multiplies and divides by the same deviations: a few roundings of float32.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for own, plain in ((norm.running_mean, plain_norm.running_mean), (norm.running_var, plain_norm.running_var)):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    for own, plain in (
        (conv.weight, plain_conv.weight),
        (norm.weight, plain_norm.weight),
        (norm.bias, plain_norm.bias),
    ):
        torch.testing.assert_close(own.grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_a_prepared_network_keeps_the_running_statistics_that_the_float_one_would():
    plain = Small().train()
    network = prepared(copy.deepcopy(plain), freeze_after=None)
    plain(images())
    network(images())
    # Behind the first layer the inputs differ by the rounding of weights.
    torch.testing.assert_close(network.stem_norm.running_mean, plain.stem_norm.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network.stem_norm.running_var, plain.stem_norm.running_var, rtol=1e-5, atol=1e-6)
    assert network.stem_norm.num_batches_tracked == 1


def test_after_the_freeze_training_and_inference_compute_the_same_and_statistics_stay():
    chain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Flatten()
    )
    network = prepared(chain, freeze_after=2)
    for seed in range(2):
        network(images(seed=seed))
    mean = network[1].running_mean.clone()
    before_last = network(images(seed=5))
    assert torch.equal(network[1].running_mean, mean)
    assert torch.equal(before_last, network.eval()(images(seed=5)))
    network.train()(images(seed=6)).sum().backward()
    assert network[1].weight.grad.abs().max() > 0


def test_before_the_freeze_the_batch_counts():
    network = prepared(freeze_after=None)
    network(images())
    assert not torch.equal(network(images()), network.eval()(images()))


def test_a_norm_that_was_exchanged_behind_our_back_is_refused():
    network = prepared()
    network.stem_norm = nn.Identity()
    with pytest.raises(RuntimeError, match="batch norm stem_norm"):
        network(images())


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
    ],
)
def test_a_batch_norm_that_no_convolution_can_hold_is_named(network):
    name = next(name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d))
    with pytest.raises(ValueError, match=f"the batch norm {name} must directly follow a convolution"):
        prepared(network)
    assert type(network) is nn.Sequential


# Ranges and steps


def test_ranges_are_moving_averages_of_smallest_and_largest_values():
    network = prepared(activation_delay=100, decay=0.75)
    expected = None
    for seed in range(3):
        x = images(seed=seed)
        seen = torch.stack([x.min(), x.max()])
        expected = seen if expected is None else 0.75 * expected + 0.25 * seen
        network(x)
    torch.testing.assert_close(network.stem.input_range, expected)
    assert network.stem.output_range[0] == 0
    network.eval()(10 * images())
    torch.testing.assert_close(network.stem.input_range, expected)


def test_activations_stay_float_until_the_delay_is_over():
    network = prepared(activation_delay=2, freeze_after=0)
    x = images()
    levels = [network.forward_features(x).unique().numel() for _ in range(3)]
    assert levels[0] == levels[1] > 600
    assert levels[2] <= 256
    assert network.quantization_step == 3


def test_steps_are_counted_in_training_alone():
    network = prepared()
    network(images())
    network.eval()(images())
    assert network.quantization_step == 1


def test_gradients_stop_where_values_leave_the_grid():
    network = prepared(nn.Sequential(nn.Conv2d(3, 4, 1)), activation_delay=0, decay=0.99)
    network(images().clamp(-1, 1))
    x = images().clamp(-1, 1)
    x[0, 0, 0, 0] = 50.0
    x.requires_grad_()
    network(x).square().sum().backward()
    # The grid reaches a little less than -1 or 1 on one side: 0 is one of its values.
    inside = x.detach().abs() < 0.98
    assert x.grad[0, 0, 0, 0] == 0
    assert (x.grad[inside] != 0).all()


def test_ranges_are_those_of_all_processes(monkeypatch):
    """Another process that saw values from -7 to 3 stands behind the reduction."""

    def all_reduce(values, operation):
        assert operation == dist.ReduceOp.MIN
        values.copy_(torch.minimum(values, torch.tensor([-7.0, -3.0])))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    span = parts.new_range()
    parts.follow_range(span, torch.tensor([-1.0, 5.0]), 0.9, "x")
    assert span.tolist() == [-7, 5]


def test_values_that_are_not_finite_are_refused_by_name_and_leave_ranges_alone():
    network = prepared()
    network(images())
    before = ranges(network)
    x = images()
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the input of stem holds NaN"):
        network(x)
    assert torch.equal(network.stem.input_range, before["stem.input_range"])
    assert network(images()).isfinite().all()


# What stays


def test_keys_and_float_checkpoints_are_kept():
    plain = Small()
    state = plain.state_dict()
    network = prepared()
    assert set(state) < set(network.state_dict())
    assert {name for name in network.state_dict() if name not in state} == {"quantization_step", *ranges(network)}
    network.load_state_dict(state)
    back = float_network(network)
    assert type(back) is Small
    assert back.state_dict().keys() == state.keys()
    assert torch.equal(back.eval()(images()), plain.eval()(images()))
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        network.load_state_dict(state)


def test_copies_and_averages_compute_the_same_and_do_not_share_ranges():
    network = prepared()
    train(network, 4)
    copied = copy.deepcopy(network)
    assert torch.equal(copied.eval()(images()), network.eval()(images()))
    train(copied.train(), 1)
    assert not torch.equal(copied.stem.input_range, network.stem.input_range)
    average = timm.utils.ModelEmaV3(network, decay=0.5)
    train(network.train(), 2)
    average.update(network)
    assert average.module.eval()(images()).isfinite().all()


def test_a_run_that_was_cut_goes_on_bit_by_bit():
    torch.manual_seed(0)
    whole = prepared()
    cut = copy.deepcopy(whole)
    train(whole, 6)
    first = torch.optim.SGD(cut.parameters(), 0.05, momentum=0.9)
    train(cut, 2, optimizer=first)
    fresh = prepared()
    fresh.load_state_dict(cut.state_dict())
    second = torch.optim.SGD(fresh.parameters(), 0.05, momentum=0.9)
    second.load_state_dict(first.state_dict())
    train(fresh, 4, optimizer=second, start=2)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_channels_of_zeros_stay_zeros():
    network = prepared()
    with torch.no_grad():
        network.stem.weight[2] = 0
        network.project.weight.zero_()
    train(network, 4)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert network.eval()(images()).isfinite().all()


def test_autocast_rounds_in_full_precision():
    network = prepared(activation_delay=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(images()).square().mean()
    loss.backward()
    assert network.stem.input_range.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        half = network.eval()(images()).float()
    # bfloat16 has 8 bits of mantissa.
    assert signal_to_noise(network(images()), half) > 20


def test_a_sum_in_place_rounds_what_it_changes():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y, z = self.a(x), self.b(x)
            y.add_(z)
            return y

    network = prepared(InPlace(), activation_delay=0).eval()
    network.train()(images())
    assert network.eval()(images()).unique().numel() <= 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits must be in 2..8"),
        ({"weight_bits": 9}, "bits must be in 2..8"),
        ({"activation_delay": -1}, "activation_delay must be"),
        ({"freeze_after": -1}, "freeze_after must be"),
        ({"decay": 1.0}, "decay must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        prepared(**settings)


def test_a_network_is_prepared_once_and_needs_something_to_quantize():
    with pytest.raises(ValueError, match="already prepared for quantization"):
        prepared(prepared())
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        prepared(nn.Sequential(nn.Flatten(), nn.PReLU()))


def test_it_is_registered_as_a_transform():
    assert find_method("prepare_qat").build is prepare_qat
    assert find_method("prepare_qat").kind == "transform"


# Training


def test_weights_of_four_bits_learn():
    torch.manual_seed(0)
    network = prepared(weight_bits=4, activation_delay=2, freeze_after=20)
    losses = train(network, 30)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    folded = parts.folded_weight(network.stem.weight, network.stem_norm)
    assert fake_quantize(folded, weight_grid(folded, 4))[0].unique().numel() <= 15


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("mobilenetv2_035", False),
        ("focalnet_tiny_srf", False),
        ("inception_next_atto", True),
        ("unireplknet_a", True),
        ("hornet_tiny_7x7", True),
    ],
)
def test_it_composes_with_networks_of_each_family(name, folded):
    network = small_model(name)
    settings = {"activation_delay": 0, "freeze_after": 1, "input_shape": (3, 64, 64), "folded": folded}
    network = prepare_qat(network, **settings).train()
    x = images(2, shape=(3, 64, 64))
    for _ in range(2):
        network(x).square().mean().backward()
    assert all(span.any() for span in ranges(network).values())
    network.eval()
    with torch.no_grad():
        noise = signal_to_noise(float_network(network)(x), network(x))
    assert 15 < noise < 60
    assert network.forward_features(x).shape[0] == 2
    assert len(network.forward_pyramid(x)) == 4


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.mobilenet_v3_small(num_classes=4),
        lambda: timm.create_model("mobilenetv2_035", num_classes=4),
    ],
    ids=["torchvision", "timm"],
)
def test_it_works_on_networks_of_other_libraries(build):
    network = prepare_qat(build(), activation_delay=0, freeze_after=0, input_shape=(3, 32, 32)).train()
    network(images(2, shape=(3, 32, 32))).sum().backward()
    assert all(span.any() for span in ranges(network).values())
    assert network.eval()(images(2, shape=(3, 32, 32))).isfinite().all()


def test_gradient_checkpointing_is_refused():
    network = prepared(small_model("mobilenetv2_035"), input_shape=(3, 64, 64))
    network.set_grad_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing off"):
        network(images(2, shape=(3, 64, 64)))


def test_a_network_whose_norms_stand_elsewhere_says_how_it_can_be_prepared():
    with pytest.raises(ValueError, match="folded=True"):
        prepared(small_model("inception_next_atto"), input_shape=(3, 64, 64))


def test_a_network_in_which_folding_moves_codes_says_how_it_can_be_prepared():
    with pytest.raises(ValueError, match="folding for inference would move codes .*folded=True"):
        prepared(small_model("hornet_tiny_7x7"), input_shape=(3, 64, 64))
