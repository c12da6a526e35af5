"""Weights that a network does not take: NaN, other kinds of number, tensors that are no plain arrays."""

from __future__ import annotations

import pytest
import torch

from gatewise import load_checkpoint
from gatewise.catalog.checkpoint import export_state, load_state, peel
from gatewise.catalog.registry import family_of
from gatewise.catalog.values import is_finite
from gatewise.errors import CheckpointError
from tests.conftest import small_model


@pytest.fixture
def model():
    return small_model("mobilenetv2_035")


def changed(model, key, change):
    return {name: change(value) if name == key else value.clone() for name, value in model.state_dict().items()}


def with_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[1] = value
        return tensor

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_unless_allowed(model, tmp_path, value):
    torch.save(changed(model, "head.weight", with_value(value)), tmp_path / "w.pth")
    before = model.head.weight.clone()
    with pytest.raises(CheckpointError, match=r"w.pth is refused: NaN or infinity in head.weight"):
        load_checkpoint(model, tmp_path / "w.pth")
    assert torch.equal(model.head.weight, before)
    load_checkpoint(model, tmp_path / "w.pth", allow_nonfinite=True)
    assert not torch.isfinite(model.head.weight).all()


def test_the_first_keys_are_named_and_the_rest_counted(model):
    floats = [key for key, value in model.state_dict().items() if value.is_floating_point()]
    state = {key: value * float("nan") for key, value in model.state_dict().items() if value.is_floating_point()}
    with pytest.raises(CheckpointError, match=f"{', '.join(floats[:3])} and {len(floats) - 3} more"):
        load_state(model, state)


def test_finite_weights_whose_sum_overflows_are_finite():
    assert is_finite(torch.full((4,), 3e38))
    assert is_finite(torch.full((4,), 6e4, dtype=torch.float16))
    assert not is_finite(torch.tensor([float("inf"), float("-inf")]))


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int64", "float8_e4m3fn", "complex64"])
def test_a_parameter_takes_ordinary_floating_point_numbers(model, dtype):
    state = changed(model, "stem.conv.weight", lambda value: value.to(getattr(torch, dtype)))
    expected = f"stem.conv.weight must be float16, bfloat16, float32 or float64, not {dtype}"
    with pytest.raises(CheckpointError, match=expected):
        load_state(model, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(model, dtype):
    state = changed(model, "stem.conv.weight", lambda value: value.to(dtype))
    load_state(model, state)
    assert torch.equal(model.stem.conv.weight, state["stem.conv.weight"].float())


def test_a_counter_takes_integers(model):
    key = next(name for name in model.state_dict() if name.endswith("num_batches_tracked"))
    with pytest.raises(CheckpointError, match=f"{key} must be an integer, not float32"):
        load_state(model, changed(model, key, torch.Tensor.float))
    load_state(model, changed(model, key, torch.Tensor.int))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (torch.Tensor.to_sparse, "a sparse tensor"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "a quantized tensor"),
        (lambda value: torch.nested.nested_tensor([value]), "a nested tensor"),
        (lambda value: value.tolist(), "a list"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unusual_tensors_in_memory_are_refused(model, change, kind):
    with pytest.raises(CheckpointError, match=f"expected ordinary tensors, not {kind} at head.weight"):
        load_state(model, changed(model, "head.weight", change))


def test_tensors_without_data_do_not_fill_a_network(model):
    with pytest.raises(CheckpointError, match="head.weight is on the meta device"):
        load_state(model, changed(model, "head.weight", lambda value: value.to("meta")))


@pytest.mark.parametrize("name", ["tiny_moat_0", "gated_swinrmt_tiny_swat"])
def test_shapes_that_a_layout_cannot_join_are_told(name):
    model = small_model(name)
    for layout in family_of(name).layouts(model.config):
        if layout.tensor_to_ours is not None and layout.tensor_to_theirs is None:
            continue
        state = export_state(model, layout.name)
        for key in [key for key in state if "qkv" in key or "query" in key or "q_proj" in key][:2]:
            with pytest.raises(CheckpointError, match="does not fit"):
                load_state(model, {**state, key: state[key][None]}, layout=layout.name)


def test_wrappers_around_themselves_end():
    content = {}
    content["model"] = content
    with pytest.raises(CheckpointError, match="no state dict within 20 wrappers"):
        peel(content)


def test_names_that_become_one_are_refused():
    with pytest.raises(CheckpointError, match="two of its names read '1'"):
        peel({1: torch.zeros(1), "1": torch.zeros(1)})
