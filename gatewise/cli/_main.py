"""Dispatcher: find the command, parse its arguments, turn errors into one line and an exit status."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from gatewise import __version__
from gatewise.errors import Failure, Interrupted, UserError, unknown_name

GROUPS: dict[str, dict[str, str]] = {
    "know": {
        "papers": "list the papers and what gatewise implements of each",
        "list": "list the registered networks",
        "show": "show one network: card, stages, cost",
        "verify": "compare networks with digests of their reference implementations",
        "reproduce": "test a paper's claim in miniature on this machine",
    },
    "use": {
        "recipes": "list the recipes that come with the package",
        "train": "train a network from a recipe",
        "evaluate": "score a trained network on held-out data",
        "predict": "classify image files or continue a text",
        "sweep": "train a recipe at every point of a grid",
    },
    "ship": {
        "measure": "measure parameters, MACs, latency, throughput and memory",
        "waterline": "show whether memory or arithmetic limits each kernel of a network",
        "optimize": "make a network fast on this machine, checked and measured",
        "quantize": "quantize weights and activations to int8",
        "export": "export to ONNX and check the file against the network",
    },
    "see": {
        "gates": "draw the gates of a trained network",
        "demo": "train, measure and export a small network, and write a report",
    },
}
_COMMANDS = {name: summary for group in GROUPS.values() for name, summary in group.items()}

USER_MISTAKES = (
    ValueError,
    FileExistsError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
# Errors of a machine that is too small or broken. Any other error that is not a user mistake is a bug.
_FAILURES = (Failure, OSError, MemoryError)


class _Parser(argparse.ArgumentParser):
    """Raise wrong arguments as `UserError`, so that they print as one line like every other user mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for a failure, 2 for a user mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _run(arguments)
    except KeyboardInterrupt as error:
        print(f"gatewise: {error if isinstance(error, Interrupted) and str(error) else 'interrupted'}", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)
    except BrokenPipeError:
        # The reader closed the pipe (`gatewise papers | head`). Python must not write to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"gatewise: error: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, USER_MISTAKES) else 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"gatewise {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in _COMMANDS:
        raise unknown_name("command", name, _COMMANDS)
    command = import_module(f"gatewise.cli.{name}")
    parser = _Parser(prog=f"gatewise {name}", description=command.__doc__, allow_abbrev=False)
    command.add_arguments(parser)
    return command.run(parser.parse_args(rest))


def overview() -> str:
    """Return the text of `gatewise --help`."""
    lines = [
        "usage: gatewise COMMAND [ARGUMENT ...] [--debug]",
        "",
        "Gated and efficient neural networks: build, reproduce, train, measure, ship, see.",
    ]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:<11}{summary}" for name, summary in commands.items())]
    lines += [
        "",
        "`gatewise COMMAND --help` lists its arguments; --debug shows tracebacks of errors, --version the version.",
    ]
    return "\n".join(lines)


def _one_line(error: BaseException) -> str:
    if isinstance(error, Failure | ValueError | OSError):
        return " ".join(str(error).split()) or type(error).__name__
    line = " ".join(f"{type(error).__name__}: {error}".split())
    # torch.OutOfMemoryError is a RuntimeError, and torch may not be imported here.
    if isinstance(error, _FAILURES) or type(error).__name__ == "OutOfMemoryError":
        return line
    return f"{line} (this is a bug; run again with --debug for the traceback)"
