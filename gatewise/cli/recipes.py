"""List the recipes that come with the package, for `gatewise train` and `gatewise sweep`."""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gatewise recipes`."""
    parser.add_argument("pattern", nargs="?", default="*", help="shell-style pattern, such as 'focalnet/*'")


def run(args: argparse.Namespace) -> int:
    """Print one line per recipe: its name and the first line of its comment.

    Raises:
        UnknownNameError: if no recipe matches the pattern.
    """
    from gatewise.errors import unknown_name
    from gatewise.recipes import list_recipes, summary_of

    known = list_recipes()
    names = [name for name in known if fnmatchcase(name, args.pattern)]
    if not names:
        raise unknown_name("recipe", args.pattern, known)
    width = max(len(name) for name in names)
    print("\n".join(f"{name:<{width}}  {summary_of(name)}" for name in names))
    return 0
