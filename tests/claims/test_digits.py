"""The handwritten digits of claims."""

from __future__ import annotations

import torch

from gatewise.claims.lab.checks import generator
from gatewise.claims.lab.digits import Digits, digits


def test_digits_are_split_once_and_drawn_from_the_generator():
    (train, _), (test, labels) = digits()
    assert len(train) + len(test) == 1797
    assert len(test) == len(labels) == 360
    task = Digits()
    first, second = (task.batch(4, generator(3)) for _ in range(2))
    assert torch.equal(first[0], second[0])
