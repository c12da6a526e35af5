"""scikit-learn's digits."""

from __future__ import annotations

import numpy as np

from gatewise.data.images.digits import MEAN, STD, Digits


def digits(**fields) -> Digits:
    module = Digits(**fields)
    module.setup()
    return module


def test_the_parts_hold_every_image_once():
    parts = digits().parts
    images = np.concatenate(
        [[np.asarray(part.image(index)) for index in range(len(part))] for part in (parts.train, parts.val, parts.test)]
    )
    assert images.shape == (1797, 8, 8)
    from sklearn.datasets import load_digits

    pixels = np.rint(load_digits().images * 255 / 16)
    assert sorted(map(bytes, images)) == sorted(map(bytes, pixels.astype(np.uint8)))


def test_the_parts_are_balanced():
    for part, share in ((digits().parts.test, 0.2), (digits().parts.val, 0.08)):
        counts = np.bincount(part.labels, minlength=10)
        assert abs(counts - 1797 / 10 * share).max() <= 3


def test_fractions_and_seed_decide_the_parts():
    assert len(digits(val_fraction=0.0).parts.val) == 0
    first, second = digits(seed=0).parts.test, digits(seed=1).parts.test
    assert any(first.image(index) != second.image(index) for index in range(len(first)))


def test_normalization_constants_are_those_of_the_data():
    from sklearn.datasets import load_digits

    pixels = load_digits().images / 16
    np.testing.assert_allclose((pixels.mean(), pixels.std()), (MEAN, STD), atol=5e-5)
