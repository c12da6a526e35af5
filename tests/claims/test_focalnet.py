"""The identities, the accounting and the task of FocalNet's claim; no training."""

from __future__ import annotations

import pytest
import torch

from gatewise.claims import focalnet
from gatewise.claims.lab.checks import generator
from gatewise.claims.lab.run import Run
from gatewise.gates.capture import capture
from gatewise.networks.image.focalnet import FocalModulation

NEAR, FAR, KINDS = slice(0, 10), slice(10, 20), slice(20, 22)


@pytest.fixture(scope="module")
def batch():
    return focalnet.NearOrFar().batch(200, generator(0))


def test_macs_of_focal_modulation_are_proportional_to_pixels():
    dim, side = 16, 8
    macs = focalnet.macs_by_side(lambda: FocalModulation(dim, focal_level=2, focal_window=3), dim, (side, 2 * side))
    per_position = dim * (2 * dim + 3) + dim * (9 + 25) + 2 * dim * dim
    assert macs == [side**2 * per_position, 4 * side**2 * per_position]


def test_macs_of_attention_grow_with_the_square():
    dim, side = 16, 8
    (macs,) = focalnet.macs_by_side(lambda: focalnet.Attention(dim, num_heads=2), dim, (side,))
    assert macs == side**2 * 4 * dim * dim + 2 * side**4 * dim


def test_attention_lets_every_position_see_every_other():
    x = torch.randn(1, 4, 3, 16, requires_grad=True)
    focalnet.Attention(16, num_heads=2)(x)[0, 0, 0].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()


def test_growing_kernels_changes_nothing():
    # The expectation that the claim states: float32 sums in another order.
    assert focalnet.kernel_growth_error(seed=3) <= 1e-5


def test_shifts_commute_with_circular_padding_alone():
    assert focalnet.translation_error(3, "circular") <= 1e-6
    assert focalnet.translation_error(3, "zeros") > 1e-2


def test_the_identities_are_shown():
    found = focalnet.check_identities(Run(0, 100))
    assert [one.verdict for one in found.measured] == ["shown", "shown", None]


def test_near_dots_are_told_by_their_only_neighbor(batch):
    pictures, cells, answers, asks_far = batch
    around = torch.nn.functional.unfold(pictures[:, NEAR].contiguous(), 3, padding=1).unflatten(1, (10, 9)).sum(2)
    seen = around.gather(2, cells[:, None].expand(-1, 10, -1))
    assert (seen.sum(1) == 1).all()
    assert (seen.argmax(1) == answers)[asks_far == 0].all()


def test_far_dots_are_told_by_the_one_far_symbol_at_a_distance(batch):
    pictures, cells, answers, asks_far = batch
    far = pictures[:, FAR].flatten(2)
    assert (far.sum((1, 2)) == 9).all()
    assert (far.sum(2).argmax(1)[:, None] == answers)[asks_far == 1].all()
    place = far.sum(1).nonzero()[:, 1].reshape(len(cells), 9)
    rows, columns = ((cells[:, :, None] // 12 - place[:, None] // 12), (cells[:, :, None] % 12 - place[:, None] % 12))
    distance = torch.maximum(rows.abs(), columns.abs())
    assert (distance.min(), distance.max()) == (5, 10)


def test_a_dot_shows_what_it_asks(batch):
    pictures, cells, _, asks_far = batch
    kinds = pictures[:, KINDS].flatten(2).gather(2, cells[:, None].expand(-1, 2, -1))
    assert torch.equal(kinds.argmax(1), asks_far)
    assert (kinds.sum(1) == 1).all()


def test_variants_start_from_the_same_weights_and_differ_in_their_gates_alone(batch):
    networks = {
        name: focalnet.build(0, lambda edit=edit: focalnet.make_network(edit)).eval()
        for name, edit in focalnet.ABLATIONS.items()
    }
    full, fixed, local = networks.values()
    weights = [torch.cat([p.flatten() for p in network.parameters()]) for network in networks.values()]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    gates = [capture(network, batch[0][:4])[0].maps for network in (full, fixed, local)]
    assert all((gates[1][name] == 1 / 3).all() for name in focalnet.GATES)
    assert torch.equal(gates[2]["level 0"], gates[0]["level 0"])
    assert (gates[2]["global"] == 0).all()
    assert gates[0]["global"].std() > 0


def test_without_the_global_level_nothing_beyond_six_cells_is_seen():
    network = focalnet.make_network(focalnet.no_global_level).eval()
    picture = torch.rand(1, 22, 20, 20, requires_grad=True)
    network.forward_features(picture)[0, :, 10, 10].square().sum().backward()
    rows, columns = torch.nonzero(picture.grad[0].abs().sum(0), as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 16, 4, 16)


def test_gate_sizes_are_read_where_the_dots_are(batch):
    network = focalnet.make_network().eval()
    small = tuple(part[:8] for part in batch)
    sizes = focalnet.gate_sizes(network, small)
    gates = torch.stack([reading.maps["global"] for reading in capture(network, small[0])]).abs().mean(0).flatten(1)
    far = small[3] == 1
    assert sizes["gate of the global level: far dots"] == pytest.approx(gates.gather(1, small[1])[far].mean().item())
    assert len(sizes) == 6
