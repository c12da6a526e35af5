"""Key layouts and axis orders of the published MOAT weights.

The published checkpoints are TensorFlow's. With TensorFlow installed, two lines convert one to an archive that
`load_checkpoint` reads with the layout "tensorflow":

    reader = tf.train.load_checkpoint(folder)
    np.savez("moat.npz", **{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})

"official" has the same names in PyTorch's terms, with PyTorch's axis order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.ops.window_attention import resize_table

if TYPE_CHECKING:
    from gatewise.networks.image.moat.network import MoatConfig

_PARTS: tuple[Rule, ...] = (
    ("shortcut_conv", "shortcut.conv"),
    ("expand_conv", "expand.conv"),
    ("expand_norm", "expand.norm"),
    ("depthwise_conv", "depthwise.conv"),
    ("depthwise_norm", "depthwise.norm"),
    ("se.reduce_conv2d", "se.reduce"),
    ("se.expand_conv2d", "se.expand"),
    ("shrink_conv", "shrink"),
    ("attention.o", "attention.project"),
    ("attention.relative_position_embedding", "attention.table"),
)

_NORM_LEAVES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_NORMS = ("norm", "pre_norm", "attention_norm")
_CONVOLUTIONS = ("conv", "stem.second", "se.reduce", "se.expand", "shrink", "head")

_TENSORFLOW_LEAVES: tuple[Rule, ...] = (
    *((f"{norm}.{theirs}", f"{norm}.{ours}") for norm in _NORMS for theirs, ours in _NORM_LEAVES.items()),
    *((f"{conv}.kernel", f"{conv}.weight") for conv in _CONVOLUTIONS),
    ("depthwise.conv.depthwise_kernel", "depthwise.conv.weight"),
)

_AVERAGE = "ExponentialMovingAverage"
_OTHER_VARIABLES = r"global_step|.*/(Adam(W)?(_1)?|Momentum)"
_TRAINED = r".*/(kernel|depthwise_kernel|bias|gamma|beta|weight|relative_position_embedding)"


def layouts(config: MoatConfig) -> list[KeyLayout]:
    """Return the layouts of PyTorch-style names, TensorFlow's variables, and their moving averages."""
    rules = (*_names(config, "moat."), *_PARTS, *_TENSORFLOW_LEAVES)
    to_ours, to_theirs = _from_tensorflow, _to_tensorflow(config.head_dim)
    # Only averages are read, except the statistics of norms, which are averages already.
    averaged = ((_AVERAGE, ""), *rules)
    other = rf"{_OTHER_VARIABLES}|{_TRAINED}|.*/moving_(mean|variance)/{_AVERAGE}"
    return [
        KeyLayout("official", (*_names(config), *_PARTS), unpack=_join_qkv, pack=_split_qkv),
        KeyLayout(
            "tensorflow", rules, rf"{_OTHER_VARIABLES}|.*/{_AVERAGE}", to_ours, to_theirs, _join_qkv, _split_qkv, "/"
        ),
        KeyLayout("tensorflow averages", averaged, other, to_ours, unpack=_join_qkv, separator="/"),
    ]


def _names(config: MoatConfig, prefix: str = "") -> list[Rule]:
    """Return rules for stem, blocks and head. All of a MOAT block but its attention is in our inner MBConv."""
    rules = [
        (f"^{prefix}stem.conv_0", "stem.first.conv"),
        (f"^{prefix}stem.norm_0", "stem.first.norm"),
        (f"^{prefix}stem.conv_1", "stem.second"),
        (f"^{prefix}final_layer_norm", "^norm"),
        (f"^{prefix}logits_head", "^head"),
    ]
    for stage, depth in enumerate(config.depths):
        for index in range(depth):
            theirs, ours = f"^{prefix}block_{stage:02d}_{index:02d}", f"stages.{stage}.{index}"
            if config.block_types[stage] == "moat":
                rules += [(f"{theirs}.{part}", f"{ours}.{part}") for part in ("attention_norm", "attention")]
                ours = f"{ours}.mbconv"
            rules.append((theirs, ours))
    return rules


def _join_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join queries, keys and values, which are one linear layer here."""
    joined = dict(tensors)
    for key in tensors:
        if match := re.fullmatch(r"(.*\.attention)\.q\.(weight|bias)", key):
            parts = [f"{match[1]}.{letter}.{match[2]}" for letter in "qkv"]
            if all(part in tensors for part in parts):
                joined[f"{match[1]}.qkv.{match[2]}"] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _split_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    split = dict(tensors)
    for key, tensor in tensors.items():
        if ".attention.qkv." in key:
            parts = split.pop(key).chunk(3) if tensor is not None else ()
            split |= {key.replace(".qkv.", f".{letter}."): part for letter, part in zip("qkv", parts, strict=True)}
    return split


def _from_tensorflow(key: str, tensor: Tensor) -> Tensor:
    name = key.removesuffix(f"/{_AVERAGE}")
    if name.endswith("/depthwise_kernel"):
        return tensor.permute(2, 3, 0, 1)
    if name.endswith("/kernel"):
        return tensor.permute(3, 2, 0, 1)
    if re.fullmatch(r".*/attention/[qkv]/weight", name):
        return tensor.flatten(1).T
    if name.endswith("/attention/o/weight"):
        return tensor.flatten(0, 1).T
    return tensor.flatten() if re.fullmatch(r".*/attention/[qkv]/bias", name) else tensor


def _to_tensorflow(head_dim: int) -> Callable[[str, Tensor], Tensor]:
    def to_theirs(key: str, tensor: Tensor) -> Tensor:
        if key.endswith("/depthwise_kernel"):
            return tensor.permute(2, 3, 0, 1)
        if key.endswith("/kernel"):
            # The classifier is a 1x1 convolution there.
            return tensor[(...,) + (None,) * (4 - tensor.ndim)].permute(2, 3, 1, 0)
        if re.fullmatch(r".*/attention/[qkv]/weight", key):
            return tensor.T.unflatten(1, (-1, head_dim))
        if key.endswith("/attention/o/weight"):
            return tensor.T.unflatten(0, (-1, head_dim))
        return tensor.unflatten(0, (-1, head_dim)) if re.fullmatch(r".*/attention/[qkv]/bias", key) else tensor

    return to_theirs


def adapt_tables(state: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors, already under our names, with tables of relative positions like `tables`.

    Tables of other sizes are resized, unused tables are dropped, and missing ones start at zero, which means no bias.
    """
    adapted = {key: tensor for key, tensor in state.items() if not key.endswith(".attention.table")}
    for key, wanted in tables.items():
        rows, columns = wanted.shape[1:]
        table = state.get(key)
        adapted[key] = (
            torch.zeros_like(wanted) if table is None else resize_table(table, ((rows + 1) // 2, (columns + 1) // 2))
        )
    return adapted
