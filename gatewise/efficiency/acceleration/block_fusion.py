"""Replace the inverted residuals of any network with blocks that are executed depth-first.

Blocks are found in a folded copy by what they compute (`block_chain`), so those of gatewise, torchvision and timm are
all recognized. A block that needs whole maps, as for squeeze-and-excitation, cannot be fused.

Depth-first execution always saves memory. Whether it saves time depends on the processor and on the size of the maps.
Given an example, each block is therefore measured in several tilings against its plain form, on its input in the
network. It stays plain if no tiling wins.

Source: Lavin 2024, arXiv:2404.03617.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gatewise.efficiency.acceleration.block_chain import Block, NotABlockError, read_block
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.inputs import check_example, check_inference, run
from gatewise.efficiency.timing.measure import Ratio, measure, ratio
from gatewise.errors import Failure
from gatewise.ops.block_fusion import (
    Activation,
    ExecutionPath,
    conv_first_path,
    conv_first_shape,
    fused_conv_first,
    fused_mbconv,
    mbconv_path,
    mbconv_shape,
)
from gatewise.ops.block_fusion.plan import BlockShape, Tile, TilePlan, cache_bytes, plan_bands, plan_tiles

if TYPE_CHECKING:
    from gatewise.efficiency.acceleration.plan import PlanContext
    from gatewise.efficiency.acceleration.runners import Runner

__all__ = [
    "BlockShape",
    "FusedBlock",
    "FusedNetwork",
    "FusionReport",
    "Tile",
    "TilePlan",
    "cache_bytes",
    "fuse_blocks",
    "fused_blocks",
    "plan_tiles",
]

MOST_CONVOLUTIONS = 8
"""Modules with more of them are split without being read: a block has three, and a few more inside of gates."""

CACHES = (1, 2, 4, 8)
"""Numbers of second-level caches that the measured tilings may fill."""

LEAST_GAIN = 1.05
"""Smallest median speedup of a fused block, whose lower quartile must exceed 1; anything less is noise."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest accepted difference of the fused network from the folded one, over the largest output. Reordering sums
changes deep float32 networks by 1e-5."""

HALF_TOLERANCE = 5e-2
"""The same in half precision, where roundings of 4e-3 fall differently and some survive to the output."""


class FusedBlock(nn.Module):
    """A folded inverted residual, executed depth-first: (B, C, H, W) -> (B, K, P, Q), channels-last.

    Args:
        tile: rows and hidden channels that a CPU works on at a time; None for the operator's plan.
    """

    spatial_weight: Tensor
    spatial_bias: Tensor | None
    expand_weight: Any
    expand_bias: Tensor | None
    project_weight: Tensor
    project_bias: Tensor | None

    def __init__(self, block: Block, tile: Tile | None = None) -> None:
        super().__init__()
        self.form, self.residual, self.tile = block.form, block.residual, tile
        self.stride = block.spatial.stride
        self.activation: Activation = "identity" if block.expand is None else block.expand.activation
        self.spatial_activation: Activation = block.spatial.activation
        for name, unit in (("spatial", block.spatial), ("expand", block.expand), ("project", block.project)):
            self.register_parameter(f"{name}_weight", None if unit is None else _frozen(unit.weight))
            self.register_parameter(f"{name}_bias", None if unit is None or unit.bias is None else _frozen(unit.bias))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "conv first":
            return fused_conv_first(
                x,
                *self._tensors(),
                stride=self.stride,
                spatial_activation=self.spatial_activation,
                activation=self.activation,
                residual=self.residual,
                tile=self.tile,
            )
        return fused_mbconv(
            x,
            *self._tensors(),
            stride=self.stride,
            expand_activation=self.activation,
            spatial_activation=self.spatial_activation,
            residual=self.residual,
            tile=self.tile,
        )

    def _tensors(self) -> list[Any]:
        """Return tensors in the order of the operator's arguments."""
        spatial, expand = [self.spatial_weight, self.spatial_bias], [self.expand_weight, self.expand_bias]
        front = spatial + expand if self.form == "conv first" else expand + spatial
        return [*front, self.project_weight, self.project_bias]

    def path(self, x: Tensor) -> ExecutionPath:
        """Return how the block would be computed for this input, and why."""
        return (conv_first_path if self.form == "conv first" else mbconv_path)(x, *self._tensors())

    def shape(self, x: Tensor) -> BlockShape:
        """Return the sizes of the block for this input."""
        if self.form == "conv first":
            return conv_first_shape(x, self.spatial_weight, self.expand_weight, self.project_weight, self.stride)
        return mbconv_shape(x, self.expand_weight, self.spatial_weight, self.project_weight, self.stride)

    def extra_repr(self) -> str:
        return f"{self.form}, {self.activation}, residual={self.residual}, tile={self.tile}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


@dataclass(frozen=True)
class BlockResult:
    """Outcome for one block.

    Attributes:
        fused: whether it is executed depth-first.
        note: how it is executed, or why it was not fused.
        ratio: speedup of the best tiling over the plain block; None if nothing was measured.
    """

    name: str
    fused: bool
    note: str
    ratio: Ratio | None = None


@dataclass(frozen=True)
class FusionReport:
    """Outcome for every block, and for every module that looks like one, in the order of the network."""

    blocks: tuple[BlockResult, ...]

    @property
    def fused(self) -> tuple[BlockResult, ...]:
        return tuple(block for block in self.blocks if block.fused)

    @property
    def kept(self) -> tuple[BlockResult, ...]:
        return tuple(block for block in self.blocks if not block.fused)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.blocks)} blocks fused"]
        for block in self.blocks:
            measured = f" {block.ratio}" if block.ratio else ""
            lines.append(
                f"{'fused' if block.fused else 'kept '}  {block.name or '(the network)'}{measured}: {block.note}"
            )
        return "\n".join(lines)


class FusedNetwork(NamedTuple):
    """The copy with fused blocks, and the outcome for each."""

    model: nn.Module
    report: FusionReport


@torch.no_grad()
def fuse_blocks(model: nn.Module, example: Tensor | None = None, *, block_budget_s: float = 0.5) -> FusedNetwork:
    """Return a folded copy of `model` whose inverted residuals run depth-first. `model` itself is not modified.

    Args:
        example: a batch of images. If given, a block is fused only if that is faster than its plain form on its input
            in this batch; without it, every possible block is fused.
        block_budget_s: measuring time in seconds per block. Blocks of one shape are measured once.
    Raises:
        ValueError: if any part of `model` is in training mode, where batch norms use the batch's statistics and need
            whole maps, or if it cannot run on the example.
        Failure: if the copy's output differs, as when a network uses parts of its blocks directly.
    """
    check_inference(model, "fusing blocks")
    folded = fold(model).requires_grad_(False)
    found: dict[str, Block] = {}
    reasons: dict[str, str] = {}
    _find(folded, "", found, reasons)
    if example is None:
        fused = {name: FusedBlock(block) for name, block in found.items()}
        notes = {name: BlockResult(name, True, _described(block)) for name, block in fused.items()}
        return FusedNetwork(_swapped(folded, fused), _report(folded, notes, reasons))
    check_example(model, example)
    if example.ndim == 4:
        folded = folded.to(memory_format=torch.channels_last)
        example = example.contiguous(memory_format=torch.channels_last)
    expected = run(folded, example)
    fused, notes = _measured(folded, example, found, block_budget_s)
    report = _report(folded, notes, reasons)
    result = _swapped(folded, fused)
    _check_equal(run(result, example), expected)
    return FusedNetwork(result, report)


def _find(module: nn.Module, name: str, found: dict[str, Block], reasons: dict[str, str]) -> bool:
    """Record the blocks at and below `module`. Return whether there was a block, or a reason why there is none."""
    sizes = [max(conv.kernel_size) for conv in module.modules() if isinstance(conv, nn.Conv2d)]
    if len(sizes) < 2:
        return False
    # A container's parent may call its members one by one, so these are tried first.
    contains = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    if contains and _find_below(module, name, found, reasons):
        return True
    reason = _enter(module, name, found) if len(sizes) <= MOST_CONVOLUTIONS else ""
    if reason is None:
        return True
    if not contains and _find_below(module, name, found, reasons):
        return True
    if reason and min(sizes) == 1 < max(sizes):
        reasons[name] = reason
    return bool(reason) and name in reasons


def _find_below(module: nn.Module, name: str, found: dict[str, Block], reasons: dict[str, str]) -> bool:
    below = [_find(child, f"{name}.{key}".lstrip("."), found, reasons) for key, child in module.named_children()]
    return any(below)


def _enter(module: nn.Module, name: str, found: dict[str, Block]) -> str | None:
    """Record `module` if it is a block, or return why it is not."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return ""
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks, which a fused block would not call"
    try:
        found[name] = read_block(module)
    except NotABlockError as reason:
        return str(reason)
    return None


def _swapped(model: nn.Module, fused: Mapping[str, FusedBlock]) -> nn.Module:
    """Return `model` with these modules replaced wherever they appear."""
    replacements = {model.get_submodule(name): block.eval() for name, block in fused.items()}
    if model in replacements:
        return replacements[model]
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, key, replacements[child])
    return model


def _report(model: nn.Module, notes: Mapping[str, BlockResult], reasons: Mapping[str, str]) -> FusionReport:
    """Build the report in the order of the modules."""
    results = {**notes, **{name: BlockResult(name, False, reason) for name, reason in reasons.items()}}
    return FusionReport(tuple(results[name] for name, _ in model.named_modules() if name in results))


def _described(block: FusedBlock) -> str:
    if block.tile is None:
        return f"{block.form}, tiles planned per input"
    return f"{block.form}, tiles of {block.tile.rows} rows and {block.tile.channels} hidden channels"


def _measured(
    model: nn.Module, example: Tensor, found: Mapping[str, Block], budget_s: float
) -> tuple[dict[str, FusedBlock], dict[str, BlockResult]]:
    """Return the blocks that are faster fused, and the outcome for each."""
    inputs = _inputs(model, example, found)
    outcomes: dict[tuple[object, ...], _Outcome] = {}
    fused, notes = {}, {}
    for name, block in found.items():
        x = inputs.get(name)
        if x is None:
            notes[name] = BlockResult(name, False, "it does not run in this network")
            continue
        key = _signature(block, x)
        if key not in outcomes:
            outcomes[key] = _best(model.get_submodule(name), block, x, budget_s)
        tile, times, note = outcomes[key]
        wins = times is not None and times.median >= LEAST_GAIN and times.low > 1
        if wins:
            fused[name] = FusedBlock(block, tile)
            note = _described(fused[name])
        notes[name] = BlockResult(name, wins, note, times)
    return fused, notes


class _Outcome(NamedTuple):
    """The best tile of a block, its speedup over the plain block, and a remark."""

    tile: Tile | None
    times: Ratio | None
    note: str


def _best(plain: nn.Module, block: Block, x: Tensor, budget_s: float) -> _Outcome:
    """Measure the tilings of a block against its plain form."""
    trial = FusedBlock(block).to(memory_format=torch.channels_last)
    path = trial.path(x)
    if path.name == "plain":
        return _Outcome(None, None, path.reason)
    candidates: dict[str, nn.Module] = {"plain": plain}
    tiles = dict(enumerate(_tiles(trial, x))) if path.name == "bands" else {0: None}
    for number, tile in tiles.items():
        candidates[str(number)] = FusedBlock(block, tile).to(memory_format=torch.channels_last)
    timings = measure(candidates, x, budget_s=budget_s)
    ratios = {int(timing.name): ratio(timings[0], timing) for timing in timings[1:]}
    best = max(ratios, key=lambda number: ratios[number].median)
    return _Outcome(tiles[best], ratios[best], "the plain block is as fast")


def _tiles(block: FusedBlock, x: Tensor) -> Iterator[Tile]:
    """Yield the distinct tiles for caches of several sizes."""
    planned = [plan_bands(block.shape(x), caches * cache_bytes(), x.element_size()) for caches in CACHES]
    return iter(dict.fromkeys(planned))


def _inputs(model: nn.Module, example: Tensor, names: Mapping[str, Block]) -> dict[str, Tensor]:
    """Return the first input of each of these modules."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def keep(module: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
            inputs.setdefault(name, arguments[0].clone())

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    try:
        run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _signature(block: Block, x: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for blocks that take equally long."""
    units = [unit for unit in (block.spatial, block.expand, block.project) if unit is not None]
    sizes = tuple((tuple(unit.weight.shape), unit.stride, unit.activation) for unit in units)
    return block.form, block.residual, tuple(x.shape), x.stride(), x.dtype, *sizes


def _check_equal(found: Tensor, expected: Tensor) -> None:
    error = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    # Not `error > limit`, which NaN would pass.
    if not error <= TOLERANCE.get(expected.dtype, HALF_TOLERANCE) * expected.abs().max().item():
        raise Failure(
            f"the network with fused blocks differs from the folded one by {error:.1e}: it uses parts of its blocks in "
            "other ways than calling them"
        )


def fused_blocks(context: PlanContext, dtype: torch.dtype = torch.float32) -> Runner:
    """Build the `optimize` plan of a folded, channels-last network whose blocks are fused where that is faster.

    Args:
        dtype: data type of weights and activations.
    """
    # Imported here because `plans` lists this plan and imports this module.
    from gatewise.efficiency.acceleration.runners import NotApplicableError

    if context.example.ndim != 4 or not context.example.is_floating_point():
        raise NotApplicableError("block fusion is for images")
    network, report = fuse_blocks(deepcopy(context.folded).to(dtype), context.example.to(dtype))
    if not report.fused:
        raise NotApplicableError(_why_none(report))
    return lambda x: network(x.to(dtype, memory_format=torch.channels_last)).to(torch.float32)


def _why_none(report: FusionReport) -> str:
    if not report.blocks:
        return "no inverted residual in this network"
    reasons = list(dict.fromkeys(block.note for block in report.blocks))
    return f"none of {len(report.blocks)} blocks gains by fusion: {'; '.join(reasons[:3])}"
