"""The command line: `gatewise COMMAND`. A command is a file of this folder; it is imported when it is called.

A command's file has `add_arguments(parser)` and `run(args) -> exit status`, and is listed in `GROUPS`.
"""

from __future__ import annotations

# The dispatcher lives beside, not here: importing the command `list` binds that name in this package.
from gatewise.cli._main import GROUPS, main

__all__ = ["GROUPS", "main"]
