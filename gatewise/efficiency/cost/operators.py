"""Cost of one operator: multiply-accumulates, and the bytes that it must read and write.

    convolution   MACs = N P Q K (C/g) R S;   ops = 2 MACs;   bytes = u (N C H W + K (C/g) R S + K + N K P Q)

for maps N,C,H,W -> N,K,P,Q, a kernel R x S, g groups, elements of u bytes and a bias of K entries. Every tensor crosses
the memory bus once. Adding a bias is half a MAC per output element and counted separately (`bias_macs`), since the
papers' tables leave it out. In training, grad-input reads the output gradient and the weight, and grad-weight reads the
input and the output gradient, each with as many MACs as the forward pass. grad-bias is half a MAC per output element.

MACs of all other operators follow PyTorch's registry of FLOP formulas, where operators of other packages can be
registered too (`torch.utils.flop_counter.register_flop_formula`).

Source: Lavin 2024, arXiv:2404.03617.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
"""Data types that networks are counted in, and their bytes."""

_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return the name in `DTYPES` of the requested data type.

    Raises:
        ValueError: for any other data type.
    """
    name = str(dtype).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return name


Phase = Literal["forward", "backward"]
Role = Literal["", "grad-input", "grad-weight", "grad-bias"]
Kind = Literal["activation", "weight", "vector"]


@dataclass(frozen=True)
class TensorUse:
    """A tensor that an operator reads or writes.

    Attributes:
        value: number of what was written to memory; views share it, writing in place makes a new one.
        view: elements of the value that it shows, and their order.
        bytes: size of this part; repeated elements of an expanded tensor count once.
        value_bytes: size of the whole value.
        kind: role of the tensor; "weight" and "vector" (biases, scales) belong to the network.
    """

    value: int
    view: tuple[Any, ...]
    bytes: int
    value_bytes: int
    kind: Kind


@dataclass(frozen=True)
class Operator:
    """One operator of a run, as its own kernel.

    Attributes:
        module: path of the innermost module that ran it; empty for the network itself.
        macs: multiply-accumulates without bias additions.
        bias_macs: half a MAC per output element that a bias is added to.
        bytes_read, bytes_written: memory traffic, with each tensor counted once.
        weight_bytes: parameters and buffers among `bytes_read`, without the bias of a product.
        element_size: bytes per element of the output.
        role: gradient that a product of the backward pass computes.
        fusible: whether it works element by element or row by row, so that the kernel that makes its input can include
            it.
        call: index into the module calls of the run.
    """

    name: str
    module: str
    stage: str
    macs: int
    bias_macs: float
    bytes_read: int
    bytes_written: int
    weight_bytes: int
    element_size: int
    phase: Phase
    role: Role
    fusible: bool = field(repr=False)
    call: int = field(repr=False)
    reads: tuple[TensorUse, ...] = field(repr=False)
    writes: tuple[TensorUse, ...] = field(repr=False)

    @property
    def ops(self) -> float:
        """Two operations per multiply-accumulate; adding a bias is one per output element."""
        return 2 * (self.macs + self.bias_macs)

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """Operations per byte; 0 for operators that only move data."""
        return self.ops / self.bytes if self.bytes else 0.0


UNINITIALISED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
"""Operators that allocate memory and write nothing."""

_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "set_"}

_GATHERING = {"embedding", "index", "index_select", "gather", "take", "_unsafe_index", "embedding_bag"}
"""Operators that read only as much of their first argument as they return."""

_BY_ROWS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "batch_norm", "native_layer_norm", "native_group_norm", "_fused_rms_norm",
    "_softmax", "_safe_softmax", "_log_softmax", "copy_", "clone", "_to_copy",
}  # fmt: skip
"""Norms, softmax and copies: like element-wise operators, they can be computed while a result is written."""


def is_fusible(func: Any) -> bool:
    """Return whether the kernel that makes its input can include this operator, which has no MACs."""
    return packet_name(func) in _BY_ROWS or torch.Tag.pointwise in getattr(func, "tags", ())


def packet_name(func: Any) -> str:
    """Return the name without namespace and overload: `convolution` for aten.convolution.default."""
    return getattr(func, "_opname", None) or str(getattr(func, "__name__", func)).partition(".")[0]


def is_overwritten(func: Any, argument: str) -> bool:
    """Return whether the operator writes this argument without reading it."""
    return argument == "out" or packet_name(func) in _OVERWRITING


def arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield name, tensor and whether it is written to, for each tensor among the arguments; lists are flattened."""
    schema = getattr(func, "_schema", None)
    declared = list(schema.arguments) if schema is not None else []
    for position, argument in enumerate(declared):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_in(value):
            yield argument.name, tensor, written
    if schema is None:
        for tensor in tensors_in([args, kwargs]):
            yield "", tensor, False


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested lists, tuples and dictionaries."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def read_limit(func: Any, argument: str, written: int) -> int | None:
    """Return the most bytes that are read, or None for no limit. Looking up rows does not read the whole table."""
    first = {"self", "weight"}
    return written if packet_name(func) in _GATHERING and argument in first else None


def _product(args: Sequence[Any], out: Tensor) -> int:
    """MACs of a matrix product: the inner width for each output element."""
    return out.numel() * args[0].shape[-1]


def _mkldnn_recurrent(args: Sequence[Any], out: Any) -> int:
    """MACs of one recurrent layer: each step multiplies by both of its matrices."""
    return math.prod(args[0].shape[:-1]) * (args[1].numel() + args[2].numel())


def _cudnn_recurrent(args: Sequence[Any], out: Any) -> int:
    """MACs of all recurrent layers, whose weights come as a list."""
    return math.prod(args[0].shape[:-1]) * sum(weight.numel() for weight in args[1] if weight.ndim > 1)


def _trilinear(args: Sequence[Any], out: Tensor) -> int:
    """MACs of `nn.Bilinear`: one for each element of the product before it is summed."""
    shapes = []
    for tensor, expanded in zip(args[:3], args[3:6], strict=True):
        shape = list(tensor.shape)
        for axis in sorted(expanded):
            shape.insert(axis, 1)
        shapes.append(shape)
    return math.prod(torch.broadcast_shapes(*shapes))


_MACS: dict[Any, Callable[[Sequence[Any], Any], int]] = {
    aten.mv: lambda args, out: args[0].numel(),
    aten.addmv: lambda args, out: args[1].numel(),
    aten.dot: lambda args, out: args[0].numel(),
    aten.vdot: lambda args, out: args[0].numel(),
    aten.addr: lambda args, out: out.numel(),
    aten.addbmm: lambda args, out: args[1].numel() * args[2].shape[-1],
    aten._cdist_forward: lambda args, out: out.numel() * args[0].shape[-1],
    aten._trilinear: _trilinear,
    aten.mkldnn_rnn_layer: _mkldnn_recurrent,
    aten._cudnn_rnn: _cudnn_recurrent,
    aten._int_mm: _product,
    aten._grouped_mm: _product,
}
"""Products missing from PyTorch's registry."""

_OWN = {"aten", "prims", "prim", "profiler", "gatewise"}
"""Namespaces whose operators are known: those without a formula have no MACs."""


def count_macs(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Return the MACs of one call, without bias additions.

    Raises:
        ValueError: for an operator of another package that has no formula.
    """
    packet = getattr(func, "_overloadpacket", func)
    if packet in _MACS:
        macs = _MACS[packet](args, out)
    elif packet in flop_registry:
        macs = flop_registry[packet](*args, **kwargs, out_val=out) // 2
    elif getattr(func, "namespace", "higher_order") not in _OWN:
        raise ValueError(
            f"the MACs of the operator {func} are unknown; register a formula for it with "
            "torch.utils.flop_counter.register_flop_formula (one that returns 0, if it has none)"
        )
    else:
        return 0
    # (a + bi)(c + di), added to a sum, takes four real multiply-accumulates.
    return 4 * macs if any(tensor.is_complex() for tensor in tensors_in(list(args))) else macs


def has_formula(func: Any) -> bool:
    """Return whether the operator is counted as a whole instead of by its parts."""
    packet = getattr(func, "_overloadpacket", func)
    return packet in _MACS or packet in flop_registry


BIASES: dict[str, str] = {"addmm": "self", "baddbmm": "self", "addmv": "self", "addbmm": "self", "addr": "self"}
"""Name of the argument for the tensor that a product adds, where it is not `bias`."""


def convolution_macs(x: Tensor, weight: Tensor, options: Sequence[Any], out: Tensor) -> int:
    """Return the MACs of a convolution's forward pass; `options` are the arguments from the stride on."""
    return flop_registry[aten.convolution](x, weight, None, *options, out_val=out) // 2
