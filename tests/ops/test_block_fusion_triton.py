"""The kernel of the conv-first block, through Triton's interpreter, and on a GPU where there is one.

The interpreter is chosen when Triton is imported, for the whole process. The cases therefore run in a process of their
own, this file as a program, which reports the errors of all results as JSON; the tests read them.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch

from gatewise.ops import block_fusion as module
from gatewise.ops.block_fusion import ExecutionPath, fused_conv_first, fused_conv_first_reference
from tests.ops.interpreted import Errors, error, errors_of_interpreted, print_errors, report_of

PLAIN = {
    "shape": [1, 16, 5, 6],
    "hidden": 40,
    "dim": 16,
    "kernel": 3,
    "group": 8,
    "stride": 1,
    "residual": True,
    "spatial_activation": "identity",
    "activation": "silu",
    "bias": True,
    "dtype": "float32",
}
CASES = {
    "plain": {},
    "without biases": {"bias": False},
    "stride 2, odd size, another width": {"stride": 2, "shape": [2, 16, 7, 5], "dim": 12, "residual": False},
    "stride 2, even size": {"stride": 2, "shape": [1, 16, 6, 8], "dim": 24, "residual": False},
    "channels that no power of 2 is": {"shape": [1, 24, 5, 3], "dim": 24, "hidden": 72},
    "depthwise": {"group": 1, "shape": [2, 10, 4, 5], "dim": 10, "hidden": 20},
    "groups of two": {"group": 2},
    "groups of four": {"group": 4},
    "dense": {"group": 16},
    "5x5, map smaller than the kernel": {"kernel": 5, "shape": [2, 16, 3, 4]},
    "1x1": {"kernel": 1},
    "one pixel": {"shape": [2, 16, 1, 1]},
    "more images than a block has pixels": {"shape": [19, 16, 1, 1]},
    "fewer hidden channels than a chunk": {"hidden": 5},
    "relu": {"activation": "relu"},
    "relu6, behind both": {"activation": "relu6", "spatial_activation": "relu6"},
    "gelu": {"activation": "gelu"},
    "hardswish": {"activation": "hardswish", "spatial_activation": "relu"},
    "no activation": {"activation": "identity"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16", "stride": 2, "residual": False},
}


def tolerance(name: str) -> float:
    """Of the root mean square error over the root mean square.

    Half precision is rounded thrice: behind the spatial convolution, behind the expansion, at the end.
    """
    return {"bfloat16": 8e-3, "float16": 1e-3}.get(CASES[name].get("dtype", ""), 1e-6)


def run(case: dict, device: str = "cpu") -> dict[str, float]:
    """The error of the result against the definition in float64."""
    case = PLAIN | case
    draw = torch.Generator().manual_seed(0)
    channels, kernel, group = case["shape"][1], case["kernel"], case["group"]
    hidden, dim = case["hidden"], case["dim"]
    dtype = getattr(torch, case["dtype"])

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=draw)).to(dtype)

    def bias(size):
        return normal(size) if case["bias"] else None

    tensors = [
        normal(*case["shape"]),
        normal(channels, group, kernel, kernel, scale=(kernel**2 * group) ** -0.5),
        bias(channels),
        normal(hidden, channels, 1, 1, scale=channels**-0.5),
        bias(hidden),
        normal(dim, hidden, 1, 1, scale=hidden**-0.5),
        bias(dim),
    ]
    options = {name: case[name] for name in ("stride", "residual", "spatial_activation", "activation")}
    wide = [None if tensor is None else tensor.double() for tensor in tensors]
    expected = fused_conv_first_reference(*wide, **options)
    with torch.no_grad():
        found = fused_conv_first(*surrounded(tensors, device), **options)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    return {"y": error(found, expected)}


def surrounded(tensors: list, device: str) -> list:
    """The tensors, on the device, each with NaN in front of it and behind: what is read outside of them shows."""
    found = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
            continue
        last = tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        margin = 1024
        memory = torch.full((tensor.numel() + 2 * margin,), float("nan"), dtype=tensor.dtype, device=device)
        inner = memory[margin : margin + tensor.numel()].as_strided(last.shape, last.stride(), margin)
        inner.copy_(last)
        found.append(inner)
    return found


@pytest.fixture(scope="module")
def interpreted() -> Errors:
    return errors_of_interpreted("tests.ops.test_block_fusion_triton")


@pytest.mark.parametrize("name", CASES)
def test_the_interpreted_kernel_equals_the_definition(interpreted, name):
    assert interpreted[name]["y"] < tolerance(name)


def test_the_kernel_compiles_to_machine_code_with_matrix_instructions():
    """For the compute capability of an H100; that needs no GPU."""
    pytest.importorskip("triton")
    report = report_of("tests.ops.test_block_fusion_triton", "compile", TRITON_INTERPRET="0")
    assert report["bytes"] > 0
    assert report["matrix instructions"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_on_a_gpu_equals_the_definition(name):
    assert run(CASES[name], "cuda")["y"] < tolerance(name)


def compile_kernel() -> dict[str, int]:
    """Compile the kernel for bfloat16, 16 channels in groups of 8, expanded thrice."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from gatewise.ops.block_fusion import triton as kernels

    # What the autotuner wraps.
    function = kernels._conv_first_kernel.fn
    sizes = {"CHANNELS": 16, "LANES": 16, "HIDDEN": 48, "OUT": 16, "OUT_LANES": 16, "GROUP": 8, "SIZE": 3, "STRIDE": 1}
    options = {"RESIDUAL": True, "SPATIAL_ACTIVATION": 0, "ACTIVATION": 3, "PIXELS": 32, "CHUNK": 16}
    biases = {f"HAS_{name}_BIAS": True for name in ("SPATIAL", "EXPAND", "PROJECT")}
    fixed = sizes | options | biases
    numbers = ("positions", "height", "width", "out_height", "out_width")
    types = {
        name: "constexpr" if name in fixed else "i32" if name in numbers else "*bf16" for name in function.arg_names
    }
    constants = {(function.arg_names.index(name),): value for name, value in fixed.items()}
    found = compile(
        ASTSource(fn=function, signature=types, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4},
    )
    return {"bytes": len(found.asm["cubin"]), "matrix instructions": found.asm["ptx"].count("mma")}


def main() -> None:
    if sys.argv[1:] == ["compile"]:
        print(json.dumps(compile_kernel()))
        return
    from gatewise.ops.block_fusion import triton as kernels

    def interpret(x, spatial, expand, project, residual, tile):
        return kernels.conv_first(x, spatial, expand, project, residual)

    module.conv_first_path = lambda *tensors: ExecutionPath("kernel", "a test")
    module.cpu.conv_first = interpret
    print_errors(run, CASES)


if __name__ == "__main__":
    main()
