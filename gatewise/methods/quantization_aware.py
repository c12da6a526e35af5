"""Quantization-aware training (a transform): train a network on the numbers that its integer form will compute with.

In each pass the weights of convolutions and linear layers, folded with their batch norm, are rounded to codes; the
optimizer updates the float weights. Activations are rounded on grids that track their smallest and largest values.
Gradients pass through the rounding where a value is within its grid, and stop elsewhere. Batch norm first uses the
batch's statistics, corrected so that weights do not jitter, and from `freeze_after` on the long-term ones, as inference
does.

The network keeps its modules and their keys. Its forward methods run in a mode that changes what they compute; ranges
and the number of steps are buffers. Submodules called on their own compute in float. Codes are placed as in
`gatewise.efficiency.quantize`, which is determined by running the network once.

Averaged weights (an EMA) are rounded again when they are evaluated. They can fall on other codes than the weights that
they average, and perform worse (section 6 of the paper).

Source: Krishnamoorthi 2018, arXiv:1806.08342, sections 2.4 and 3.2.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import cache, wraps
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatewise.efficiency.acceleration.export import onnx_bytes
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.inputs import eval_mode, sample_input
from gatewise.efficiency.quantization.graph import Graph
from gatewise.efficiency.quantization.placement import Placement, place
from gatewise.efficiency.quantization.prepare import Batches, Options, images_of
from gatewise.efficiency.quantization.quantize import QuantizedModel, quantize
from gatewise.efficiency.quantization.training.plan import Plan, Site, make_plan
from gatewise.efficiency.quantization.training.simulation import STEP, Settings, Simulation
from gatewise.efficiency.quantization.training.trace import CallKey, as_exported, tracked
from gatewise.layers.quantization_aware import is_set, new_range
from gatewise.methods._base import register_transform

_NAMES_SHOWN = 3
_ONNX_KINDS = {
    "Conv": "conv",
    "Gemm": "linear",
    "MatMul": "linear",
    "Add": "add",
    "Mul": "mul",
    "Concat": "cat",
    "GlobalAveragePool": "average",
    "AveragePool": "average",
    "ReduceMean": "average",
    "Sigmoid": "sigmoid",
    "Relu": "clamp",
    "Clip": "clamp",
    "HardSwish": "curve",
    "HardSigmoid": "curve",
    "LeakyRelu": "curve",
}
"""Names of the integer network's operators in a plan."""


@register_transform
def prepare_qat(
    model: nn.Module,
    *,
    bits: int = 8,
    weight_bits: int = 8,
    per_channel: bool = True,
    activation_delay: int = 200,
    freeze_after: int | None = 2000,
    decay: float = 0.99,
    folded: bool = False,
    input_shape: Sequence[int] | None = None,
) -> nn.Module:
    """Change `model` so that it trains for integers. It should start from trained float weights, such as a checkpoint.

    In eval mode it computes what the integer network of `convert` will, with the same roundings in the same places.
    Given the same codes, a layer returns the same codes, except for single values that are on the border of two codes
    to the last bits of float32, which differ by one code. Without such values outputs agree to 120 dB or more; in a
    network with fresh weights a single one can reduce that to 35 dB. If the integer network has codes that this one
    lacks, `convert` warns.

    Float checkpoints of the network can be loaded. Checkpoints of the prepared network also hold the ranges
    (`..._range`, smallest and largest value) and the number of steps.

    Args:
        model: any image network; changed in place, or replaced by its folded copy.
        bits: bits per activation, 2..8.
        weight_bits: bits per weight, 2..8.
        per_channel: use one scale per output channel of a weight instead of one per weight.
        activation_delay: steps before activations are rounded; their ranges are tracked from the first on. Each forward
            pass in training mode is a step.
        freeze_after: steps after which batch norms permanently use their long-term statistics, unchanged: about a third
            of a run; None for never.
        decay: decay of the ranges' moving averages.
        folded: train the merged form (`gatewise.efficiency.fold`), whose batch norms are in the weights from the start.
            Use it for networks whose norms do not follow convolutions, whose branches merge, or which have scales
            between rounded values.
        input_shape: (channels, height, width) of an input to find the placement with; None for the size that the
            network is made for, or else 224 x 224.
    Returns:
        `model`, or its folded copy.
    Raises:
        ValueError: if settings are out of range, the network is already prepared or has nothing to quantize, a batch
            norm is not the only reader of a convolution or linear layer, or folding would move codes (names them).
    """
    settings = Settings(bits, weight_bits, per_channel, activation_delay, freeze_after, decay)
    if isinstance(model, QuantizationAware):
        raise ValueError(f"{type(model).__name__} is already prepared for quantization")
    if folded:
        training = model.training
        with eval_mode(model):
            model = fold(model)
        model.train(training)
    images = sample_input(model, tuple(input_shape or _own_shape(model)))
    images = images.to(next(model.parameters()).dtype)
    with eval_mode(model):
        plan = make_plan(model, images)
        if not folded:
            _check_codes(plan, make_plan(fold(model), images))
    if not any(key.kind in ("conv", "linear") for key in plan.calls):
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer to quantize")
    aware = cast(Any, model)
    aware.__class__ = _aware(cast(Any, type(model)))
    aware.quantization, aware.plan, aware._simulates = settings, plan, False
    for site in plan.groups:
        span = new_range().to(images.device)
        if site in plan.fixed:
            span.copy_(torch.tensor(plan.fixed[site]))
        model.get_submodule(site.path).register_buffer(site.buffer, span)
    model.register_buffer(STEP, torch.zeros((), dtype=torch.int64, device=images.device))
    return model


def _check_codes(plan: Plan, folded: Plan) -> None:
    """Raise ValueError unless the folded network, which `convert` turns into integers, has codes in the same places.

    Folding moves a scale or a norm between two roundings into a weight, which changes ranges and codes.
    """
    moved = sorted(str(site) for site in set(plan.groups) ^ set(folded.groups))
    if moved:
        raise ValueError(
            f"folding for inference would move codes ({', '.join(moved[:_NAMES_SHOWN])}; {len(moved)} in all), so the "
            "integer network would compute something else; pass folded=True to train the folded form"
        )


class QuantizationAware(nn.Module):
    """A mix-in for prepared networks. Float checkpoints, which hold no ranges, leave the ranges unchanged.

    Attributes:
        quantization: settings of the simulation.
        plan: the calls at which it rounds.
    """

    quantization: Settings
    plan: Plan
    _simulates: bool

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {prefix + name: getattr(self.get_submodule(path), buffer) for name, path, buffer in self._buffers_added()}
        if not any(name in state_dict for name in own):
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _buffers_added(self) -> list[tuple[str, str, str]]:
        sites = [(".".join(part for part in site if part), *site) for site in self.plan.groups]
        return [*sites, (STEP, "", STEP)]


@cache
def _aware(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of prepared networks for a class, the same class every time."""
    names = [name for name in dir(kind) if name.startswith("forward") and callable(getattr(kind, name))]
    methods = {name: _simulated(getattr(kind, name)) for name in names}
    return type(f"QuantizationAware{kind.__name__}", (QuantizationAware, kind), methods)


def _simulated(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a forward method run in the simulation."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._simulates:
            return method(self, *args, **kwargs)
        with _simulation(self):
            return method(self, *args, **kwargs)

    return run


@contextmanager
def _simulation(model: Any) -> Iterator[None]:
    """Run one pass of a prepared network; it counts as a step in training mode.

    Raises:
        ValueError: with gradient checkpointing, which would recompute in float, and later.
    """
    if model.training and getattr(model, "grad_checkpointing", False):
        raise ValueError("quantization-aware training needs gradient checkpointing off: ranges move in each pass")
    current = Simulation(model)
    model._simulates = True
    try:
        # Training uses the faster operators with their own gradients.
        with nullcontext() if model.training else as_exported(), tracked(model, current), current:
            yield
    finally:
        model._simulates = False
    current.check_norms()
    if model.training:
        getattr(model, STEP).add_(1)


def float_network(model: nn.Module) -> nn.Module:
    """Return a float copy of a prepared network: same architecture, float weights, long-term statistics, no ranges.

    Raises:
        ValueError: if `model` was not prepared by `prepare_qat`.
    """
    network = deepcopy(_prepared(model))
    for _, path, buffer in network._buffers_added():
        delattr(network.get_submodule(path), buffer)
    for name in ("quantization", "plan", "_simulates"):
        delattr(network, name)
    cast(Any, network).__class__ = type(network).__mro__[2]
    return network


def convert(model: nn.Module, calibration: Batches, **options: Any) -> QuantizedModel:
    """Return the integer network of a prepared one: `gatewise.efficiency.quantize` with the trained ranges.

    Args:
        model: the prepared and trained network, which is not modified.
        calibration: a batch, or batches. Trained ranges replace theirs; a tensor without a trained range uses the
            calibrated one (a warning names these).
        options: options of `quantize`, except bits, weight_bits, per_channel and ranges, which are those of training.
    Raises:
        ValueError: if `model` was not prepared, or was never run in training mode; and as for `quantize`.
    """
    prepared = _prepared(model)
    if not any(is_set(span) for site, span in _spans(prepared).items() if site not in prepared.plan.fixed):
        raise ValueError("the prepared network has not seen a batch in training mode: its ranges are empty")
    limit = options.get("max_batches", Options.max_batches)
    batches = calibration if isinstance(calibration, Tensor) else list(islice(calibration, limit))
    network = float_network(model).cpu().eval()
    example = next(images_of(batches, 1), None)
    ranges = {} if example is None else trained_ranges(prepared, Graph(onnx_bytes(fold(network), example[:1])))
    chosen = prepared.quantization
    return quantize(
        network,
        batches,
        bits=chosen.bits,
        weight_bits=chosen.weight_bits,
        per_channel=chosen.per_channel,
        ranges=ranges,
        **options,
    )


def trained_ranges(model: nn.Module, graph: Graph) -> dict[str, tuple[float, float]]:
    """Return trained ranges by the names of tensors in the float network's graph. Warn of tensors without one.

    A call and an operator match if both are the n-th of their kind in the module at the same path.
    """
    prepared, placement = _prepared(model), place(graph)
    spans = _spans(prepared)
    ends: defaultdict[str, list[Tensor]] = defaultdict(list)
    for site, tensor in code_tensors(prepared, graph, placement).items():
        if is_set(spans[site]):
            ends[placement.roots[tensor]].append(spans[site])
    found, missing = {}, []
    for tensor, root in placement.roots.items():
        name = graph.names[tensor]
        if root in ends:
            both = torch.stack(ends[root])
            found[name] = float(both[:, 0].min()), float(both[:, 1].max())
        else:
            missing.append(name)
    _warn_of_missing(missing)
    return found


def code_tensors(model: nn.Module, graph: Graph, placement: Placement) -> dict[Site, str]:
    """Map each range of a prepared network to its tensor of codes in the float network's graph, if there is one."""
    plan, operators = _prepared(model).plan, _operators(graph, placement, model)
    found = {}
    for site, (key, position) in plan.origins.items():
        node = operators.get(_ranked(plan, key))
        if node is None:
            continue
        tensor = node.output[0] if position is None else node.input[position]
        tensor = placement.clamped.get(tensor, tensor) if position is None else tensor
        if tensor in placement.roots:
            found[site] = tensor
    return found


def _operators(graph: Graph, placement: Placement, model: nn.Module) -> dict[CallKey, Any]:
    """Return the operators with codes around them, numbered by module and kind."""
    paths = {path for path, _ in model.named_modules()}
    counts: Counter[tuple[str, str]] = Counter()
    found = {}
    for node in graph.nodes:
        kind = _ONNX_KINDS.get(node.op_type)
        node = _end_of_mean(graph, placement, node)
        name, end = graph.names[node.output[0]], placement.clamped.get(node.output[0], node.output[0])
        layer = graph.weight(node) is not None
        if kind is None or not (layer or (kind not in ("conv", "linear") and end in placement.roots)):
            continue
        if node.output[0] in placement.clamped.values():
            continue
        path = name
        while path not in paths:
            path = path.rpartition(".")[0]
        found[CallKey(path, kind, counts[path, kind])] = node
        counts[path, kind] += 1
    return found


def _end_of_mean(graph: Graph, placement: Placement, node: Any) -> Any:
    """Return the reshape after a pool, if the two are a mean over positions that becomes codes; else `node`."""
    pooled = node.output[0]
    if node.op_type != "GlobalAveragePool" or pooled in placement.roots:
        return node
    readers = graph.consumers.get(pooled, [])
    made = [reader for reader in readers if graph.names[reader.output[0]] == graph.names[pooled]]
    return made[0] if made else node


def _ranked(plan: Plan, key: CallKey) -> CallKey:
    """Return the key, numbered among the calls of its module and kind at which something becomes codes."""
    giving = {origin for origin, position in plan.origins.values() if position is None}
    before = [
        other
        for other in plan.calls
        if other[:2] == key[:2] and other.number < key.number and (other in giving or other.kind == "linear")
    ]
    return CallKey(key.path, key.kind, len(before))


def _spans(model: QuantizationAware) -> dict[Site, Tensor]:
    return {site: getattr(model.get_submodule(site.path), site.buffer).cpu() for site in model.plan.groups}


def _prepared(model: nn.Module) -> QuantizationAware:
    if not isinstance(model, QuantizationAware):
        raise ValueError(f"{type(model).__name__} must be a network that prepare_qat has prepared")
    return model


def _warn_of_missing(names: Sequence[str]) -> None:
    if not names:
        return
    rest = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    warnings.warn(
        f"training has no ranges for {', '.join(names[:_NAMES_SHOWN])}{rest}: the integer network has these tensors "
        "where the prepared one has not; their ranges come from the calibration",
        stacklevel=4,
    )


def _own_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) that a network is made for, as far as it declares them."""
    config: Any = getattr(model, "config", None)
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, tuple) else (size, size)
    return getattr(config, "in_chans", 3), height, width
