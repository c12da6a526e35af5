"""Checks of inputs from callers, and of networks' outputs for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def check_example(model: nn.Module, example: Tensor) -> None:
    """Check that `example` is a batch for `model`: on its device, and of its dtype or, for tokens, integer.

    Raises:
        TypeError: if `example` is not a tensor.
        ValueError: if the batch is empty, or the dtype or device is wrong. The message names the expected one.
    """
    if not isinstance(example, Tensor):
        raise TypeError(f"the example must be one tensor, a batch of inputs, not {type(example).__name__}")
    if example.ndim < 2 or not example.numel():
        raise ValueError(f"the example must be a batch with at least one sample, not shape {tuple(example.shape)}")
    if takes_tokens(model):
        if example.is_floating_point():
            raise ValueError(f"the example must hold tokens (integers), not {example.dtype}")
    elif not example.is_floating_point():
        raise ValueError(f"the example must be floating-point, not {example.dtype}; convert and normalize it first")
    own = next(chain(model.parameters(), model.buffers()), None)
    if own is None:
        return
    if own.device != example.device:
        raise ValueError(f"the example is on {example.device}, the network on {own.device}; move one to the other")
    if example.is_floating_point() and own.is_floating_point() and own.dtype != example.dtype:
        raise ValueError(f"the example is {example.dtype}, the network {own.dtype}; convert one to the other")


def takes_tokens(model: nn.Module) -> bool:
    """Return whether `model` takes tokens instead of floating-point inputs."""
    return getattr(model, "takes_tokens", False)


def sample_input(model: nn.Module, input_size: tuple[int, ...], batch_size: int = 1) -> Tensor:
    """Return a fixed batch of samples of this shape to try `model` on: noise or random tokens, on its device."""
    own = next(chain(model.parameters(), model.buffers()), None)
    device = own.device if own is not None else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        if takes_tokens(model):
            vocabulary: Any = model.config
            sample = torch.randint(vocabulary.vocab_size, (batch_size, *input_size), generator=generator)
        else:
            sample = torch.randn(batch_size, *input_size, generator=generator)
    return sample.to(device)


def check_inference(model: nn.Module, what: str) -> None:
    """Raise ValueError unless every part of `model` is in eval mode, since `what` is exact only at inference."""
    for name, module in model.named_modules():
        if module.training:
            part = f"its part {name!r}" if name else "it"
            raise ValueError(f"{what} needs a network in eval mode, but {part} is in training mode; call .eval() first")


def run(model: nn.Module, example: Tensor) -> Tensor:
    """Return the network's single output for `example`, computed without gradients.

    Raises:
        ValueError: if the network rejects the input, or returns anything but one tensor.
    """
    try:
        with torch.no_grad():
            output = model(example)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the network cannot run on an example of shape {tuple(example.shape)}: {reason}") from error
    if not isinstance(output, Tensor):
        raise ValueError(f"the network must return one tensor, not {type(output).__name__}")
    return output


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put all parts of `model` in eval mode within the block, and restore each part's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
