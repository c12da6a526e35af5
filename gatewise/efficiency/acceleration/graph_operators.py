"""The functions that a graph in a file may call, and the arguments that they may be given.

A name in a file can only reach operators of PyTorch's dispatcher and a short table of arithmetic on sizes. An operator
is refused if it touches files, storage or the state of a tensor's owner, or if it is a private one of PyTorch's that no
network needs. Strings are limited to a fixed set of mode words, so no operator ever gets a path.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from gatewise.errors import UserError

NAMESPACES = ("aten", "prims", "gatewise")

ON_SIZES: dict[str, Callable[..., Any]] = {
    "operator.getitem": operator.getitem,
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg")
    },
    **{f"operator.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite")
    },
}
"""Python functions by their names in a file. Powers are excluded, since one of them can take forever."""

CHECK_MESSAGE = "a check of the network failed"
"""Replacement for the message of a network's own assertion, which may be any text."""

MODES = frozenset({
    "none", "tanh", "floor", "trunc", "sum", "mean", "prod", "amax", "amin", "constant", "reflect", "replicate",
    "circular", "zeros", "border", "reflection", "bilinear", "bicubic", "trilinear", "nearest", "nearest-exact",
    "linear", "area", "valid", "same", "ij", "xy", "backward", "forward", "ortho", "fro", "nuc", "left", "right",
    "lower", "higher", "midpoint", CHECK_MESSAGE,
})  # fmt: skip
"""Strings that an operator may be given."""

# Indices and arrows: "bhqk,bhkd->bhqd".
_EQUATION = re.compile(r"[A-Za-z,.> -]{1,200}")

_NAME = re.compile(rf"({'|'.join(NAMESPACES)})::([A-Za-z_][A-Za-z0-9_]*)(?:\.([A-Za-z_][A-Za-z0-9_]*))?")

_PRIVATE = frozenset({
    "_assert_async", "_assert_scalar", "_conj", "_convolution", "_fft_c2c", "_fft_c2r", "_fft_r2c", "_log_softmax",
    "_native_batch_norm_legit_no_training", "_neg_view", "_prelu_kernel", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_softmax", "_to_copy", "_unsafe_view", "_weight_norm",
    "_weight_norm_interface",
})  # fmt: skip
"""Operators with a leading underscore that networks consist of."""

_DUNDER = re.compile(r"__i?(and|or|xor|lshift|rshift)__")

_REFUSED = re.compile(
    r"from_file|save|set_.*|data|set_data|resize.*|.*storage.*|share_memory_?|pin_memory|is_pinned|as_strided_"
    r"|record_stream|rename_?|refine_names|align_.*|requires_grad_|retain_grad|backward|copy_to|device_put|lift"
    r"|.*_backward(_.*)?|.*unsafe.*|.*sparse.*|.*mkldnn.*|.*cudnn.*|.*miopen.*|.*fbgemm.*|.*nested.*|inductor_.*"
    r"|quantize_.*|quantized_.*|dequantize|fused_moving_.*|choose_qparams_.*|q_.*|int_repr|segment_reduce"
    r"|embedding_bag.*|lu_.*|linalg_lu_solve|linalg_ldl_solve|ormqr|ctc_loss"
)
"""Refused public operators: they touch storage or a tensor's state, belong to training, or do not check indices."""


def name_of(target: Any) -> str:
    """Return the name under which a file calls a function.

    Args:
        target: callee of a graph's node.
    Raises:
        UserError: if files may not call it.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = target.name()
        find_function(name)
        return name
    for name, function in ON_SIZES.items():
        if function is target:
            return name
    raise UserError(f"its graph calls {getattr(target, '__name__', None) or target}, which no file may call")


def find_function(name: Any) -> Callable[..., Any]:
    """Return the function with this name.

    Args:
        name: name such as "aten::add.Tensor" or "operator.getitem".
    Raises:
        UserError: if there is no such function, or files may not call it.
    """
    if not isinstance(name, str):
        raise UserError(f"a function must be called by its name, not by {name!r:.80}")
    if name in ON_SIZES:
        return ON_SIZES[name]
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise UserError(f"its graph calls {name!r:.80}, which no file may call")
    namespace, base, overload = parts[1], parts[2], parts[3] or ""
    private = base.startswith("_") and base not in _PRIVATE and not _DUNDER.fullmatch(base)
    if namespace != "gatewise" and (private or _REFUSED.fullmatch(base)):
        raise UserError(f"its graph calls the operator {name}, which no file may call")
    try:
        torch._C._dispatch_find_schema_or_throw(f"{namespace}::{base}", overload)
    except RuntimeError as error:
        message = f"its graph calls the operator {name}, which PyTorch {torch.__version__} does not have"
        raise UserError(message) from error
    found = getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    if not isinstance(found, torch._ops.OpOverload) or found.name() != name:
        raise UserError(f"its graph calls {name!r}, which is not an operator")
    for argument in found._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if (argument.kwarg_only and written) or re.search(r"Storage|Stream|__torch__|Any", str(argument.type)):
            raise UserError(f"its graph calls the operator {name}, which no file may call")
    return found


def check_call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check a call against the function's signature.

    Args:
        function: as `find_function` returns it.
        args, kwargs: values, with nodes for computed ones.
    Raises:
        UserError: if an argument is unknown, missing or given twice, or a string is not a mode word.
    """
    if isinstance(function, torch._ops.OpOverload):
        _check_operator(function, args, kwargs)
        return
    if kwargs or not 1 <= len(args) <= 3 or not all(isinstance(value, fx.Node | int | float) for value in args):
        raise UserError(f"its graph calls {function.__name__} with something other than sizes")
    if function is operator.getitem and not (isinstance(args[0], fx.Node) and type(args[-1]) is int):
        raise UserError("its graph takes an item by something other than a number")


def _check_operator(function: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    name, arguments = function.name(), function._schema.arguments
    positional = [argument.name for argument in arguments if not argument.kwarg_only]
    if len(args) > len(positional):
        raise UserError(f"its graph gives {name} {len(args)} arguments, and it takes {len(positional)}")
    given = dict(zip(positional, args, strict=False))
    known = {argument.name for argument in arguments}
    for key in kwargs:
        if key not in known or key in given:
            raise UserError(f"its graph gives {name} an argument {key!r:.80} that is unknown or given twice")
    given |= kwargs
    for argument in arguments:
        if argument.name in given:
            _check_value(name, argument.name, str(argument.type), given[argument.name])
        elif not argument.has_default_value():
            raise UserError(f"its graph leaves out the argument {argument.name!r} of {name}")


def _check_value(name: str, argument: str, kind: str, value: Any) -> None:
    """Check that strings appear only where the operator takes one, and are mode words or equations."""
    if isinstance(value, str):
        equation = name == "aten::einsum" and argument == "equation" and _EQUATION.fullmatch(value)
        if "str" not in kind or not (equation or value in MODES):
            raise UserError(f"its graph gives {name} the text {value!r:.80} as {argument}")
    elif isinstance(value, list | tuple):
        for part in value:
            _check_value(name, argument, kind, part)
