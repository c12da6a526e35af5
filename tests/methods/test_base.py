from __future__ import annotations

import pytest

from gatewise.errors import UnknownNameError
from gatewise.methods import find_method, list_methods, register_transform


def test_an_unknown_method_suggests_the_closest():
    with pytest.raises(UnknownNameError, match="freeze_batch_norm"):
        find_method("freeze_batchnorm")


def test_a_name_cannot_be_taken_twice():
    def freeze_batch_norm(model):
        return model

    with pytest.raises(ValueError, match="already registered"):
        register_transform(freeze_batch_norm)


def test_methods_are_listed_by_name():
    assert "freeze_batch_norm" in list_methods()
