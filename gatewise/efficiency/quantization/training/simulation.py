"""One pass of a network prepared for quantization-aware training: weights and activations on their grids.

A mode intercepts every PyTorch function call in the pass, and changes those named in the plan. Convolutions and linear
layers get rounded weights and are computed with their batch norm, whose own call then changes nothing. Values that are
codes in the integer network are rounded. Nothing is rounded between a convolution, its norm and its ReLU.

Source: Krishnamoorthi 2018, arXiv:1806.08342, sections 2.4 and 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from gatewise.efficiency.quantization.training.plan import CallPlan, Plan, Site
from gatewise.efficiency.quantization.training.trace import CallKey, Pass, addcmul_terms, kind_of, name_of, operands
from gatewise.layers.quantization_aware import (
    BatchNorm,
    BatchStatistics,
    fake_quantize_bias,
    folded_bias,
    folded_weight,
    follow_range,
    grid_of,
    norm_with_batch_statistics,
    norm_with_long_term_statistics,
    update_statistics,
)
from gatewise.ops.quantize import Grid, code_range, fake_quantize, weight_grid

STEP = "quantization_step"
"""The buffer that counts training passes."""


@dataclass(frozen=True)
class Settings:
    """Settings of the simulation.

    Attributes:
        bits, weight_bits: bits per activation and per weight, 2..8.
        per_channel: use one scale per output channel of a weight instead of one per weight.
        activation_delay: training passes before activations are rounded; their ranges are tracked from the first on.
        freeze_after: training passes after which batch norms use, and keep, their long-term statistics; None for never.
        decay: decay of the ranges' moving averages, per training pass.
    """

    bits: int = 8
    weight_bits: int = 8
    per_channel: bool = True
    activation_delay: int = 200
    freeze_after: int | None = 2000
    decay: float = 0.99

    def __post_init__(self) -> None:
        code_range(self.bits)
        code_range(self.weight_bits)
        for name in ("activation_delay", "freeze_after"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be a number of training steps, 0 or more, not {value}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be from 0 to below 1, not {self.decay}")


class Simulation(Pass):
    """Rounds what the plan names, tracks ranges in training, and computes batch norms with their convolutions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.settings: Settings = model.quantization
        self.plan: Plan = model.plan
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.training = model.training
        step = int(getattr(model, STEP)) if self.training else 0
        freeze = self.settings.freeze_after
        self.is_frozen = not self.training or (freeze is not None and step >= freeze)
        self.rounds = not self.training or step >= self.settings.activation_delay
        self._followed: set[Site] = set()
        self._rounded: set[Site] = set()
        self._grids: dict[tuple[Site, ...], Grid | None] = {}
        # Norms whose own call is pending, with their batch statistics.
        self._norms: dict[str, BatchStatistics | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if name_of(func) == "addcmul":
            return self.__torch_function__(torch.add, types, addcmul_terms(self, types, *args, **kwargs))
        if kind_of(func) == "silu":
            return self.__torch_function__(
                torch.mul, types, (args[0], self.__torch_function__(torch.sigmoid, types, args[:1]))
            )
        key = self.key(name_of(func))
        plan = self.plan.calls.get(key)
        if plan is None:
            return func(*args, **kwargs)
        name = func.__name__
        if not name.endswith("_") or name.startswith("__"):
            return self._run(func, key, plan, args, kwargs)
        # The rounded result is a new tensor, not the one that was to change in place.
        pure = getattr(torch, name[:-1], None) or getattr(F, name[:-1])
        return args[0].copy_(self._run(pure, key, plan, args, kwargs))

    def check_norms(self) -> None:
        """Raise RuntimeError if a norm was computed with its convolution but did not run after it."""
        if self._norms:
            raise RuntimeError(
                f"the batch norm {next(iter(self._norms))} did not run after its convolution, as it did when the "
                "network was prepared; prepare the network after all other changes to it"
            )

    def _run(self, func: Any, key: CallKey, plan: CallPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args = self._round_operands(key.kind, plan, args, kwargs)
        if plan.is_folded:
            result = args[0] if args else kwargs["input"]
            self._end_norm(key.path, args, kwargs)
        elif key.kind in ("conv", "linear"):
            result = self._layer(func, key, plan, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if plan.parts:
            return self._round_parts(result, plan.parts)
        return result if plan.output is None else self._given(result, plan.output)

    def _given(self, x: Tensor, site: Site) -> Tensor:
        self._rounded.add(site)
        return self._round(x, site)

    def _round_parts(self, result: Any, parts: dict[int, Site]) -> Any:
        """Round a result of several tensors, some of which become codes."""
        leaves, structure = tree_flatten(result)
        tensors = [position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for number, site in parts.items():
            leaves[tensors[number]] = self._given(leaves[tensors[number]], site)
        return tree_unflatten(leaves, structure)

    def _round_operands(
        self, kind: str, plan: CallPlan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Return the positional arguments, with the operands that become codes here rounded."""
        if not plan.inputs:
            return args
        values = operands(kind, args, kwargs)
        for position, site in plan.inputs.items():
            if site in self._rounded:
                continue
            values[position] = self._round(values[position], site)
        if kind == "cat":
            kwargs.pop("tensors", None)
            return (values, *args[1:])
        for name in ("input", "other"):
            kwargs.pop(name, None)
        return (*values, *args[len(values) :])

    def _round(self, x: Tensor, site: Site) -> Tensor:
        """Round a value to its grid. In training its range tracks it, once per pass."""
        if self.training and site not in self._followed and site not in self.plan.fixed:
            follow_range(self._span(site), x, self.settings.decay, f"the {site}")
            self._followed.add(site)
        grid = self._grid(self.plan.groups[site])
        return x if grid is None else fake_quantize(x, grid)

    def _grid(self, sites: tuple[Site, ...]) -> Grid | None:
        """Return the grid that these ranges share; None while activations stay float."""
        if not self.rounds or not sites:
            return None
        # While ranges move, a grid is only valid at the moment.
        if self.training or sites not in self._grids:
            self._grids[sites] = grid_of([self._span(site) for site in sites], self.settings.bits, str(sites[0]))
        return self._grids[sites]

    def _span(self, site: Site) -> Tensor:
        return cast(Tensor, getattr(self.modules[site.path], site.buffer))

    def _layer(self, func: Any, key: CallKey, plan: CallPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Compute a convolution or linear layer with its weight rounded, and its batch norm with it."""
        fields = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        x, weight, bias = fields.pop("input"), fields.pop("weight"), fields.pop("bias", None)

        def apply(rounded: Tensor) -> Tensor:
            return func(x, rounded.to(weight.dtype), None, *args[3:], **fields)

        norm = None if plan.norm is None else self._norm(plan.norm)
        wide = weight if norm is None else folded_weight(weight, norm)
        name = f"{key.path}.weight"
        grid = weight_grid(wide, self.settings.weight_bits, per_channel=self.settings.per_channel, name=name)
        rounded = fake_quantize(wide, grid)
        if norm is not None and norm.training and not self.is_frozen:
            y, self._norms[cast(str, plan.norm)] = norm_with_batch_statistics(apply, weight, bias, norm, rounded)
            return y
        shift = bias if norm is None else folded_bias(bias, norm)
        input_grid = self._grid(plan.input_spans)
        # Integer kernels add biases to convolutions and matrix products, but not to products of stacks of matrices.
        if shift is not None and input_grid is not None and (key.kind == "conv" or x.ndim == 2):
            shift = fake_quantize_bias(shift, input_grid, grid)
        if norm is not None:
            self._norms[cast(str, plan.norm)] = None
            return norm_with_long_term_statistics(apply, rounded, shift)
        return func(
            x, rounded.to(weight.dtype), shift if shift is None else shift.to(weight.dtype), *args[3:], **fields
        )

    def _norm(self, path: str) -> BatchNorm:
        norm = self.modules.get(path)
        if not isinstance(norm, _BatchNorm):
            raise RuntimeError(
                f"the batch norm {path} is {type(norm).__name__} now; prepare the network after all other changes to it"
            )
        return cast(BatchNorm, norm)

    def _end_norm(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Handle the norm's own call: it was computed with its convolution, and its running statistics move now."""
        if path not in self._norms:
            raise RuntimeError(
                f"the batch norm {path} ran without its convolution, or more than once; prepare the network as it runs"
            )
        seen = self._norms.pop(path)
        if seen is not None:
            update_statistics(self._norm(path), seen, kwargs.get("momentum", args[6] if len(args) > 6 else 0.1))
