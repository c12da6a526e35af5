"""Finding claims, and what every claim file must have."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gatewise
import gatewise.claims
from gatewise.catalog.papers import paper
from gatewise.claims import list_claims, load_claim, reproduce
from gatewise.claims.lab.base import Verdict
from gatewise.errors import UnknownNameError, UserError
from tests.claims.fakes import passing_claim


def test_claims_are_found_by_their_files():
    assert {"focalnet", "inception_next", "mobilenetv2"} <= set(list_claims())
    assert not any(name.startswith("_") for name in list_claims())


@pytest.mark.parametrize("name", list_claims())
def test_every_claim_is_declared_in_full(name):
    claim = load_claim(name)
    assert paper(name).id == name
    for text in (claim.statement, claim.source, claim.design, claim.limits, *claim.cautions):
        assert len(text) > 5
    assert claim.published
    assert len({part.title for part in claim.parts}) == len(claim.parts) > 0
    # Networks of images take three minutes at most, language models four.
    of_images = paper(name).kind == "image network"
    assert claim.budget_s <= (180 if of_images else 240)
    # On two quiet cores nothing is cut.
    assert sum(part.seconds for part in claim.parts) < claim.budget_s


def test_an_unknown_paper_suggests_the_closest():
    with pytest.raises(UnknownNameError, match="did you mean 'focalnet'"):
        reproduce("focalnett")


def test_a_paper_without_a_claim_says_so(monkeypatch):
    monkeypatch.setattr(gatewise.claims, "list_claims", lambda: ["mobilenetv2"])
    with pytest.raises(UserError, match=r"'hornet' is in the catalog, but has no claim .* there are mobilenetv2"):
        reproduce("hornet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be 0 or more, not -1"),
        ({"budget_s": 0}, "positive number of seconds, not 0"),
        ({"budget_s": float("inf")}, "positive number of seconds, not inf"),
        ({"budget_s": float("nan")}, "positive number of seconds, not nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        reproduce("focalnet", output=tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_results_go_into_a_folder_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(gatewise.claims, "load_claim", lambda name: passing_claim())
    outcome = gatewise.reproduce("focalnet", output=tmp_path / "new")
    assert outcome.verdict is Verdict.SHOWN
    assert outcome.folder == tmp_path / "new" / "reproduce-focalnet"
    assert {path.name for path in outcome.folder.iterdir()} == {"result.json", "figure.png"}


def test_finding_claims_imports_no_torch():
    code = "import sys, gatewise.claims as c; c.list_claims(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
