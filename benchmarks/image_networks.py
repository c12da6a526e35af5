"""`gatewise.optimize` against the plainest faithful form of each image network, and timm's, on the CPU.

    python benchmarks/image_networks.py [--batch-size 1] [--bf16] [--only convit_tiny ...] [--budget 25] [--seconds 12]

The plain form is the same network with the same weights, as it is trained, in plain memory order and eager mode, with
library calls or the definition itself in the place of this library's operators. It, timm's network of that name (where
there is one) and the optimized ones (in float32, and with bfloat16 permitted) are interleaved in this one
process; ratios are taken within rounds. Weights are random.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from _report import RESULTS, Table, write_results
from torch import Tensor, nn

import gatewise
from gatewise.efficiency import measure, ratio
from gatewise.efficiency.acceleration.optimize import relative_error
from gatewise.efficiency.cost.count import count
from gatewise.ops.context_mixing import context_mixing_reference
from gatewise.ops.decayed_window_attention import decayed_window_attention_reference
from gatewise.ops.evonorm import evonorm_b_reference, evonorm_s_reference
from gatewise.ops.gated_linear_attention_2d import gated_linear_attention_2d_reference
from gatewise.ops.gated_norm_blend import gated_norm_blend_reference
from gatewise.ops.gated_positional_attention import gated_positional_attention_reference
from gatewise.ops.translation_variant_conv import translation_variant_conv_reference

NETWORKS: dict[str, tuple[int, str | None]] = {
    "focalnet_tiny_srf": (224, "focalnet_tiny_srf"),
    "hornet_tiny_7x7": (224, None),
    "hornet_tiny_gf": (224, None),
    "inception_next_tiny": (224, "inception_next_tiny"),
    "unireplknet_a": (224, None),
    "unireplknet_t": (224, None),
    "overlock_xt": (224, None),
    "convit_tiny": (224, "convit_tiny"),
    "vig_tiny": (224, None),
    "gated_swinrmt_tiny_swat": (224, None),
    "gated_swinrmt_tiny_retention": (224, None),
    "spartan_tiny": (224, None),
    "tiny_moat_0": (224, None),
    "resnet50_max": (224, None),
    "resnet50_hybrid": (224, None),
    "vit_ti_max": (224, None),
    "pit_ti_max": (224, None),
    "resnet50_evonorm_s0": (224, None),
    "mobilenetv2_evonorm_s0": (224, None),
    "mobilenetv2_evonorm_b0": (224, None),
    "mobilenetv2_100": (224, "mobilenetv2_100"),
    "inception_v4": (299, "inception_v4"),
    "convfirstnet_small": (224, None),
    "tvconv_mobilenet_v2_x1_0": (96, None),
    "tvconv_shufflenet_v2_x1_0": (96, None),
    "herseg_encoder_96": (224, None),
    "activator_cifar10": (32, None),
    "ninformer_cifar10": (32, None),
    "resnet18_cifar_moe": (32, None),
}
"""Pixels a side, and timm's name, where it has the network."""


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1) -> Tensor:
    return F.conv2d(x, weight, bias, padding=dilation * (weight.shape[-1] // 2), dilation=dilation, groups=x.shape[1])


def _max_pool(x: Tensor, kernel_size: int = 3, stride: int = 1) -> Tensor:
    return F.max_pool2d(x, kernel_size, stride, kernel_size // 2)


def _positional(*tensors: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    return gated_positional_attention_reference(*tensors, scale=scale)


PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("gatewise.layers.depthwise_conv", "large_depthwise_conv"): _depthwise,
    ("gatewise.layers.gated_context_mixing", "context_mixing"): context_mixing_reference,
    ("gatewise.layers.evonorm", "evonorm_s"): evonorm_s_reference,
    ("gatewise.layers.evonorm", "evonorm_b"): evonorm_b_reference,
    ("gatewise.layers.tvconv", "translation_variant_conv"): translation_variant_conv_reference,
    ("gatewise.networks.image.pflayer.resnet", "spatial_max_pool"): _max_pool,
    ("gatewise.networks.image.pflayer.transformers", "spatial_max_pool"): _max_pool,
    ("gatewise.networks.image.convit", "gated_positional_attention"): _positional,
    ("gatewise.networks.image.gated_swinrmt.blocks", "decayed_window_attention"): decayed_window_attention_reference,
    ("gatewise.networks.image.vig.blocks", "gated_linear_attention_2d"): gated_linear_attention_2d_reference,
    ("gatewise.networks.image.vig.blocks", "gated_norm_blend"): gated_norm_blend_reference,
}
"""What stands in for an operator where it is called: module and name there."""


@contextmanager
def plain_operators() -> Iterator[None]:
    """Within the block, networks call library functions or definitions in the place of the operators above."""
    kept = {}
    for (path, name), stand_in in PLAIN.items():
        module = importlib.import_module(path)
        kept[path, name] = getattr(module, name)
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for (path, name), own in kept.items():
            setattr(importlib.import_module(path), name, own)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


def run_plain(model: nn.Module, x: Tensor) -> Tensor:
    with plain_operators():
        return run(model, x)


def compare(name: str, batch_size: int, bf16: bool, budget_s: float, seconds: float) -> dict[str, Any]:
    """Times and ratios of one network."""
    side, timms = NETWORKS[name]
    torch.manual_seed(0)
    model = settled(gatewise.create_model(name), side)
    example = torch.randn(batch_size, 3, side, side)
    fast = gatewise.optimize(model, example, "float32", budget_s=budget_s)
    calls: dict[str, Callable[[Tensor], Tensor]] = {"plain": partial(run_plain, model), "optimized": fast}
    if bf16:
        calls["bf16"] = half = gatewise.optimize(model, example, "bf16", budget_s=budget_s)
    if timms is not None:
        calls["timm"] = partial(run, timm.create_model(timms).eval())
    expected = run_plain(model, example)
    error = relative_error(fast(example), expected)
    timings = dict(zip(calls, measure(calls, example, budget_s=seconds, min_rounds=5), strict=True))
    faster = {key: ratio(timings[key], timings["optimized"]) for key in calls if key not in ("optimized", "bf16")}
    case: dict[str, Any] = {
        "network": name,
        "macs": count(model, example).macs,
        "pixels": side,
        "batch_size": batch_size,
        "plan": fast.report.chosen.name,
        "error_against_plain": error,
        "ms": {key: [1e3 * value for value in timing.samples] for key, timing in timings.items()},
        "median_ms": {key: 1e3 * timing.median for key, timing in timings.items()},
        "faster": {key: value.median for key, value in faster.items()},
        "quartiles": {key: [value.low, value.high] for key, value in faster.items()},
        "text": {key: str(value) for key, value in faster.items()},
    }
    if bf16:
        gain = ratio(timings["plain"], timings["bf16"])
        case["bf16"] = {
            "plan": half.report.chosen.name,
            "error_against_plain": relative_error(half(example), expected),
            "faster": gain.median,
            "quartiles": [gain.low, gain.high],
            "text": str(gain),
        }
    shown = ", ".join(f"{key} {text}" for key, text in case["text"].items())
    shown += f", plain/bf16 {case['bf16']['text']}" if bf16 else ""
    print(f"{name}, batch {batch_size}: {case['plan']}, {shown}, error {error:.1e}", flush=True)
    return case


@torch.no_grad()
def settled(model: nn.Module, side: int) -> nn.Module:
    """The network in eval mode, its norms' running statistics those of its activations, as training leaves them.

    With fresh ones, norms do not normalize, and deep networks magnify each rounding: no plan could be checked.
    """
    if any(name.endswith("running_var") for name, _ in model.named_buffers()):
        model.train()
        for _ in range(30):
            model(torch.randn(8, 3, min(side, 96), min(side, 96)))
    return model.eval()


def peak_flops() -> float:
    """Floating-point operations per second of a product of large matrices, the best of several."""
    a, b = torch.randn(2, 1536, 1536)
    fastest = min(timeit.repeat(lambda: a @ b, number=1, repeat=15))
    return 2 * 1536**3 / fastest


def earlier_cases(batch_size: int) -> dict[str, dict[str, Any]]:
    """What the last run wrote, by network.

    Raises:
        ValueError: if it ran with another number of threads.
    """
    path = RESULTS / f"{title(batch_size)}.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["threads_used"] != torch.get_num_threads():
        raise ValueError(f"{path.name} is of {record['threads_used']} threads, not of {torch.get_num_threads()}")
    return {case["network"]: case for case in record["cases"]}


def title(batch_size: int) -> str:
    return f"image_networks_batch_{batch_size}"


def write(cases: list[dict[str, Any]], batch_size: int, threads: int, peak: float) -> None:
    """The table, and all figures behind it."""
    means = geometric_means(cases)
    shown = {key: f"{mean:.2f}x" for key, mean in means.items()}
    last = ["geometric mean", "", "", "", "", shown["plain"], shown.get("timm", ""), "", "", "", shown.get("bf16", "")]
    header = ["network", "pixels", "plan", "plain ms", "optimized ms", "against plain", "against timm"]
    header += ["plain of peak", "optimized of peak", "bf16 plan", "bf16 against plain"]
    table = Table(f"Times faster, batch {batch_size}", header, [*(row(case, peak) for case in cases), last])
    slower = [case["network"] for case in cases if min(case["faster"].values()) < 1]
    headline = (
        f"Batch {batch_size}, {threads} thread(s), float32 where nothing else is said. Slower than plain or timm: "
        f"{', '.join(slower) or 'none'}. Ratios: median over rounds (quartiles). The plain form: the training form in "
        "eval mode, eager, plain memory order, library calls or definitions for operators "
        f"({Path(__file__).name} lists them). Of peak: multiply-accumulates over time, against the "
        f"{peak / 1e9:.0f} GFLOP/s of a large matrix product here; what is near 100 % cannot become faster in this "
        "precision on this processor."
    )
    data = {"cases": cases, "geometric_means": means, "peak_flops": peak, "threads_used": threads}
    write_results(title(batch_size), headline, [table], data)


def row(case: dict[str, Any], peak: float) -> list[str]:
    """A network's line of the table."""
    half = case.get("bf16", {"plan": "", "text": ""})
    return [
        case["network"],
        str(case["pixels"]),
        case["plan"],
        f"{case['median_ms']['plain']:.1f}",
        f"{case['median_ms']['optimized']:.1f}",
        case["text"]["plain"],
        case["text"].get("timm", ""),
        f"{100 * share_of_peak(case, 'plain', peak):.0f} %",
        f"{100 * share_of_peak(case, 'optimized', peak):.0f} %",
        half["plan"],
        half["text"],
    ]


def geometric_means(cases: list[dict[str, Any]]) -> dict[str, float]:
    """How many times faster: than the plain form, than timm, and than the plain form where bfloat16 is permitted."""
    found = {key: [case["faster"][key] for case in cases if key in case["faster"]] for key in ("plain", "timm")}
    found["bf16"] = [case["bf16"]["faster"] for case in cases if "bf16" in case]
    return {key: statistics.geometric_mean(values) for key, values in found.items() if values}


def share_of_peak(case: dict[str, Any], which: str, peak: float) -> float:
    return 2 * case["macs"] / (case["median_ms"][which] / 1e3) / peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--budget", type=float, default=25.0, help="seconds of trying plans, per network")
    parser.add_argument("--seconds", type=float, default=12.0, help="of measuring, per network")
    parser.add_argument("--bf16", action="store_true", help="also with bfloat16 permitted")
    parser.add_argument("--keep", action="store_true", help="keep what the last results say of other networks")
    parser.add_argument("--threads", type=int, help="of every network; as many as there are cores by default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    peak = peak_flops()
    cases = earlier_cases(args.batch_size) if args.keep else {}
    for name in args.only:
        cases[name] = compare(name, args.batch_size, args.bf16, args.budget, args.seconds)
        # After each, so that what was measured is kept whatever ends the run.
        ordered = [cases[network] for network in NETWORKS if network in cases]
        write(ordered, args.batch_size, torch.get_num_threads(), peak)


if __name__ == "__main__":
    main()
