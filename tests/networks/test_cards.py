"""Cards agree with the published tables."""

from __future__ import annotations

import pytest

import gatewise
from tests.conftest import declared

CARDS = {name: row for kind in ("image", "sequence", "video") for name, row in declared(kind, "CARDS").items()}


@pytest.mark.parametrize("name", CARDS)
def test_card_agrees_with_the_published_table(name):
    card = gatewise.model_card(name)
    parameters, macs = CARDS[name]
    assert card.parameters == parameters
    if macs is not None:
        assert card.macs == (macs if isinstance(macs, int) else pytest.approx(macs, rel=5e-4))
