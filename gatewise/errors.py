"""Errors by cause: mistakes of the user (exit status 2) and failures (exit status 1)."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake that the user can fix; the message says what was expected, what came and what to do."""


class UnknownNameError(UserError):
    """An unknown name; the message suggests the closest known ones."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit the network."""


class MissingExtraError(UserError):
    """A missing optional dependency; the message names the extra that installs it."""


class Failure(RuntimeError):  # noqa: N818  (users see the name)
    """A failure that is not the user's fault, reported in one line (a full disk, a NaN loss)."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to stop. The message says what that means for the user, or is empty.

    Args:
        number: the signal's number; the exit status of the process is 128 plus it.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Return the error for an unknown `name` of this `kind`, with the closest known names in its message."""
    known = sorted(known)
    close = get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    if close:
        hint = "did you mean " + " or ".join(repr(match) for match in close) + "?"
    elif len(known) <= 12:
        hint = "known: " + ", ".join(known)
    else:
        hint = f"there are {len(known)}, for example {', '.join(known[:3])}"
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}")
