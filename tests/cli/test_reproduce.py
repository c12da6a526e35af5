"""`gatewise reproduce`: arguments, exit status, one line per mistake."""

from __future__ import annotations

import json

import pytest

import gatewise.claims
from gatewise.claims.lab.base import at_least
from gatewise.cli import main
from tests.claims.fakes import claim, finding, part, passing_claim


@pytest.fixture
def fake(monkeypatch):
    def use(a_claim):
        monkeypatch.setattr(gatewise.claims, "load_claim", lambda paper: a_claim)

    return use


def error_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("gatewise: error: ")
    assert error.count("\n") == 1
    return error


def test_list_names_papers_and_titles(capsys):
    assert main(["reproduce", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split(None, 1) == ["focalnet", "Focal Modulation Networks"] for line in lines)
    assert len(lines) == len(gatewise.claims.list_claims())


def test_a_shown_claim_is_saved_where_asked(fake, capsys, tmp_path):
    fake(passing_claim())
    assert main(["reproduce", "focalnet", "--seed", "5", "--budget", "60", "--output", str(tmp_path)]) == 0
    assert "focalnet: shown in 1 of 1 parts" in capsys.readouterr().out
    record = json.loads((tmp_path / "reproduce-focalnet" / "result.json").read_text())
    assert (record["seed"], record["budget_s"]) == (5, 60.0)


def test_a_claim_that_does_not_show_says_so_and_exits_with_0(fake, capsys, tmp_path):
    fake(claim(part(lambda run: finding(1.0, expected=at_least(2)), "the part")))
    assert main(["reproduce", "focalnet", "--output", str(tmp_path)]) == 0
    assert "focalnet: shown in 0 of 1 parts; contrary: the part" in capsys.readouterr().out


def test_a_failure_exits_with_1(fake, capsys, tmp_path):
    def broken(run):
        raise RuntimeError("out of luck")

    fake(claim(part(broken)))
    assert main(["reproduce", "focalnet", "--output", str(tmp_path)]) == 1
    assert "out of luck" in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["focalnt"], "unknown paper 'focalnt'; did you mean 'focalnet'"),
        (["nothing_like_it"], "unknown paper"),
        ([], "name a paper: activator, "),
        (["focalnet", "--budget", "0"], "positive number of seconds"),
        (["focalnet", "--budget", "soon"], "--budget"),
        (["focalnet", "--seed", "-1"], "seed must be 0 or more"),
    ],
)
def test_mistakes_exit_with_2(arguments, message, capsys):
    assert main(["reproduce", *arguments]) == 2
    assert message in error_line(capsys)


def test_a_paper_without_a_claim_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(gatewise.claims, "list_claims", lambda: ["focalnet"])
    assert main(["reproduce", "hornet"]) == 2
    assert "'hornet' is in the catalog, but has no claim to reproduce yet" in error_line(capsys)


def test_an_output_that_is_a_file_exits_with_2(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["reproduce", "focalnet", "--output", str(tmp_path / "file")]) == 2
    error_line(capsys)
