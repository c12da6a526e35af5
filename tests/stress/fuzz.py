"""Damage every kind of file that gatewise reads, and see what becomes of it.

    python -m tests.stress.fuzz --cases 10000 --output benchmarks/results/stress.json

Each case is a file of one kind with seeded damage, or a call with odd arguments. It must end in one of three ways: the
content is read as it was written (`same`), other content that is valid by itself is read (`changed`, only for formats
without checksums), or one line says what is wrong (`refused`). Everything else is a defect: another exception, an
answer that is wrong, no answer within the time, a crash, more memory than allowed, or code that ran.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gatewise.files import write_json, write_text
from tests.stress.kinds import KINDS, prepare
from tests.stress.worker import Verdict, work

TIMEOUT_S = 60.0
"""Seconds after which a case counts as hanging. Nothing read here takes more than a few."""

LARGEST_MEMORY = 2 * 2**30
"""Bytes of resident memory that the reading process may reach."""

GOOD = ("same", "changed", "refused")
DEFECTS = ("bad", "hang", "crash", "memory", "code")


@dataclass
class Tally:
    """What became of the cases of one kind."""

    kind: str
    counts: Counter[str] = field(default_factory=Counter)
    defects: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int = 0
    slowest_s: float = 0.0

    @property
    def cases(self) -> int:
        return sum(self.counts.values())

    def add(self, seed: int, verdict: Verdict) -> None:
        status = verdict.status
        if verdict.code:
            status = "code"
        elif status in GOOD and verdict.peak_bytes > LARGEST_MEMORY:
            status = "memory"
        self.counts[status] += 1
        self.peak_bytes = max(self.peak_bytes, verdict.peak_bytes)
        self.slowest_s = max(self.slowest_s, verdict.seconds)
        if status in DEFECTS:
            self.defects.append({"seed": seed, "status": status, "case": verdict.case, "what": verdict.what})


class Reader:
    """The process that reads: started when needed, and replaced when it hangs, dies or has grown."""

    def __init__(self, corpus: Path, scratch: Path) -> None:
        self._arguments = (str(corpus), str(scratch))
        self._process: Any = None
        self._connection: Connection | None = None

    def ask(self, kind: str, seed: int) -> Verdict:
        connection = self._connection or self._start()
        started = time.monotonic()
        connection.send((kind, seed))
        try:
            if not connection.poll(TIMEOUT_S):
                self.close()
                return Verdict("hang", what=f"no answer within {TIMEOUT_S:g} s", seconds=TIMEOUT_S)
            verdict = connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            return Verdict("crash", what=f"the process ended ({code})", seconds=time.monotonic() - started)
        if verdict.peak_bytes > LARGEST_MEMORY:
            # Its peak would count against the cases that follow.
            self.close()
        return verdict

    def _start(self) -> Connection:
        context = get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=work, args=(other, *self._arguments), daemon=True)
        self._process.start()
        other.close()
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._connection = None


def fuzz(cases: int, first_seed: int = 0, kinds: Sequence[str] = (), log: Any = sys.stderr) -> list[Tally]:
    """Run at least so many cases, shared out between the kinds by their weights."""
    chosen = [kind for kind in KINDS if not kinds or kind.name in kinds]
    total = sum(kind.weight for kind in chosen)
    tallies = []
    with tempfile.TemporaryDirectory(prefix="gatewise-fuzz-") as folder:
        corpus, scratch = Path(folder, "corpus"), Path(folder, "scratch")
        scratch.mkdir()
        prepare(corpus, [kind.name for kind in chosen])
        reader = Reader(corpus, scratch)
        try:
            for kind in chosen:
                tally = Tally(kind.name)
                tallies.append(tally)
                for seed in range(first_seed, first_seed + math.ceil(cases * kind.weight / total)):
                    tally.add(seed, reader.ask(kind.name, seed))
                print(_row(tally), file=log, flush=True)
                for defect in tally.defects[:20]:
                    print(f"    {defect}", file=log, flush=True)
        finally:
            reader.close()
    return tallies


def _row(tally: Tally) -> str:
    counts = "".join(f"{tally.counts[status]:>9}" for status in (*GOOD, *DEFECTS))
    return f"{tally.kind:<22}{tally.cases:>7}{counts}{tally.peak_bytes / 2**20:>8.0f}{tally.slowest_s:>8.1f}"


def table(tallies: Sequence[Tally]) -> str:
    """Return the results as text: a line per kind, and their sum."""
    head = f"{'kind':<22}{'cases':>7}" + "".join(f"{status:>9}" for status in (*GOOD, *DEFECTS)) + "     MiB       s"
    whole = Tally("total")
    for tally in tallies:
        whole.counts.update(tally.counts)
        whole.peak_bytes = max(whole.peak_bytes, tally.peak_bytes)
        whole.slowest_s = max(whole.slowest_s, tally.slowest_s)
    return "\n".join([head, *map(_row, tallies), _row(whole)])


def as_dict(tallies: Sequence[Tally], cases: int, first_seed: int, seconds: float) -> dict[str, Any]:
    """Return the results as plain data, with what they were measured on."""
    import torch

    import gatewise

    return {
        "date": time.strftime("%Y-%m-%d"),
        "gatewise": gatewise.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cases": cases,
        "first_seed": first_seed,
        "seconds": round(seconds),
        "kinds": [
            {
                "kind": tally.kind,
                **{status: tally.counts[status] for status in (*GOOD, *DEFECTS)},
                "peak_mib": round(tally.peak_bytes / 2**20),
                "slowest_s": round(tally.slowest_s, 2),
                "defects": tally.defects,
            }
            for tally in tallies
        ],
    }


def page(content: dict[str, Any], rows: str) -> str:
    """Return the results as a page of the documentation."""
    return f"""# Damaged files

`python -m tests.stress.fuzz --cases {content["cases"]}`, {content["date"]}: gatewise {content["gatewise"]}, Python
{content["python"]}, torch {content["torch"]}, {content["machine"]}, {content["seconds"]} s.

A case ends as `same` (read as it was written), `changed` (other valid content was read, in formats without checksums)
or `refused` (one line says why). The other columns count defects: `bad` (another exception, or a wrong answer), `hang`,
`crash`, `memory` (more than 2 GiB) and `code` (something ran). MiB is the peak of the reading process, s the slowest
case.

```
{rows}
```
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=300, metavar="N", help="number of cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of each kind's first case")
    parser.add_argument("--kinds", nargs="+", default=[], metavar="KIND", choices=[kind.name for kind in KINDS])
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the results")
    args = parser.parse_args()
    started = time.monotonic()
    tallies = fuzz(args.cases, args.seed, args.kinds)
    print(table(tallies))
    if args.output is not None:
        content = as_dict(tallies, args.cases, args.seed, time.monotonic() - started)
        write_json(args.output, content)
        write_text(args.output.with_suffix(".md"), page(content, table(tallies)))
    return 1 if any(tally.defects for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
