"""The kernels of context mixing, through Triton's interpreter, and on a GPU where there is one.

The interpreter is chosen when Triton is imported, for the whole process. The cases therefore run in a process of their
own, this file as a program, which reports the errors of all results as JSON; the tests read them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gatewise.ops import context_mixing as module
from gatewise.ops.context_mixing import context_mixing, context_mixing_reference
from tests.ops.interpreted import Errors, error, errors_of_interpreted, print_errors

NAMES = ("query", "centers", "weight", "bias", "small", "large", "value")
PLAIN = {
    "batch": 1, "heads": 2, "query_dim": 3, "value_dim": 2, "size": [6, 7], "windows": [3, 5], "dtype": "float32",
}  # fmt: skip
CASES = {
    "plain": {},
    "a map as large as the window": {"size": [5, 5], "batch": 2},
    "a high map": {"size": [11, 5], "heads": 1},
    "a wide map, more columns than a block": {"size": [5, 21]},
    "windows of one size": {"windows": [5, 5]},
    "a window of one position": {"windows": [1, 3], "size": [3, 4]},
    "more lanes than a block": {"query_dim": 17, "value_dim": 18, "heads": 1},
    "no more entries than a block": {"windows": [3, 3]},
    "bfloat16": {"dtype": "bfloat16"},
}


def tolerance(name: str) -> float:
    """Of the root mean square error over the root mean square.

    Results are rounded once from float32, but gradients of logits are differences, and lose a digit on the way.
    """
    return 6e-3 if CASES[name].get("dtype") == "bfloat16" else 4e-6


def run(case: dict, device: str = "cpu") -> dict[str, float]:
    """Errors of the result and of all gradients against the definition in float64."""
    case = PLAIN | case
    draw = torch.Generator().manual_seed(0)
    batch, heads, regions, size = case["batch"], case["heads"], 4, case["size"]
    taps = sum(window**2 for window in case["windows"])
    shapes = [
        [batch, heads * case["query_dim"], *size],
        [batch, heads * case["query_dim"], regions],
        [taps, regions],
        [taps],
        *([heads, 2 * window - 1, 2 * window - 1] for window in case["windows"]),
        [batch, 2 * heads * case["value_dim"], *size],
    ]
    dtype = getattr(torch, case["dtype"])
    tensors = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    cotangent = torch.randn(shapes[-1], generator=draw).to(dtype)
    found = results(context_mixing, [tensor.to(device) for tensor in tensors], cotangent.to(device))
    expected = results(context_mixing_reference, [tensor.double() for tensor in tensors], cotangent.double())
    # A window of one position leaves its kernel no choice: gradients for it are exactly zero.
    return {name: error(found[name], expected[name], least=1e-30) for name in expected}


def results(function, tensors: list[Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    gradients = torch.autograd.grad((y * cotangent).sum(), leaves)
    return {"y": y} | {f"d{name}": gradient for name, gradient in zip(NAMES, gradients, strict=True)}


@pytest.fixture(scope="module")
def interpreted() -> Errors:
    return errors_of_interpreted("tests.ops.test_context_mixing_triton")


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
    from gatewise.ops.context_mixing import triton as kernels

    module._backend = lambda x: kernels
    print_errors(run, CASES)


if __name__ == "__main__":
    main()
