"""The weighted average of RWKV-4: values weighted by exponentials of keys that decay with distance.

    y_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (sum_{i<t} e^{(t-1-i) w + k_i} + e^{u + k_t})

for each channel separately, with the decay w <= 0 and the bonus u of the current token. The recurrent form keeps both
sums as multiples of e^m, with m the largest exponent so far, so that nothing overflows:

    a_t e^{m_t} = e^w a_{t-1} e^{m_{t-1}} + e^{k_t} v_t,   b_t e^{m_t} likewise with 1 in the place of v_t

All m are known in advance, m_t = max_{i<=t} (k_i - (t - i) |w|), a running maximum; the rest is linear.

Source: Peng et al. 2023, arXiv:2305.13048, eq. (16) and appendix D.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gatewise.ops.linear_recurrence import linear_recurrence

# The exponent of an empty sum: far below every other, and finite, so that differences of two stay defined.
_NOTHING = -1e30
# A decay used only for the running maximum, where any bound works: multiples of it must keep their digits.
_STEEPEST = -1e3


def weighted_key_value(
    k: Float[Tensor, "batch time dim"],
    v: Float[Tensor, "batch time dim"],
    decay: Float[Tensor, " dim"],
    bonus: Float[Tensor, " dim"],
    state: Float[Tensor, "batch 3 dim"] | None = None,
) -> tuple[Float[Tensor, "batch time dim"], Float[Tensor, "batch 3 dim"]]:
    """Return outputs in the dtype of `v`, and the state after the last token. Half precision is summed in float32.

    Args:
        decay: w, natural log, at most 0.
        bonus: u, natural log.
        state: numerator, denominator and largest exponent from an earlier call.
    Raises:
        ValueError: if shapes disagree, or a decay is positive (checked on the CPU in eager mode).
    """
    _check(k, v, decay, bonus)
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    k_wide, v_wide, decay, bonus = (t.to(wide) for t in (k, v, decay, bonus))
    if state is None:
        zeros = torch.zeros_like(k_wide[:, 0])
        state = torch.stack([zeros, zeros, zeros + _NOTHING], dim=1)
    sums, largest = state[:, :2].to(wide), state[:, 2].to(wide)
    m = _running_maximum(k_wide.detach(), decay.detach(), largest.detach())
    m_before, m = m[:, :-1], m[:, 1:]
    weight = (k_wide - m).exp()
    factors = (decay + m_before - m).exp()[:, :, None]
    after = linear_recurrence(factors, torch.stack([weight * v_wide, weight], dim=2), sums)
    before = torch.cat([sums[:, None], after[:, :-1]], dim=1)
    now = bonus + k_wide
    top = torch.maximum(m_before, now.detach())
    old, new = (m_before - top).exp(), (now - top).exp()
    y = (before[:, :, 0] * old + v_wide * new) / (before[:, :, 1] * old + new)
    return y.to(v.dtype), torch.cat([after[:, -1], m[:, -1:]], dim=1)


def weighted_key_value_reference(
    k: Float[Tensor, "batch time dim"],
    v: Float[Tensor, "batch time dim"],
    decay: Float[Tensor, " dim"],
    bonus: Float[Tensor, " dim"],
) -> Float[Tensor, "batch time dim"]:
    """Compute the definition: a softmax over all exponents of an output."""
    steps = torch.arange(k.shape[1], device=k.device)
    distance = (steps[:, None] - steps - 1).to(k.dtype)[..., None]
    exponents = torch.where(distance >= 0, distance * decay, bonus) + k[:, None]
    exponents = exponents.masked_fill(distance < -1, -torch.inf)
    return torch.einsum("btid,bid->btd", exponents.softmax(dim=2), v)


def _running_maximum(k: Tensor, decay: Tensor, initial: Tensor) -> Tensor:
    """Return m before the first token and after each: (B, T + 1, D). Results do not depend on it, nor do gradients."""
    decay = decay.clamp(min=_STEEPEST)
    places = torch.arange(-1, k.shape[1], device=k.device, dtype=k.dtype)[:, None] * decay
    exponents = torch.cat([initial[:, None], k], dim=1)
    return (exponents - places).cummax(dim=1).values + places


def _check(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> None:
    if k.shape != v.shape or decay.shape != k.shape[2:] or bonus.shape != k.shape[2:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (k, v, decay, bonus))
        raise ValueError(f"expected k and v (B, T, D), decay and bonus (D), not {shapes}")
    if decay.device.type == "cpu" and not torch.compiler.is_compiling() and bool((decay > 0).any()):
        raise ValueError(f"the log decay is at most 0, not {float(decay.max())}")
