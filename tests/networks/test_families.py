"""No family of networks escapes its contract."""

from __future__ import annotations

import pytest

from gatewise.catalog.registry import families
from gatewise.networks.image._base import ImageNetwork
from gatewise.networks.sequence._base import LanguageModel
from tests.conftest import SMALL, SMALL_SEQUENCES, small_language_model, small_model


@pytest.mark.parametrize(
    ("base", "small", "build"),
    [(ImageNetwork, SMALL, small_model), (LanguageModel, SMALL_SEQUENCES, small_language_model)],
)
def test_every_family_is_under_the_contract(base, small, build):
    under_test = {type(build(name)) for name in small}
    assert {family.network for family in families() if issubclass(family.network, base)} == under_test
