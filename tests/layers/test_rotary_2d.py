"""Rotary positions on a grid."""

from __future__ import annotations

import json

import pytest
import torch

from gatewise.layers.rotary_2d import grid_rotation, rotate_pairs
from tests.conftest import FINGERPRINTS


def test_the_worked_table():
    table = torch.tensor(
        json.loads((FINGERPRINTS / "herseg" / "worked_dla.json").read_text())["outputs"]["rope_cos_sin"]
    )
    torch.testing.assert_close(torch.stack(grid_rotation((3, 3), 8), dim=-1), table)


def test_rows_turn_the_first_half_and_columns_the_second():
    cos, sin = grid_rotation((4, 6), 12)
    assert cos.shape == sin.shape == (4, 6, 6)
    assert (cos[:, :, :3] == cos[:, :1, :3]).all()
    assert (cos[:, :, 3:] == cos[:1, :, 3:]).all()


def test_pairs_are_complex_numbers():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    cos, sin = (part.double() for part in grid_rotation((3, 5), 8))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
    torch.testing.assert_close(rotate_pairs(x, cos, sin), torch.view_as_real(turned).flatten(-2))


def test_products_depend_on_offsets_alone():
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    cos, sin = (part.double() for part in grid_rotation((5, 5), 8))
    turned_q, turned_k = (rotate_pairs(x.expand(5, 5, 8), cos, sin) for x in (q, k))
    one, other = turned_q[1, 0] @ turned_k[3, 1], turned_q[2, 3] @ turned_k[4, 4]
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.untyped
def test_channels_come_in_fours():
    with pytest.raises(ValueError, match="multiple of 4 channels, not 6"):
        grid_rotation((2, 2), 6)
