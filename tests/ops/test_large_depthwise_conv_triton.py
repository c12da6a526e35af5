"""The kernels of the large depthwise convolution, through Triton's interpreter, and on a GPU where there is one.

The interpreter is chosen when Triton is imported, for the whole process. The cases therefore run in a process of their
own, this file as a program, which reports the errors of all results as JSON; the tests read them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gatewise.ops import large_depthwise_conv as module
from gatewise.ops.large_depthwise_conv import large_depthwise_conv, large_depthwise_conv_reference
from tests.ops.interpreted import Errors, error, errors_of_interpreted, print_errors

PLAIN = {"shape": [1, 4, 5, 6], "kernel": 7, "dilation": 1, "bias": True, "dtype": "float32"}
CASES = {
    "plain": {},
    "without bias": {"bias": False},
    "13x13, map smaller than the kernel": {"kernel": 13, "shape": [2, 5, 4, 7]},
    "blocks that sizes do not divide": {"shape": [3, 21, 9, 5], "kernel": 9},
    "one pixel": {"shape": [2, 3, 1, 1]},
    "one row": {"shape": [1, 3, 1, 19]},
    "one channel": {"shape": [2, 1, 6, 5]},
    "dilated": {"dilation": 3, "shape": [1, 3, 11, 8]},
    "more pixels than one share": {"shape": [2, 2, 11, 7], "kernel": 7},
    "bfloat16": {"dtype": "bfloat16", "kernel": 9},
    "float16": {"dtype": "float16", "kernel": 9},
}


def tolerance(name: str) -> float:
    """Of the root mean square error over the root mean square: results are rounded once from float32 sums."""
    return {"bfloat16": 4e-3, "float16": 5e-4}.get(CASES[name].get("dtype", ""), 1e-6)


def run(case: dict, device: str = "cpu") -> dict[str, float]:
    """Errors of the result and of all gradients against the definition in float64."""
    case = PLAIN | case
    draw = torch.Generator().manual_seed(0)
    channels, kernel = case["shape"][1], case["kernel"]
    shapes = {"x": case["shape"], "weight": [channels, 1, kernel, kernel]}
    shapes |= {"bias": [channels]} if case["bias"] else {}
    dtype = getattr(torch, case["dtype"])
    tensors = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    cotangent = torch.randn(case["shape"], generator=draw).to(dtype)
    found = results(
        large_depthwise_conv,
        {name: tensor.to(device) for name, tensor in tensors.items()},
        cotangent.to(device),
        case["dilation"],
    )
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    expected = results(large_depthwise_conv_reference, wide, cotangent.double(), case["dilation"])
    return {name: error(found[name], expected[name]) for name in expected}


def results(function, tensors: dict[str, Tensor], cotangent: Tensor, dilation: int) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    x = leaves["x"].contiguous(memory_format=torch.channels_last)
    y = function(x, *[leaf for name, leaf in leaves.items() if name != "x"], dilation=dilation)
    gradients = torch.autograd.grad((y * cotangent).sum(), list(leaves.values()))
    return {"y": y} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


@pytest.fixture(scope="module")
def interpreted() -> Errors:
    return errors_of_interpreted("tests.ops.test_large_depthwise_conv_triton")


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
    module._own_operator = module._uses_kernels = lambda *arguments: True
    module._memory_format = lambda x, kernel_size: torch.channels_last
    print_errors(run, CASES)


if __name__ == "__main__":
    main()
