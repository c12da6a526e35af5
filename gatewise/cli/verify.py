"""Compare networks with digests of the outputs of their reference implementations, one line per file."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE.json", help="digest files")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="tolerance for outputs and taps (default: %(default)g)"
    )
    parser.add_argument(
        "--gradient-tolerance", type=float, default=1e-3, help="tolerance for gradients (default: %(default)g)"
    )


def run(args: argparse.Namespace) -> int:
    from gatewise.fidelity.verify import verify

    report = verify(*args.files, tolerance=args.tolerance, gradient_tolerance=args.gradient_tolerance)
    print(report)
    return 0 if report.ok else 1
