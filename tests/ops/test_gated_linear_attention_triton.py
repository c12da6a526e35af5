"""The kernels of gated linear attention, through Triton's interpreter, and on a GPU where there is one.

The interpreter is chosen when Triton is imported, for the whole process. The cases therefore run in a process of their
own, this file as a program, which reports the errors of all results as JSON; the tests read them.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.ops import (
    bidirectional_gated_linear_attention,
    bidirectional_gated_linear_attention_reference,
    gated_linear_attention,
    gated_linear_attention_reference,
)
from gatewise.ops.gated_linear_attention import operators
from tests.ops.interpreted import Errors, error, errors_of_interpreted, print_errors, report_of

PROGRAM = "tests.ops.test_gated_linear_attention_triton"

PLAIN = {"batch": 1, "time": 40, "heads": 1, "kv_heads": 1, "key_dim": 16, "value_dim": 16, "dtype": "float32"}
CASES = {
    "plain": {},
    "without states": {"states": False},
    "reversed": {"reverse": True, "time": 70},
    "three chunks, two sequences": {"time": 130, "batch": 2},
    "a full chunk": {"time": 64},
    "few tokens": {"time": 5},
    "one more than a chunk of 16": {"time": 17},
    "blocks that widths do not divide": {"key_dim": 20, "value_dim": 40},
    "grouped keys": {"heads": 4, "kv_heads": 2, "time": 70},
    "grouped keys, reversed": {"heads": 4, "kv_heads": 2, "reverse": True},
    "packed": {"bounds": [0, 30, 30, 31, 100], "time": 100},
    "packed, reversed": {"bounds": [0, 0, 70, 100], "time": 100, "reverse": True},
    "hard gates": {"hard": True, "time": 70},
    "hard gates, reversed": {"hard": True, "time": 70, "reverse": True},
    "one gate per head": {"per_head": True, "time": 70, "key_dim": 20, "heads": 2},
    "one gate per head, reversed, packed": {"per_head": True, "reverse": True, "bounds": [0, 25, 60], "time": 60},
    "one hard gate per head": {"per_head": True, "hard": True, "time": 70},
    "both directions": {"both": True, "time": 70},
    "both directions, grouped keys": {"both": True, "heads": 2, "key_dim": 20, "value_dim": 40},
    "both directions, packed": {"both": True, "bounds": [0, 10, 60], "time": 60},
    "both directions, one gate per head": {"both": True, "per_head": True, "time": 70},
    "both directions, hard gates": {"both": True, "hard": True, "time": 40},
    "bfloat16": {"dtype": "bfloat16", "time": 70, "key_dim": 32},
    "bfloat16, both directions": {"dtype": "bfloat16", "time": 70, "both": True},
    "bfloat16, one gate per head": {"dtype": "bfloat16", "time": 70, "per_head": True},
    "float16": {"dtype": "float16", "time": 70},
    "one token": {"time": 1, "gradients": False},
    "one token, grouped keys": {
        "time": 1,
        "gradients": False,
        "heads": 4,
        "kv_heads": 2,
        "key_dim": 20,
        "value_dim": 40,
    },
    "one token, one gate per head": {"time": 1, "gradients": False, "per_head": True},
    "first token": {"time": 1, "gradients": False, "states": False},
    "one token with gradients": {"time": 1},
}


def tolerance(name: str, interpreted: bool) -> float:
    """Of the root mean square error over the root mean square, for the worst of results and gradients.

    Operands of half precision are rounded several times on the way; the interpreter does not round them, it truncates.
    Sums of hard gates over a chunk reach hundreds, of which float32 keeps five digits behind the point.
    """
    case = CASES[name]
    if case.get("dtype") == "bfloat16":
        return 2e-2 if interpreted else 1e-2
    if case.get("dtype") == "float16":
        return 5e-4
    return 3e-5 if case.get("hard") else 3e-6


def run(case: dict, device: str = "cpu") -> dict[str, float]:
    """Errors of all results and gradients against the recurrence in float64, relative to their root mean square."""
    case = PLAIN | case
    dtype = getattr(torch, case["dtype"])
    tensors = _inputs(case, dtype)
    cu_seqlens = torch.tensor(case["bounds"]) if "bounds" in case else None
    options = {"cu_seqlens": cu_seqlens} | ({"reverse": True} if case.get("reverse") else {})
    reference = bidirectional_gated_linear_attention_reference if case.get("both") else gated_linear_attention_reference
    expected = _results(reference, {name: x.double() for name, x in tensors.items()}, case, options)
    ours = bidirectional_gated_linear_attention if case.get("both") else gated_linear_attention
    if cu_seqlens is not None:
        options["cu_seqlens"] = cu_seqlens.to(device)
    found = _results(ours, {name: x.to(device) for name, x in tensors.items()}, case, options)
    return {name: error(found[name], expected[name]) for name in expected}


def _inputs(case: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = case["batch"], case["time"]
    key_dim, value_dim, kv_heads = case["key_dim"], case["value_dim"], case["kv_heads"]
    tensors = {
        "q": normal(*shape, case["heads"], key_dim).to(dtype),
        "k": normal(*shape, kv_heads, key_dim).to(dtype),
        "v": normal(*shape, kv_heads, value_dim).to(dtype),
    }
    for name in ("g_forward", "g_backward") if case.get("both") else ("g",):
        raw = normal(*shape, kv_heads, 1 if case.get("per_head") else key_dim)
        tensors[name] = F.logsigmoid(8 * raw - 8) if case.get("hard") else F.logsigmoid(raw) / 4
    if case.get("states", True) and not case.get("both"):
        tensors["state"] = normal(len(case.get("bounds", [0] * (case["batch"] + 1))) - 1, kv_heads, key_dim, value_dim)
    return tensors


def _results(function, tensors: dict[str, Tensor], case: dict, options: dict) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_(case.get("gradients", True)) for name, x in tensors.items()}
    results = function(*leaves.values(), **options)
    named = dict(zip(("o", "final"), results if isinstance(results, tuple) else (results,), strict=False))
    if not case.get("gradients", True):
        return named
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(x.shape, generator=generator).to(getattr(torch, case["dtype"])) for name, x in named.items()
    }
    used = named if case.get("states", True) else {"o": named["o"]}
    loss = sum((x * weights[name].to(x.device, x.dtype)).sum() for name, x in used.items())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return named | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


@pytest.fixture(scope="module")
def interpreted() -> Errors:
    return errors_of_interpreted(PROGRAM, "run")


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_the_recurrence(interpreted, name):
    assert max(interpreted[name].values()) < tolerance(name, interpreted=True), interpreted[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_a_gpu_equal_the_recurrence(name):
    errors = run(CASES[name], "cuda")
    assert max(errors.values()) < tolerance(name, interpreted=False), errors


def test_kernels_are_chosen_for_cuda_and_not_for_float64():
    from torch._subclasses.fake_tensor import FakeTensorMode

    pytest.importorskip("triton")
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = {
            (device, dtype): torch.empty(1, 4, 1, 16, device=device, dtype=dtype)
            for device in ("cpu", "cuda")
            for dtype in (torch.float32, torch.bfloat16, torch.float64)
        }
        chosen = [key for key, tensor in tensors.items() if operators.suits_triton(tensor)]
    assert chosen == [("cuda", torch.float32), ("cuda", torch.bfloat16)]


@pytest.mark.parametrize("width", [1, 16])
def test_kernels_compile_for_an_h100(width):
    """What the interpreter runs may still not compile; compiling needs no GPU."""
    pytest.importorskip("triton")
    report = report_of(PROGRAM, "compile", str(width), TRITON_INTERPRET="0")
    assert set(report) == KERNELS
    assert all(size > 0 for size in report.values())


KERNELS = {
    "sum_gates_kernel",
    "states_kernel",
    "outputs_kernel",
    "step_kernel",
    "value_gradients_kernel",
    "query_key_gradients_kernel",
}


def compile_kernels(width: int) -> dict[str, int]:
    """Bytes of machine code of each kernel for compute capability 9.0, with bfloat16 tokens in both directions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gatewise.ops.gated_linear_attention import triton_backward_kernels, triton_kernels

    kernels = [
        getattr(triton_kernels, name, None) or getattr(triton_backward_kernels, name) for name in sorted(KERNELS)
    ]
    return {
        kernel.__name__: len(
            triton.compile(ASTSource(kernel, *_arguments(kernel, width)), target=GPUTarget("cuda", 90, 32)).asm["cubin"]
        )
        for kernel in kernels
    }


def _arguments(kernel, width: int) -> tuple[dict[str, str], dict[str, object]]:
    """Types of the arguments, and values of those that are fixed at compile time."""
    import triton.language as tl

    fixed = {"WIDTH": width, "LEVELS": 4, "GROUPS": 2, "PACKED": True, "CHUNK": 16, "FORWARD": True, "BACKWARD": True}
    fixed |= {"REVERSE": True, "GRADIENT": True, "HAS_INITIAL": True, "HAS_STATE": True, "BK": 16, "BV": 32}
    fixed |= {"BW": width, "OPERAND": tl.bfloat16, "PRECISION": "tf32"}
    tokens = dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv", "x", "y"), "*bf16")
    states = dict.fromkeys(("boundaries", "forward_states", "backward_states"), "*bf16")
    states |= dict.fromkeys(("forward_gradients", "backward_gradients"), "*bf16")
    wide = ("g", "sums", "forward_sums", "backward_sums", "forward_dg", "backward_dg")
    wide = dict.fromkeys((*wide, "initial", "final", "state", "new_state"), "*fp32")
    types = tokens | states | wide | {"table": "*i64", "firsts": "*i64", "scale": "fp32"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    return signature, {name: fixed[name] for name in names if name in fixed}


def main() -> None:
    if sys.argv[1] == "compile":
        print(json.dumps(compile_kernels(int(sys.argv[2]))))
        return
    operators.suits_triton = lambda q: q.dtype != torch.float64
    print_errors(run, CASES)


if __name__ == "__main__":
    main()
