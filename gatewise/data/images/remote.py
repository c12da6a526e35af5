"""Remote shards as byte streams.

http and https are fetched here. The other schemes are those of the webdataset package, which starts a program for each
(curl, gsutil, ais). Their URLs may not contain characters that are special to a shell, however it is started.
"""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from gatewise.data.images.tar import DamagedTarError, Readable
from gatewise.data.module import optional_module
from gatewise.errors import UserError

_FETCHED_HERE = ("http", "https")
_TIMEOUT_S = 60.0
_PAUSES_S = (1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before each further attempt if the server is busy or does not answer."""

_BUSY = (408, 425, 429, 500, 502, 503, 504)
_PLAIN = re.compile(r"[A-Za-z0-9_.~%:/@+=,#?-]+")
_PRINTABLE = "".join(map(chr, range(33, 127)))


def is_local(shard: str) -> bool:
    """Return whether a shard is a path, not a URL."""
    return ":" not in shard.split("/", 1)[0]


def require_fetchable(shard: str) -> None:
    """Raise `UserError` if a shard is a shell command or a URL with an unknown scheme."""
    if is_local(shard):
        return
    scheme = shard.split(":", 1)[0]
    if scheme == "pipe":
        raise UserError(f"shard {shard!r} is a shell command, which is not run; name a path or a URL")
    known = sorted({*_FETCHED_HERE, *optional_module("webdataset").gopen_schemes} - {"__default__", "pipe", "file"})
    if scheme not in known:
        raise UserError(f"shard {shard!r} has an unknown scheme; expected a path, or one of {', '.join(known)}")
    if scheme in _FETCHED_HERE:
        if any(character.isspace() or not character.isprintable() for character in shard):
            raise UserError(f"shard {shard!r} is not a URL: it contains white space; write %20 for a space")
    elif not _PLAIN.fullmatch(shard):
        unusual = next(character for character in shard if not _PLAIN.fullmatch(character))
        raise UserError(f"shard {shard!r} is not accepted: its URL contains {unusual!r}; write such characters as %XX")


@contextmanager
def remote_stream(url: str) -> Iterator[Readable]:
    """Open a shard as a byte stream within the block.

    Raises:
        UserError: if the URL is not accepted.
        DamagedTarError: if it cannot be reached.
    """
    require_fetchable(url)
    if url.split(":", 1)[0] in _FETCHED_HERE:
        with closing(_answer(url)) as answer:
            yield answer
        return
    command = _command(url)
    try:
        yield command
    finally:
        command.close()


class _BusyError(DamagedTarError):
    """Failure of a server that may answer when it is asked again."""


def _answer(url: str) -> Any:
    """Return the server's response, with retries if the server is busy or cannot be reached."""
    for pause in _PAUSES_S:
        try:
            return _request(url)
        except _BusyError:
            time.sleep(pause)
    return _request(url)


def _request(url: str) -> Any:
    try:
        return urllib.request.urlopen(urllib.parse.quote(url, safe=_PRINTABLE), timeout=_TIMEOUT_S)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        refused = isinstance(error, urllib.error.HTTPError) and error.code not in _BUSY
        if refused or isinstance(error, (http.client.InvalidURL, ValueError)):
            raise DamagedTarError(reason) from error
        raise _BusyError(reason) from error


def _command(url: str) -> _Command:
    try:
        return _Command(optional_module("webdataset.gopen").gopen(url, "rb"))
    # Programs that are not installed, and any error of the hub clients.
    except Exception as error:
        raise DamagedTarError(f"it cannot be fetched: {' '.join(str(error).split())}") from error


class _Command:
    """Output of a program."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def read(self, count: int) -> bytes:
        try:
            return self._pipe.read(count)
        except OSError:
            # The original message has the whole command line, which may contain a token.
            raise OSError("the program that fetches it failed") from None

    def close(self) -> None:
        # A failed program leaves a truncated archive, which the reader has already noticed.
        with suppress(OSError):
            self._pipe.close()
