"""`gatewise.optimize` against the plainest faithful form of each image network, and timm's, on the CPU in float32.

    python benchmarks/image_networks.py [--batch-size 1] [--only convit_tiny ...] [--budget 25] [--seconds 12]

The plain form is the same network with the same weights, as it is trained, in plain memory order and eager mode, with
library calls or the definition itself in the place of this library's operators. It, timm's network of that name (where
there is one) and the optimised one are measured by turns, in this one process; ratios are taken within rounds.
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
from gatewise.efficiency.count import count
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
    ("gatewise.layers.dilated_reparam", "large_depthwise_conv"): _depthwise,
    ("gatewise.layers.gated_context_mixing", "context_mixing"): context_mixing_reference,
    ("gatewise.layers.evonorm", "evonorm_s"): evonorm_s_reference,
    ("gatewise.layers.evonorm", "evonorm_b"): evonorm_b_reference,
    ("gatewise.layers.tvconv", "translation_variant_conv"): translation_variant_conv_reference,
    ("gatewise.networks.image.pflayer", "spatial_max_pool"): _max_pool,
    ("gatewise.networks.image.pflayer_transformers", "spatial_max_pool"): _max_pool,
    ("gatewise.networks.image.convit", "gated_positional_attention"): _positional,
    ("gatewise.networks.image.gated_swinrmt_blocks", "decayed_window_attention"): decayed_window_attention_reference,
    ("gatewise.networks.image.vig_blocks", "gated_linear_attention_2d"): gated_linear_attention_2d_reference,
    ("gatewise.networks.image.vig_blocks", "gated_norm_blend"): gated_norm_blend_reference,
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


def compare(name: str, batch_size: int, budget_s: float, seconds: float) -> dict[str, Any]:
    """Times and ratios of one network."""
    side, timms = NETWORKS[name]
    torch.manual_seed(0)
    model = gatewise.create_model(name).eval()
    example = torch.randn(batch_size, 3, side, side)
    fast = gatewise.optimize(model, example, "float32", budget_s=budget_s)
    calls: dict[str, Callable[[Tensor], Tensor]] = {"plain": partial(run_plain, model), "optimised": fast}
    if timms is not None:
        calls["timm"] = partial(run, timm.create_model(timms).eval())
    expected = run_plain(model, example)
    error = ((fast(example) - expected).abs().max() / expected.abs().max()).item()
    timings = dict(zip(calls, measure(calls, example, budget_s=seconds, min_rounds=5), strict=True))
    faster = {key: ratio(timings[key], timings["optimised"]) for key in calls if key != "optimised"}
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
    shown = ", ".join(f"{key} {text}" for key, text in case["text"].items())
    print(f"{name}, batch {batch_size}: {case['plan']}, {shown}, error {error:.1e}", flush=True)
    return case


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
    rows = [
        [
            case["network"],
            str(case["pixels"]),
            case["plan"],
            f"{case['median_ms']['plain']:.1f}",
            f"{case['median_ms']['optimised']:.1f}",
            case["text"]["plain"],
            case["text"].get("timm", ""),
            f"{100 * share_of_peak(case, 'plain', peak):.0f} %",
            f"{100 * share_of_peak(case, 'optimised', peak):.0f} %",
        ]
        for case in cases
    ]
    means = {
        against: statistics.geometric_mean(case["faster"][against] for case in cases if against in case["faster"])
        for against in ("plain", "timm")
        if any(against in case["faster"] for case in cases)
    }
    timm_mean = f"{means['timm']:.2f}x" if "timm" in means else ""
    rows.append(["geometric mean", "", "", "", "", f"{means['plain']:.2f}x", timm_mean, "", ""])
    slower = [case["network"] for case in cases if min(case["faster"].values()) < 1]
    headline = (
        f"float32, batch {batch_size}, {threads} thread(s). Slower than plain or timm: {', '.join(slower) or 'none'}. "
        "Ratios: median over rounds (quartiles). The plain form: the training form in eval mode, eager, plain memory "
        f"order, library calls or definitions for operators ({Path(__file__).name} lists them). Of peak: "
        f"multiply-accumulates over time, against the {peak / 1e9:.0f} GFLOP/s of a large matrix product here; what is "
        "near 100 % cannot become faster in this precision on this processor."
    )
    header = ["network", "pixels", "plan", "plain ms", "optimised ms", "against plain", "against timm"]
    table = Table(f"Times faster, batch {batch_size}", [*header, "plain of peak", "optimised of peak"], rows)
    data = {"cases": cases, "geometric_means": means, "peak_flops": peak, "threads_used": threads}
    write_results(title(batch_size), headline, [table], data)


def share_of_peak(case: dict[str, Any], which: str, peak: float) -> float:
    return 2 * case["macs"] / (case["median_ms"][which] / 1e3) / peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--budget", type=float, default=25.0, help="seconds of trying plans, per network")
    parser.add_argument("--seconds", type=float, default=12.0, help="of measuring, per network")
    parser.add_argument("--keep", action="store_true", help="keep what the last results say of other networks")
    parser.add_argument("--threads", type=int, help="of every network; as many as there are cores by default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    peak = peak_flops()
    cases = earlier_cases(args.batch_size) if args.keep else {}
    for name in args.only:
        cases[name] = compare(name, args.batch_size, args.budget, args.seconds)
        # After each, so that what was measured is kept whatever ends the run.
        ordered = [cases[network] for network in NETWORKS if network in cases]
        write(ordered, args.batch_size, torch.get_num_threads(), peak)


if __name__ == "__main__":
    main()
