"""The papers' claims in miniature, one file or folder per paper; `lab` is how claims are run.

A file here has a paper's id for its name and ends with `CLAIM`, a `gatewise.claims.lab.base.Claim`: what the paper
says, how a few minutes on this machine can bear on it, and the parts that measure it. Being in this folder is being
registered. `reproduce` runs one; importing this module imports neither torch nor any claim.
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
    """Ids of the papers that have a claim here, sorted; imports none of them."""
    return sorted(module.name for module in iter_modules(__path__) if module.name != "lab")


def load_claim(paper: str) -> Claim:
    """The claim of the paper with this id.

    Raises:
        UnknownNameError: if there is no such paper; suggests the closest.
        UserError: if the paper is in the catalog and has no claim yet.
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
    """Measure a paper's claim in miniature on this machine, and say honestly whether it shows.

    Prints the claim, the miniature's design and limits, and each measured figure with its interval beside what was
    expected and what was published. Writes `result.json` and `figure.png` into `output/reproduce-PAPER/`.

    Args:
        paper: a paper's id; `list_claims()` has those that can be reproduced.
        seed: of everything random; the same seed gives the same accuracies on the same kind of machine, as long as the
            budget does not cut the number of repetitions (which the outcome states).
        budget_s: seconds to stay within, by fewer repetitions and, at last, by giving parts up; the claim's own budget
            where None.
        output: the folder to make the run's folder in.
    Raises:
        UnknownNameError: for an unknown paper; suggests the closest.
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
