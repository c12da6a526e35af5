"""Claims of papers in miniature, one file or folder per paper. `lab` has the code that runs them.

A file here is named after the id of its paper and ends with `CLAIM`, a `gatewise.claims.lab.base.Claim`: what the paper
says, how a few minutes on this machine can test it, and the parts that measure it. Every claim in this folder is
registered. `reproduce` runs one. Importing this module imports neither torch nor any claim.
"""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from gatewise.errors import UserError, unknown_name

if TYPE_CHECKING:
    from gatewise.claims.lab.base import Claim, Outcome


def list_claims() -> list[str]:
    """Return the sorted ids of the papers with a claim, without importing any claim."""
    return sorted(module.name for module in iter_modules(__path__) if module.name != "lab")


def load_claim(paper: str) -> Claim:
    """Return the claim of the paper with this id.

    Raises:
        UnknownNameError: if there is no such paper. The message suggests the closest.
        UserError: if the paper is in the catalog but has no claim yet.
    """
    from gatewise.catalog import papers

    claims = list_claims()
    if paper not in claims:
        known = {entry.id for entry in papers.papers()}
        if paper not in known:
            raise unknown_name("paper", paper, known)
        raise UserError(
            f"{paper!r} is in the catalog, but has no claim to reproduce yet; there are {', '.join(claims)}"
        )
    return import_module(f"gatewise.claims.{paper}").CLAIM


def reproduce(paper: str, *, seed: int = 0, budget_s: float | None = None, output: str | Path = "runs") -> Outcome:
    """Test a paper's claim in miniature on this machine and report whether it holds here.

    Prints the claim, the miniature's design and limits, and each measured figure with its interval beside what was
    expected and what was published. Writes `result.json` and `figure.png` into `output/reproduce-PAPER/`.

    Args:
        paper: id of a paper; `list_claims()` returns those with a claim.
        seed: random seed. The same seed gives the same accuracies on the same kind of machine, unless the budget cuts
            the number of repetitions (which the outcome states).
        budget_s: time budget in seconds, kept by fewer repetitions and finally by skipping parts; None: the budget of
            the claim.
        output: parent folder of the run's folder.
    Raises:
        UnknownNameError: for an unknown paper. The message suggests the closest.
        UserError: for a paper without a claim, or a seed or budget that is out of range.
    """
    begun = time.monotonic()
    claim = load_claim(paper)
    if seed < 0:
        raise UserError(f"seed must be 0 or more, not {seed}")
    if budget_s is not None and not 0 < budget_s < float("inf"):
        raise UserError(f"the budget must be a positive number of seconds, not {budget_s:g}")
    from gatewise.claims.lab.runner import run_claim

    folder = Path(output) / f"reproduce-{paper}"
    folder.mkdir(parents=True, exist_ok=True)
    budget_s = claim.budget_s if budget_s is None else budget_s
    return run_claim(paper, claim, folder, seed=seed, budget_s=budget_s, begun=begun)
