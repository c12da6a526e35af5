"""Command line: `gatewise COMMAND`. Each command is a file in this folder and is imported only when it is called.

A command's file has `add_arguments(parser)` and `run(args) -> exit status`, and is listed in `GROUPS`.
"""

from __future__ import annotations

# The dispatcher is in `_main`, because importing the command `list` binds the name `list` in this package.
from gatewise.cli._main import GROUPS, main

__all__ = ["GROUPS", "main"]
