"""The identities and the accounting of AdvMoE's claim; no training."""

from __future__ import annotations

import pytest
import torch

from gatewise.claims import advmoe
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import build
from gatewise.networks.image.advmoe import ExpertConv2d, ResNetMoE, ResNetMoEConfig

TINY = ResNetMoEConfig(num_classes=10, ratio=0.125, depths=(1, 1))


def tiny_network(name):
    """Small stand-ins for the networks that are timed."""
    experts = 1 if name.endswith("_ori") else 2
    return ResNetMoE(ResNetMoEConfig(num_classes=10, ratio=0.125, depths=(1,), n_expert=experts))


def test_identities_are_shown():
    found = advmoe.check_identities(Run(0, 100))
    assert [one.verdict for one in found.measured] == ["shown"] * 4


def test_a_wrong_expert_would_be_noticed(monkeypatch):
    original = advmoe.thin_network
    monkeypatch.setattr(advmoe, "thin_network", lambda network, expert: original(network, 1 - expert))
    wrong = advmoe.check_identities(Run(0, 100)).measured[2]
    assert wrong.what.startswith("mixed batch")
    assert wrong.verdict == "contrary"


def test_a_wrong_gradient_would_be_noticed(monkeypatch):
    reference = advmoe.expert_conv2d_reference
    monkeypatch.setattr(
        advmoe,
        "expert_conv2d_reference",
        lambda x, scores, *rest, **options: reference(x, scores, *rest, **options) + (scores - scores.detach()).sum(),
    )
    of_outputs, of_scores = advmoe.operator_errors(0)
    assert of_outputs < 1e-12
    assert of_scores > 1e-3


def test_costs_are_those_of_the_published_networks():
    found = advmoe.count_cost(Run(0, 100)).measured
    shares = {one.what: one.interval.value for one in found}
    assert shares["ResNet-18: MACs, router and pathway over dense"] == pytest.approx(0.346, abs=5e-4)
    assert shares["VGG-16-BN: MACs, router and pathway over dense"] == pytest.approx(0.381, abs=5e-4)
    assert shares["WRN-28-10: MACs, router and pathway over dense"] == pytest.approx(0.258, abs=5e-4)
    assert all(one.verdict == "shown" for one in found if one.expected)
    assert shares["there, the router alone"] > 1


def test_the_busier_expert_has_half_of_the_images_that_are_timed(monkeypatch):
    monkeypatch.setattr(advmoe, "registered", tiny_network)
    times = {"dense": (1.0, 1.0, 1.0), "experts": (0.5, 0.4, 0.5), "masked": (0.9, 0.9, 0.9)}

    def run_once(calls, run, seconds):
        outputs = [call() for call in calls.values()]
        assert all(output.shape == outputs[0].shape for output in outputs)
        return times

    monkeypatch.setattr(advmoe, "time_by_turns", run_once)
    found = {one.what: one for one in advmoe.time_inference(Run(0, 100)).measured}
    assert found["images of the busier expert, of 16"].interval.value == 8
    grouped = found["batch 16: time over dense, grouped"]
    assert grouped.interval.value == 0.5
    assert grouped.verdict == "shown"
    assert found["batch 16: time over dense, all experts computed and masked"].verdict is None


def test_all_experts_masked_give_the_same_logits():
    network = build(0, lambda: ResNetMoE(TINY)).eval()
    images = torch.rand(6, 3, 32, 32)
    advmoe.balance(network, images)
    assert network.expert_load(images) == (3, 3)
    with torch.no_grad():
        torch.testing.assert_close(advmoe.all_experts(network, images), network(images), rtol=1e-4, atol=1e-6)


def test_a_thin_network_holds_one_expert():
    network = build(0, lambda: ResNetMoE(TINY)).eval()
    thin = advmoe.thin_network(network, 1)
    conv = next(module for module in network.modules() if isinstance(module, ExpertConv2d))
    assert torch.equal(thin.stages[0][0].units[0].conv.weight, conv.weight.chunk(2)[1])
    assert thin.router is None


def losses(learner):
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    model = build(0, learner).eval()
    advmoe.RoutedDigits().loss(model, (images, labels)).backward()
    return model


def test_a_router_that_is_taught_learns_from_labels_alone():
    model = losses(advmoe.TaughtByLabels)
    gradient = model.network.router.fc.bias.grad
    scores = model.network.scores(torch.randn(1, 1, 8, 8))
    assert gradient.sum().abs() < 1e-6
    assert gradient.abs().max() > 0
    assert scores.shape == (1, 2)


def test_both_learners_train_backbone_and_router():
    for learner in advmoe.LEARNERS.values():
        model = losses(learner)
        assert all(p.grad is not None for p in model.network.router.parameters())
        assert model.network.stages[0][0].units[0].conv.weight.grad.abs().sum() > 0


def test_load_and_agreement_are_read_from_unseen_digits():
    model = build(0, advmoe.TaughtByLabels).eval()
    model.network.router.fc.bias.data = torch.tensor([100.0, 0.0])
    assert advmoe.busiest_share(model) == 100
    images, labels = advmoe.digits()[1]
    assert advmoe.agreement(model) == pytest.approx(100 * (labels % 2 == 0).float().mean().item(), abs=1e-3)
    assert len(images) == 360
