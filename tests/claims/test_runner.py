"""A claim from its parts to the files that it leaves."""

from __future__ import annotations

import json
import os

import pytest

from gatewise.claims.lab.base import Finding, Measured, Published, Verdict, at_least
from gatewise.claims.lab.intervals import Interval
from gatewise.claims.lab.plot import Bars, Lines, Pictures
from gatewise.claims.lab.runner import REPORT_SECONDS, run_claim
from gatewise.errors import Failure
from tests.claims.fakes import Clock, claim, finding, part, passing_claim

CHARTS = (
    Lines("curves", "x", "y", [1, 10], {"a": [1, 2], "b": [2, 1]}, published={"paper": [(1, 1), (10, 3)]}, log="xy"),
    Bars("bars", "y", {"g: a": (1.0, 0.5, 1.5), "g: b": (0.0, 0.0, 0.0)}, points={"g: a": [0.5, 1.5]}, log=True),
    Bars(
        "more bars", "y", {"a": (1.0, float("-inf"), float("inf"))}, published={"a": 2.0}, limit=3, limit_label="limit"
    ),
    Pictures("maps", {"one": [[0, 1], [1, 0]], "two": [[1, 1], [0, 0]]}),
)


def run(a_claim, folder, *, budget_s=100.0, clock=None, seed=0):
    clock = clock or Clock()
    return run_claim("focalnet", a_claim, folder, seed=seed, budget_s=budget_s, begun=clock(), clock=clock)


def test_the_report_says_everything(tmp_path, capsys):
    outcome = run(passing_claim(), tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    for said in (
        "Focal Modulation Networks (arXiv:2203.11926)",
        "gates help [table 1]",
        "gain: 12 points (table 1)",
        "a small network",
        "no large one",
        "small networks differ from large ones",
        "how it is measured",
        "figure 0: 11 points",
        "expected at least 10: shown",
        "focalnet: shown in 1 of 1 parts",
        "result.json",
    ):
        assert said in printed
    assert outcome.verdict is Verdict.SHOWN


def test_the_saved_result_is_whole(tmp_path):
    published = Published("gain", "12 points", "table 1", 12.0)
    measured = Measured("gain", Interval(11.0, 10.5, float("inf"), "by hand"), "points", at_least(10), published)
    run(claim(part(lambda run: Finding((measured,), CHARTS, "a remark"))), tmp_path, seed=3)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["paper"] == "focalnet"
    assert record["verdict"] == "shown"
    assert record["seed"] == 3
    assert record["cautions"] == ["small networks differ from large ones"]
    assert record["published"][0]["figure"] == "12 points"
    (saved,) = record["parts"]
    assert saved["remark"] == "a remark"
    assert saved["measured"] == [
        {
            "what": "gain",
            "unit": "points",
            "value": 11.0,
            "low": 10.5,
            "high": None,
            "method": "by hand",
            "expected": "at least 10",
            "verdict": "shown",
            "published": {"what": "gain", "figure": "12 points", "source": "table 1", "value": 12.0},
        }
    ]
    assert [chart["title"] for chart in saved["charts"]] == ["curves", "bars", "more bars", "maps"]
    assert saved["charts"][0]["series"] == {"a": [1, 2], "b": [2, 1]}
    assert set(record["versions"]) == {"gatewise", "torch", "python"}
    assert not list(tmp_path.glob("*.partial"))


def test_the_figure_has_a_panel_for_every_chart(tmp_path):
    from matplotlib.image import imread

    run(claim(part(lambda run: Finding((), CHARTS))), tmp_path)
    picture = imread(tmp_path / "figure.png")
    assert picture.shape[1] == 1650
    # Not blank, in any quarter: four panels stand in two rows of two.
    height, width = (picture.shape[0] // 2 // 2, picture.shape[1] // 2)
    for row in (0, height):
        for column in (0, width):
            assert picture[row : row + height, column : column + width, :3].min() < 0.5


def test_a_part_gets_its_share_of_what_is_left(tmp_path):
    clock, shares = Clock(), []

    def first(run):
        shares.append(run.remaining)
        clock.pass_by(6)
        return finding()

    def second(run):
        shares.append(run.remaining)
        return finding()

    budget = 40 + REPORT_SECONDS
    run(claim(part(first, seconds=10), part(second, seconds=30)), tmp_path, budget_s=budget, clock=clock)
    # 10 of 40 parts of 40 s; it takes 6, and what it leaves goes to the second.
    assert shares == [10, 34]


def test_an_exhausted_budget_gives_parts_up_and_says_so(tmp_path, capsys):
    clock = Clock()

    def slow(run):
        clock.pass_by(60)
        return finding(11.0, expected=at_least(10))

    outcome = run(claim(part(slow, "slow"), part(slow, "late")), tmp_path, budget_s=50.0, clock=clock)
    assert [one.verdict for one in outcome.parts] == [Verdict.SHOWN, Verdict.NOT_SHOWN]
    assert outcome.parts[1].finding is None
    assert "for lack of time" in outcome.parts[1].why
    assert "focalnet: shown in 1 of 2 parts; not shown here: late" in capsys.readouterr().out
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["parts"][1]["measured"] == []
    assert record["verdict"] == "not shown here"


def test_cut_repetitions_are_reported(tmp_path, capsys):
    clock = Clock()

    def once(seed):
        clock.pass_by(20)

    def repeated(run):
        run.repeat(5, once)
        return finding()

    outcome = run(claim(part(repeated)), tmp_path, budget_s=50.0, clock=clock)
    assert outcome.parts[0].notes == ("2 of 5 seeds, for lack of time",)
    assert "cut: 2 of 5 seeds" in capsys.readouterr().out


def test_an_error_in_a_part_is_not_swallowed(tmp_path):
    def broken(run):
        raise ZeroDivisionError("in the middle")

    with pytest.raises(ZeroDivisionError, match="in the middle"):
        run(claim(part(broken)), tmp_path)


@pytest.mark.parametrize("syncs_before", [0, 1])
def test_a_full_disk_leaves_the_earlier_figure_and_result(tmp_path, monkeypatch, syncs_before):
    run(passing_claim(), tmp_path, seed=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > syncs_before:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Failure, match=r"cannot write .*(result\.json|figure\.png): No space left on device"):
        run(passing_claim(), tmp_path, seed=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
