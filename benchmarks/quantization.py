"""8-bit networks against themselves in float32 on the CPU: eager PyTorch and onnxruntime.

    python benchmarks/quantization.py [--only mobilenetv2_100 resnet50] [--threads 1] [--seconds 60]

All forms of a network are interleaved in this one process; ratios are taken within rounds. Weights are random, as
fresh networks have them, so outputs are compared by their cosine. The quantized network runs in whichever of
onnxruntime and OpenVINO is quicker for it; both are shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _report import Table, write_results
from torch import Tensor, nn

import gatewise
from gatewise.efficiency.acceleration.export import onnx_bytes, onnx_session
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.acceleration.openvino import openvino_installed
from gatewise.efficiency.quantization.quantize import QuantizedModel, quantize
from gatewise.efficiency.timing.measure import Timing, measure, ratio

EAGER, FLOAT, INT8 = "eager float32", "onnxruntime float32", "int8"

TARGETS: dict[str, dict[str, float]] = {
    "mobilenetv2_100": {EAGER: 8.0, FLOAT: 2.2},
    "resnet50": {FLOAT: 3.0},
    "focalnet_tiny_srf": {FLOAT: 1.8},
    "inception_next_tiny": {FLOAT: 1.8},
}
"""Times faster than what, at least."""

LEAST_COSINE = 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(TARGETS), default=list(TARGETS), metavar="NAME")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring, per network")
    parser.add_argument("--name", default="quantization", help="of the result files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [case for name in args.only for case in compare(name, args.batch_size, args.seconds)]
    missed = [f"{case['network']} against {case['against']}" for case in cases if not case["met"]]
    headline = (
        f"Batch {args.batch_size}, 224x224, {args.threads} thread(s). Ratios: median over rounds (quartiles). "
        f"Targets missed: {', '.join(missed) or 'none'}."
    )
    header = ["network", "against", "runtime", "times", "faster", "target", "cosine", "size"]
    rows = [
        [
            case["network"],
            case["against"],
            case["runtime"],
            f"{case['before_ms']:.2f} ms / {case['after_ms']:.2f} ms",
            case["text"],
            f"{case['target']:.1f}x" if case["target"] else "-",
            f"{case['cosine']:.4f}",
            f"{case['bytes_before'] / 2**20:.1f} -> {case['bytes_after'] / 2**20:.1f} MiB",
        ]
        for case in cases
    ]
    write_results(args.name, headline, [Table("Times faster with 8 bits", header, rows)], {"cases": cases})


@torch.no_grad()
def compare(name: str, batch_size: int, seconds: float) -> list[dict[str, Any]]:
    """A record for each float form of a network and each runtime of the quantized one."""
    torch.manual_seed(0)
    model = _network(name)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, 224, 224, generator=generator) for _ in range(2)]
    example = torch.randn(batch_size, 3, 224, 224, generator=generator)
    network = quantize(model, batches)
    floats = onnx_session(onnx_bytes(fold(model), example), torch.get_num_threads())
    calls: dict[str, Callable[[Tensor], Tensor]] = {EAGER: partial(_run, model), FLOAT: floats, INT8: network}
    if openvino_installed():
        calls[f"{INT8}, openvino"] = QuantizedModel(network.onnx, network.report, "openvino")
    expected = model(example)
    cosines = {
        key: nn.functional.cosine_similarity(call(example), expected).min().item() for key, call in calls.items()
    }
    timings = dict(zip(calls, measure(calls, example, budget_s=seconds, min_rounds=9, max_rounds=1000), strict=True))
    forms = [key for key in calls if key.startswith(INT8)]
    quickest = max(forms, key=lambda form: ratio(timings[FLOAT], timings[form]).median)
    cases = []
    for form in forms:
        for against in (EAGER, FLOAT):
            target = TARGETS[name].get(against) if form == quickest else None
            case = _case(timings[against], timings[form], target, cosines[form])
            cases.append(
                {
                    "network": name,
                    "runtime": "openvino" if form != INT8 else "onnxruntime",
                    **case,
                    "bytes_before": network.report.bytes_before,
                    "bytes_after": network.report.bytes_after,
                    "noise_db": network.report.noise_db,
                }
            )
    return cases


def _case(before: Timing, after: Timing, target: float | None, cosine: float) -> dict[str, Any]:
    faster = ratio(before, after)
    return {
        "against": before.name,
        "ratio": faster.median,
        "quartiles": [faster.low, faster.high],
        "text": str(faster),
        "target": target,
        "cosine": cosine,
        "met": cosine > LEAST_COSINE and (target is None or faster.median >= target),
        "before_ms": 1e3 * before.median,
        "after_ms": 1e3 * after.median,
        "rounds": len(before.samples),
    }


def _network(name: str) -> nn.Module:
    if name == "resnet50":
        from torchvision.models import resnet50

        return resnet50().eval()
    return gatewise.create_model(name).eval()


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


if __name__ == "__main__":
    main()
