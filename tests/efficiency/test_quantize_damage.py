"""Damaged, foreign and contradictory quantized files are refused in one line; inputs without codes are, too."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from gatewise.efficiency.acceleration.onnx_file import CHECKSUM, with_checksum
from gatewise.efficiency.acceleration.optimize import optimize
from gatewise.efficiency.quantization.quantize import HEADER, load_quantized, quantize
from gatewise.errors import Failure, UserError
from tests.efficiency.quantized import batches

pytestmark = pytest.mark.untyped


@pytest.fixture
def file(quantized, tmp_path):
    return quantized.save(tmp_path / "small.onnx")


def rewrite(path, edit):
    """Change the model of a file, and give it the checksum that it then has."""
    import onnx

    model = onnx.load_from_string(path.read_bytes())
    kept = [entry for entry in model.metadata_props if entry.key != CHECKSUM]
    edit(model)
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    path.write_bytes(with_checksum(model.SerializeToString()))


def set_report(path, name, value):
    def edit(model):
        for entry in model.metadata_props:
            if entry.key == HEADER:
                entry.value = json.dumps(json.loads(entry.value) | {name: value})

    rewrite(path, edit)


def test_a_file_that_was_rewritten_with_its_checksum_is_read(file, quantized):
    rewrite(file, lambda model: None)
    x = batches(1)[0]
    assert torch.equal(load_quantized(file)(x), quantized(x))


def test_no_damaged_file_is_loaded_as_something_else(file, quantized):
    whole, draw = file.read_bytes(), random.Random(2)
    for place in draw.sample(range(len(whole)), 30):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        for content in (damaged, whole[:place]):
            file.write_bytes(content)
            with pytest.raises((UserError, Failure), match=r"^[^\n]*$"):
                load_quantized(file)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bits", 9, r"\.bits must be in 2\.\.8, not 9"),
        ("bits", 8.5, r"\.bits must be an integer, not 8.5"),
        ("layers", "head", r"\.layers must be a list"),
        ("scheme", "other", r"\.scheme must be one of affine, symmetric"),
        ("weights_only", 0, r"\.weights_only must be true or false"),
        ("noise_db", float("nan"), r"\.noise_db must be in"),
        ("floats", [], r"\.floats must be a mapping"),
        ("ranges", [{"name": "x"}], r"\.ranges\[0\] has no field"),
        ("more", 1, "has an unknown field 'more'"),
        ("input_shape", [3, 8, 8], r"takes samples of shape \[3, 16, 16\]"),
        ("input_shape", [], r"takes samples of shape \[3, 16, 16\]"),
    ],
)
def test_a_wrong_field_of_the_report_is_named(file, name, value, message):
    set_report(file, name, value)
    with pytest.raises(UserError, match=rf"^[^\n]*small.onnx[^\n]*{message}[^\n]*$"):
        load_quantized(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_scale_must_be_positive_and_finite(file, value):
    from onnx import numpy_helper

    def edit(model):
        name = next(node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear")
        scale = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        scale.CopyFrom(numpy_helper.from_array(np.array(value, np.float32), name))

    rewrite(file, edit)
    with pytest.raises(UserError, match="must be positive and finite"):
        load_quantized(file)


def test_an_operator_that_no_runtime_knows_is_one_line(file):
    def edit(model):
        next(node for node in model.graph.node if node.op_type == "Add").op_type = "Nothing"

    rewrite(file, edit)
    with pytest.raises(Failure, match=r"^[^\n]*small.onnx cannot be run here: onnxruntime rejects [^\n]*$"):
        load_quantized(file)


def test_weights_in_another_file_are_refused(file):
    def edit(model):
        from onnx.external_data_helper import set_external_data

        set_external_data(next(tensor for tensor in model.graph.initializer if tensor.raw_data), "/etc/passwd")

    rewrite(file, edit)
    with pytest.raises(UserError, match="is in another file"):
        load_quantized(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_without_a_code_are_refused(quantized, value):
    x = batches(1)[0]
    x[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match="takes finite values, and this batch holds NaN or infinite ones"):
        quantized(x)


@pytest.mark.parametrize("wrong", [np.zeros((1, 3, 16, 16), np.float32), None, [0.0]])
def test_what_is_no_tensor_is_a_type_error(residual, quantized, wrong):
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=f"a quantized network takes a torch.Tensor, not {kind}"):
        quantized(wrong)
    fast = optimize(residual, batches(1)[0], plans=[])
    with pytest.raises(TypeError, match=f"an optimized network takes a torch.Tensor, not {kind}"):
        fast(wrong)


def test_an_empty_batch_is_refused_everywhere(residual, quantized, tmp_path):
    from gatewise.efficiency.acceleration.export import export_onnx

    for shape in ((0, 3, 16, 16), (1, 3, 0, 16)):
        empty = torch.zeros(shape)
        with pytest.raises(ValueError, match="not for shape"):
            quantized(empty)
        with pytest.raises(ValueError, match="must be a batch with at least one sample"):
            optimize(residual, empty, plans=[])
        with pytest.raises(ValueError, match="must be a batch with at least one sample"):
            export_onnx(residual, tmp_path / "network.onnx", empty)
        with pytest.raises(ValueError, match="calibration batch 0 must hold samples"):
            quantize(residual, empty)


@pytest.mark.parametrize("name", ["bits", "weight_bits", "max_batches"])
@pytest.mark.parametrize("value", [2.5, True, 8.0, "8", None])
def test_numbers_of_bits_and_batches_are_integers(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be an integer, not {value!r}$"):
        quantize(nn.Linear(2, 2).eval(), torch.zeros(1, 2), **{name: value})
