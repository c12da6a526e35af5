"""The kernels of the translation-variant convolution, through Triton's interpreter, and on a GPU where there is one.

The interpreter is chosen when Triton is imported, for the whole process. The cases therefore run in a process of their
own, this file as a program, which reports the errors of all results as JSON; the tests read them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gatewise.ops import translation_variant_conv as module
from gatewise.ops.translation_variant_conv import (
    output_size,
    translation_variant_conv,
    translation_variant_conv_reference,
)
from tests.ops.interpreted import Errors, error, errors_of_interpreted, print_errors

PLAIN = {"shape": [2, 3, 5, 6], "kernel": 3, "stride": 1, "bias": True, "last": False, "dtype": "float32"}
CASES = {
    "plain": {},
    "channels last": {"last": True},
    "without bias": {"bias": False},
    "stride 2, even size": {"stride": 2, "shape": [2, 3, 8, 6]},
    "stride 2, odd size": {"stride": 2, "shape": [2, 3, 7, 9]},
    "stride 2, channels last": {"stride": 2, "shape": [3, 5, 7, 6], "last": True},
    "5x5": {"kernel": 5, "shape": [1, 4, 9, 5]},
    "5x5, stride 2, channels last": {"kernel": 5, "stride": 2, "shape": [2, 3, 8, 5], "last": True},
    "7x7, map smaller than the kernel": {"kernel": 7, "shape": [1, 2, 3, 2]},
    "1x1": {"kernel": 1},
    "one pixel": {"shape": [3, 3, 1, 1]},
    "one channel, one row": {"shape": [2, 1, 1, 19]},
    "blocks that sizes do not divide": {"shape": [1, 7, 11, 5]},
    "more samples than shares": {"shape": [19, 2, 3, 3]},
    "more samples than shares, channels last": {"shape": [19, 2, 3, 3], "last": True},
    "transposed input": {"turned": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16, stride 2": {"dtype": "float16", "stride": 2},
}


def tolerance(name: str) -> float:
    """Of the root mean square error over the root mean square: results are rounded once from float32 sums."""
    return {"bfloat16": 4e-3, "float16": 5e-4}.get(CASES[name].get("dtype", ""), 1e-6)


def run(case: dict, device: str = "cpu") -> dict[str, float]:
    """Errors of the result and of all gradients against the definition in float64."""
    case = PLAIN | case
    draw = torch.Generator().manual_seed(0)
    batch, channels, height, width = case["shape"]
    kernel, stride = case["kernel"], case["stride"]
    outputs = [output_size(height, stride), output_size(width, stride)]
    shapes = {"x": case["shape"], "weight": [channels, kernel, kernel, *outputs]}
    shapes |= {"bias": [channels, *outputs]} if case["bias"] else {}
    dtype = getattr(torch, case["dtype"])
    tensors = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    cotangent = torch.randn([batch, channels, *outputs], generator=draw).to(dtype)
    found = results(translation_variant_conv, on(device, tensors), cotangent.to(device), case)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    expected = results(translation_variant_conv_reference, wide, cotangent.double(), case)
    return {name: error(found[name], expected[name]) for name in expected}


def on(device: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def results(function, tensors: dict[str, Tensor], cotangent: Tensor, case: dict) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    x = leaves["x"]
    if case["last"]:
        x, cotangent = (t.contiguous(memory_format=torch.channels_last) for t in (x, cotangent))
    if case.get("turned"):
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    y = function(x, *[leaf for name, leaf in leaves.items() if name != "x"], stride=case["stride"])
    gradients = torch.autograd.grad(y, list(leaves.values()), cotangent)
    return {"y": y} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


@pytest.fixture(scope="module")
def interpreted() -> Errors:
    return errors_of_interpreted("tests.ops.test_translation_variant_conv_triton")


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_the_definition(interpreted, name):
    assert max(interpreted[name].values()) < tolerance(name), interpreted[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_a_gpu_equal_the_definition(name):
    errors = run(CASES[name], "cuda")
    assert max(errors.values()) < tolerance(name), errors


def main() -> None:
    module.suits_triton = lambda x: True
    print_errors(run, CASES)


if __name__ == "__main__":
    main()
