"""Experts, their router and its losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gatewise.layers.mixture_of_experts import (
    MixtureOfExperts,
    load_balance_loss,
    record_routing,
    router_z_loss,
    visits,
)


def mixture(**options):
    module = MixtureOfExperts(6, 5, 7, 3, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def token_by_token(module, x):
    """The definition, one token and one expert at a time."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        probabilities = (module.router.weight @ token).softmax(0)
        best = probabilities.argsort(descending=True)[: module.experts_per_token]
        total = probabilities[best].sum() if module.normalize else 1.0
        row = torch.zeros_like(token)
        for e in best.tolist():
            hidden = F.silu(module.gate_proj[e] @ token) * (module.up_proj[e] @ token)
            row = row + probabilities[e] / total * (module.down_proj[e] @ hidden)
        rows.append(row)
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(2, 9, 6), (1, 6), (40, 6)])
def test_sorted_tokens_equal_one_token_at_a_time(normalize, shape):
    module = mixture(normalize=normalize)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gradients = []
    for run in (module, lambda x: token_by_token(module, x)):
        y = run(x)
        gradients.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_one_expert_for_all_is_a_plain_perceptron():
    module = MixtureOfExperts(6, 5, 1, 1)
    x = torch.randn(4, 6)
    plain = F.linear(F.silu(x @ module.gate_proj[0].T) * (x @ module.up_proj[0].T), module.down_proj[0])
    torch.testing.assert_close(module(x), plain)


def test_half_precision_routes_in_float32():
    weights, chosen = MixtureOfExperts(6, 5, 7, 3).choose(torch.randn(4, 7).bfloat16())
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))
    assert chosen.shape == (4, 3)


def test_visits_are_counted():
    assert visits(torch.tensor([[0, 2], [2, 3]]), 5).tolist() == [1, 0, 2, 1, 0]


def test_balance_costs_one_and_imbalance_up_to_the_number_of_experts():
    even = torch.zeros(8, 4)
    assert load_balance_loss(even, torch.tensor([4, 4, 4, 4])) == pytest.approx(1.0)
    collapsed = torch.tensor([[30.0, 0, 0, 0]]).expand(8, 4)
    assert load_balance_loss(collapsed, torch.tensor([8, 0, 0, 0])) == pytest.approx(4.0)


def test_the_balance_loss_by_its_definition():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    p = logits.softmax(-1).mean(0)
    expected = 2 * (1 / 3 * p[0] + 2 / 3 * p[1])
    torch.testing.assert_close(load_balance_loss(logits, torch.tensor([1, 2])), expected)


def test_the_z_loss_by_its_definition():
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    expected = (torch.tensor(2.0).log() ** 2 + (torch.tensor(1.0).exp() + torch.tensor(3.0).exp()).log() ** 2) / 2
    torch.testing.assert_close(router_z_loss(logits), expected)


def test_counts_of_the_whole_batch_make_parts_add_up():
    module = mixture()
    model = nn.Sequential(module)
    x = torch.randn(8, 6, dtype=torch.float64)
    with record_routing(model) as whole:
        model(x)
    (everywhere,) = whole.counts()
    parts = []
    for part in x.split(2):
        with record_routing(model) as routing:
            model(part)
        parts.append(routing.load_balance_loss(lambda counts: everywhere))
    torch.testing.assert_close(torch.stack(parts).mean(), whole.load_balance_loss())
    assert everywhere.sum() == 8 * 3


def test_losses_are_means_over_mixtures_and_reach_the_routers():
    model = nn.Sequential(mixture(), mixture())
    x = torch.randn(4, 6, dtype=torch.float64)
    with record_routing(model) as routing:
        model(x)
    inner = model[0](x)
    logits = [x @ model[0].router.weight.T, inner @ model[1].router.weight.T]
    expected = (router_z_loss(logits[0]) + router_z_loss(logits[1])) / 2
    torch.testing.assert_close(routing.z_loss(), expected)
    (routing.z_loss() + routing.load_balance_loss()).backward()
    assert all(module.router.weight.grad.abs().max() > 0 for module in model)
    assert not any(module._forward_pre_hooks for module in model)


def test_losses_go_with_gradient_checkpointing():
    module = mixture()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        module.zero_grad()
        with record_routing(module) as routing:
            hidden = 2 * x
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(lambda x: module(2 * x), x, use_reentrant=False)
            else:
                y = module(hidden)
        (y.sum() + routing.z_loss() + routing.load_balance_loss()).backward()
        gradients.append(module.router.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="Linear has no mixture of experts"), record_routing(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("visited", [0, 8])
def test_impossible_numbers_of_experts_are_refused(visited):
    with pytest.raises(ValueError, match=f"experts_per_token must be 1 to the number of experts, 7, not {visited}"):
        MixtureOfExperts(6, 5, 7, visited)
