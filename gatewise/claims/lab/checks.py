"""Small measurements that claims share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from gatewise.claims.lab.intervals import Interval, bootstrap
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import one_thread_each
from gatewise.efficiency.timing.measure import measure

Module = TypeVar("Module", bound=nn.Module)


def generator(seed: int) -> torch.Generator:
    """Return a new generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value of `theirs`."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def randomise(model: Module, seed: int) -> Module:
    """Move every parameter and running statistic off its initial value, where identities hold too easily.

    Returns `model`, in eval mode.
    """
    draw = generator(seed)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=draw))
        elif key.endswith("running_var"):
            buffer.copy_(1 + torch.rand(buffer.shape, generator=draw))
    return model.eval()


def time_by_turns(
    calls: Mapping[str, Callable[[], object]], run: Run, seconds: float, max_rounds: int = 25
) -> dict[str, tuple[float, ...]]:
    """Seconds of each call on one thread, round by round, within what is left of the part's time.

    Raises:
        OutOfTime: if nothing is left.
    """
    run.check_time()
    candidates = {name: lambda _, call=call: call() for name, call in calls.items()}
    with one_thread_each():
        budget_s = min(seconds, 0.8 * run.remaining)
        timings = measure(candidates, torch.empty(1), budget_s=budget_s, min_rounds=3, max_rounds=max_rounds)
    return {timing.name: timing.samples for timing in timings}


def times_faster(slow: Sequence[float], fast: Sequence[float]) -> Interval:
    """Return how many times faster the second is: the median ratio over interleaved rounds."""
    return bootstrap([a / b for a, b in zip(slow, fast, strict=True)])


def median_ms(samples: Sequence[float]) -> float:
    """Milliseconds."""
    return 1e3 * sorted(samples)[len(samples) // 2]
