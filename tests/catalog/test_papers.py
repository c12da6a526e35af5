"""The catalog of papers: its content, its errors, and the command that prints it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import date

import pytest

from gatewise.catalog.papers import KINDS, Figure, Paper, RelatedPaper, paper, papers, parse_papers, search
from gatewise.catalog.registry import implemented, registered_names
from gatewise.cli import main
from gatewise.errors import UnknownNameError

ENTRY = """
[tidy_net]
title = "Tidy Networks"
date = 2020-05-17
arxiv = "2005.01234"
repository = "someone/tidy"
license = "MIT"
kind = "image network"
summary = "Keeps things tidy."
[tidy_net.figures."Table 1"]
"top-1" = "80.0 %"
"""


def entry_with(old: str, new: str) -> str:
    """`ENTRY` with a part replaced; the part must be there."""
    assert old in ENTRY
    return ENTRY.replace(old, new)


class TestContent:
    def test_there_are_forty_papers_with_different_ids_titles_and_arxiv_ids(self) -> None:
        entries = papers()
        assert len(entries) == 40
        for field in ("id", "title", "arxiv"):
            assert len({getattr(entry, field) for entry in entries}) == 40

    @pytest.mark.parametrize(
        ("id", "arxiv"),
        [("focalnet", "2203.11926"), ("inception_next", "2303.16900"), ("mobilenetv2", "1801.04381")],
    )
    def test_the_first_networks_name_their_papers(self, id: str, arxiv: str) -> None:
        assert paper(id).arxiv == arxiv
        assert paper(id).links["arXiv"] == f"https://arxiv.org/abs/{arxiv}"

    @pytest.mark.parametrize("entry", papers(), ids=lambda entry: entry.id)
    def test_dates_lie_in_the_month_of_the_arxiv_id(self, entry: Paper) -> None:
        assert entry.arxiv is not None
        year, month = entry.date.split("-")[:2]
        assert entry.arxiv.startswith(year[2:] + month)
        assert date(2015, 1, 1) <= date.fromisoformat(entry.date if entry.date.count("-") == 2 else f"{entry.date}-01")

    @pytest.mark.parametrize("entry", papers(), ids=lambda entry: entry.id)
    def test_summaries_are_one_short_line_and_figures_have_sources(self, entry: Paper) -> None:
        assert "\n" not in entry.summary
        assert len(entry.summary) <= 200
        assert entry.summary.endswith((".", ".)"))
        assert all(figure.source and figure.what and figure.value for figure in entry.figures)

    def test_papers_are_ordered_by_kind_then_by_date(self) -> None:
        order = [(list(KINDS).index(entry.kind), entry.date) for entry in papers()]
        assert order == sorted(order)

    def test_every_registered_network_names_a_paper_of_the_catalog(self) -> None:
        assert {registered.paper for registered in registered_names().values()} <= {entry.id for entry in papers()}

    def test_the_list_is_the_callers_own(self) -> None:
        papers().clear()
        assert papers()


class TestLookingUp:
    def test_an_unknown_id_suggests_the_closest(self) -> None:
        with pytest.raises(UnknownNameError, match=r"unknown paper 'focalnets'; did you mean 'focalnet'"):
            paper("focalnets")

    def test_an_id_finds_that_paper_alone_although_others_contain_it(self) -> None:
        assert [entry.id for entry in search("gla")] == ["gla"]

    def test_a_shell_pattern_matches_ids(self) -> None:
        assert {entry.id for entry in search("gated_*")} == {"gated_swinrmt", "gated_attention", "gated_condition"}

    def test_any_other_text_is_looked_for_in_titles_and_summaries_in_any_case(self) -> None:
        assert "ffnet" in {entry.id for entry in search("SEMANTIC SEGMENTATION")}
        assert "herseg" in {entry.id for entry in search("medical images at one scale")}

    def test_what_is_nowhere_finds_nothing(self) -> None:
        assert search("no such words") == []


class TestParsing:
    def test_an_entry_becomes_a_paper(self) -> None:
        text = ENTRY + '[tidy_net.recalled.abstract]\n"speed" = "2x"\n[tidy_net.related]\n"1905.00001" = "Neat"\n'
        (tidy,) = parse_papers(text)
        assert (tidy.id, tidy.date, tidy.venue) == ("tidy_net", "2020-05-17", None)
        assert tidy.figures == (
            Figure("top-1", "80.0 %", "Table 1"),
            Figure("speed", "2x", "abstract", recalled=True),
        )
        assert tidy.related == (RelatedPaper("1905.00001", "Neat"),)
        assert tidy.links == {"arXiv": "https://arxiv.org/abs/2005.01234", "code": "https://github.com/someone/tidy"}

    def test_a_summary_over_several_lines_becomes_one_line(self) -> None:
        text = entry_with('"Keeps things tidy."', '"""\nKeeps things\n  tidy."""')
        assert parse_papers(text)[0].summary == "Keeps things tidy."

    def test_a_month_is_a_date(self) -> None:
        assert parse_papers(entry_with("2020-05-17", '"2020-05"'))[0].date == "2020-05"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (ENTRY + ENTRY, r"not valid TOML: .*tidy_net.* twice"),
            ("[tidy_net", "not valid TOML"),
            ("tidy_net = 1", "paper 'tidy_net': expected a table of fields, not 1"),
            (ENTRY.replace("tidy_net", "TidyNet"), "paper 'TidyNet': id must be snake_case"),
            (entry_with("arxiv =", "arxive ="), "paper 'tidy_net': unknown field 'arxive'; did you mean 'arxiv'"),
            (entry_with('title = "Tidy Networks"', ""), "paper 'tidy_net': missing title"),
            (entry_with('"Tidy Networks"', '" "'), "paper 'tidy_net': 'title' .* must be a text that is not empty"),
            (entry_with('"Tidy Networks"', "3"), "paper 'tidy_net': 'title' .* must be a text .* not 3"),
            (entry_with("image network", "picture network"), "paper 'tidy_net': kind must be one of image network"),
            (entry_with("2005.01234", "2013.01234"), "paper 'tidy_net': arxiv must be an arXiv id"),
            (entry_with("2005.01234", "2005.01234v2"), "paper 'tidy_net': arxiv must be .* without its version"),
            (entry_with("2020-05-17", '"May 2020"'), "paper 'tidy_net': date must be a date, or 'YYYY-MM'"),
            (entry_with("someone/tidy", "https://example.org/tidy"), "paper 'tidy_net': repository must be owner/name"),
            (entry_with('license = "MIT"', ""), "paper 'tidy_net': repository and license are stated together"),
            (entry_with('"top-1" = "80.0 %"', ""), "paper 'tidy_net': needs a figure"),
            (
                entry_with('"80.0 %"', "80.0"),
                r"paper 'tidy_net': 'top-1' of figures.Table 1 must be a text .* not 80.0",
            ),
            (entry_with('[tidy_net.figures."Table 1"]', "[tidy_net.figures]"), "figures.top-1 must be a table"),
            (ENTRY + '[tidy_net.related]\n"Neat" = "1905.00001"\n', "paper 'tidy_net': arxiv must be .* not 'Neat'"),
        ],
    )
    def test_a_broken_entry_is_refused_by_name(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_papers(text)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `gatewise papers ARGUMENTS` prints, without colors; it must succeed."""
    assert main(["papers", *arguments]) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


class TestCommand:
    @pytest.fixture(autouse=True)
    def no_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
            monkeypatch.delenv(name, raising=False)

    @pytest.fixture
    def narrow_terminal(self, no_terminal: None, monkeypatch: pytest.MonkeyPatch) -> int:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "80")
        return 80

    def test_a_pipe_gets_every_paper_on_one_plain_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["papers"]) == 0
        output = capsys.readouterr().out
        assert "\x1b" not in output
        header, *lines = output.splitlines()
        assert header.split() == ["id", "date", "networks", "claim", "kind", "title"]
        assert [line.split()[0] for line in lines] == [entry.id for entry in papers()]
        assert all(line.endswith(entry.title) for line, entry in zip(lines, papers(), strict=True))

    def test_a_narrow_terminal_gets_a_line_per_paper_under_headings(
        self, capsys: pytest.CaptureFixture[str], narrow_terminal: int
    ) -> None:
        lines = printed(capsys).splitlines()
        assert max(map(len, lines)) <= narrow_terminal
        assert set(KINDS.values()) <= set(lines)
        assert sum(line.split()[:1] == [entry.id] for line in lines for entry in papers()) == 40

    def test_a_whole_entry_fits_a_narrow_terminal(
        self, capsys: pytest.CaptureFixture[str], narrow_terminal: int
    ) -> None:
        for entry in papers():
            assert max(map(len, printed(capsys, entry.id).splitlines())) <= narrow_terminal

    def test_an_id_shows_the_whole_entry(self, capsys: pytest.CaptureFixture[str]) -> None:
        output = " ".join(printed(capsys, "mobilenetv2").split())
        entry = paper("mobilenetv2")
        for expected in (entry.title, entry.summary, *entry.links.values(), "(Apache-2.0)", "(recalled)"):
            assert expected in output
        for figure in entry.figures:
            assert f"{figure.what} {figure.value} {figure.source}" in output

    def test_what_is_implemented_comes_from_the_registry(self, capsys: pytest.CaptureFixture[str]) -> None:
        networks = implemented("focalnet").networks
        assert "focalnet_tiny_srf" in networks
        listing = printed(capsys, "--implemented").splitlines()
        (line,) = [line for line in listing if line.startswith("focalnet ")]
        assert line.split()[2] == str(len(networks))
        assert all(name in printed(capsys, "focalnet") for name in networks)

    def test_kind_keeps_papers_of_that_kind(self, capsys: pytest.CaptureFixture[str]) -> None:
        entries = json.loads(printed(capsys, "--kind", "video", "--json"))
        assert {entry["id"] for entry in entries} == {"p3d", "simvp"}

    def test_json_holds_whole_entries_and_what_is_implemented(self, capsys: pytest.CaptureFixture[str]) -> None:
        (entry,) = json.loads(printed(capsys, "focalnet", "--json"))
        assert entry["title"] == "Focal Modulation Networks"
        assert entry["figures"][0].keys() == {"what", "value", "source", "recalled"}
        assert "focalnet_tiny_srf" in entry["networks"]

    def test_an_unknown_paper_is_a_users_mistake_with_a_suggestion(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["papers", "mobilenet_v2"]) == 2
        assert "did you mean 'mobilenetv2'" in capsys.readouterr().err

    def test_filters_that_leave_nothing_are_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["papers", "focalnet", "--kind", "video"]) == 2
        assert "none passes --kind video" in capsys.readouterr().err

    def test_it_imports_no_torch(self) -> None:
        script = "import sys; from gatewise.cli import main; main(['papers']); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False).returncode == 0
