"""The papers behind the library, read from `papers.toml`.

Each table of that file is one paper; its name is the id by which networks, methods and claims refer to it. Reading the
file needs no torch. It does not say how much of a paper is implemented; see `gatewise.catalog.registry.implemented`.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any

from gatewise.errors import unknown_name

KINDS = {
    "image network": "Image networks",
    "dense network": "Dense networks",
    "video network": "Video networks",
    "restoration network": "Restoration networks",
    "sequence network": "Sequence networks",
    "generation network": "Generation networks",
    "multimodal network": "Multimodal networks",
    "tabular network": "Tabular networks",
    "method": "Methods",
    "analysis": "Analyzes",
}
"""Main subjects of papers, with the heading of each, in the order in which they are listed."""

_KIND_ORDER = list(KINDS)
_REQUIRED = {"title", "date", "kind", "summary"}
_OPTIONAL = {"arxiv", "venue", "doi", "repository", "license", "note"}
_TABLES = {"related", "figures", "recalled"}

_FORMS = {
    "id": (re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*"), "snake_case, like 'inception_next'"),
    "date": (re.compile(r"\d{4}-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?"), "a date, or 'YYYY-MM'"),
    "kind": (re.compile("|".join(KINDS)), "one of " + ", ".join(KINDS)),
    "arxiv": (re.compile(r"\d{2}(0[1-9]|1[0-2])\.\d{4,5}"), "an arXiv id without its version, like '2203.11926'"),
    "doi": (re.compile(r"10\.\d{4,}/\S+"), "a DOI, like '10.1145/3583780.3615089'"),
    "repository": (re.compile(r"[\w.-]+/[\w.-]+"), "owner/name on GitHub"),
}


@dataclass(frozen=True)
class Figure:
    """One headline result: what was measured, the value, and where the paper or its repository states it.

    A `recalled` figure is quoted from memory of the published table. It is for orientation, not for comparison.
    """

    what: str
    value: str
    source: str
    recalled: bool = False


@dataclass(frozen=True)
class RelatedPaper:
    """A paper that defines what another paper uses."""

    arxiv: str
    name: str


@dataclass(frozen=True)
class Paper:
    """One paper: what it is, where to read it, what it reports.

    Attributes:
        id: snake_case name that the code uses for it.
        date: date of the first arXiv version, ISO 8601: `2022-03-22`, or `2021-03` if the day is not known.
        kind: one of `KINDS`.
        summary: one sentence on what it does and why one would want it.
        arxiv: arXiv id without a version.
        repository: reference implementation on GitHub, `owner/name`; None if none is public.
        license: license of that repository; "none stated" if it has none, "unknown" if it could not be inspected.
        note: remarks on the sources.
    """

    id: str
    title: str
    date: str
    kind: str
    summary: str
    figures: tuple[Figure, ...]
    arxiv: str | None = None
    venue: str | None = None
    doi: str | None = None
    repository: str | None = None
    license: str | None = None
    note: str | None = None
    related: tuple[RelatedPaper, ...] = ()

    @property
    def links(self) -> dict[str, str]:
        """URLs of the paper and its code, by label."""
        links = {}
        if self.arxiv:
            links["arXiv"] = arxiv_url(self.arxiv)
        if self.doi:
            links["DOI"] = f"https://doi.org/{self.doi}"
        if self.repository:
            links["code"] = f"https://github.com/{self.repository}"
        return links


def arxiv_url(arxiv: str) -> str:
    """Return the URL of an arXiv id's abstract page."""
    return f"https://arxiv.org/abs/{arxiv}"


def papers() -> list[Paper]:
    """Return all papers, by kind (in the order of `KINDS`), then by date."""
    return list(_catalog().values())


def paper(id: str) -> Paper:
    """Return the paper with this id.

    Raises:
        UnknownNameError: if the id is unknown. The message suggests the closest one.
    """
    catalog = _catalog()
    if id not in catalog:
        raise unknown_name("paper", id, catalog)
    return catalog[id]


def search(pattern: str) -> list[Paper]:
    """Return the papers that match, possibly none.

    An id matches only that paper, and a shell-style pattern (`gated_*`) every id that fits. Any other text matches
    every paper that has it in its id, title or summary, ignoring case.
    """
    if pattern in _catalog():
        return [_catalog()[pattern]]
    wanted = pattern.casefold()
    if any(wildcard in pattern for wildcard in "*?["):
        return [entry for entry in papers() if fnmatchcase(entry.id, wanted)]
    return [entry for entry in papers() if wanted in f"{entry.id}\n{entry.title}\n{entry.summary}".casefold()]


@cache
def _catalog() -> dict[str, Paper]:
    source = resources.files("gatewise.catalog") / "papers.toml"
    return {entry.id: entry for entry in parse_papers(source.read_text(encoding="utf-8"))}


def parse_papers(text: str) -> list[Paper]:
    """Parse papers from a TOML catalog, by kind, then by date. The fields are described at the top of `papers.toml`.

    Raises:
        ValueError: if it is not valid TOML (including a repeated id), or an entry lacks a field, or has an unknown or
            malformed one. The message names the entry and the field.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the paper catalog is not valid TOML: {error}") from error
    found = [_parse_paper(id, table) for id, table in tables.items()]
    return sorted(found, key=lambda entry: (_KIND_ORDER.index(entry.kind), entry.date, entry.id))


def _parse_paper(id: str, table: Any) -> Paper:
    where = f"paper {id!r}"
    _check_form(where, "id", id)
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a table of fields, not {table!r}")
    fields = dict(table)
    figures = (
        *_parse_figures(where, "figures", fields.pop("figures", {})),
        *_parse_figures(where, "recalled", fields.pop("recalled", {})),
    )
    if not figures:
        raise ValueError(f"{where}: needs a figure, in [{id}.figures.SOURCE] or [{id}.recalled.SOURCE]")
    related = _texts(where, "related", fields.pop("related", {}))
    for arxiv in related:
        _check_form(where, "arxiv", arxiv)
    return Paper(
        id=id,
        figures=figures,
        related=tuple(RelatedPaper(arxiv, name) for arxiv, name in related.items()),
        **_parse_fields(where, fields),
    )


def _parse_fields(where: str, fields: dict[str, Any]) -> dict[str, str]:
    for name in fields:
        if name not in _REQUIRED | _OPTIONAL:
            raise ValueError(f"{where}: {unknown_name('field', name, _REQUIRED | _OPTIONAL | _TABLES)}")
    if missing := sorted(_REQUIRED - fields.keys()):
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    if ("repository" in fields) != ("license" in fields):
        raise ValueError(f"{where}: repository and license are stated together, or neither is")
    texts = _texts(where, "the entry", fields | {"date": str(fields["date"])})
    for name in _FORMS.keys() & texts.keys():
        _check_form(where, name, texts[name])
    return texts


def _parse_figures(where: str, name: str, sources: Any) -> list[Figure]:
    if not isinstance(sources, dict):
        raise ValueError(f"{where}: {name} must be tables by source, not {sources!r}")
    return [
        Figure(what, value, source, recalled=name == "recalled")
        for source, values in sources.items()
        for what, value in _texts(where, f"{name}.{source}", values).items()
    ]


def _texts(where: str, name: str, table: Any) -> dict[str, str]:
    """Return the table after checking that it holds only text, each on one line."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {name} must be a table, not {table!r}")
    for key, value in table.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {key!r} of {name} must be a text that is not empty, not {value!r}")
    return {key: " ".join(value.split()) for key, value in table.items()}


def _check_form(where: str, name: str, text: str) -> None:
    pattern, expected = _FORMS[name]
    if not pattern.fullmatch(text):
        raise ValueError(f"{where}: {name} must be {expected}, not {text!r}")
