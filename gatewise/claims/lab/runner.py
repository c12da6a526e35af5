"""Running a claim: its parts in order, each with its share of the time, and the report."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gatewise.claims.lab.base import Claim, Outcome, Part, PartOutcome
from gatewise.claims.lab.report import VERDICT_STYLES, describe_claim, describe_part, write_report
from gatewise.claims.lab.run import OutOfTime, Run

REPORT_SECONDS = 4.0
"""Seconds for drawing and writing. Parts get the rest of the budget."""

_WIDEST = 120
_LABEL = "{:<11}"


def run_claim(
    paper: str,
    claim: Claim,
    folder: Path,
    *,
    seed: int,
    budget_s: float,
    begun: float,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Run the parts, and print and write their outcomes.

    A part's share of what is left of the budget is its planned seconds over those of all parts that are still to come:
    what one part saves, the later ones have.

    Args:
        begun: when the budget began to be spent, by `clock`.
    """
    console = Console(highlight=False)
    console.width = min(console.width, _WIDEST)
    for label, text in describe_claim(paper, claim, seed, budget_s):
        _print(console, text, label=label)
    outcomes: list[PartOutcome] = []
    for index, part in enumerate(claim.parts):
        left = budget_s - REPORT_SECONDS - (clock() - begun)
        seconds = left * part.seconds / sum(later.seconds for later in claim.parts[index:])
        title = f"[{index + 1}/{len(claim.parts)}] {part.title}"
        console.print(Text(f"\n{title}", style="bold"))
        _print(console, part.method, style="dim", indent=2)
        with _progress(console, title) as say:
            outcomes.append(_run_part(part, Run(seed, seconds, say, clock), clock))
        _print_part(console, outcomes[-1])
    outcome = Outcome(paper, claim, tuple(outcomes), seed, budget_s, clock() - begun, folder)
    write_report(outcome, folder)
    console.print()
    _print(console, str(outcome), style=f"bold {VERDICT_STYLES[outcome.verdict]}")
    console.print(
        f"{outcome.seconds:.0f} s; written: {folder / 'result.json'}, {folder / 'figure.png'}", soft_wrap=True
    )
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


def _print_part(console: Console, outcome: PartOutcome) -> None:
    for line in describe_part(outcome):
        _print(console, line, indent=2)
    text = f"-> {outcome.verdict} ({outcome.seconds:.1f} s): {outcome.why}"
    _print(console, text, style=VERDICT_STYLES[outcome.verdict], indent=2)


def _print(console: Console, text: str, *, label: str = "", style: str = "", indent: int = 0) -> None:
    """Wrapped, and indented where it begins: behind the label, or as its own leading blanks have it."""
    margin = " " * (len(_LABEL.format(label)) if label else indent + len(text) - len(text.lstrip()))
    lines = textwrap.wrap(text.strip(), console.width - len(margin) - 1, break_on_hyphens=False)
    for number, line in enumerate(lines):
        begins = Text(_LABEL.format(label), style="cyan") if label and number == 0 else Text(margin)
        console.print(begins.append(line, style=style), soft_wrap=True)


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    """A line that tells what is going on; in a terminal alone, and gone afterwards."""
    with console.status(title) as status:
        yield lambda text: status.update(f"{title}: {text}")
