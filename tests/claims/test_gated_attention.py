"""The identities, the tasks and the readings of gated attention's claim; no training to speak of."""

from __future__ import annotations

import pytest
import torch

from gatewise.claims import gated_attention
from gatewise.claims.gated_attention import CONTENT, FLAG, KINDS, RareCopy
from gatewise.claims.lab.checks import generator
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.tokens import ByteText
from gatewise.claims.lab.training import Schedule
from gatewise.networks.sequence.gated_attention import Gate


def test_the_identities_are_shown():
    found = gated_attention.check_identities(Run(0, 100))
    assert all(one.verdict == "shown" for one in found.measured)


def test_layers_of_a_seed_share_all_weights_but_the_gates():
    plain, gated = (gated_attention.make_layer(3, gate).state_dict() for gate in (None, Gate()))
    assert set(gated) - set(plain) == {"gate_proj.weight"}
    assert all(torch.equal(plain[key], gated[key]) for key in plain)


def test_decoders_have_equally_many_parameters():
    counts = [sum(p.numel() for p in gated_attention.make_decoder(kind).parameters()) for kind in KINDS]
    assert max(counts) / min(counts) < 1.005


@torch.no_grad()
def test_a_decoder_without_queries_attends_uniformly(monkeypatch):
    monkeypatch.setattr(ByteText, "validation_loss", lambda task, model: 2.5)
    assert gated_attention.uniform_first_token(3) == pytest.approx((1 / 2 + 1 / 3) / 2)
    decoder = gated_attention.make_decoder("by channel").eval()
    for block in decoder.blocks:
        block.mixer.q_proj.weight.zero_()
        block.mixer.gate_proj.weight.zero_()
        block.mixer.o_proj.weight.zero_()
    found = gated_attention.read_decoder(decoder, ByteText(32, limit=50_000))
    assert found["first"] == pytest.approx(100 * gated_attention.uniform_first_token(32), rel=1e-4)
    assert found["gate"] == pytest.approx(0.5)
    assert found["loss"] == 2.5


@pytest.mark.parametrize("constant_first", [True, False])
def test_the_marked_vector_is_asked_for_at_triggers_alone(constant_first):
    inputs, targets, triggers = RareCopy(constant_first).batch(50, generator(0))
    ordinary, marked, flagged = (inputs[..., start] for start in range(CONTENT, CONTENT + 3 * FLAG, FLAG))
    assert torch.equal(flagged == 2, triggers)
    assert torch.equal(ordinary == 2, ~triggers)
    assert (marked[:, 1:5].sum(dim=1) == 2).all()
    assert (marked.sum(dim=1) == 2).all()
    asked_for = inputs[marked == 2][:, None, :CONTENT]
    assert torch.equal(targets[..., :CONTENT], asked_for * triggers[..., None])
    assert not targets[..., CONTENT:].any()
    assert 0.05 < triggers.float().mean() < 0.12
    assert not triggers[:, :6].any()
    assert bool((inputs[:, 0, :CONTENT] == 1).all()) == constant_first


def test_contents_of_a_sequence_resemble_each_other():
    content = RareCopy(False).batch(200, generator(1))[0][..., :CONTENT]
    assert content.square().mean().item() == pytest.approx(1, abs=0.05)
    assert (content[:, 8] * content[:, 20]).mean().item() == pytest.approx(RareCopy.common, abs=0.08)


def test_batches_come_from_the_generator_alone():
    first, second, other = (RareCopy(True).batch(4, generator(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@torch.no_grad()
def test_a_silent_layer_misses_everything():
    task = RareCopy(True)
    layer = gated_attention.make_speaker("by head").eval()
    for parameter in layer.parameters():
        parameter.zero_()
    batch = task.batch(100, generator(0))
    found = gated_attention.read_speaker(layer, task, batch)
    assert found["missed"] == pytest.approx(100)
    assert found["gate"] == found["gate at triggers"] == 0.5
    steps = torch.arange(task.length).expand(100, -1)[:, 1:]
    expected = (1 / (steps + 1))[~batch[2][:, 1:]].mean()
    assert found["first"] == pytest.approx(100 * expected.item(), rel=1e-5)


def test_layers_are_trained_and_read_for_every_seed(monkeypatch):
    monkeypatch.setattr(gated_attention, "SPEAKING", Schedule(steps=2, batch_size=2, lr=1e-3))
    seeds = gated_attention.learn_to_speak(Run(0, 1000), constant_first=True)
    assert len(seeds) == 5
    assert all(list(one) == list(KINDS) for one in seeds)
    assert "gate" not in seeds[0]["no gate"]
    assert seeds[0]["by channel"] != seeds[1]["by channel"]


def readings(**figures):
    """Of one seed: each figure in the order of `KINDS`."""
    return {kind: {name: row[index] for name, row in figures.items()} for index, kind in enumerate(KINDS)}


def verdicts(finding):
    return {one.what: one.verdict for one in finding.measured if one.verdict is not None}


def test_gains_on_text_are_judged_within_a_seed():
    def of_seed(shift, tenfold):
        return readings(
            loss=[2 + shift, 2.1 + shift + shift / 100, 1.9 + shift + shift / 100 - tenfold, 1.95 + shift],
            first=[3.0, 3.1, 3.2, 3.3],
            largest=[9.0, 8.0, 7.0, 6.0],
            gate=[float("nan"), 0.4, 0.3, 0.6],
            **{"near zero": [1.0, 2.0, 3.0, 4.0]},
        )

    normal, tenfold = ([of_seed(shift, more) for shift in (0.0, 0.5, 1.0)] for more in (0.0, 0.2))
    found = verdicts(gated_attention.report_text(normal, tenfold))
    assert found["gain, normal rate, by channel"] == "shown"
    assert found["gain, normal rate, by head"] == "contrary"
    assert found["what by channel gains more at the tenfold rate"] == "shown"
    assert not any("never below half" in what for what in found)


def test_a_gated_layer_that_parks_too_does_not_show_the_claim(monkeypatch):
    def outcome(gated):
        one = readings(first=[99.0, gated, gated, 99.0], missed=[0.1] * 4, gate=[0.3] * 4)
        for figures in one.values():
            figures["gate at triggers"] = 0.8
        return [one] * 3

    expected = {98.0: "not shown here", 20.0: "shown", 99.5: "contrary"}
    for gated, verdict in expected.items():
        monkeypatch.setattr(gated_attention, "learn_to_speak", lambda run, constant_first, gated=gated: outcome(gated))
        found = verdicts(gated_attention.offer_a_sink(Run(0, 100)))
        assert found["first-token attention, no gate"] == "shown"
        assert found["first-token attention, no gate minus by channel"] == verdict


def test_what_is_missed_without_a_sink_is_judged(monkeypatch):
    one = readings(missed=[80.0, 2.0, 60.0, 45.0], gate=[0.1] * 4)
    for figures in one.values():
        figures["gate at triggers"] = 0.9
    monkeypatch.setattr(gated_attention, "learn_to_speak", lambda run, constant_first: [one] * 3)
    found = verdicts(gated_attention.offer_no_sink(Run(0, 100)))
    assert found["missed, no gate minus by head"] == "shown"
    assert found["missed, no gate minus by channel"] == "not shown here"
    assert found["missed, never below half minus by channel"] == "contrary"
    assert found["gate at triggers minus elsewhere, by channel"] == "shown"
