"""Train a small FocalNet, evaluate, measure, make fast and export it; write one page about it."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="YAML file, or a name that `gatewise recipes` lists (default: focalnet/demo)"
    )


def run(args: argparse.Namespace) -> int:
    from gatewise.demo.run import RECIPE, run_demo

    report = run_demo(args.output, args.recipe or RECIPE)
    print(f"report: {report.resolve()}")
    return 0
