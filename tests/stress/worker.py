"""The process that reads damaged files, watched for code that runs."""

from __future__ import annotations

import os
import random
import resource
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

WATCHED = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn")
"""Audit events of programs that are started."""


class Wrong(Exception):  # noqa: N818 (a finding of the harness)
    """The content was read, but the answer is wrong."""


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        status: "same", "changed", "refused", or a defect.
        what: the exception or the finding.
        case: what was done to the file.
        code: whether a program was started or a planted payload ran.
    """

    status: str
    what: str = ""
    case: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    code: bool = False


def work(connection: Connection, corpus: str, scratch: str) -> None:
    """Answer (kind, seed) with a verdict until the other end closes."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    os.chdir(scratch)
    # Imported here: the parent needs none of it.
    import torch

    from tests.stress.kinds import KINDS

    torch.set_num_threads(1)
    started: list[str] = []
    watching = False

    def listen(event: str, arguments: tuple) -> None:
        if watching and event in WATCHED:
            started.append(f"{event} {arguments[:2]}")

    sys.addaudithook(listen)
    kinds = {kind.name: kind(Path(corpus)) for kind in KINDS}
    while True:
        try:
            name, seed = connection.recv()
        except EOFError:
            return
        folder = Path(scratch, "case")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        sentinel = folder / "RAN"
        kind = kinds[name]
        case = kind.case(random.Random(f"{name} {seed}"), folder)
        started.clear()
        begun = time.monotonic()
        watching = True
        status, what = _verdict(case.read, kind.refusals)
        watching = False
        seconds = time.monotonic() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        ran = bool(started) or sentinel.exists()
        connection.send(Verdict(status, what or "; ".join(started), case.what, seconds, peak, ran))


def _verdict(read, refusals: tuple[type[BaseException], ...]) -> tuple[str, str]:
    try:
        return read(), ""
    except refusals as error:
        told = str(error)
        if "\n" in told.strip() or not told.strip():
            return "bad", f"more than one line, or none: {told[:500]!r}"
        if "weights_only=False" in told or "weights_only=`False`" in told:
            return "bad", f"advice to run code: {told[:500]!r}"
        return "refused", told[:300]
    # Whatever else comes is the finding.
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in where if "gatewise" in frame.filename]
        return "bad", f"{type(error).__name__}: {str(error)[:300]} at {', '.join(ours[-3:])}"
