"""Report of the demo: one self-contained HTML file."""

from __future__ import annotations

import base64
from datetime import date
from importlib import metadata
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image
from torch import Tensor

import gatewise
from gatewise.demo import figures
from gatewise.demo.findings import Demo
from gatewise.efficiency.acceleration.report import OptimizationReport
from gatewise.files import write_text
from gatewise.gates import draw

GATE_PICTURES = 2
GATE_ROWS = 4


def write_report(path: Path, demo: Demo) -> None:
    """Write the report of a demo run atomically, so that a reader never sees half of it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(files("gatewise.demo").joinpath("report.html.j2").read_text(encoding="utf-8"))
    write_text(path, template.render(**page(demo)))


def page(demo: Demo) -> dict[str, Any]:
    """Return the values for the template."""
    name = demo.trained.recipe.model.name
    one = demo.optimizations[min(demo.optimizations)]
    return {
        "title": f"{name}, small, on {demo.trained.recipe.data.name}",
        "subtitle": (
            "A network trained, measured and exported with one command. Everything on this page was "
            f"computed in {demo.seconds / 60:.1f} minutes on this machine."
        ),
        "tiles": [
            {"value": f"{demo.evaluation.top1:.1%}", "label": f"accuracy on {demo.evaluation.images:,} test images"},
            {"value": f"{demo.cost.parameters:,}", "label": "parameters"},
            {"value": f"{demo.cost.macs / 1e6:.1f} M", "label": "multiply-accumulates per image"},
            {"value": f"{one.chosen.median_ms:.2f} ms", "label": f"per image, {one.speedup:.1f}x faster than before"},
            {"value": f"{demo.export.error:.0e}", "label": "largest relative difference of the ONNX file"},
        ],
        "training": {
            "figure": figures.as_data_uri(figures.training_curve(demo.log)),
            "text": (
                f"{demo.result.epochs} epochs, {demo.result.steps:,} updates, {demo.result.seconds:.0f} s; the best "
                f"epoch ({demo.result.metrics['epoch'] + 1:.0f}) has {demo.result.metrics['val/top1']:.1%} validation "
                "accuracy. The rest of this page uses its weights."
            ),
        },
        "evaluation": _evaluation(demo),
        "pictures": _pictures(demo),
        "latency": _latency(demo),
        "cost": _cost(demo),
        "gates": _gates(demo),
        "export": {"text": _export(demo)},
        "made": _made(demo),
        "commands": _commands(demo),
        "recipe": demo.trained.recipe.to_yaml(),
    }


def _evaluation(demo: Demo) -> dict[str, Any]:
    evaluation = demo.evaluation
    totals = [sum(row) for row in evaluation.confusion]
    classes = [
        {"name": name, "images": total, "accuracy": "-" if accuracy is None else f"{accuracy:.1%}"}
        for (name, accuracy), total in zip(evaluation.per_class.items(), totals, strict=True)
    ]
    mistakes = [
        (count, true, predicted)
        for true, row in enumerate(evaluation.confusion)
        for predicted, count in enumerate(row)
        if true != predicted
    ]
    count, true, predicted = max(mistakes)
    names = evaluation.class_names
    text = (
        f"{evaluation.images:,} test images, used neither for training nor for choosing the epoch: "
        f"accuracy {evaluation.top1:.2%}, loss {evaluation.loss:.3f}. The most frequent mistake: {names[true]} taken "
        f"for {names[predicted]} ({count} times)."
    )
    figure = figures.as_data_uri(figures.confusion_matrix(evaluation.confusion, names))
    return {"figure": figure, "classes": classes, "text": text}


def _pictures(demo: Demo) -> list[dict[str, Any]]:
    pictures, names = demo.pictures, demo.trained.class_names
    scores, predicted = pictures.probabilities.max(dim=1)
    return [
        {
            "image": _png(image),
            "label": names[label],
            "predicted": names[guess],
            "score": f"{score:.0%}",
            "right": guess == label,
        }
        for image, label, guess, score in zip(
            pictures.shown, pictures.labels.tolist(), predicted.tolist(), scores.tolist(), strict=True
        )
    ]


def _png(image: Tensor) -> str:
    pixels = (image.clamp(0, 1) * 255).round().byte()
    picture = Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())
    buffer = BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _latency(demo: Demo) -> dict[str, Any]:
    return {
        "text": (
            "The output of each plan was first compared with the original's. Then all were timed, interleaved, in one "
            f"process ({demo.optimizations[1].threads} threads): medians, interquartile ranges, and the ratio within "
            "rounds. gatewise.optimize returns the fastest."
        ),
        "batches": [_batch(size, report) for size, report in demo.optimizations.items()],
    }


def _batch(size: int, report: OptimizationReport) -> dict[str, Any]:
    texts = {row[0]: row for row in report.rows()}
    rows = [
        {
            "name": plan.name,
            "median": plan.median_ms,
            "low": plan.median_ms - (plan.spread_ms or 0.0) / 2,
            "high": plan.median_ms + (plan.spread_ms or 0.0) / 2,
            "chosen": plan.status == "chosen",
            "median_text": texts[plan.name][1],
            "spread_text": texts[plan.name][2],
            "ratio_text": texts[plan.name][3],
            "error_text": texts[plan.name][4],
        }
        for plan in report.plans
        if plan.median_ms is not None
    ]
    notes = [f"{plan.name}: {plan.status}, {plan.note}" for plan in report.plans if plan.median_ms is None]
    return {"size": size, "rows": rows, "figure": figures.as_data_uri(figures.latency_bars(rows)), "notes": notes}


def _cost(demo: Demo) -> dict[str, Any]:
    rows = [
        {
            "name": stage.name,
            "shape": "-" if stage.output_shape is None else " x ".join(str(size) for size in stage.output_shape[1:]),
            "parameters": stage.parameters,
            "macs": stage.macs,
            "activations": stage.activation_bytes,
            "parameters_text": f"{stage.parameters:,}",
            "macs_text": f"{stage.macs / 1e6:.2f} M",
            "activations_text": f"{stage.activation_bytes / 1024:,.0f} KiB",
        }
        for stage in demo.cost.stages
        if stage.macs or stage.parameters
    ]
    return {"rows": rows, "figure": figures.as_data_uri(figures.stage_shares(rows))}


def _gates(demo: Demo) -> dict[str, Any]:
    step = max(1, len(demo.readings) // GATE_ROWS)
    readings = demo.readings[::step][:GATE_ROWS]
    figure_uris = [
        figures.as_data_uri(draw(demo.pictures.shown[index], readings, index), "png")
        for index in range(0, len(demo.pictures.shown), len(demo.pictures.shown) // GATE_PICTURES)
    ]
    text = (
        "Each row is one focal modulation, from fine to coarse. The gates set how much of each level's context is used "
        "at each position: red adds it, blue subtracts it, white leaves it out. Level 0 sees the nearest surroundings, "
        "the global level the whole image. The modulator combines all levels; its magnitude is shown too."
    )
    return {"figures": figure_uris, "text": text}


def _export(demo: Demo) -> str:
    export = demo.export
    batch = "any number of images" if export.dynamic_batch else "only this number of images"
    return (
        f"{export.files[0].name}: {export.bytes / 1024:,.0f} KiB, ONNX opset {export.opset}, takes {batch}. Run in "
        f"onnxruntime on batches of {' and '.join(map(str, export.batch_sizes))}, its outputs differ from those of the "
        f"network by at most {export.error:.1e} of the largest output."
    )


def _made(demo: Demo) -> list[dict[str, str]]:
    packages = ("torch", "torchvision", "timm", "lightning", "onnxruntime")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    return [
        {"label": "date", "value": date.today().isoformat()},
        {"label": "machine", "value": demo.machine},
        {"label": "versions", "value": f"gatewise {gatewise.__version__}, {versions}"},
        {"label": "weights", "value": str(demo.result.best or demo.result.last)},
    ]


def _commands(demo: Demo) -> list[str]:
    checkpoint = demo.result.best or demo.result.last
    return [
        f"gatewise evaluate --checkpoint {checkpoint}",
        f"gatewise predict --checkpoint {checkpoint} PICTURE.png",
        f"tensorboard --logdir {demo.result.folder}",
        "gatewise train focalnet/finetune --data.root YOUR-FOLDER",
        "gatewise reproduce focalnet",
    ]
