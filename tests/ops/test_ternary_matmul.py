"""Two bits per weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops.ternary_matmul import pack_ternary, ternary_matmul, ternary_matmul_int8, unpack_ternary


def codes_of(out, width):
    return torch.randint(-1, 2, (out, width)).float()


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 13), width=st.integers(1, 9))
def test_packing_goes_both_ways(out, width):
    codes = codes_of(out, width)
    packed = pack_ternary(codes)
    assert packed.shape == (-(-out // 4), width)
    assert torch.equal(unpack_ternary(packed, out), codes)


def test_blocks_of_rows_share_a_byte():
    codes = torch.tensor([[1.0], [0.0], [-1.0], [1.0]])
    assert pack_ternary(codes).tolist() == [[2 | 1 << 2 | 0 << 4 | 2 << 6]]


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7)])
def test_integers_come_out_bit_for_bit(shape):
    x, codes = torch.randint(-9, 10, shape).float(), codes_of(10, 7)
    scale = torch.tensor(0.25)
    expected = x @ codes.T * scale
    assert torch.equal(ternary_matmul(x, pack_ternary(codes), scale, 10), expected)


def test_integer_activations_come_out_bit_for_bit():
    x, codes = torch.randint(-128, 128, (2, 3, 32)).float(), codes_of(18, 32)
    x_scale, scale = torch.full((2, 3, 1), 0.5), torch.tensor(0.25)
    expected = (x @ codes.T) * 0.125
    assert torch.equal(ternary_matmul_int8(x, x_scale, pack_ternary(codes), scale, 18), expected)


@pytest.mark.untyped
def test_wrong_codes_and_widths_are_refused():
    with pytest.raises(ValueError, match="ternary codes are"):
        pack_ternary(torch.full((4, 4), 2.0))
    packed = pack_ternary(codes_of(8, 4))
    with pytest.raises(ValueError, match="take 4 channels, not 5"):
        ternary_matmul(torch.randn(2, 5), packed, torch.tensor(1.0), 8)
    with pytest.raises(ValueError, match="2 packed rows hold up to 8 outputs, not 9"):
        ternary_matmul(torch.randn(2, 4), packed, torch.tensor(1.0), 9)
