"""Export a network to ONNX, with any batch size, and check the file against the network in onnxruntime."""

from __future__ import annotations

import argparse

from gatewise.cli._network import add_network_arguments, find_network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="registered name or trained checkpoint")
    parser.add_argument("--to", required=True, metavar="FILE.onnx", help="ONNX file to write")
    add_network_arguments(parser)
    parser.add_argument("--fixed-batch", type=int, metavar="N", help="fix the batch size to N (default: any size)")


def run(args: argparse.Namespace) -> int:

    from gatewise.efficiency.acceleration.export import export_onnx
    from gatewise.errors import UserError

    if args.fixed_batch is not None and args.fixed_batch < 1:
        raise UserError(f"--fixed-batch must be 1 or more, not {args.fixed_batch}")
    found = find_network(args.model, args)
    example = found.example(args.fixed_batch or 1)
    report = export_onnx(found.model, args.to, example, dynamic_batch=args.fixed_batch is None)
    for file in report.files:
        print(f"wrote {file} ({file.stat().st_size / 2**20:.1f} MiB)")
    sizes = " and ".join(map(str, report.batch_sizes))
    print(f"opset {report.opset}, input {_shape(report.input_shape)}, output {_shape(report.output_shape)}")
    print(f"onnxruntime agrees with the network within {report.error:.1e} (batches of {sizes})")
    return 0


def _shape(sizes: tuple[int | str, ...]) -> str:
    return " x ".join(map(str, sizes))
