"""Side-by-side training of networks that take seconds.

The variants of a comparison are trained on the same batches, with the same optimizer and schedule, each on one thread
and as many at once as there are cores: small operators gain more from that than from parallel execution, and the
results do not depend on the number of cores.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from gatewise.claims.lab.run import Run

Batch = tuple[Tensor, ...]
Network = TypeVar("Network", bound=nn.Module)
Learner = TypeVar("Learner", bound=nn.Module, contravariant=True)

REPORT_EVERY = 20
"""Steps between two lines of progress."""


class Task(Protocol[Learner]):
    """Learning task."""

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Inputs (images channels-last) and targets, drawn from the generator alone."""

    def loss(self, model: Learner, batch: Batch) -> Tensor:
        """A scalar to minimize."""


@dataclass(frozen=True)
class Schedule:
    """AdamW; the rate rises over the first tenth of the steps and falls to zero along a cosine; gradients clipped."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05
    clip: float = 5.0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm_up = max(1, self.steps // 10)
        if step < warm_up:
            return self.lr * (step + 1) / warm_up
        return self.lr * (1 + math.cos(math.pi * (step - warm_up) / (self.steps - warm_up))) / 2


def build(seed: int, make: Callable[[], Network]) -> Network:
    """`make()` with its random weights drawn from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def init_by_fan_in(model: Network) -> Network:
    """Redraw the weights of linear layers and convolutions with variance 1 / fan-in; returns `model`.

    The fixed 0.02 of published networks suits widths of hundreds and long schedules; at a width of 32 hardly a signal
    would get through.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


def train_side_by_side(
    models: Mapping[str, Network], task: Task[Network], schedule: Schedule, *, seed: int, run: Run
) -> dict[str, float]:
    """Train every model; returns the mean loss of its last tenth of steps.

    Models are changed in place: trained, laid out channels-last (twice as fast here), and left in eval mode.

    Raises:
        OutOfTime: if the time of the part runs out first.
    """
    with one_thread_each(), ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {name: pool.submit(_train, name, model, task, schedule, seed, run) for name, model in models.items()}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            # Whatever ends one of them, an impatient user included, the others are not waited for.
            run.stop()
            raise


def _train(name: str, model: Network, task: Task[Network], schedule: Schedule, seed: int, run: Run) -> float:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)
    losses = []
    model.train().to(memory_format=torch.channels_last)
    for step in range(schedule.steps):
        run.check_time()
        if step % REPORT_EVERY == 0:
            run.say(f"seed {seed}, {name}, step {step} of {schedule.steps}")
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = task.loss(model, task.batch(schedule.batch_size, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    last = losses[-max(1, schedule.steps // 10) :]
    return sum(last) / len(last)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Operators use one thread within the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
