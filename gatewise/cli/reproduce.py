"""Test a paper's claim in miniature on this machine and compare with what the paper reports.

The verdict is printed and saved. The exit status is 0 whenever the claim ran, whatever the verdict.
"""

from __future__ import annotations

import argparse

from gatewise.claims import list_claims, reproduce
from gatewise.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gatewise reproduce`."""
    parser.add_argument("paper", nargs="?", metavar="PAPER", help="id of the paper; see --list")
    parser.add_argument("--list", action="store_true", help="list the papers with a claim that can be reproduced")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="time budget (default: the claim's own)")
    parser.add_argument(
        "--output",
        default="runs",
        metavar="DIR",
        help="parent folder; results go to DIR/reproduce-PAPER (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the claim, or list the claims.

    Raises:
        UserError: if no paper is given, it is unknown or has no claim, or the seed or budget is out of range.
    """
    if args.list:
        print("\n".join(_listing()))
        return 0
    if args.paper is None:
        raise UserError(f"name a paper: {', '.join(list_claims())}")
    reproduce(args.paper, seed=args.seed, budget_s=args.budget, output=args.output)
    return 0


def _listing() -> list[str]:
    from gatewise.catalog.papers import paper

    claims = list_claims()
    width = max(len(name) for name in claims)
    return [f"{name:<{width}}  {paper(name).title}" for name in claims]
