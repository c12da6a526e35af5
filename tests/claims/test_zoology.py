"""The generator, the mixers and the readings of Zoology's claim; no training."""

from __future__ import annotations

import pytest
import torch

from gatewise.claims import zoology
from gatewise.claims.lab.checks import generator
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.tokens import IGNORED
from gatewise.claims.lab.training import Schedule
from gatewise.claims.zoology import (
    DIMS,
    EVERYWHERE,
    FULL,
    KINDS,
    LEARNED,
    PAIRS,
    RANDOM,
    RULE,
    SPARSE,
    TASK,
    MixedRecall,
    cell,
)
from gatewise.networks.sequence.mixers._base import CausalMixer
from gatewise.networks.sequence.mixers.attention import Attention
from gatewise.networks.sequence.mixers.base_conv import BaseConv


def test_the_generator_is_shown_right():
    found = zoology.check_generator(Run(0, 100))
    assert all(one.verdict == "shown" for one in found.measured)


def test_the_mixers_are_shown_right():
    found = zoology.check_mixers(Run(0, 100))
    assert all(one.verdict == "shown" for one in found.measured)


def test_wrong_answers_are_noticed():
    inputs, targets = TASK.batch(10, generator(0))
    assert zoology.misled((inputs, targets)) == 0
    places = (targets[0] != IGNORED).nonzero().flatten()
    targets[0, places[:2]] = targets[0, places[:2]].flip(0)
    assert zoology.misled((inputs, targets)) == 2


@pytest.mark.untyped
def test_a_mixer_that_looks_ahead_is_noticed(monkeypatch):
    class Mirror(CausalMixer):
        def run(self, x, state):
            return x.flip(1), None

    monkeypatch.setitem(zoology.MIXERS, "mirror", lambda config, layer: Mirror())
    before, after = zoology.changes_around("mirror", 0)
    assert before > 0.01
    assert after > 0.01


def test_places_tell_pairs_apart_only_so_far():
    inputs = torch.zeros(2, zoology.LENGTH, dtype=torch.int64)
    inputs[:, : 2 * PAIRS] = torch.arange(1, 2 * PAIRS + 1)
    targets = torch.full_like(inputs, IGNORED)
    targets[:, 2 * PAIRS] = torch.tensor([2, 6])
    shares = zoology.pair_at_place((inputs, targets))
    assert shares.shape == (zoology.LENGTH - 2 * PAIRS, PAIRS)
    assert (shares[0, 0], shares[0, 2], shares.sum()) == (0.5, 0.5, 1)
    assert 100 / PAIRS < zoology.by_place_alone(TASK) < 30


def test_training_mixes_difficulties_and_batches_do_not():
    draw = generator(0)
    asked_for = [(MixedRecall().batch(3, draw)[1] != IGNORED).sum(dim=1).tolist() for _ in range(30)]
    assert {tuple(row) for row in asked_for} == {(2, 2, 2), (4, 4, 4), (8, 8, 8)}


def test_scores_are_kept_few_by_their_penalty():
    network = zoology.make_network(LEARNED, 16).train()
    batch = TASK.batch(5, generator(0))
    with_penalty = MixedRecall().loss(network, batch)
    assert network.auxiliary_loss() > 0
    torch.testing.assert_close(with_penalty, TASK.loss(network, batch) + network.auxiliary_loss())


def test_networks_differ_in_their_mixers_alone():
    networks = {kind: zoology.make_network(kind, 16) for kind in (*KINDS, *SPARSE)}
    firsts = {kind: type(network.blocks[0].mixer) for kind, network in networks.items()}
    assert {kind for kind, first in firsts.items() if first is not BaseConv} == {"attention alone"}
    seconds = {kind: type(network.blocks[1].mixer) for kind, network in networks.items()}
    assert len(set(seconds.values())) == len(networks) - 1
    assert seconds[FULL] is seconds["attention alone"] is Attention
    assert networks["BaseConv"].blocks[1].mixer.long_conv is not None
    assert networks[FULL].blocks[0].mixer.short_conv is not None
    assert {kind for kind, network in networks.items() if network.positions is not None} == {"attention alone"}


def test_weights_move_to_another_mixer():
    full = zoology.make_network(FULL, 16)
    rule = zoology.with_mixers(full, RULE)
    assert not rule.training
    assert all(torch.equal(ours, full.state_dict()[key]) for key, ours in rule.state_dict().items())


def test_at_all_positions_random_ones_are_full_attention(monkeypatch):
    full = zoology.make_network(FULL, 16).eval()
    batch = TASK.batch(60, generator(0))
    monkeypatch.setattr(zoology, "occurred_before", lambda tokens: torch.ones_like(tokens, dtype=torch.bool))
    by_rule = zoology.at_random_positions(zoology.with_mixers(full, RULE), batch, 0)
    assert by_rule == pytest.approx(TASK.percent_right(full, batch))


def test_random_positions_are_as_many_as_the_rule_chooses(monkeypatch):
    network = zoology.make_network(RULE, 16).eval()
    tokens, targets = TASK.batch(5, generator(0))
    chosen = []
    mix = network.mix

    def watched(x, states, bounds, selected):
        chosen.append(selected)
        return mix(x, states, bounds, selected)

    monkeypatch.setattr(network, "mix", watched)
    zoology.at_random_positions(network, (tokens, targets), 0)
    rule = zoology.occurred_before(tokens)
    assert torch.equal(chosen[0].sum(dim=1), rule.sum(dim=1))
    assert not torch.equal(chosen[0], rule)


@pytest.fixture
def untrained(monkeypatch):
    """One seed of one step; what is reported are the accuracies themselves."""
    monkeypatch.setattr(zoology, "SCHEDULE", Schedule(steps=1, batch_size=2, lr=1e-3))
    monkeypatch.setattr(Run, "repeat", lambda run, count, once: [once(0)])
    monkeypatch.setattr(zoology, "report_mixers", lambda seeds: seeds)
    monkeypatch.setattr(zoology, "report_choices", lambda seeds: seeds)


@pytest.mark.usefixtures("untrained")
def test_every_mixer_is_tested_at_every_width():
    (found,) = zoology.compare_mixers(Run(0, 1000))
    assert set(found) == {cell(kind, dim) for kind in (*KINDS, RULE) for dim in DIMS}
    assert all(found[cell(RULE, dim)] == pytest.approx(found[cell(FULL, dim)]) for dim in DIMS)


@pytest.mark.usefixtures("untrained")
def test_every_choice_of_positions_is_tested():
    (found,) = zoology.choose_positions(Run(0, 1000))
    assert set(found) == {FULL, RULE, LEARNED, RANDOM, EVERYWHERE, "BaseConv"}
    assert found[RULE] == pytest.approx(found[FULL])


def verdicts(finding):
    return {one.what: str(one.verdict) for one in finding.measured if one.verdict is not None}


def test_mixers_are_judged_within_a_seed():
    def accuracies(shift, **changed):
        table = {FULL: 95.0, "BaseConv": 20.0, "BaseConv + GLA": 30.0}
        found = {cell(kind, dim): table.get(kind, 50.0) + shift for kind in (*KINDS, RULE) for dim in DIMS}
        found[cell("BaseConv + GLA", 64)] = 80.0 + shift
        return found | changed

    found = verdicts(zoology.report_mixers([accuracies(shift) for shift in (0.0, 1.0, 2.0)]))
    assert set(found.values()) == {"shown"}
    assert len(found) == 5
    stuck = [accuracies(shift, **{cell(FULL, 16): 12.0 + shift}) for shift in (0.0, 1.0, 2.0)]
    assert verdicts(zoology.report_mixers(stuck))["accuracy, dim 16, BaseConv + attention"] == "contrary"


CHOICES = {FULL: 95.0, RULE: 94.0, LEARNED: 93.0, "BaseConv": 20.0, RANDOM: 40.0, EVERYWHERE: 95.0}


def choices(**changed):
    seeds = [{name: value + shift for name, value in (CHOICES | changed).items()} for shift in (0.0, 1.0, 2.0)]
    return verdicts(zoology.report_choices(seeds))


def test_choices_of_positions_are_judged_within_a_seed():
    found = choices()
    assert set(found.values()) == {"shown"}
    assert len(found) == 3


def test_sparse_attention_that_does_not_recall_speaks_against_the_claim():
    found = choices(**{LEARNED: 10.0, RULE: 50.0})
    assert found[f"share of the gap that {LEARNED} closes"] == "contrary"
    assert found[f"share of the gap that {RULE} closes"] == "not shown here"
    assert found["by the rule minus at random, as many positions"] == "not shown here"


def test_without_a_gap_no_share_is_given():
    assert not any("share" in what for what in choices(**{FULL: 15.0}))
