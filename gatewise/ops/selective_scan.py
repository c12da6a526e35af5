"""The selective state space recurrence of Mamba (S6).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t         h: (dim, state) per row, all products channel by channel
    y_t = sum over the state of C_t h_t

The products with the state are never held for the whole sequence. Time is split into segments, only the state at the
start of each is kept, and the backward pass recomputes a segment's states.

Source: Gu and Dao 2023, arXiv:2312.00752, eq. (2) and algorithm 2 (A by zero-order hold, B by Euler's rule).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

from gatewise.ops.linear_recurrence import run_steps

# Elements of a segment: 2 MB in float32, so that its intermediate results stay in the cache.
_SEGMENT = 2**19


def selective_scan(
    x: Float[Tensor, "batch time dim"],
    dt: Float[Tensor, "batch time dim"],
    a: Float[Tensor, "dim state"],
    b: Float[Tensor, "batch time state"],
    c: Float[Tensor, "batch time state"],
    state: Float[Tensor, "batch dim state"] | None = None,
) -> tuple[Float[Tensor, "batch time dim"], Float[Tensor, "batch dim state"]]:
    """Return outputs in the dtype of `x`, and the state after the last token. Half precision is scanned in float32.

    Differentiable once.


    Args:
        dt: positive step sizes.
        a: negative state matrix.
        state: state returned by an earlier call.
    Raises:
        ValueError: if shapes disagree.
    """
    if x.shape != dt.shape or a.shape != (x.shape[2], b.shape[2]) or b.shape != c.shape or b.shape[:2] != x.shape[:2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, dt, a, b, c))
        raise ValueError(f"expected x and dt (B, T, D), a (D, N), b and c (B, T, N), not {shapes}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide, dt, a, b, c = (t.to(wide) for t in (x, dt, a, b, c))
    before = x_wide.new_zeros(x.shape[0], *a.shape) if state is None else state.to(wide)
    a, before = a.t().contiguous(), before.transpose(1, 2).contiguous()
    y, final, _ = torch.ops.gatewise.selective_scan(x_wide, dt, a, b, c, before)
    return y.to(x.dtype), final.transpose(1, 2)


def selective_scan_reference(
    x: Float[Tensor, "batch time dim"],
    dt: Float[Tensor, "batch time dim"],
    a: Float[Tensor, "dim state"],
    b: Float[Tensor, "batch time state"],
    c: Float[Tensor, "batch time state"],
) -> Float[Tensor, "batch time dim"]:
    """Compute the definition, token by token."""
    h = x.new_zeros(x.shape[0], *a.shape)
    outputs = []
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * a).exp() * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        outputs.append((h * c[:, t, None]).sum(dim=-1))
    return torch.stack(outputs, dim=1)


@torch.library.custom_op(
    "gatewise::selective_scan",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor initial) -> (Tensor, Tensor, Tensor)",
)
def _selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, final state, and the states at the starts of segments (segments, B, N, D).

    Here `a` and the states have their contiguous channels last: (N, D) and (B, N, D).
    """
    y, h = torch.empty_like(x), initial.clone()
    starts = []
    for segment in _segments(x.shape[1], initial.numel()):
        starts.append(h)
        states = _states_of(_factors(dt[:, segment], a), x[:, segment] * dt[:, segment], b[:, segment], h)
        h = states[:, -1].clone()
        y[:, segment] = states.mul_(c[:, segment, :, None]).sum(dim=2)
    return y, h.clone(), torch.stack(starts)


@_selective_scan.register_fake
def _(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = len(_segments(x.shape[1], initial.numel()))
    return torch.empty_like(x), torch.empty_like(initial), initial.new_empty(count, *initial.shape)


@torch.library.custom_op(
    "gatewise::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor dfinal, Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor starts)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gradients(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of x, dt, a, b, c and the initial state, computed from the last segment to the first."""
    dx, ddt, db, dc = (torch.empty_like(t) for t in (x, dt, b, c))
    da, entering = torch.zeros_like(a), dfinal.clone()
    for segment, start in zip(reversed(_segments(x.shape[1], dfinal.numel())), reversed(starts.unbind()), strict=True):
        x_s, dt_s, b_s, dy_s = (t[:, segment] for t in (x, dt, b, dy))
        u, factors = x_s * dt_s, _factors(dt_s, a)
        states = _states_of(factors, u, b_s, start)
        dc[:, segment] = (states * dy_s[:, :, None]).sum(dim=3)
        dh = _state_gradients(factors, dy_s[:, :, None] * c[:, segment, :, None], entering)
        entering = factors[:, 0] * dh[:, 0]
        db[:, segment] = (dh * u[:, :, None]).sum(dim=3)
        du = (dh * b_s[..., None]).sum(dim=2)
        dexponents = dh.mul_(factors)
        dexponents[:, 1:] *= states[:, :-1]
        dexponents[:, 0] *= start
        dx[:, segment] = du * dt_s
        ddt[:, segment] = du * x_s + (dexponents * a).sum(dim=2)
        da += dexponents.mul_(dt_s[:, :, None]).sum(dim=(0, 1))
    return dx, ddt, da, db, dc, entering


@_gradients.register_fake
def _(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, da, db, dc, dinitial = (torch.empty_like(t) for t in (x, dt, a, b, c, dfinal))
    return dx, ddt, da, db, dc, dinitial


def _setup(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])


def _backward(ctx: FunctionCtx, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.gatewise.selective_scan_backward(dy, dfinal, *ctx.saved_tensors)  # type: ignore[attr-defined]


_selective_scan.register_autograd(_backward, setup_context=_setup)


def _segments(time: int, step: int) -> list[slice]:
    size = max(1, _SEGMENT // max(step, 1))
    return [slice(begin, min(begin + size, time)) for begin in range(0, time, size)]


def _factors(dt: Tensor, a: Tensor) -> Tensor:
    return (dt[:, :, None] * a).exp_()


def _states_of(factors: Tensor, u: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Return the states after each token of a segment: (B, t, N, D)."""
    states = u[:, :, None] * b[..., None]
    run_steps(factors.unbind(1), states.unbind(1), states.unbind(1), start)
    return states


def _state_gradients(factors: Tensor, grads: Tensor, entering: Tensor) -> Tensor:
    """Return gradients of all states of a segment, written over those that come from the outputs."""
    grads[:, -1] += entering
    following = reversed(factors[:, 1:].unbind(1))
    earlier = list(reversed(grads[:, :-1].unbind(1)))
    run_steps(following, earlier, earlier, grads[:, -1])
    return grads
