"""List the papers, or show one: its summary, its reported figures, and what gatewise implements of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from gatewise.catalog.papers import KINDS, Paper, arxiv_url, papers, search
from gatewise.catalog.registry import Implemented, implemented
from gatewise.errors import UserError, unknown_name

_KIND_OF_WORD = {kind.split()[0]: kind for kind in KINDS}
_UNWRAPPED = 1000  # columns, so that each fact stays on one line in a pipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gatewise papers`."""
    parser.add_argument(
        "pattern",
        nargs="?",
        metavar="PATTERN",
        help="paper id to show in full, shell-style pattern of ids to list, "
        "or text to find in ids, titles and summaries (default: list all)",
    )
    words = list(_KIND_OF_WORD)
    parser.add_argument(
        "--kind", choices=words, metavar="KIND", help=f"list only papers of this kind: {', '.join(words)}"
    )
    parser.add_argument(
        "--implemented", action="store_true", help="list only papers with a network or a claim in gatewise"
    )
    parser.add_argument("--json", action="store_true", help="print full entries as a JSON list")


def run(args: argparse.Namespace) -> int:
    """Print the chosen papers.

    Raises:
        UserError: if no paper passes the filters.
    """
    chosen = _choose(args.pattern, args.kind, args.implemented)
    console = Console(highlight=False)
    if args.json:
        print(json.dumps([asdict(entry) | asdict(implemented(entry.id)) for entry in chosen], indent=2))
    elif [entry.id for entry in chosen] == [args.pattern]:
        if not console.is_terminal:
            console.width = _UNWRAPPED
        console.print(_whole_entry(chosen[0], implemented(chosen[0].id)))
    elif console.is_terminal:
        console.print(_listing(chosen))
    else:
        print("\n".join(_plain_listing(chosen)))
    return 0


def _choose(pattern: str | None, kind_word: str | None, only_implemented: bool) -> list[Paper]:
    found = papers() if pattern is None else search(pattern)
    if not found:
        raise unknown_name("paper", str(pattern), [entry.id for entry in papers()])
    chosen = [
        entry
        for entry in found
        if (kind_word is None or entry.kind == _KIND_OF_WORD[kind_word])
        and (not only_implemented or _is_implemented(implemented(entry.id)))
    ]
    if not chosen:
        asked = [f"--kind {kind_word}"] * (kind_word is not None) + ["--implemented"] * only_implemented
        raise UserError(f"of {len(found)} papers found, none passes {' '.join(asked)}; leave that out to see them")
    return chosen


def _is_implemented(done: Implemented) -> bool:
    return bool(done.networks) or done.claim


def _row(entry: Paper) -> tuple[str, str, str, str, str]:
    done = implemented(entry.id)
    return entry.id, entry.date[:7], str(len(done.networks) or "-"), "yes" if done.claim else "-", entry.title


def _listing(chosen: Sequence[Paper]) -> RenderableType:
    """Return a section per kind with one line per paper. Long titles are cut, so that the list can be scanned."""
    id_width = max(len(entry.id) for entry in chosen)
    parts: list[RenderableType] = [_table(id_width, show_header=True)]
    for kind, entries in groupby(chosen, key=lambda entry: entry.kind):
        section = _table(id_width, show_header=False)
        for entry in entries:
            section.add_row(*map(Text, _row(entry)))
        parts += [Text(f"\n{KINDS[kind]}", style="bold"), section]
    done = sum(_is_implemented(implemented(entry.id)) for entry in chosen)
    counts = f"\n{len(chosen)} of {len(papers())} papers, {done} implemented; `gatewise papers ID` shows one"
    return Group(*parts, Text(counts, style="dim"))


def _table(id_width: int, show_header: bool) -> Table:
    return Table(
        Column("id", width=id_width, style="cyan"),
        Column("date", width=len("2022-03")),
        Column("networks", width=len("networks"), justify="right"),
        Column("claim", width=len("claim")),
        Column("title", ratio=1, no_wrap=True, overflow="ellipsis"),
        show_header=show_header,
        header_style="dim",
        box=None,
        expand=True,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )


def _plain_listing(chosen: Sequence[Paper]) -> Iterator[str]:
    """Yield one line per paper, in columns and with nothing cut, for pipes."""
    rows = [(*_row(entry)[:-1], entry.kind, entry.title) for entry in chosen]
    rows.insert(0, ("id", "date", "networks", "claim", "kind", "title"))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _whole_entry(entry: Paper, done: Implemented) -> RenderableType:
    facts = Table.grid(Column(style="dim"), Column(), padding=(0, 2, 0, 0))
    for label, url in entry.links.items():
        facts.add_row(label, Text(f"{url} ({entry.license})" if label == "code" else url))
    for other in entry.related:
        facts.add_row("see also", Text(f"{other.name}: {arxiv_url(other.arxiv)}"))
    if done.networks:
        facts.add_row("networks", Text(", ".join(done.networks)))
    if done.claim:
        facts.add_row("claim", Text(f"gatewise reproduce {entry.id}"))
    if not _is_implemented(done):
        facts.add_row("gatewise", Text("not implemented yet"))

    figures = Table("reported", "figure", "source", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for figure in entry.figures:
        source = f"{figure.source} (recalled)" if figure.recalled else figure.source
        figures.add_row(Text(figure.what), Text(figure.value), Text(source))

    tags = (entry.id, entry.kind, entry.date, entry.venue)
    parts: list[RenderableType] = [
        Text(entry.title, style="bold"),
        Text(" · ".join(tag for tag in tags if tag), style="cyan"),
        Text(),
        Text(entry.summary),
        *([Text(f"Note: {entry.note}", style="italic")] if entry.note else []),
        Text(),
        facts,
        Text(),
        figures,
    ]
    if any(figure.recalled for figure in entry.figures):
        parts.append(Text("recalled: quoted from memory of the published table, for orientation", style="dim"))
    return Group(*parts)
