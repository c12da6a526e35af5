"""Our operators against what stands in for them in plain PyTorch, forward and with the backward pass, on the CPU.

    python benchmarks/operators.py [--seconds 10] [--threads 1]

Each pair computes the same on the same tensors, interleaved in this one process; ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _report import Table, write_results
from torch import Tensor

from gatewise.efficiency import measure, ratio
from gatewise.ops.context_mixing import context_mixing, context_mixing_reference
from gatewise.ops.evonorm import evonorm_b, evonorm_b_reference, evonorm_s, evonorm_s_reference
from gatewise.ops.gated_positional_attention import gated_positional_attention, gated_positional_attention_reference
from gatewise.ops.kernel_attention import kernel_attention, kernel_attention_reference
from gatewise.ops.large_depthwise_conv import large_depthwise_conv
from gatewise.ops.spatial_pool import spatial_max_pool
from gatewise.ops.translation_variant_conv import translation_variant_conv, translation_variant_conv_reference

Call = Callable[..., Tensor]
Pair = tuple[str, str, Call, Call, tuple[Tensor, ...]]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def library_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])


def library_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def pairs() -> list[Pair]:
    """Name, what it is compared with, ours, theirs, and the tensors."""
    maps = normal(8, 64, 56, 56)
    channels = [1 + 0.1 * normal(64) for _ in range(3)]
    found: list[Pair] = []
    for kernel in (7, 13, 17, 31):
        tensors = (normal(4, 96, 28, 28), normal(96, 1, kernel, kernel))
        name = f"large depthwise convolution {kernel}x{kernel}, 4x96x28x28"
        found.append((name, "conv2d", large_depthwise_conv, library_depthwise, tensors))
    heads, taps = 8, 25 + 169
    for side in (14, 32):
        tensors = (
            normal(1, 64, side, side),
            normal(1, 64, 49),
            normal(taps, 49),
            normal(taps),
            normal(heads, 9, 9),
            normal(heads, 25, 25),
            normal(1, 128, side, side),
        )
        name = f"context mixing 5x5 and 13x13, 1x128x{side}x{side}"
        found.append((name, "offset by offset", context_mixing, context_mixing_reference, tensors))
    found.append(("max pooling 3x3, 8x64x56x56", "max_pool2d", spatial_max_pool, library_pool, (maps,)))
    s0: tuple[Call, Call] = (partial(evonorm_s, groups=32), partial(evonorm_s_reference, groups=32))
    found.append(("EvoNorm-S0, 8x64x56x56", "library calls", *s0, (maps, *channels)))

    def b0(operator: Any, *tensors: Tensor) -> Tensor:
        return operator(*tensors, member="B0")[0]

    ours, theirs = partial(b0, evonorm_b), partial(b0, evonorm_b_reference)
    found.append(("EvoNorm-B0, 8x64x56x56", "library calls", ours, theirs, (maps, *channels)))
    tensors = (normal(16, 32, 48, 48), normal(32, 3, 3, 48, 48))
    variant: tuple[Call, Call] = (translation_variant_conv, translation_variant_conv_reference)
    found.append(("translation-variant convolution 3x3, 16x32x48x48", "unfold", *variant, tensors))
    q, k, v = (normal(2, 28, 28, 4, 48) for _ in range(3))
    positional: tuple[Call, Call] = (gated_positional_attention, gated_positional_attention_reference)
    name = "gated positional attention, 28x28, 4 heads of 48"
    found.append((name, "maps of all pairs", *positional, (q, k, v, normal(4, 3), normal(4))))
    q, k, v = normal(1, 1024, 6, 16).abs(), normal(1, 1024, 6, 16).abs(), normal(1, 1024, 6, 16)
    kernel_pair: tuple[Call, Call] = (kernel_attention, kernel_attention_reference)
    found.append(("kernel attention, 1,024 tokens, 6 heads of 16", "maps of all pairs", *kernel_pair, (q, k, v)))
    return found


def forward(operator: Call, tensors: tuple[Tensor, ...]) -> Tensor:
    with torch.inference_mode():
        return operator(*tensors)


def with_backward(operator: Call, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(operator(*leaves).sum(), leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, per pair")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows, cases = [], []
    for name, against, ours, theirs, tensors in pairs():
        torch.testing.assert_close(forward(ours, tensors), forward(theirs, tensors), rtol=1e-3, atol=1e-3)
        row = [name, against]
        for kind, way in (("forward", forward), ("forward and backward", with_backward)):
            calls = {"theirs": partial(way, theirs, tensors), "ours": partial(way, ours, tensors)}
            candidates = {key: lambda _, call=call: call() for key, call in calls.items()}
            before, after = measure(candidates, torch.empty(1), budget_s=args.seconds / 2, min_rounds=5, max_rounds=60)
            faster = ratio(before, after)
            row.append(f"{1e3 * before.median:.2f} / {1e3 * after.median:.2f} ms = {faster}")
            samples = {"theirs_ms": [1e3 * s for s in before.samples], "ours_ms": [1e3 * s for s in after.samples]}
            cases.append({"operator": name, "against": against, "kind": kind, "ratio": faster.median, **samples})
        print(" | ".join(row), flush=True)
        rows.append(row)
    slower = [f"{case['operator']} ({case['kind']})" for case in cases if case["ratio"] < 1]
    headline = f"float32, {args.threads} thread(s). Slower: {'; '.join(slower) or 'none'}. Ratios: median (quartiles)."
    header = ["operator", "against", "forward", "forward and backward"]
    write_results("operators", headline, [Table("Times faster than plain PyTorch", header, rows)], {"cases": cases})


if __name__ == "__main__":
    main()
