"""Measure networks on this machine: parameters, MACs, latency (interleaved), throughput, peak memory and energy."""

from __future__ import annotations

import argparse

from gatewise.cli._network import add_network_arguments, find_network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="registered names or trained checkpoints")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1], metavar="N", help="batch sizes (default: 1)")
    parser.add_argument(
        "--threads", nargs="+", type=int, metavar="N", help="numbers of CPU threads (default: one per core)"
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("float32", "bf16"),
        default=["float32"],
        help="data types of the eager baseline (default: float32)",
    )
    add_network_arguments(parser)
    parser.add_argument("--optimize", action="store_true", help="also measure each network after `gatewise optimize`")
    parser.add_argument(
        "--precision",
        choices=("float32", "bf16"),
        default="float32",
        help="lowest precision that --optimize may use (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time per batch size (default: 10)")
    parser.add_argument(
        "--warm-up",
        type=int,
        default=2,
        metavar="CALLS",
        help="untimed calls of each network before measuring (default: 2)",
    )
    parser.add_argument(
        "--warm-up-seconds", type=float, default=0.0, metavar="S", help="minimum duration of the warm-up (default: 0)"
    )
    parser.add_argument("--stages", action="store_true", help="also print the peak activation memory of each stage")
    parser.add_argument("--save-baseline", metavar="FILE", help="save this measurement as a baseline for later ones")
    parser.add_argument("--baseline", metavar="FILE", help="compare with a saved baseline")
    parser.add_argument("--csv", metavar="FILE", help="also write the table to FILE")
    parser.add_argument("--chart", metavar="FILE", help="plot the times to FILE (png, svg or pdf)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from gatewise.efficiency.timing.baseline import against_baseline, save_baseline
    from gatewise.efficiency.timing.compare import compare, draw, write_csv
    from gatewise.errors import UserError

    if args.checkpoint is not None and len(args.models) > 1:
        raise UserError("--checkpoint belongs to one network: measure the others in a separate call")
    if len(set(args.models)) < len(args.models):
        raise UserError("each network is measured once, but a name is given twice")
    networks = {}
    for name in args.models:
        found = find_network(name, args)
        networks[name] = (found.model, found.input_size)
    rows = compare(
        networks,
        args.batch_size,
        threads=args.threads,
        dtypes=args.dtype,
        optimized=args.optimize,
        precision=args.precision,
        budget_s=args.seconds,
        warm_up=args.warm_up,
        warm_up_s=args.warm_up_seconds,
    )
    changes = against_baseline(rows, args.baseline) if args.baseline else []
    console = Console(highlight=False)
    console.print(_table(rows))
    for row, change in zip(rows, changes, strict=False):
        console.print(f"{row.model}, {_form(row, rows)}, batch {row.batch_size}: {change or 'not in the baseline'}")
    if args.stages:
        console.print(_stages(networks))
    if args.save_baseline:
        save_baseline(rows, args.save_baseline)
    if args.csv:
        write_csv(rows, args.csv)
    if args.chart:
        draw(rows, args.chart)
    return 0


def _table(rows):
    from rich.table import Table

    # No borders, so that the table fits into 80 columns.
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("network", overflow="fold", min_width=12)
    table.add_column("form", overflow="fold", min_width=8)
    with_energy = any(row.energy_j is not None for row in rows)
    titles = ["batch", "params", "MACs", "ms (95 %)", "samples/s", "memory", *(["mJ/sample"] if with_energy else [])]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            row.model,
            _form(row, rows),
            str(row.batch_size),
            f"{row.parameters / 1e6:.2f} M",
            f"{row.macs / 1e6:,.0f} M",
            f"{row.median_ms:.2f} ({row.low_ms:.2f}-{row.high_ms:.2f})",
            f"{row.samples_per_s:.1f}",
            f"{row.peak_memory_bytes / 2**20:.0f} MiB",
        ]
        cells += ["-" if row.energy_j is None else f"{1e3 * row.energy_j:.1f}"] if with_energy else []
        table.add_row(*cells)
    return table


def _form(row, rows):
    """Return the form, with the data type and the number of threads where rows differ in them."""
    parts = [row.form]
    parts += [row.dtype] if len({other.dtype for other in rows}) > 1 else []
    parts += [f"{row.threads} threads"] if len({other.threads for other in rows}) > 1 else []
    return ", ".join(parts)


def _stages(networks):
    from rich.table import Table

    from gatewise.efficiency.cost.memory import memory_by_stage
    from gatewise.efficiency.inputs import sample_input

    table = Table(title="Peak activation memory, one sample")
    for title in ("network", "stage", "peak", "left"):
        table.add_column(title, justify="left" if title in ("network", "stage") else "right")
    for name, (model, shape) in networks.items():
        for stage in memory_by_stage(model, sample_input(model, shape)):
            table.add_row(
                name, stage.name, f"{stage.peak_bytes / 2**20:.2f} MiB", f"{stage.left_bytes / 2**20:.2f} MiB"
            )
    return table
