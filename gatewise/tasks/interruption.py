"""Signals that ask a run to stop: SIGINT, SIGTERM and SIGHUP.

Before training begins and after it has ended a signal stops the run at once. In training the first one lets the step
finish, so that what is saved is a state between two steps, and the second one stops at once.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from gatewise.errors import Interrupted

BEFORE_TRAINING = "interrupted before training began; nothing was saved"

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_STOPPING = b"\ngatewise: stopping after this step; interrupt again to stop at once\n"


class Interruption:
    """Within the block, signals that ask to stop are answered here; outside the main thread nothing changes.

    Args:
        message: of the `Interrupted` that a signal raises.

    Attributes:
        asked: the signal that asked a step in work to be the last; None so far.
    """

    def __init__(self, message: str = "") -> None:
        self.message = message
        self.asked: int | None = None
        self._in_training = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interruption:
        # Handlers can only be set in the main thread; elsewhere whoever owns the thread decides.
        if threading.current_thread() is threading.main_thread():
            for number in _numbers():
                self._before[number] = signal.signal(number, self._answer)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def begin_training(self) -> None:
        """From now on, let the step in work finish."""
        self._in_training = True
        self.message = ""

    def end_training(self) -> None:
        """From now on, stop at once again."""
        self._in_training = False

    def error(self) -> Interrupted:
        """The error to raise once the step in work is saved, or once somebody else has caught the one raised here."""
        return Interrupted(signal.SIGINT if self.asked is None else self.asked, self.message)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        # Loading processes inherit the handlers; they end with the process that started them.
        if os.getpid() != self._process:
            return
        first = self.asked is None
        self.asked = number
        if first and self._in_training:
            # Not print: a handler may run in the middle of one.
            os.write(2, _STOPPING)
            return
        raise self.error()


def _numbers() -> list[int]:
    """The signals to answer on this system; a hang-up is left alone where the process was told to survive it."""
    found = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [number for number in found if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN]
