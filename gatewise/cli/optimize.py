"""Make a network fast on this machine: try several plans, check each against the original, measure and report."""

from __future__ import annotations

import argparse

from gatewise.cli._network import add_network_arguments, find_network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="registered name or trained checkpoint")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="batch size to optimize for (default: 1)"
    )
    add_network_arguments(parser)
    parser.add_argument(
        "--precision",
        choices=("float32", "bf16"),
        default="float32",
        help="lowest precision to use inside the network (default: %(default)s)",
    )
    parser.add_argument(
        "--budget", type=float, default=300.0, metavar="SECONDS", help="time budget for trying plans (default: 300)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="number of CPU threads (default: one per core)")
    parser.add_argument("--save", metavar="FILE", help="save the chosen plan for gatewise.efficiency.load_optimized")
    parser.add_argument("--json", metavar="FILE", help="also write the report to FILE")


def run(args: argparse.Namespace) -> int:
    import torch

    from gatewise.efficiency.acceleration.optimize import optimize
    from gatewise.errors import UserError
    from gatewise.files import finite_or_null, write_json

    if args.batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more, not {args.batch_size}")
    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads must be 1 or more, not {args.threads}")
        torch.set_num_threads(args.threads)
    found = find_network(args.model, args)
    example = found.example(args.batch_size)
    fast = optimize(found.model, example, args.precision, budget_s=args.budget)
    print(f"{found.name}: {fast.report}")
    print(f"chosen: {fast.report.chosen.name}, {fast.report.speedup:.2f} times as fast as the original")
    if args.save:
        print(f"saved: {fast.save(args.save)}")
    if args.json:
        write_json(args.json, finite_or_null(fast.report.to_dict()))
    return 0
