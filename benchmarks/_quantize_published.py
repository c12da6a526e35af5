"""What 8 bits do to networks at their published sizes: fresh weights, images of noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _kept import kept
from _quantize_trained import described
from image_networks import NETWORKS
from torch import Tensor

import gatewise
from gatewise.efficiency import measure, ratio
from gatewise.efficiency.acceleration.export import onnx_bytes, onnx_session
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.inputs import run
from gatewise.efficiency.quantization.quantize import quantize
from gatewise.errors import Failure
from gatewise.ops.quantize import signal_to_noise

KEPT = Path("runs/quantize_networks/published")
"""What has been measured, a file for each network."""

SIZES: dict[str, int] = {name: pixels for name, (pixels, _) in NETWORKS.items()} | {
    "focalnet_tiny_iso": 224,
    "hornet_small_iso_7x7": 224,
    "convnext_tiny_k5": 224,
    "vig_h_tiny": 224,
    "deit_tiny": 224,
    "vit_s_attention": 224,
    "gated_swinrmt_tiny_rmt": 224,
    "rmt_t": 224,
    "resnet50": 224,
    "resnetv2_50d_evos": 224,
    "regnetz_b16_evos": 224,
    "ese_vovnet39b_evos": 224,
    "efficientnet_b0_evonorm_s0": 224,
    "mobilenetv5_300m_enc": 256,
    "inception_resnet_v2": 299,
    "tvconv_deeplabv3plus": 256,
    "resnet18_imagenet_moe": 224,
    "densenet_cifar_moe": 32,
    "vgg16_bn_moe": 32,
    "wrn_28_4_cifar_moe": 32,
}
"""Pixels a side: the networks of `image_networks`, and one of each family and kind of block that is not there."""

BATCHES, IMAGES = 2, 2


def published_case(name: str) -> dict[str, Any]:
    """How near the integers come to the float network, or why there are none."""
    return kept(KEPT / f"{name}.json", lambda: _measure(name))


def speed_case(name: str, seconds: float) -> dict[str, Any]:
    """Integers against float32 on one image and one thread, both in onnxruntime, interleaved."""
    return kept(KEPT / f"{name}-speed.json", lambda: _measure_speed(name, seconds))


def _measure(name: str) -> dict[str, Any]:
    model, calibration, images = _network(name)
    case = {"network": name, "pixels": SIZES[name]}
    try:
        network = quantize(model, calibration)
    except (Failure, ValueError) as error:
        return case | {"failed": str(error)}
    expected, found = run(model, images), network(images)
    return case | {
        "cosine": torch.cosine_similarity(expected.flatten(1), found.flatten(1)).min().item(),
        "noise_db": signal_to_noise(expected, found),
        **described(network),
    }


def _measure_speed(name: str, seconds: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, calibration, images = _network(name)
    example = images[:1]
    calls = {"float": onnx_session(onnx_bytes(fold(model), example), 1), "integer": quantize(model, calibration)}
    before, after = measure(calls, example, budget_s=seconds, min_rounds=5, max_rounds=1000)
    faster = ratio(before, after)
    return {
        "float_ms": 1e3 * before.median,
        "integer_ms": 1e3 * after.median,
        "faster": faster.median,
        "quartiles": [faster.low, faster.high],
        "text": str(faster),
    }


def _network(name: str) -> tuple[torch.nn.Module, list[Tensor], Tensor]:
    """The network with fresh weights, batches to calibrate on, and other images; all of seed 0."""
    torch.manual_seed(0)
    model = gatewise.create_model(name).eval()
    generator = torch.Generator().manual_seed(0)
    *calibration, images = torch.randn(BATCHES + 1, IMAGES, 3, SIZES[name], SIZES[name], generator=generator)
    return model, calibration, images
