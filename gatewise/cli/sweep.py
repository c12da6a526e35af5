"""Train a recipe at every point of a grid, several cells at once. Repeated, it runs only the missing cells."""

from __future__ import annotations

import argparse
import sys

_EPILOG = """examples:
  gatewise sweep zoology/laptop --axis model.dim=64,128,256 --axis optim.lr=1e-4,1e-3,1e-2
  gatewise sweep my-recipe.yaml --axis model.name=zoology_attention,zoology_hyena --axis seed=0,1,2 --jobs 4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gatewise sweep`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "recipe", metavar="RECIPE", help="YAML file or name from `gatewise recipes`, such as zoology/laptop"
    )
    parser.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="FIELD=VALUE,...",
        help="recipe field and its values; may be repeated",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="recipe fields to override in every cell"
    )
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="how cells are run (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="number of cells to run at once (default: number of accelerators, else of cores)",
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the sweep (default: runs/sweep-RECIPE)")
    parser.add_argument("--overwrite", action="store_true", help="discard an earlier sweep in the same folder")


def run(args: argparse.Namespace) -> int:
    """Run the sweep and print the best cells. Return 1 if a cell failed, else 0.

    Raises:
        UserError: for a mistake in the recipe, an axis or a field, before any cell starts.
    """
    from gatewise.tasks.interruption import Interruption

    with Interruption():
        return _sweep(args)


def _sweep(args: argparse.Namespace) -> int:
    from rich.console import Console

    from gatewise.errors import UserError
    from gatewise.tasks.sources import parse_assignment
    from gatewise.tasks.sweep import parse_axis, sweep
    from gatewise.tasks.sweep_report import table_of_best

    axes = [parse_axis(text) for text in args.axis]
    if len(dict(axes)) < len(axes):
        raise UserError("an axis is given twice; give all of its values in one --axis")
    console = Console(highlight=False, markup=False)
    try:
        found = sweep(
            args.recipe,
            dict(axes),
            fields=dict(parse_assignment(text) for text in args.set),
            output=args.output,
            engine=args.engine,
            jobs=args.jobs,
            overwrite=args.overwrite,
            say=lambda text: console.print(text, soft_wrap=True),
        )
    except KeyboardInterrupt:
        print("gatewise: repeat the same command to resume this sweep", file=sys.stderr)
        raise
    console.print()
    console.print(table_of_best(found))
    console.print(f"\nwritten: {', '.join(sorted(str(path) for path in found.folder.glob('[rf]*.*')))}", soft_wrap=True)
    for row in found.failed:
        print(f"gatewise: failed: {row.cell.name}: {row.outcome.error}", file=sys.stderr)
    if found.failed:
        print(
            f"gatewise: {len(found.failed)} of {len(found.rows)} cells failed; see log.txt in {found.folder}/cells/...",
            file=sys.stderr,
        )
    return 1 if found.failed else 0
