"""Pages that are written when the documentation is built, so that none is kept by hand.

A page per paper comes from the catalog (title, links, figures), the registry (networks and their cards) and the
source (claim and reference); a page per room of the package comes from the source; the guides that live at the root of
the repository are taken over. mkdocs calls the two hooks below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from gatewise.catalog.papers import KINDS, Paper, arxiv_url, papers
from gatewise.catalog.registry import implemented, registered_names
from gatewise.efficiency.card import model_card

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gatewise"
RESULTS = ROOT / "benchmarks" / "results"
ROOT_GUIDES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md"}
_LINK_INTO_REPOSITORY = re.compile(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)")
ROOMS = {
    "catalog": "Catalog, registry, checkpoints",
    "networks": "What a network offers",
    "layers": "Layers",
    "ops": "Operators",
    "methods": "Methods",
    "data": "Data",
    "tasks": "Tasks and recipes",
    "efficiency": "Efficiency",
    "gates": "Gates",
    "claims": "Claims",
    "fidelity": "Fidelity",
    "integrations": "Integrations",
    "files": "Reading and writing files",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages below the entries of `nav` that they belong to."""
    kinds = groupby(papers(), key=lambda entry: entry.kind)
    below = {
        "Papers": [{KINDS[kind]: [{entry.id: f"papers/{entry.id}.md"} for entry in group]} for kind, group in kinds],
        "Reference": [{title: f"reference/{room}.md"} for room, title in ROOMS.items()],
    }
    config.nav = [
        {title: [page, *below[title]] if title in below else page}
        for entry in config.nav or []
        for title, page in entry.items()
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"papers/index.md": _index_of_papers()}
    pages |= {f"papers/{entry.id}.md": _page_of_paper(entry) for entry in papers()}
    pages |= {f"reference/{room}.md": _page_of_room(room, title) for room, title in ROOMS.items()}
    pages |= {path: _page_of_guide(source) for path, source in ROOT_GUIDES.items()}
    pages["benchmarks.md"] = _page_of_benchmarks()
    pages["backbones.md"] = _page_of_backbones()
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    files.append(File.generated(config, "compare_backbones.png", abs_src_path=str(RESULTS / "compare_backbones.png")))
    return files


def _page_of_backbones() -> str:
    """The recorded comparison of all families, and how to go on from it."""
    _, _, found = (RESULTS / "compare_backbones.md").read_text(encoding="utf-8").partition("\n")
    return f"""# Choosing a backbone

![Accuracy against latency and against parameters, with the Pareto fronts](compare_backbones.png)

Every family of image networks, its smallest member scaled to 32x32 pixels, under one recipe for equally many epochs.
Orange families are on a front: no other is at least as accurate at less cost. What lies near a front is as good a
choice where it offers something else that you need: a pyramid for dense prediction, any image size, published weights.

Three questions decide more than this picture:

- **Which size of image?** Self-attention among all patches grows with the square of the pixels; windows, gates and
  convolutions grow with the pixels. [Benchmarks](benchmarks.md) has times at 224 pixels and memory at 1,024.
- **Which device?** Few multiply-accumulates are no short time: depthwise convolutions and norms wait for memory.
  `gatewise measure NAME ... --optimize` tells on yours.
- **Are there weights?** `gatewise show NAME` says which checkpoint a name has, its license and its reported score.

```
gatewise list 'focalnet*'
gatewise measure focalnet_tiny_srf inception_next_tiny mobilenetv2_100 --optimize --chart times.png
```

## All families
{found.replace("## ", "### ")}"""


def _page_of_benchmarks() -> str:
    """All recorded results, one section each, the slow ones included."""
    parts = [
        "# Benchmarks",
        "Recorded with the scripts in `benchmarks/`: both sides in one process, interleaved, medians of ratios within "
        "rounds. Times belong to the machine named; ratios are what carries over.",
    ]
    for path in sorted(RESULTS.glob("*.md")):
        title, _, rest = path.read_text(encoding="utf-8").partition("\n")
        parts.append(f"## {title.removeprefix('# ').replace('_', ' ')}\n{rest.replace('## ', '### ')}")
    return "\n\n".join(parts)


def _index_of_papers() -> str:
    parts = [
        "# Papers",
        "What is implemented is read from the source: networks from their registration, claims from `gatewise.claims`. "
        "`gatewise papers` prints the same list.",
    ]
    for kind, group in groupby(papers(), key=lambda entry: entry.kind):
        rows = []
        for entry in group:
            done = implemented(entry.id)
            claim = "yes" if done.claim else ""
            rows.append((f"[{entry.title}]({entry.id}.md)", entry.date[:4], len(done.networks) or "", claim))
        parts += [f"## {KINDS[kind]}", _table(("paper", "year", "networks", "claim"), rows)]
    return "\n\n".join(parts)


def _page_of_paper(entry: Paper) -> str:
    done = implemented(entry.id)
    tags = [KINDS[entry.kind], entry.date, *([entry.venue] if entry.venue else [])]
    parts = [f"# {entry.title}", " · ".join(tags), entry.summary, _links(entry)]
    if entry.note:
        parts.append(f"!!! note\n    {entry.note}")
    parts += ["## Reported", _figures(entry)]
    if done.networks:
        parts += ["## Networks", _cards(done.networks)]
    if done.claim:
        parts += [
            "## The claim in miniature",
            f"```\ngatewise reproduce {entry.id}\n```",
            _reference(f"gatewise.claims.{entry.id}", members=False, show_root_heading=False),
        ]
    if done.networks:
        modules = sorted({registered_names()[name].module for name in done.networks})
        parts += ["## Reference", *(_reference(module) for module in modules)]
    if not done.networks and not done.claim:
        parts.append("Not implemented yet: [add it](../contributing.md).")
    return "\n\n".join(parts)


def _links(entry: Paper) -> str:
    lines = []
    for label, url in entry.links.items():
        license = f" ({entry.license})" if label == "code" else ""
        lines.append(f"- {label}: <{url}>{license}")
    lines += [f"- see also: [{other.name}]({arxiv_url(other.arxiv)})" for other in entry.related]
    return "\n".join(lines)


def _figures(entry: Paper) -> str:
    rows = [
        (figure.what, figure.value, f"{figure.source} (recalled)" if figure.recalled else figure.source)
        for figure in entry.figures
    ]
    table = _table(("reported", "figure", "source"), rows)
    if any(figure.recalled for figure in entry.figures):
        table += "\n\nrecalled: quoted from memory of the published table, for orientation."
    return table


def _cards(names: Iterable[str]) -> str:
    rows = []
    for card in sorted(map(model_card, names), key=lambda card: card.parameters):
        size = "x".join(str(side) for side in card.input_size)
        weights = (f"`{card.weights.source}`", card.weights.score, card.weights.license) if card.weights else ("",) * 3
        rows.append((f"`{card.name}`", size, f"{card.parameters:,}", f"{card.macs / 1e9:.2f}", *weights))
    return _table(("name", "input", "parameters", "GMACs", "published weights", "score", "license"), rows)


def _page_of_room(room: str, title: str) -> str:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((PACKAGE / room).glob("*/_base.py" if room == "networks" else "**/*.py"))
        if path.parent != PACKAGE / room or path.stem != "__init__"
        if path.stem in ("_base", "__init__") or not path.stem.startswith("_")
        if not path.stem.startswith("triton")
    ]
    introduction = _reference(f"gatewise.{room}", show_root_heading=False)
    return "\n\n".join([f"# {title}", introduction, *(_reference(module) for module in modules)])


def _page_of_guide(name: str) -> str:
    """A guide from the root of the repository; its links to files, which the site does not hold, become plain text."""
    return _LINK_INTO_REPOSITORY.sub(r"\1", (ROOT / name).read_text(encoding="utf-8"))


def _reference(name: str, **options: bool) -> str:
    """The directive by which mkdocstrings writes the docstrings of a module."""
    lines = [f"::: {name}", "    options:", "      heading_level: 2"]
    lines += [f"      {option}: {str(value).lower()}" for option, value in options.items()]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
