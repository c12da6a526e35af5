"""List the registered networks."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="shell-style pattern, such as 'focalnet_*'")


def run(args: argparse.Namespace) -> int:
    from gatewise.catalog.registry import list_models, registered_names
    from gatewise.errors import unknown_name

    names = list_models(args.pattern)
    if not names:
        raise unknown_name("model", args.pattern, registered_names())
    print("\n".join(names))
    return 0
