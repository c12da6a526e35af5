"""Measure networks on this machine: parameters, MACs, latency (by turns), throughput and peak memory."""

from __future__ import annotations

import argparse

from gatewise.cli._network import add_network_arguments, find_network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="registered names or trained checkpoints")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1], metavar="N", help="(default: 1)")
    add_network_arguments(parser)
    parser.add_argument("--optimize", action="store_true", help="measure each network also as `optimize` makes it")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="permitted to --optimize")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring per batch size (default: 10)")
    parser.add_argument("--csv", metavar="FILE", help="write the table here, too")
    parser.add_argument("--chart", metavar="FILE", help="draw the times here (png, svg or pdf)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from gatewise.efficiency.compare import compare, draw, write_csv
    from gatewise.errors import UserError

    if args.checkpoint is not None and len(args.models) > 1:
        raise UserError("--checkpoint belongs to one network: measure the others in a call of their own")
    if len(set(args.models)) < len(args.models):
        raise UserError("each network is measured once: a name is given twice")
    networks = {}
    for name in args.models:
        found = find_network(name, args)
        networks[name] = (found.model, found.input_size)
    rows = compare(networks, args.batch_size, optimized=args.optimize, precision=args.precision, budget_s=args.seconds)
    Console(highlight=False).print(_table(rows))
    if args.csv:
        write_csv(rows, args.csv)
    if args.chart:
        draw(rows, args.chart)
    return 0


def _table(rows):
    from rich.table import Table

    table = Table()
    table.add_column("network", overflow="fold")
    table.add_column("form", overflow="fold")
    for title in ("batch", "params", "MACs", "ms", "samples/s", "memory"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.model,
            row.form,
            str(row.batch_size),
            f"{row.parameters / 1e6:.2f} M",
            f"{row.macs / 1e6:,.0f} M",
            f"{row.median_ms:.2f} ± {row.spread_ms / 2:.2f}",
            f"{row.samples_per_s:.1f}",
            f"{row.peak_memory_bytes / 2**20:.0f} MiB",
        )
    return table
