"""Key layouts of the published TVConv networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.layers.tvconv import TVConv, TVConvOptions, resize_maps

Numbers = dict[str, int]


def operator_rules(options: TVConvOptions | None) -> list[Rule]:
    """Return the rules within a TVConv, or none if there is no TVConv."""
    if options is None:
        return []
    rules = [("posi_map", "affinity"), ("weight_layers", "generator"), ("bias_layers", "bias_generator")]
    for generator in ("generator", "bias_generator"):
        block = f"{generator}.blocks.{{i}}"
        rules += [
            (f"{generator}.{options.hidden_layers + 1}", f"{generator}.project"),
            (f"{generator}.{{i}}", block),
            (f"{block}.0", f"{block}.conv"),
            (f"{block}.1", f"{block}.norm"),
        ]
    return rules


def block_rules(path: str, expand: bool = True) -> list[Rule]:
    """Return the rules within an inverted residual. Its path is equal on both sides and empty or ends with a dot."""
    units = ["expand", "spatial"] if expand else ["spatial"]
    rules = []
    for position, unit in enumerate(units):
        rules += [(f"^{path}conv.{position}.0", f"{path}{unit}.conv")]
        rules += [(f"^{path}conv.{position}.1", f"{path}{unit}.norm")]
    rules += [(f"^{path}conv.{len(units)}", f"{path}project.conv")]
    return [*rules, (f"^{path}conv.{len(units) + 1}", f"{path}project.norm")]


def unit_rules(path: str) -> list[Rule]:
    """Return the rules within a shuffle unit, with `path` as in `block_rules`."""
    places = {"branch1.0": "shortcut.spatial.conv", "branch1.1": "shortcut.spatial.norm"}
    places |= {"branch1.2": "shortcut.project.conv", "branch1.3": "shortcut.project.norm"}
    places |= {"branch2.0": "branch.expand.conv", "branch2.1": "branch.expand.norm"}
    places |= {"branch2.3": "branch.spatial.conv", "branch2.4": "branch.spatial.norm"}
    places |= {"branch2.5": "branch.project.conv", "branch2.6": "branch.project.norm"}
    return [(f"^{path}{theirs}", f"{path}{ours}") for theirs, ours in places.items()]


def pair_rules(theirs: str, ours: str) -> list[Rule]:
    """Return rules for a convolution and the following norm, which are numbered."""
    return [(f"^{theirs}", ours), (f"^{ours}.0", f"{ours}.conv"), (f"^{ours}.1", f"{ours}.norm")]


Build = Callable[[], nn.Module]
State = dict[str, Tensor]


def layout(name: str, rules: Sequence[Rule], build: Build, dropped: str | None = None) -> KeyLayout:
    """Return a layout that checks and writes the integers that published operators store beside their weights.

    Args:
        build: function that builds the network of these operators without storage.
    """

    @cache
    def numbers() -> dict[str, Numbers]:
        with torch.device("meta"):
            network = build()
        return {path: _numbers(module) for path, module in network.named_modules() if isinstance(module, TVConv)}

    def unpack(state: State) -> State:
        """Drop the numbers that agree. A mismatch stays, under a name that describes it, and fails to load."""
        kept = {}
        for key, tensor in state.items():
            path, _, name = key.rpartition(".")
            expected = numbers().get(path, {}).get(name) if tensor.ndim == 0 else None
            if expected is None:
                kept[key] = tensor
            elif int(tensor) != expected:
                kept[f"{key} is {int(tensor)}, not {expected}"] = tensor
        return kept

    def pack(state: State) -> State:
        return dict(state) | {
            f"{path}.{name}": torch.tensor(value) for path, own in numbers().items() for name, value in own.items()
        }

    return KeyLayout(name, tuple(rules), dropped, unpack=unpack, pack=pack)


def _numbers(operator: TVConv) -> Numbers:
    kernel, (h, w) = operator.options.kernel_size, operator.map_size
    numbers = {"TVConv_k": kernel, "TVConv_k_square": kernel**2, "stride": operator.stride}
    return numbers | {"channels": operator.channels, "h": h, "w": w}


def resized(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> State:
    """Return a state resized to the map sizes of `wanted`: maps are interpolated, mismatched sizes dropped."""
    return {
        key: resize_maps(key, tensor, (wanted[key].shape[-2], wanted[key].shape[-1]))
        if key in wanted and tensor.ndim >= 3
        else tensor
        for key, tensor in state.items()
        if not re.search(r"\.[hw] is \d+, not \d+$", key)
    }


def face_layouts(
    rules: list[Rule], build: Build, *, operator: TVConvOptions | None, dropout: bool, head: bool
) -> list[KeyLayout]:
    """Return the layouts of the network by itself and of the training code's checkpoints, with a classifier.

    Args:
        rules: rules within the network.
        build: function that builds the network.
        operator: options of the network's operators.
        dropout: whether dropout precedes the embedding.
        head: whether the network has a classifier.
    """
    embedding = "output_layer.layer1.0" if dropout else "output_layer.layer1"
    rules += [(f"^{embedding}", "embedding.norm"), ("^output_layer.layer2.0", "embedding.project")]
    rules += [("^output_layer.layer2.1", "embedding.embed_norm"), *operator_rules(operator)]
    tops = dict.fromkeys(theirs.removeprefix("^").split(".")[0] for theirs, _ in rules if theirs.startswith("^"))
    inside = [(f"^model.{top}", f"^{top}") for top in tops if top not in ("stages", "stem", "head_conv")]
    network = layout("official", rules, build, None if head else r"head\.weight")
    training = layout("lightning", [*inside, *rules], build, network.dropped)
    return [_with_classifier(network), _with_classifier(training)]


def _with_classifier(layout: KeyLayout) -> KeyLayout:
    def turned(key: str, tensor: Tensor) -> Tensor:
        return tensor.t() if key == "head.weight" else tensor

    return replace(layout, tensor_to_ours=turned, tensor_to_theirs=turned)
