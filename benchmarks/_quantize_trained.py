"""What 8 bits cost trained networks: the families of `compare_backbones`, on its test images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from _kept import kept
from compare_backbones import FAMILIES, RUNS, folder_of, recipe_of, result_of, train_one
from torch import Tensor, nn

from gatewise.claims.lab.intervals import Interval, t_interval
from gatewise.data.images.base import ImageData
from gatewise.efficiency.quantization.onnx_qdq import write_codes
from gatewise.efficiency.quantization.placement import Placement, place
from gatewise.efficiency.quantization.prepare import Options, Prepared, onnxruntime_runner
from gatewise.efficiency.quantization.quantize import QuantizedModel, quantize
from gatewise.efficiency.quantization.sensitivity import Judge, examine, noise_power
from gatewise.ops.quantize import signal_to_noise
from gatewise.tasks import load_trained, parse_recipe
from gatewise.tasks.training import build_data

KEPT = RUNS.with_name("quantize_networks")
"""What has been measured, a file for each network, seed and number of epochs."""

CALIBRATION_BATCHES = 8
JUDGED_BATCHES = 2
WORST = 4
"""Layers and grids that are named."""

Pairs = list[tuple[Tensor, Tensor]]


def trained_case(family: str, seed: int, epochs: int) -> dict[str, Any]:
    """What 8 bits cost one trained network; measured once, and trained first where that has not happened."""
    return kept(KEPT / f"{_slug(family, seed, epochs)}.json", lambda: _measure(family, seed, epochs))


def cause_case(family: str, seed: int, epochs: int) -> dict[str, Any]:
    """Where a trained network loses, and what other ways to quantize it give; each part measured once."""
    own, slug = (family, seed, epochs), _slug(family, seed, epochs)

    def part(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return kept(KEPT / "causes" / f"{slug}-{name}.json", measure)

    return {
        "family": family,
        "seed": seed,
        "ways": {way: part(way.replace(" ", "_"), lambda way=way: _try(way, *own)) for way in WAYS},
        "worst_layers": part("layers", lambda: _locate(_worst_layers, *own))["worst"],
        "worst_grids": part("grids", lambda: _locate(_worst_grids, *own))["worst"],
    }


def lost_points(cases: list[dict[str, Any]]) -> Interval:
    """Points of accuracy lost in the mean over a family's seeds; the interval is over test images, in pairs.

    An image that one seed gets right in float and wrong in integers counts 1, the other way round -1. A mean over seeds
    first, since what one network loses on an image another one may lose on it too.
    """
    per_image = torch.zeros(cases[0]["images"])
    for case in cases:
        per_image[case["wrong_in_integers"]] += 100 / len(cases)
        per_image[case["right_in_integers"]] -= 100 / len(cases)
    return t_interval(per_image.tolist(), "images")


def reasons(floats: dict[str, str]) -> dict[str, int]:
    """How many operations stay float for each reason, the most frequent first."""
    return dict(Counter(floats.values()).most_common())


def layers_left_float(network: QuantizedModel) -> list[str]:
    """The outputs of convolutions and products whose weight is no integer in the file, of those that have a weight."""
    import onnx

    graph = onnx.load_from_string(network.onnx).graph
    constants = {tensor.name for tensor in graph.initializer}
    weighted = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return [node.output[0] for node in weighted if node.input[1] in constants]


def _measure(family: str, seed: int, epochs: int) -> dict[str, Any]:
    if result_of(family, seed, epochs) is None:
        train_one(family, seed, epochs)
    model, calibration, test = _load(family, seed, epochs)
    network = quantize(model, [images for images, _ in calibration])
    labels = torch.cat([labels for _, labels in test])
    before, after = _outputs(model, test), _outputs(network, test)
    right, still = before.argmax(dim=1) == labels, after.argmax(dim=1) == labels
    return {
        "family": family,
        "network": FAMILIES[family][0],
        "seed": seed,
        "epochs": epochs,
        "images": len(labels),
        "float": _percent(right),
        "integer": _percent(still),
        "agreement": _percent(before.argmax(dim=1) == after.argmax(dim=1)),
        "noise_db": signal_to_noise(before, after),
        "wrong_in_integers": (right & ~still).nonzero().flatten().tolist(),
        "right_in_integers": (~right & still).nonzero().flatten().tolist(),
        **described(network),
    }


def described(network: QuantizedModel) -> dict[str, Any]:
    """Of a network and its report, what the tables show."""
    report = network.report
    return {
        "layers": len(report.layers),
        "layers_float": len(layers_left_float(network)),
        "floats": reasons(report.floats),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
    }


WAYS: dict[str, dict[str, Any]] = {
    "weights alone": {"weights_only": True},
    "percentile": {"activations": "percentile"},
    "mse": {"activations": "mse"},
    "max_loss=0.01": {"max_loss": 0.01},
}
"""What is tried where a network loses accuracy: arguments of `quantize`."""


def _try(way: str, family: str, seed: int, epochs: int) -> dict[str, Any]:
    model, calibration, test = _load(family, seed, epochs)
    # Labels beside the images make max_loss a loss of accuracy; nothing else looks at them.
    network = quantize(model, calibration, **WAYS[way])
    before, after = _outputs(model, test), _outputs(network, test)
    return {
        "percent": _percent(after.argmax(dim=1) == torch.cat([labels for _, labels in test])),
        "noise_db": signal_to_noise(before, after),
        "on_request": [name for name, why in network.report.floats.items() if why == "kept float on request"],
    }


def _locate(
    look: Callable[[Prepared, Judge], list[dict[str, Any]]], family: str, seed: int, epochs: int
) -> dict[str, Any]:
    """What disturbs the outputs most, looked at on some of the images that ranges come from."""
    model, calibration, _ = _load(family, seed, epochs)
    images = [images for images, _ in calibration]
    prepared, judge = Prepared.of(model, iter(images), Options()), Judge(images[:JUDGED_BATCHES])
    judge.set_reference(onnxruntime_runner(prepared.float_onnx))
    return {"worst": look(prepared, judge)}


def _worst_layers(prepared: Prepared, judge: Judge) -> list[dict[str, Any]]:
    """The layers whose integers disturb the outputs most, each alone, as parts of the noise that all make together."""
    report = examine(prepared, judge)
    whole = noise_power(report.all_db)
    return [{"layer": layer.name, "part": layer.damage / whole} for layer in report.layers[:WORST]]


def _worst_grids(prepared: Prepared, judge: Judge) -> list[dict[str, Any]]:
    """The same for grids: the tensors that share one as codes, and everything else float."""
    placement, names = place(prepared.graph), prepared.graph.names
    whole = prepared.write()
    power = noise_power(judge.noise_db(onnxruntime_runner(whole.onnx)))
    rows = []
    for root in dict.fromkeys(placement.roots.values()):
        members = placement.members(root)
        alone = Placement(dict.fromkeys(members, root), {}, {})
        grid = whole.grids[names[root]]
        written, _ = write_codes(prepared.graph, alone, {root: grid}, prepared.options.weights)
        noise = noise_power(judge.noise_db(onnxruntime_runner(written.SerializeToString())))
        ends = [float(grid.minimum), float(grid.maximum)]
        rows.append({"tensors": [names[tensor] for tensor in members], "part": noise / power, "range": ends})
    return sorted(rows, key=lambda row: -row["part"])[:WORST]


def _load(family: str, seed: int, epochs: int) -> tuple[nn.Module, Pairs, Pairs]:
    """The trained network, training images as they are evaluated, and the test images; each with labels."""
    recipe = recipe_of(family, seed, epochs)
    recipe["data"]["augment"] = {"crop_padding": 0, "hflip": 0.0}
    data = build_data(parse_recipe(recipe))
    assert isinstance(data, ImageData)
    data.prepare_data()
    data.setup()
    calibration = [pair for _, pair in zip(range(CALIBRATION_BATCHES), data.train_dataloader(), strict=False)]
    model = load_trained(folder_of(family, seed, epochs) / "last.ckpt").model
    return model, calibration, list(data.test_dataloader())


def _outputs(network: Callable[[Tensor], Tensor], pairs: Pairs) -> Tensor:
    with torch.inference_mode():
        return torch.cat([network(images) for images, _ in pairs])


def _percent(hits: Tensor) -> float:
    return 100 * fmean(hits.tolist())


def _slug(family: str, seed: int, epochs: int) -> str:
    return folder_of(family, seed, epochs).name
