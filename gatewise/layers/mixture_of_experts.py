"""Sparse MLP: each token is routed to a few of many small experts.

    p = softmax(W_r x);   y = sum over the k experts with the largest p:  p_e / sum p  *  expert_e(x)

Tokens are sorted by expert, so that every expert runs once, on one matrix. Two losses keep the router healthy: one
encourages even use of the experts, the other small logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewise.ops.grouped_linear import grouped_linear


class MixtureOfExperts(nn.Module):
    """SwiGLU experts selected by a softmax router: (..., C) -> (..., C).

    Source: Shazeer et al. 2017, arXiv:1701.06538, section 2. Narrow experts follow Dai et al. 2024, arXiv:2401.06066.

    Args:
        dim: width of the tokens.
        hidden_dim: hidden width of one expert.
        num_experts: number of experts.
        experts_per_token: number of experts per token.
        normalize: whether the weights of a token's experts are normalized to sum to 1.
    """

    def __init__(
        self, dim: int, hidden_dim: int, num_experts: int, experts_per_token: int, *, normalize: bool = True
    ) -> None:
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(
                f"experts_per_token must be 1 to the number of experts, {num_experts}, not {experts_per_token}"
            )
        super().__init__()
        self.experts_per_token = experts_per_token
        self.normalize = normalize
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.up_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.choose(self.router(tokens))
        order = chosen.flatten().argsort(stable=True)
        counts = visits(chosen, self.router.out_features)
        rows = tokens[order // self.experts_per_token]
        hidden = F.silu(grouped_linear(rows, self.gate_proj, counts)) * grouped_linear(rows, self.up_proj, counts)
        # Gathered back into token order, because a scatter sum would depend on the order of additions.
        outputs = grouped_linear(hidden, self.down_proj, counts)[order.argsort()]
        y = (outputs.unflatten(0, (-1, self.experts_per_token)) * weights[..., None].to(outputs.dtype)).sum(dim=1)
        return y.reshape(x.shape).to(x.dtype)

    def choose(
        self, logits: Float[Tensor, "tokens experts"]
    ) -> tuple[Float[Tensor, "tokens visited"], Int[Tensor, "tokens visited"]]:
        """Return weights and indices of each token's experts. Probabilities are computed at least in float32."""
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)
        return (weights / weights.sum(dim=-1, keepdim=True) if self.normalize else weights), chosen


def visits(chosen: Int[Tensor, "tokens visited"], num_experts: int) -> Int[Tensor, " experts"]:
    """Return the number of tokens per expert."""
    flat = chosen.flatten()
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


def load_balance_loss(
    logits: Float[Tensor, "tokens experts"], counts: Float[Tensor, " experts"] | Int[Tensor, " experts"]
) -> Float[Tensor, ""]:
    """Return experts * sum_e f_e P_e, with f the fraction of visits and P the mean probability (1 if both even).

    Counts over the whole batch, across processes and accumulated steps, encourage balance in the batch instead of in
    every small part of it, which lets experts specialize.

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. (4)-(6), with fractions of visits for several experts per token.
    Global counts: Qiu et al. 2025, arXiv:2501.11873.
    """
    share = counts / counts.sum()
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    return len(counts) * (share.to(probabilities.dtype) * probabilities.mean(dim=0)).sum()


def router_z_loss(logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    """Return the mean of log^2(sum_e exp(logit_e)). Source: Zoph et al. 2022, arXiv:2202.08906, eq. (5)."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(dim=-1).square().mean()


class Routing:
    """Router inputs of a network in one forward pass, filled by `record_routing`."""

    def __init__(self) -> None:
        self._seen: list[tuple[MixtureOfExperts, Tensor]] = []

    def add(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        """Record the router's input, as a forward pre-hook.

        The router runs again for the losses. Nothing may be computed here, because gradient checkpointing recomputes
        the block as it first ran.
        """
        self._seen.append((module, inputs[0].reshape(-1, inputs[0].shape[-1])))

    def logits(self) -> list[Float[Tensor, "tokens experts"]]:
        """Return the router logits of each mixture of experts, in the order in which they ran."""
        return [module.router(x) for module, x in self._seen]

    def counts(self) -> list[Int[Tensor, " experts"]]:
        """Return the number of tokens per expert, for each mixture."""
        return [
            visits(module.choose(logits)[1], logits.shape[-1])
            for (module, _), logits in zip(self._seen, self.logits(), strict=True)
        ]

    def load_balance_loss(self, globally: Callable[[Tensor], Tensor] = lambda counts: counts) -> Float[Tensor, ""]:
        """Return the mean of `load_balance_loss` over the mixtures.

        Args:
            globally: function from counts of this part of the batch to counts of all of it (a sum over processes).
        """
        pairs = zip(self.logits(), self.counts(), strict=True)
        return torch.stack([load_balance_loss(logits, globally(counts)) for logits, counts in pairs]).mean()

    def z_loss(self) -> Float[Tensor, ""]:
        """Return the mean of `router_z_loss` over the mixtures."""
        return torch.stack([router_z_loss(logits) for logits in self.logits()]).mean()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Routing]:
    """Record the routers' inputs while the model runs:

        with record_routing(model) as routing:
            logits = model(tokens)
        loss = cross_entropy(logits, targets) + 1e-2 * routing.load_balance_loss() + 1e-3 * routing.z_loss()

    Raises:
        ValueError: if the model has no mixture of experts.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if not mixtures:
        raise ValueError(f"{type(model).__name__} has no mixture of experts whose routing could be recorded")
    routing = Routing()
    handles = [module.register_forward_pre_hook(routing.add) for module in mixtures]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()
