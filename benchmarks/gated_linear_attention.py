"""Gated linear attention against softmax attention and the plain recurrence on the CPU, forward and backward.

    python benchmarks/gated_linear_attention.py [--seconds 20] [--threads 2] [--longest 32768]

Batch 2 and 4 heads, keys of width 64 and values of width 128, float32: a layer of width 512. Softmax attention of equal
width is `F.scaled_dot_product_attention` with 4 causal heads of 128; with heads of 96 it has as many columns to
multiply as keys and values have here. Measured interleaved in one process; ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _report import Table, write_results
from torch import Tensor

from gatewise.efficiency import measure, ratio
from gatewise.efficiency.timing.measure import Timing, peak_memory
from gatewise.ops import bidirectional_gated_linear_attention, gated_linear_attention, gated_linear_attention_reference

BATCH, HEADS, KEY_DIM, VALUE_DIM = 2, 4, 64, 128
SOFTMAX_LONGEST = 8192
"""Tokens up to which softmax attention is measured: at 32768 a step would take a minute."""

Step = Callable[[Tensor], None]


def random_gates(time: int, width: int = KEY_DIM) -> Tensor:
    """As the layer makes them: logsigmoid(x) / 16."""
    return F.logsigmoid(torch.randn(BATCH, time, HEADS, width)) / 16


def tokens(time: int) -> list[Tensor]:
    widths = (KEY_DIM, KEY_DIM, VALUE_DIM)
    return [torch.randn(BATCH, time, HEADS, width, requires_grad=True) for width in widths]


def linear_step(time: int, operator: Callable[..., Any] = gated_linear_attention, width: int = KEY_DIM) -> Step:
    """Forward and backward of the operator with gates of this width."""
    leaves = [*tokens(time), random_gates(time, width).requires_grad_()]
    cotangent = torch.randn(BATCH, time, HEADS, VALUE_DIM)
    return lambda _: _backward(operator(*leaves)[0], leaves, cotangent)


def both_ways_step(time: int) -> Step:
    gates = [random_gates(time).requires_grad_() for _ in range(2)]
    leaves = [*tokens(time), *gates]
    cotangent = torch.randn(BATCH, time, HEADS, VALUE_DIM)
    return lambda _: _backward(bidirectional_gated_linear_attention(*leaves), leaves, cotangent)


def softmax_step(time: int, width: int, causal: bool = True) -> Step:
    """Forward and backward of softmax attention with heads of this width."""
    leaves = [torch.randn(BATCH, HEADS, time, width, requires_grad=True) for _ in range(3)]
    cotangent = torch.randn(BATCH, HEADS, time, width)
    return lambda _: _backward(F.scaled_dot_product_attention(*leaves, is_causal=causal), leaves, cotangent)


def _backward(output: Tensor, leaves: Sequence[Tensor], cotangent: Tensor) -> None:
    torch.autograd.grad(output, leaves, cotangent)


class Decoder:
    """One token after a context, from its state."""

    def __init__(self, context: int) -> None:
        q, k, v = (x.detach() for x in tokens(context))
        self.state = gated_linear_attention(q, k, v, random_gates(context))[1]
        self.token = [*(x.detach() for x in tokens(1)), random_gates(1)]

    @torch.no_grad()
    def __call__(self, _: Tensor) -> None:
        _, self.state = gated_linear_attention(*self.token, self.state)


def lengths(args: argparse.Namespace) -> tuple[Table, list[dict[str, Any]]]:
    """Time over length, against softmax attention as far as that goes."""
    rows, cases = [], []
    time = 512
    while time <= args.longest:
        steps = {"per channel": linear_step(time), "per head": linear_step(time, width=1)}
        if time <= SOFTMAX_LONGEST:
            steps |= {"softmax 128": softmax_step(time, 128), "softmax 96": softmax_step(time, 96)}
        timings = _measured(steps, args)
        ours = timings["per channel"]
        faster = {name: ratio(timing, ours) for name, timing in timings.items() if name.startswith("softmax")}
        rows.append(
            [
                str(time),
                _milliseconds(ours),
                f"{1e6 * ours.median / (BATCH * time):.2f} µs",
                _milliseconds(timings["per head"]),
                *(_milliseconds(timings[name]) if name in timings else "" for name in ("softmax 128", "softmax 96")),
                *(str(faster[name]) if name in faster else "" for name in ("softmax 128", "softmax 96")),
            ]
        )
        cases.append({"time": time, **_samples(timings)})
        print(rows[-1], flush=True)
        time *= 2
    header = ["tokens", "gate per channel", "per token", "gate per head", "softmax, 4 x 128", "softmax, 4 x 96"]
    header += ["times faster than 4 x 128 (quartiles)", "times faster than 4 x 96 (quartiles)"]
    return Table("Forward and backward over length", header, rows), cases


def recurrence(args: argparse.Namespace) -> tuple[Table, dict[str, Any]]:
    steps = {"recurrence": linear_step(1024, gated_linear_attention_reference), "chunked": linear_step(1024)}
    timings = _measured(steps, args)
    faster = ratio(timings["recurrence"], timings["chunked"])
    row = [_milliseconds(timings["recurrence"]), _milliseconds(timings["chunked"]), str(faster)]
    print(row, flush=True)
    header = ["token by token", "ours", "times faster (quartiles)"]
    return Table("Against the plain recurrence, 1024 tokens, forward and backward", header, [row]), _samples(timings)


def both_directions(args: argparse.Namespace) -> tuple[Table, list[dict[str, Any]]]:
    rows, cases = [], []
    for time in (196, 784, 3136):
        timings = _measured({"softmax": softmax_step(time, 128, causal=False), "ours": both_ways_step(time)}, args)
        faster = ratio(timings["softmax"], timings["ours"])
        rows.append([str(time), _milliseconds(timings["softmax"]), _milliseconds(timings["ours"]), str(faster)])
        cases.append({"time": time, **_samples(timings)})
        print(rows[-1], flush=True)
    header = ["tokens", "softmax, 4 x 128", "ours", "times faster (quartiles)"]
    return Table("Both directions, forward and backward", header, rows), cases


def memory(args: argparse.Namespace) -> tuple[Table, list[dict[str, Any]]]:
    rows, cases = [], []
    for time in (2048, 4096, 8192, 16384):
        step = linear_step(time)
        peak = peak_memory(step, torch.empty(0))
        inputs = 4 * BATCH * time * HEADS * (3 * KEY_DIM + VALUE_DIM)
        rows.append([str(time), f"{peak / 2**20:.0f} MiB", f"{inputs / 2**20:.0f} MiB", f"{peak / inputs:.2f}"])
        cases.append({"time": time, "peak_bytes": peak, "input_bytes": inputs})
        print(rows[-1], flush=True)
    header = ["tokens", "peak of forward and backward", "inputs", "peak / inputs"]
    return Table("Memory beyond the inputs: output, gradients and work", header, rows), cases


def decoding(args: argparse.Namespace) -> tuple[Table, dict[str, Any]]:
    contexts = (64, 1024, 16384)
    timings = _measured({str(context): Decoder(context) for context in contexts}, args)
    rows = [[name, f"{1e6 * timing.median:.0f} µs"] for name, timing in timings.items()]
    print(rows, flush=True)
    title = f"Decoding: one token for each of {BATCH} sequences"
    return Table(title, ["tokens before", "time per token"], rows), _samples(timings)


def _measured(steps: dict[str, Step], args: argparse.Namespace) -> dict[str, Timing]:
    timings = measure(steps, torch.empty(BATCH, 0), budget_s=args.seconds, min_rounds=5, warm_up=1)
    return {timing.name: timing for timing in timings}


def _milliseconds(timing: Timing) -> str:
    return f"{1e3 * timing.median:.1f} ms"


def _samples(timings: dict[str, Timing]) -> dict[str, Any]:
    return {f"{name}_ms": [1e3 * sample for sample in timing.samples] for name, timing in timings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, per row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--longest", type=int, default=32768, help="tokens, from 512 on in powers of two")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    parts = {part.__name__: part(args) for part in (lengths, recurrence, both_directions, memory, decoding)}
    headline = (
        "Targets: faster than softmax attention of equal width from 2048 tokens on, time and memory linear in the "
        "length, at least 5 times the plain recurrence at 1024 tokens, decoding independent of the context."
    )
    sizes = {"batch": BATCH, "heads": HEADS, "key_dim": KEY_DIM, "value_dim": VALUE_DIM, "dtype": "float32"}
    tables = [table for table, _ in parts.values()]
    data = {"sizes": sizes, **{name: data for name, (_, data) in parts.items()}}
    write_results("gated_linear_attention", headline, tables, data)


if __name__ == "__main__":
    main()
