"""Train a network from a recipe. Recipe fields are overridden as in `gatewise train RECIPE --optim.lr 1e-3`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gatewise.tasks import Recipe, Result

_FLAGS = {
    "resume": "resume from last.ckpt; the result equals that of an uninterrupted run",
    "overwrite": "replace an earlier run in the same folder",
    "print-config": "print the recipe with every field filled in and exit",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gatewise train`. Words after the recipe go to the recipe's own parser."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="YAML file or name from `gatewise recipes`, such as focalnet/finetune"
    )
    parser.add_argument(
        "fields",
        nargs=argparse.REMAINDER,
        metavar="--field value",
        help="recipe fields to override; `gatewise train RECIPE --help` lists them all",
    )
    for flag, summary in _FLAGS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=summary)


def run(args: argparse.Namespace) -> int:
    """Train and print the result.

    Raises:
        UserError: for a mistake in the recipe or on the command line.
    """
    from gatewise.tasks.interruption import BEFORE_TRAINING, Interruption

    # After the recipe, argparse puts every word into `fields`, flags included.
    flags = {flag: f"--{flag}" in args.fields or vars(args)[flag.replace("-", "_")] for flag in _FLAGS}
    fields = [word for word in args.fields if word.removeprefix("--") not in _FLAGS]
    # The imports take seconds. `train` handles the signals itself.
    with Interruption(BEFORE_TRAINING):
        from rich.console import Console

        from gatewise.tasks import load_recipe, train
        from gatewise.tasks.logs import is_main_process

        recipe = load_recipe(args.recipe, arguments=fields)
    if flags["print-config"]:
        print(recipe.to_yaml(), end="")
        return 0
    result = train(recipe, resume=flags["resume"], overwrite=flags["overwrite"])
    if is_main_process():
        console = Console(highlight=False, markup=False)
        for label, text in _facts(recipe, result):
            console.print(f"{label:<9}{text}", soft_wrap=True)
    return 0


def _facts(recipe: Recipe, result: Result) -> Iterator[tuple[str, str]]:
    yield "network", f"{recipe.model.name}, {result.parameters:,} trained parameters"
    yield "data", recipe.data.name
    yield "trained", f"{result.epochs} epochs, {result.steps:,} updates, {result.seconds:,.0f} s"
    if result.best is None:
        yield "weights", f"{result.last} (nothing was validated)"
        return
    metrics = ", ".join(f"{k.removeprefix('val/')} {v:.4f}" for k, v in result.metrics.items() if k != "epoch")
    yield "best", f"epoch {result.metrics['epoch'] + 1:.0f}: {metrics}"
    yield "weights", str(result.best)
    yield "next", f"gatewise evaluate --checkpoint {result.best}"
