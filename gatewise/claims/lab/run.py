"""Context of a running part of a claim: a seed, a time limit, and a progress line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

SEEDS_PER_RUN = 1000
"""Seeds that belong to one `--seed`, so that two of them never share a repetition."""


class OutOfTime(Exception):  # noqa: N818 - it ends a part early; nothing went wrong
    """The time of a part has run out."""


class Run:
    """The surroundings of one part.

    Args:
        seed: seed of the user.
        seconds: time limit of the part.
        say: function that shows a line of progress.
        clock: monotonic clock in seconds.
    """

    def __init__(
        self,
        seed: int,
        seconds: float,
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seed = seed
        self.say = say
        self.notes: list[str] = []
        self._clock = clock
        self._deadline = clock() + seconds

    @property
    def remaining(self) -> float:
        """Seconds that are left; below 0 when the part has taken too long."""
        return self._deadline - self._clock()

    def check_time(self) -> None:
        """Check the time limit; call this in every long loop.

        Raises:
            OutOfTime: if nothing is left.
        """
        if self.remaining <= 0:
            raise OutOfTime

    def stop(self) -> None:
        """Let the time run out now, so that loops in other threads end at their next `check_time`."""
        self._deadline = -math.inf

    def note(self, text: str) -> None:
        """State how this run fell short of the design; it is printed and saved with the result."""
        self.notes.append(text)

    def repeat(self, count: int, once: Callable[[int], Result], what: str = "seed") -> list[Result]:
        """`once(seed)` for `count` different seeds; fewer, and a note of it, where the time does not last.

        A repetition is not begun if there is less time left than the slowest so far took, and one that runs out of time
        is left out.

        Raises:
            OutOfTime: if not even one repetition was completed.
        """
        results: list[Result] = []
        slowest = 0.0
        for index in range(count):
            if results and self.remaining < slowest:
                break
            self.say(f"{what} {index + 1} of {count}")
            begun = self._clock()
            try:
                results.append(once(self.seed * SEEDS_PER_RUN + index))
            except OutOfTime:
                if not results:
                    raise
                break
            slowest = max(slowest, self._clock() - begun)
        if len(results) < count:
            self.note(f"{len(results)} of {count} {what}s, for lack of time")
        return results
