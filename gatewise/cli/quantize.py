"""Quantize a network to int8 weights and activations, or to small weights only, and write it as ONNX.

Activation ranges are calibrated on batches of the validation part. With labeled images, accuracy on the test part is
measured before and after. Without data, ranges come from noise, which is enough to measure speed and size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gatewise.cli._network import add_network_arguments, find_network

if TYPE_CHECKING:
    from torch import nn

    from gatewise.data import ImageData

_EPILOG = """examples:
  gatewise quantize runs/flowers/best.ckpt --output flowers.onnx
  gatewise quantize runs/flowers/best.ckpt --output flowers.onnx --max-loss 0.01
  gatewise quantize mobilenetv2_100 --pretrained --data data.name=image_folder data.root=/data/imagenet --output m.onnx
  gatewise quantize mobilenetv2_100 --calibration 2 --output speed.onnx
"""


@dataclass(frozen=True)
class _Source:
    """Network, batches to calibrate it on, and labeled data if there is any."""

    name: str
    model: nn.Module
    batches: Iterable[Any]
    data: ImageData | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gatewise quantize`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("model", metavar="MODEL", help="registered name or trained checkpoint")
    parser.add_argument("--output", required=True, metavar="FILE.onnx", help="ONNX file to write")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="recipe fields of the data, as for `evaluate --set`",
    )
    parser.add_argument("--pretrained", action="store_true", help="use the published weights of MODEL")
    parser.add_argument(
        "--calibration",
        type=int,
        default=100,
        metavar="N",
        help="maximum number of calibration batches (default: %(default)s)",
    )
    add_network_arguments(parser)
    parser.add_argument("--bits", type=int, default=8, help="activation bits, 2 to 8 (default: %(default)s)")
    parser.add_argument("--weight-bits", type=int, default=8, help="weight bits, 2 to 8 (default: %(default)s)")
    parser.add_argument("--weights-only", action="store_true", help="quantize only the weights; arithmetic stays float")
    parser.add_argument(
        "--per-tensor", action="store_true", help="use one scale per weight tensor instead of one per channel"
    )
    parser.add_argument(
        "--activations",
        choices=("min-max", "averaged", "percentile", "mse", "entropy"),
        default="min-max",
        help="how activation ranges are chosen (default: %(default)s)",
    )
    parser.add_argument("--skip", nargs="+", default=[], metavar="LAYER", help="layers that stay float")
    parser.add_argument(
        "--max-loss",
        type=float,
        metavar="X",
        help="largest loss of accuracy; the worst layers stay float until it is met",
    )
    parser.add_argument("--sensitivity", action="store_true", help="also print the error that each layer causes")
    parser.add_argument(
        "--trust-paths",
        action="store_true",
        help="use the files, folders and URLs that a checkpoint names even if no recipe.yaml beside it confirms them",
    )
    parser.add_argument(
        "--split", choices=("test", "val"), default="test", help="part of the data to score on (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the report to FILE")


def run(args: argparse.Namespace) -> int:
    """Quantize, write, score and print. Return exit status 0.

    Raises:
        UserError: if the network or its data is not determined, or options contradict each other.
    """
    from gatewise.efficiency.quantization.quantize import quantize
    from gatewise.files import finite_or_null, write_json

    source = _find(args)
    options = {
        "bits": args.bits,
        "weight_bits": args.weight_bits,
        "weights_only": args.weights_only,
        "per_channel": not args.per_tensor,
        "activations": args.activations,
        "max_batches": args.calibration,
    }
    if args.sensitivity:
        from gatewise.efficiency.quantization.sensitivity import sensitivity

        print(sensitivity(source.model, source.batches, **options))
    network = quantize(source.model, source.batches, skip=args.skip, max_loss=args.max_loss, **options)
    print(f"{source.name}: {network.report}")
    if source.data is None and not args.weights_only:
        print("calibrated on noise: only good for measuring speed and size")
    path = network.save(args.output)
    print(f"wrote {path} ({path.stat().st_size / 2**20:.2f} MiB)")
    scores = {} if source.data is None else _scores(source, network.as_module(), args.split)
    if args.json:
        write_json(args.json, finite_or_null(network.report.to_dict() | scores))
    return 0


def _find(args: argparse.Namespace) -> _Source:
    from gatewise.errors import UserError

    if args.calibration < 1:
        raise UserError(f"--calibration must be 1 or more, not {args.calibration}")
    if not Path(args.output).parent.is_dir():
        raise UserError(f"the folder of {args.output} does not exist; create it first")
    if Path(args.model).is_file() or args.data:
        return _with_data(args)
    if args.pretrained:
        raise UserError("give calibration data, such as --data data.name=image_folder data.root=FOLDER")
    found = find_network(args.model, args)
    return _Source(found.name, found.model, _noise(found.input_size, args.calibration), None)


def _with_data(args: argparse.Namespace) -> _Source:
    from gatewise.data import ImageData
    from gatewise.errors import UserError
    from gatewise.tasks.sources import open_source

    if args.image_size is not None or args.num_classes is not None or args.length is not None:
        raise UserError("the size of images and the number of classes come from the data: leave those options out")
    if Path(args.model).is_file():
        model, data = open_source(checkpoint=args.model, assignments=args.data, trust_paths=args.trust_paths)
    else:
        model, data = open_source(
            args.model, weights=args.checkpoint, pretrained=args.pretrained, assignments=args.data
        )
    if not isinstance(data, ImageData):
        raise UserError(f"{args.model} takes {type(data).__name__}; quantize is for image networks")
    data.prepare_data()
    data.setup("validate")
    return _Source(args.model, model.eval().cpu(), _Again(data), data)


class _Again:
    """Validation batches, from the start at each iteration."""

    def __init__(self, data: ImageData) -> None:
        self._data = data

    def __iter__(self) -> Any:
        return iter(self._data.val_dataloader())


def _noise(input_size: tuple[int, ...], count: int) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    # A few batches are enough for the ranges of noise.
    return [torch.randn(4, *input_size, generator=generator) for _ in range(min(count, 4))]


def _scores(source: _Source, quantized: nn.Module, split: Literal["val", "test"]) -> dict[str, Any]:
    """Print and return the accuracy of both networks."""
    from gatewise.tasks import evaluate

    assert source.data is not None
    before = evaluate(source.model, source.data, split, "cpu")
    after = evaluate(quantized, source.data, split, "cpu")
    print(f"top-1 on {before.images:,} images ({split}): {before.top1:.2%} float, {after.top1:.2%} quantized")
    return {"top1_before": before.top1, "top1_after": after.top1, "images": before.images}
