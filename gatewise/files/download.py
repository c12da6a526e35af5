"""Downloads into a cache, in which a file is either complete or absent.

The name of a cached file begins with a digest of the whole URL, because different files can have the same last part
(`/a/model.pth` and `/b/model.pth`, `download?id=1` and `download?id=2`).
"""

from __future__ import annotations

import hashlib
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from gatewise.errors import Failure, UserError
from gatewise.files.writing import write_atomically

_CHUNK = 2**20
_PATIENCE_S = 60.0
"""Seconds without data after which a download is aborted."""
_LONGEST_NAME = 100
_DIGEST_IN_NAME = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8})\.\w+$")
"""PyTorch's convention: first digits of the content's SHA-256 before the suffix. Eight decimals may be a date."""


def download(url: str, folder: Path) -> Path:
    """Return the path of the file at an http(s) URL, downloading it if it is not in the cache.

    Args:
        url: URL of the file.
        folder: cache folder; it is created if necessary.
    Raises:
        UserError: if the URL is malformed or unreachable, or the download is incomplete.
        Failure: if the cache cannot be written.
    """
    target = folder / _cache_name(url)
    try:
        there = target.exists()
    except OSError as error:
        raise Failure(f"cannot read the cache {folder}: {error.strerror or error}") from error
    if there:
        return target
    write_atomically(target, lambda file: _fetch(url, file))
    return target


def _cache_name(url: str) -> str:
    digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    try:
        last = unquote(urlsplit(url).path).rpartition("/")[2]
    except ValueError as error:
        raise UserError(f"cannot download {url!r}: {error}") from error
    name = re.sub(r"[^\w.-]", "_", last, flags=re.ASCII)[-_LONGEST_NAME:]
    return f"{digest}-{name or 'download'}"


def _fetch(url: str, file: IO[bytes]) -> None:
    with _telling(url), urllib.request.urlopen(_request(url), timeout=_PATIENCE_S) as response:
        promised = _promised(response)
        digest, count = hashlib.sha256(), 0
        with _progress(url, promised) as advance:
            while chunk := response.read(_CHUNK):
                _write(file, chunk, url)
                digest.update(chunk)
                count += len(chunk)
                advance(len(chunk))
    if promised is not None and count != promised:
        raise UserError(f"cannot download {url!r}: it broke off after {count:,} of {promised:,} bytes; try again")
    named = _DIGEST_IN_NAME.search(urlsplit(url).path)
    if named is not None and not digest.hexdigest().startswith(named[1]):
        raise UserError(
            f"cannot download {url!r}: its SHA-256 begins with {digest.hexdigest()[:8]}, not with {named[1]} as its "
            "name says"
        )


def _write(file: IO[bytes], chunk: bytes, url: str) -> None:
    """Write, so that a full disk is not mistaken for a network error."""
    try:
        file.write(chunk)
    except OSError as error:
        raise _DiskError(error) from error


class _DiskError(Exception):
    """Wrapper that carries a disk error past the handler of network errors."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def _request(url: str) -> urllib.request.Request:
    return urllib.request.Request(url, headers={"User-Agent": "gatewise"})


def _promised(response: HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdigit() else None


@contextmanager
def _telling(url: str) -> Iterator[None]:
    """Convert network errors to one-line `UserError`s."""
    try:
        yield
    except _DiskError as error:
        raise error.error from None
    except urllib.error.HTTPError as error:
        raise UserError(f"cannot download {url!r}: the server answers {error.code} {error.reason}") from error
    # Network errors, a malformed URL, an invalid host name, a server that does not speak HTTP.
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "reason", None) or error
        raise UserError(f"cannot download {url!r}: {' '.join(str(reason).split()) or type(error).__name__}") from error


@contextmanager
def _progress(url: str, size: int | None) -> Iterator[Any]:
    """Provide a function that reports received bytes to a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    shown = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as progress:
        task = progress.add_task(f"downloading {urlsplit(url).path.rpartition('/')[2] or url}", total=size)
        yield lambda count: progress.advance(task, count)
