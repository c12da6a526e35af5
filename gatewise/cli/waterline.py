"""Show what limits a network on a device: lower bounds on the time of each kernel from memory and arithmetic."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from gatewise.cli._network import add_network_arguments, find_network

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gatewise.efficiency.bounds.device import Device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="registered name, trained checkpoint, or package.module:function"
    )
    parser.add_argument(
        "--input", metavar="N,C,H,W", help="input shape, batch first (default: one sample of the network's own size)"
    )
    add_network_arguments(parser)
    parser.add_argument("--dtype", metavar="KIND", help="data type to assume: float32, bfloat16, float16 or int8")
    parser.add_argument("--no-fold", action="store_true", help="keep batch norms and branches as in training")
    parser.add_argument(
        "--blocks", nargs="+", metavar="PATH", help="modules to treat as one kernel each (default: residual blocks)"
    )
    parser.add_argument(
        "--device-peak", type=float, metavar="TFLOPS", help="peak of another device in the data type of --dtype"
    )
    parser.add_argument("--bandwidth", type=float, metavar="GBS", help="memory bandwidth of that device in GB/s")
    parser.add_argument(
        "--device-name", default="custom device", metavar="NAME", help="name of that device (default: %(default)s)"
    )
    parser.add_argument("--refresh", action="store_true", help="measure the limits of this machine again")
    parser.add_argument(
        "--level",
        choices=("operators", "epilogues", "blocks"),
        default="operators",
        help="how far kernels are fused (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=int, default=20, metavar="N", help="number of kernels in the table (default: 20)"
    )
    parser.add_argument("--plot", metavar="FILE", help="plot the waterline to FILE (png, svg or pdf)")
    parser.add_argument("--html", metavar="FILE", help="write an interactive page to FILE")
    parser.add_argument("--csv", metavar="FILE", help="write all kernels to FILE")
    parser.add_argument("--measure", action="store_true", help="also time each operator and compare it with its bound")
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time for --measure (default: 10)")


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from gatewise.efficiency.bounds.waterline import waterline
    from gatewise.errors import UserError
    from gatewise.files import write_text

    if args.rows < 1:
        raise UserError(f"--rows must be 1 or more, not {args.rows}")
    by_hand = _device_by_hand(args)
    if by_hand is not None and args.measure:
        raise UserError("--measure compares with the limits of this machine: leave out --device-peak and --bandwidth")
    model, example = _network(args)
    device = _measured_device(args) if by_hand is None else by_hand
    found = waterline(model, example, device, dtype=args.dtype, fold=not args.no_fold, blocks=args.blocks)
    found = replace(found, name=args.model)
    print(found.table(args.level, args.rows))
    if args.plot:
        found.plot(args.plot, args.level)
    if args.html:
        page = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>waterline</title>{found.html()}</html>\n'
        write_text(args.html, page)
    if args.csv:
        found.write_csv(args.csv)
    if args.measure:
        print(f"\n{found.measured(budget_s=args.seconds).table(args.rows)}")
    return 0


def _device_by_hand(args: argparse.Namespace) -> Device | None:
    from gatewise.efficiency.bounds.device import Device
    from gatewise.errors import UserError

    if (args.device_peak is None) != (args.bandwidth is None):
        raise UserError("--device-peak and --bandwidth must be given together")
    if args.device_peak is None:
        return None
    return Device(args.device_name, {args.dtype or "float32": 1e12 * args.device_peak}, 1e9 * args.bandwidth)


def _measured_device(args: argparse.Namespace) -> Device:
    from gatewise.efficiency.bounds.device import device

    return device(refresh=args.refresh)


def _network(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Return the network in eval mode and a batch, without storage where nothing is timed."""
    import torch

    from gatewise.efficiency.inputs import sample_input
    from gatewise.errors import UserError

    where = "cpu" if args.measure or args.checkpoint is not None else "meta"
    if ":" in args.model:
        if args.input is None:
            raise UserError(f"{args.model} has no input size of its own: give --input, such as --input 1,3,224,224")
        model = _imported(args.model, where)
        batch, *sample = _shape(args.input)
        return model, sample_input(model, tuple(sample), batch)
    with torch.device(where):
        found = find_network(args.model, args)
    if args.input is None:
        return found.model, found.example()
    batch, *sample = _shape(args.input)
    return found.model, sample_input(found.model, tuple(sample), batch)


def _shape(text: str) -> list[int]:
    from gatewise.errors import UserError

    sizes = [part.strip() for part in text.split(",")]
    if len(sizes) < 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--input takes positive sizes, the batch first, such as 1,3,224,224, not {text!r}")
    return [int(size) for size in sizes]


def _imported(name: str, where: str) -> nn.Module:
    """Return the module that `package.module:function` builds when called without arguments."""
    from importlib import import_module

    from torch import nn

    from gatewise.errors import UserError

    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"there is no {function_name!r} to import from {module_name!r}: {error}") from error
    # Built with storage and then moved: third-party code may need values while it builds a network.
    model = function()
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} must make a torch.nn.Module, not {type(model).__name__}")
    return model.eval().to(where)
