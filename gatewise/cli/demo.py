"""Train, evaluate, measure, optimize and export a small FocalNet, and write a one-page report."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="output folder (default: %(default)s)"
    )
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="YAML file or name from `gatewise recipes` (default: focalnet/demo)"
    )


def run(args: argparse.Namespace) -> int:
    from gatewise.demo.run import RECIPE, run_demo

    report = run_demo(args.output, args.recipe or RECIPE)
    print(f"report: {report.resolve()}")
    return 0
