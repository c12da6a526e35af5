"""The identities and the networks of GLA's claim; no training."""

from __future__ import annotations

import torch

from gatewise.claims import gla
from gatewise.claims.lab.run import Run


def test_the_forms_are_shown_equal():
    found = gla.check_forms(Run(0, 100))
    assert all(one.verdict == "shown" for one in found.measured)


def test_the_compared_networks_differ_in_their_decay_alone():
    gated, fixed = (gla.make_network(32, kind) for kind in (False, True))
    names = {"decay"}
    own = [key for key in gated.state_dict() if not any(name in key for name in names)]
    assert own == list(fixed.state_dict())
    more = sum(p.numel() for p in gated.parameters()) / sum(p.numel() for p in fixed.parameters())
    assert 1 < more < 1.06


def test_costs_are_judged_on_ratios_within_rounds(monkeypatch):
    times = iter([1.0, 1.0, 2.0, 4.0, 4.0, 16.0, 8.0, 64.0])

    def timed(calls, run, seconds, max_rounds=25):
        if set(calls) == {"GLA", "softmax attention"}:
            return {name: (next(times),) * 3 for name in calls}
        return dict.fromkeys(calls, (1.0, 1.0, 1.0))

    monkeypatch.setattr(gla, "time_by_turns", timed)
    monkeypatch.setattr(gla, "tensors", lambda batch, time, seed, dtype=torch.float32: [torch.zeros(1, 1, 1, 16)] * 4)
    linear, quadratic, faster, decoding = gla.measure_cost(Run(0, 100)).measured
    assert (linear.interval.value, quadratic.interval.value) == (2, 4)
    assert faster.interval.value == 8
    assert decoding.verdict == "shown"


def test_the_most_frequent_answer_is_no_answer():
    assert 40 < gla.without_memory(gla.RESET) < 60
