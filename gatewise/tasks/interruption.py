"""Signals that ask a run to stop: SIGINT, SIGTERM and SIGHUP.

Before and after training, a signal stops the run at once. During training, the first signal lets the current step
finish, so that the saved state is between two steps. The second signal stops at once.
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
    """Context manager that handles signals that ask to stop. Outside the main thread it changes nothing.

    Args:
        message: message of the `Interrupted` that a signal raises.

    Attributes:
        asked: signal that asked the run to stop; None so far.
    """

    def __init__(self, message: str = "") -> None:
        self.message = message
        self.asked: int | None = None
        self._in_training = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interruption:
        # Handlers can be set only in the main thread. In another thread, its owner decides.
        if threading.current_thread() is threading.main_thread():
            for number in _numbers():
                self._before[number] = signal.signal(number, self._answer)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def begin_training(self) -> None:
        """From now on, let the current step finish."""
        self._in_training = True
        self.message = ""

    def end_training(self) -> None:
        """From now on, stop at once again."""
        self._in_training = False

    def error(self) -> Interrupted:
        """Return the error to raise once the current step is saved, or after other code caught the one raised here."""
        return Interrupted(signal.SIGINT if self.asked is None else self.asked, self.message)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        # Data-loading processes inherit the handlers, but they end with the process that started them.
        if os.getpid() != self._process:
            return
        first = self.asked is None
        self.asked = number
        if first and self._in_training:
            # Not `print`, because the handler may run in the middle of one.
            os.write(2, _STOPPING)
            return
        raise self.error()


def _numbers() -> list[int]:
    """Return the signals to handle on this system. SIGHUP stays ignored if it already is (nohup)."""
    found = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [number for number in found if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN]
