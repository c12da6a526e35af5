"""A quantized network's state dict holds the float weights and every scale, and gives the same network back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from gatewise.efficiency.quantization.quantize import HEADER, quantize
from gatewise.efficiency.quantization.state import load_quantized_state, quantized_state, save_quantized_state
from gatewise.errors import UserError
from gatewise.layers.conv import ConvNormAct

pytestmark = pytest.mark.untyped


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, width, 3, 2)
        self.spatial = ConvNormAct(width, width, 3, groups=width)
        self.project = ConvNormAct(width, width, act=None)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.spatial(x))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def make(images, **options):
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for _ in range(20):
            model(images)
    return model.eval(), quantize(model, images, **options)


def test_float_weights_stay_and_scales_come_beside_them(images):
    model, small = make(images)
    state = quantized_state(model, small)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert set(small.report.layers) == {"stem.conv", "spatial.conv", "project.conv", "head"}
    for layer in small.report.layers:
        channels = 5 if layer == "head" else 8
        assert state[f"{layer}.weight_scale"].shape == state[f"{layer}.weight_zero_point"].shape == (channels,)
        assert state[f"{layer}.weight_zero_point"].dtype == torch.int32
        assert not state[f"{layer}.weight_zero_point"].any()
        assert state[f"{layer}.input_scale"].shape == state[f"{layer}.input_zero_point"].shape == ()
    ranges = {entry.name: entry for entry in small.report.ranges}
    # What one layer gives, the next one reads.
    assert state["stem.conv.output_scale"] == state["spatial.conv.input_scale"] == ranges["stem.act"].scale
    assert state["spatial.conv.output_scale"] == state["project.conv.input_scale"]
    assert state["stem.conv.input_zero_point"] == ranges["images"].zero_point
    # The largest weight of each channel, folded, has the largest code.
    norm = model.stem.norm
    folded = model.stem.conv.weight * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
    largest = 63 if small.report.reduced_range else 127
    expected = folded.abs().amax((1, 2, 3)) / largest
    torch.testing.assert_close(state["stem.conv.weight_scale"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_bits": 4, "per_channel": False},
        {"weights_only": True, "weight_scheme": "affine"},
        {"skip": ["project.conv"], "activations": "percentile"},
        {"scheme": "symmetric", "bits": 6},
    ],
)
@pytest.mark.filterwarnings("ignore:one scale for all channels")
def test_a_file_gives_the_same_network_back(images, options, tmp_path):
    model, small = make(images, **options)
    path = save_quantized_state(model, small, tmp_path / "small.safetensors")
    other = Net().eval()
    loaded = load_quantized_state(path, other)
    assert loaded.report.layers == small.report.layers
    assert torch.equal(other(images), model(images))
    # Scales come from the ends of ranges, and may differ in the last bit.
    torch.testing.assert_close(loaded(images), small(images), rtol=1e-5, atol=1e-5)
    ours, theirs = quantized_state(other, loaded), quantized_state(model, small)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=0)


def test_weight_only_layers_have_no_scales_of_activations(images):
    model, small = make(images, weights_only=True)
    state = quantized_state(model, small)
    assert "head.weight_scale" in state
    assert "head.input_scale" not in state


def test_other_files_and_networks_are_refused(images, tmp_path):
    model, small = make(images)
    path = save_quantized_state(model, small, tmp_path / "small.safetensors")

    class Longer(Net):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(2, 2)

    with pytest.raises(UserError, match=r"another network: missing \['more.bias', 'more.weight'\]"):
        load_quantized_state(path, Longer().eval())
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a safetensors file, or is damaged"):
        load_quantized_state(broken, Net().eval())
    with pytest.raises(ValueError, match="does not exist"):
        save_quantized_state(model, small, tmp_path / "nowhere" / "small.safetensors")


def rewrite(path, edit):
    """Change the tensors of a file; the report stays."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata)


def test_weights_are_rounded_by_the_scales_in_the_file(images, tmp_path):
    model, small = make(images)
    path = save_quantized_state(model, small, tmp_path / "small.safetensors")

    def coarser(state):
        state["head.weight_scale"] = 8 * state["head.weight_scale"]

    rewrite(path, coarser)
    loaded = load_quantized_state(path, Net().eval())
    state = quantized_state(model, loaded)
    torch.testing.assert_close(state["head.weight_scale"], 8 * quantized_state(model, small)["head.weight_scale"])
    assert not torch.equal(loaded(images), small(images))


def remove(name):
    return lambda state: state.pop(name)


def put(name, change):
    def edit(state):
        state[name] = change(state[name]).contiguous()

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("head.weight_scale"), "lacks head.weight_scale"),
        (remove("head.input_zero_point"), "lacks head.input_zero_point"),
        (remove("stem.conv.weight"), r"missing \['stem.conv.weight'\]"),
        (put("stem.conv.weight", lambda x: x * float("nan")), "stem.conv.weight holds NaN or infinite values"),
        (put("stem.conv.weight", torch.Tensor.double), "stem.conv.weight must be torch.float32 of shape"),
        (put("stem.conv.weight", lambda x: x[:4]), r"stem.conv.weight must be .* not torch.float32 of shape \(4,"),
        (put("head.weight_scale", lambda x: x * float("nan")), "head.weight_scale must be positive and finite"),
        (put("head.weight_scale", lambda x: -x), "head.weight_scale must be positive and finite"),
        (put("head.weight_scale", torch.Tensor.half), "head.weight_scale must be float32, one per channel"),
        (put("head.weight_scale", lambda x: x.sum()), "head.weight_scale must be float32, one per channel"),
        (put("head.weight_zero_point", torch.Tensor.float), "head.weight_zero_point must be int32"),
        (put("head.input_zero_point", lambda x: x + 300), r"head.input_zero_point must be in 0\.\.255"),
        (put("head.weight_scale", lambda x: x / 2), "head.weight has values without a code"),
        (put("head.input_scale", lambda x: 2 * x), "contradicts itself: head.input_scale is not what"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_and_the_model_left_alone(images, tmp_path, edit, message):
    path = save_quantized_state(*make(images), tmp_path / "small.safetensors")
    rewrite(path, edit)
    other = Net().eval()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        load_quantized_state(path, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_a_damaged_report_is_named(images, tmp_path):
    path = save_quantized_state(*make(images), tmp_path / "small.safetensors")
    with safe_open(path, framework="pt") as file:
        report = json.loads(file.metadata()[HEADER])
    for content, message in ((report | {"bits": 2.5}, "bits must be an integer"), ([], "must be a mapping")):
        save_file(load_file(path), path, {HEADER: json.dumps(content)})
        with pytest.raises(UserError, match=f"the report in .*{message}"):
            load_quantized_state(path, Net().eval())
