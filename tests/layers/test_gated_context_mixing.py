"""Context mixing with its projections: small maps, gates, errors. Its equations are tested with OverLoCK's blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gatewise.layers.gated_context_mixing import ContextMixing, GatedContextMixing, enlarged_size

TABLE = {5: ((3, 1),), 15: ((3, 1),)}


@pytest.mark.parametrize(
    ("size", "kernel", "expected"),
    [
        ((13, 20), 13, (13, 20)),
        ((9, 12), 13, (13, 17)),
        ((12, 9), 13, (17, 13)),
        ((1, 1), 7, (7, 7)),
        ((1, 5), 7, (7, 35)),
        ((6, 20), 13, (13, 43)),
        # Rounding of the proportions would give 14 here.
        ((11, 11), 15, (15, 15)),
    ],
)
def test_small_maps_grow_until_the_window_fits(size, kernel, expected):
    assert enlarged_size(*size, kernel) == expected


def test_all_sides_grow_to_the_window_at_least():
    for kernel in (5, 7, 13, 15, 17, 19):
        for height in range(1, 2 * kernel):
            for width in range(1, 2 * kernel):
                assert min(enlarged_size(height, width, kernel)) >= kernel


def test_a_small_map_is_enlarged_mixed_and_averaged_back():
    layer = ContextMixing(8, 6, 5, 3, num_heads=1, project_value=True).double().eval()
    query, key, value = (torch.randn(2, dim, 3, 4, dtype=torch.float64) for dim in (8, 6, 8))

    def enlarge(x):
        return F.interpolate(x, (5, 6), mode="bilinear", align_corners=False)

    expected = F.adaptive_avg_pool2d(layer(enlarge(query), enlarge(key), enlarge(value)), (3, 4))
    assert torch.allclose(layer(query, key, value), expected, rtol=1e-12, atol=1e-12)


def test_the_whole_map_decides_on_a_kernel():
    layer = ContextMixing(8, 6, 5, 3, num_heads=1).double().eval()
    query, key, value = (torch.randn(1, dim, 40, 40, dtype=torch.float64) for dim in (8, 6, 8))
    key.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(query, key, value)[0, :, 20, 20].square().sum(), key)
    assert (gradient[0].abs().sum(0) > 0).all()


def test_the_gate_is_read_as_one_map():
    layer = GatedContextMixing(8, 6, 10, 5, 3, 1, TABLE).eval()
    value, query, key = (torch.randn(2, dim, 6, 7) for dim in (8, 8, 6))
    assert layer(value, query, key).shape == (2, 10, 6, 7)
    gate = layer.read_gates(value)["positions"]
    assert torch.allclose(gate, F.silu(layer.gate.norm(layer.gate.conv(value))).mean(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 6, 4, 3, 1), "odd, and the small one no larger than the large one, not 3 and 4"),
        ((8, 6, 3, 5, 1), "not 5 and 3"),
        ((10, 6, 5, 3, 1), r"multiple of 4 times num_heads \(1\), not 10"),
        ((8, 6, 5, 3, 0), "at least one head, not 0"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContextMixing(*arguments)
