"""Running a claim: its parts in order, each with its share of the time, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gatewise.claims._base import Claim, Outcome, Part, PartOutcome
from gatewise.claims._report import VERDICT_STYLES, describe_claim, describe_part, write_figure, write_json
from gatewise.claims._run import OutOfTime, Run

REPORT_SECONDS = 4.0
"""What drawing and writing take; parts get the rest of the budget."""

_WIDEST = 120


def run_claim(
    paper: str,
    claim: Claim,
    folder: Path,
    *,
    seed: int,
    budget_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Run the parts, print and write what comes out.

    A part's share of what is left of the budget is its planned seconds over those of all parts that are still to come:
    what one part saves, the later ones have.
    """
    begun = clock()
    console = Console(highlight=False)
    console.width = min(console.width, _WIDEST)
    console.print(_heading(describe_claim(paper, claim, seed, budget_s)))
    outcomes: list[PartOutcome] = []
    for index, part in enumerate(claim.parts):
        left = budget_s - REPORT_SECONDS - (clock() - begun)
        seconds = left * part.seconds / sum(later.seconds for later in claim.parts[index:])
        title = f"[{index + 1}/{len(claim.parts)}] {part.title}"
        console.print(Text(f"\n{title}", style="bold"))
        console.print(Padding(Text(part.method, style="dim"), (0, 0, 0, 2)))
        with _progress(console, title) as say:
            outcomes.append(_run_part(part, Run(seed, seconds, say, clock), clock))
        _print_part(console, outcomes[-1])
    outcome = Outcome(paper, claim, tuple(outcomes), seed, budget_s, clock() - begun, folder)
    write_json(outcome, folder / "result.json")
    write_figure(outcome, folder / "figure.png")
    console.print(Text(f"\n{outcome}", style=f"bold {VERDICT_STYLES[outcome.verdict]}"))
    console.print(Text(f"{outcome.seconds:.0f} s; written: {folder / 'result.json'}, {folder / 'figure.png'}"))
    return outcome


def _run_part(part: Part, run: Run, clock: Callable[[], float]) -> PartOutcome:
    begun = clock()
    try:
        run.check_time()
        finding = part.run(run)
    except OutOfTime:
        run.note(f"given up after {clock() - begun:.0f} s, for lack of time; it takes about {part.seconds:.0f} s")
        finding = None
    return PartOutcome(part, finding, tuple(run.notes), clock() - begun)


def _heading(lines: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    before = ""
    for label, text in lines:
        table.add_row(label if label != before else "", Text(text))
        before = label
    return table


def _print_part(console: Console, outcome: PartOutcome) -> None:
    for line in describe_part(outcome):
        indent = 2 + len(line) - len(line.lstrip())
        console.print(Padding(Text(line.lstrip()), (0, 0, 0, indent)))
    verdict = Text(f"-> {outcome.verdict}", style=VERDICT_STYLES[outcome.verdict])
    console.print(Padding(verdict.append(f" ({outcome.seconds:.1f} s): {outcome.why}", style="default"), (0, 0, 0, 2)))


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    """A line that tells what is going on; in a terminal alone, and gone afterwards."""
    with console.status(title) as status:
        yield lambda text: status.update(f"{title}: {text}")
