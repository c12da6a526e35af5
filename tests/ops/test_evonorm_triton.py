"""The kernels of EvoNorm, through Triton's interpreter, and on a GPU where there is one.

The interpreter is chosen when Triton is imported, for the whole process. The cases therefore run in a process of their
own, this file as a program, which reports the errors of all results as JSON; the tests read them.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from gatewise.ops import evonorm as module
from gatewise.ops.evonorm import evonorm_b, evonorm_b_reference, evonorm_s, evonorm_s_reference
from tests.ops.interpreted import Errors, error, errors_of_interpreted, print_errors

PLAIN = {"shape": [2, 6, 5, 3], "layer": "S0", "running": False, "dtype": "float32", "last": False}
SHAPES = {
    "": {},
    ", channels-last": {"last": True},
    ", more positions than one share": {"shape": [2, 4, 7, 9]},
    ", more positions than one share, channels-last": {"shape": [2, 6, 5, 7], "last": True},
    ", one image, one row": {"shape": [1, 2, 1, 5]},
}
CASES = {f"{layer}{name}": {"layer": layer} | case for layer in ("S0", "B0") for name, case in SHAPES.items()}
CASES |= {layer: {"layer": layer} for layer in ("S1", "S2", "S0a off", "B1", "B2", "B1 centered")}
CASES |= {
    f"{layer} with running variances": {"layer": layer, "running": True, "shape": [2, 4, 3, 4]}
    for layer in ("B0", "B1", "B2")
}
CASES |= {f"{layer} in {dtype}": {"layer": layer, "dtype": dtype} for layer in ("S0", "B0") for dtype in ("bfloat16",)}
CASES |= {"S0 in float16": {"dtype": "float16", "last": True}}


def tolerance(name: str) -> float:
    """Of the root mean square error over the root mean square: results are rounded once from float32 sums.

    To bfloat16 the interpreter does not round, it cuts off: up to 2^-7 for a single value.
    """
    return {"bfloat16": 6e-3, "float16": 5e-4}.get(CASES[name].get("dtype", ""), 2e-6)


def functions(case: dict):
    """The operator and its definition for these settings."""
    layer = case["layer"]
    if layer.startswith("S"):
        fields = {"groups": 2, "centered": not layer.startswith("S2"), "gated": "off" not in layer}
        return partial(evonorm_s, **fields), partial(evonorm_s_reference, **fields)
    running = torch.linspace(0.5, 2, case["shape"][1], dtype=torch.float64) if case["running"] else None
    fields = {"member": layer[:2], "centered": layer not in ("B1", "B2")}

    def call(function, x, weight, bias, v=None):
        given = None if running is None else running.to(x.device, torch.promote_types(x.dtype, torch.float32))
        return function(x, weight, bias, v, given, **fields)[0]

    return partial(call, evonorm_b), partial(call, evonorm_b_reference)


def run(case: dict, device: str = "cpu") -> dict[str, float]:
    """Errors of the result and of all gradients against the definition in float64."""
    case = PLAIN | case
    draw = torch.Generator().manual_seed(0)
    channels, dtype = case["shape"][1], getattr(torch, case["dtype"])
    names = ["x", "weight", "bias", *(["v"] if case["layer"] in ("S0", "B0") else [])]
    shapes = {name: case["shape"] if name == "x" else [channels] for name in names}
    tensors = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    # Means beside zero, so that centering matters.
    tensors["x"] = tensors["x"] + 0.5
    cotangent = torch.randn(case["shape"], generator=draw).to(dtype)
    ours, theirs = functions(case)
    found = results(ours, {name: t.to(device) for name, t in tensors.items()}, cotangent.to(device), case["last"])
    expected = results(theirs, {name: t.double() for name, t in tensors.items()}, cotangent.double(), False)
    return {name: error(found[name], expected[name]) for name in expected}


def results(function, tensors: dict[str, Tensor], cotangent: Tensor, last: bool) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    x = leaves["x"].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    y = function(x, *[leaf for name, leaf in leaves.items() if name != "x"])
    gradients = torch.autograd.grad((y * cotangent).sum(), list(leaves.values()))
    return {"y": y} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


@pytest.fixture(scope="module")
def interpreted() -> Errors:
    return errors_of_interpreted("tests.ops.test_evonorm_triton")


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
