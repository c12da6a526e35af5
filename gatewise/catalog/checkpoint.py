"""Load checkpoints, both published ones and your own.

Files are safetensors, NumPy archives or torch files. They are checked before they are loaded, and torch files are read
only with `weights_only=True`, so that a file with code in it is refused instead of run. Wrappers are removed, and keys
and axes are mapped by the family's layouts. Every key must be used and every parameter filled, with finite numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatewise.catalog._reading import read_checkpoint as read_checkpoint
from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Family, family_of_network
from gatewise.catalog.values import require_finite, require_kinds, require_strided
from gatewise.errors import CheckpointError

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")
_EMA_WRAPPERS = ("state_dict_ema", "model_ema", "params_ema")
_PREFIXES = ("module.", "model.", "_orig_mod.", "network.", "backbone.")
_MOST_WRAPPERS = 20
# Missing in checkpoints of older versions of PyTorch; it only counts batches.
_OPTIONAL = re.compile(r"(.*\.)?num_batches_tracked")


def load_checkpoint(
    model: nn.Module,
    source: str | Path,
    *,
    replace_head: bool = False,
    adapt: bool = False,
    ema: bool = True,
    layout: str | None = None,
    allow_nonfinite: bool = False,
) -> KeyLayout:
    """Fill `model` with the weights at `source`, which may have any of its family's key layouts.

    Args:
        model: a network of this library.
        source: a path, an http(s) URL, or a Hugging Face hub id (`owner/name`, optionally with `hf-hub:` before it).
        replace_head: keep the head as initialized if the checkpoint's is absent or has another shape.
        adapt: let the family transfer weights between sizes that its paper defines a transfer for (see its `adapt`).
        ema: prefer averaged weights if the file holds both.
        layout: name of the key layout, in case two have the same names and shapes; None finds the one that fits.
        allow_nonfinite: accept weights that contain NaN or infinity, as left by a diverged run.
    Returns:
        The layout that fitted.
    Raises:
        CheckpointError: if the file is missing, damaged, holds anything but plain data, or does not fit. The message
            lists every unused key and every unfilled parameter of the closest layout. Also if a parameter has another
            kind of dtype than the network's, or holds NaN or infinity.
        Failure: if the download cache cannot be written.
    """
    return load_state(
        model,
        peel(read_checkpoint(source), ema=ema),
        replace_head=replace_head,
        adapt=adapt,
        origin=str(source),
        layout=layout,
        allow_nonfinite=allow_nonfinite,
    )


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    replace_head: bool = False,
    adapt: bool = False,
    origin: str = "the state dict",
    layout: str | None = None,
    allow_nonfinite: bool = False,
) -> KeyLayout:
    """Like `load_checkpoint`, for tensors that are already in memory."""
    family = _family(model)
    require_strided(state, origin)
    candidates = _layouts(model, family)
    if layout is not None:
        candidates = [_named(layout, candidates)]
    fits = [_fit(model, family, candidate, state, replace_head, adapt) for candidate in candidates]
    best = min(fits, key=lambda fit: len(fit.problems))
    if best.problems:
        raise CheckpointError(_mismatch(model, family, state, best, origin))
    require_kinds(best.tensors, model.state_dict(), origin)
    if not allow_nonfinite:
        require_finite(best.tensors, origin)
    with torch.no_grad():
        model.load_state_dict(best.tensors, strict=False)
    return best.layout


def export_state(model: nn.Module, layout: str) -> dict[str, Tensor]:
    """Return the model's weights under the names (and axes) of a published layout, such as "timm".

    Raises:
        CheckpointError: if the model's family has no layout with this name.
    """
    chosen = _named(layout, _family(model).layouts(_config(model)))
    if chosen.tensor_to_ours is not None and chosen.tensor_to_theirs is None:
        raise CheckpointError(f"the layout {layout!r} can be read, not written")
    state = model.state_dict()
    exported = {}
    for key, tensor in (chosen.pack(state) if chosen.pack else state).items():
        theirs = chosen.to_theirs(key)
        exported[theirs] = chosen.tensor_to_theirs(theirs, tensor) if chosen.tensor_to_theirs else tensor
    return exported


def _named(name: str, layouts: Sequence[KeyLayout]) -> KeyLayout:
    known = {layout.name: layout for layout in layouts}
    if name not in known:
        raise CheckpointError(f"no key layout {name!r} here; known: {', '.join(known)}")
    return known[name]


def peel(content: Any, *, ema: bool = True) -> dict[str, Tensor]:
    """Return the state dict inside the wrappers and prefixes that training scripts add.

    Raises:
        CheckpointError: if there is no state dict in `content`.
    """
    wrappers = (*_EMA_WRAPPERS, *_WRAPPERS) if ema else (*_WRAPPERS, *_EMA_WRAPPERS)
    for _ in range(_MOST_WRAPPERS):
        names = wrappers if isinstance(content, Mapping) else ()
        inner = next((content[name] for name in names if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    else:
        raise CheckpointError(f"the checkpoint holds no state dict within {_MOST_WRAPPERS} wrappers")
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError("the checkpoint holds no state dict (a mapping from names to tensors)")
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            if str(key) in state:
                raise CheckpointError(f"the checkpoint is not understood: two of its names read {str(key)!r}")
            state[str(key)] = value
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


@dataclass(frozen=True)
class _Fit:
    layout: KeyLayout
    tensors: dict[str, Tensor]
    unused: list[str]
    unfilled: list[str]
    misshapen: list[str]
    ours: list[str]
    """The keys of ours that have problems."""

    @property
    def problems(self) -> list[str]:
        return [*self.unused, *self.unfilled, *self.misshapen]


def _fit(
    model: nn.Module,
    family: Family,
    layout: KeyLayout,
    state: Mapping[str, Tensor],
    replace_head: bool,
    adapt: bool,
) -> _Fit:
    try:
        mapped, origin = _mapped(layout, state)
        if adapt:
            mapped = _adapter(model)(mapped)
    # Layouts join, split and permute tensors of the shapes that they know; PyTorch rejects others.
    except (RuntimeError, IndexError) as error:
        reason = f"its tensors have shapes that {layout.name} does not know ({' '.join(str(error).split())})"
        return _Fit(layout, {}, list(state), [], [reason], list(state))
    wanted = model.state_dict()
    tensors, unused, misshapen, problems = {}, [], [], []
    for ours, tensor in mapped.items():
        in_head = replace_head and ours.startswith(family.fresh_with_head)
        if ours not in wanted:
            if not in_head:
                unused.append(origin.get(ours, ours))
                problems.append(ours)
            continue
        reshaped = _with_shape(tensor, wanted[ours].shape)
        if reshaped is not None:
            tensors[ours] = reshaped
        elif not in_head:
            misshapen.append(f"{origin.get(ours, ours)} {tuple(tensor.shape)} for {ours} {tuple(wanted[ours].shape)}")
            problems.append(ours)
    unfilled = [
        key
        for key in wanted
        if key not in mapped
        and not _OPTIONAL.fullmatch(key)
        and not (replace_head and key.startswith(family.fresh_with_head))
    ]
    return _Fit(layout, tensors, unused, unfilled, misshapen, [*problems, *unfilled])


def _mapped(layout: KeyLayout, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors under our names, and the name that each came from, if it has one."""
    mapped, origin = {}, {}
    for key, tensor in state.items():
        if layout.drops(key):
            continue
        ours = layout.to_ours(key)
        mapped[ours] = layout.tensor_to_ours(key, tensor) if layout.tensor_to_ours else tensor
        origin[ours] = key
    return (layout.unpack(mapped) if layout.unpack else mapped), origin


def _adapter(model: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    adapt = getattr(model, "adapt", None)
    if adapt is None:
        raise CheckpointError(f"{type(model).__name__} defines no transfer between sizes; load it without adapt=True")
    return cast(Callable[[dict[str, Tensor]], dict[str, Tensor]], adapt)


def _with_shape(tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """Reshape a tensor if only trailing unit axes differ, as for a linear layer stored as a 1x1 convolution."""
    if tensor.shape == shape:
        return tensor
    return tensor.reshape(shape) if _stripped(tensor.shape) == _stripped(shape) else None


def _stripped(shape: torch.Size) -> tuple[int, ...]:
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _mismatch(model: nn.Module, family: Family, state: Mapping[str, Tensor], fit: _Fit, origin: str) -> str:
    parts = []
    for title, keys in (("unused", fit.unused), ("unfilled", fit.unfilled), ("other shape", fit.misshapen)):
        if keys:
            parts.append(f"{title} ({len(keys)}): {', '.join(keys)}")
    hints = []
    if fit.misshapen and all(
        " for " in text and text.split(" for ")[1].startswith(family.fresh_with_head) for text in fit.misshapen
    ):
        hints.append("only the head differs: pass replace_head=True to leave it fresh")
    if not hints and (fitting := _fitting_variants(family, state)):
        hints.append("it fits " + ", ".join(fitting))
    hint = f" [{'; '.join(hints)}]" if hints else ""
    return f"{origin} does not fit {_title(model)} (closest layout: {fit.layout.name}){hint}; " + "; ".join(parts)


def _fitting_variants(family: Family, state: Mapping[str, Tensor]) -> list[str]:
    """Return variants of the family that the state fits in everything but the head."""
    found = []
    for name, variant in family.variants.items():
        with torch.device("meta"):
            network = family.network(variant.config)
        if any(not _fit(network, family, layout, state, True, False).problems for layout in _layouts(network, family)):
            found.append(name)
    return found


def _layouts(model: nn.Module, family: Family) -> list[KeyLayout]:
    return [KeyLayout("gatewise"), *family.layouts(_config(model))]


def _config(model: nn.Module) -> Any:
    return model.config


def _title(model: nn.Module) -> str:
    return getattr(model, "variant", None) or type(model).__name__


def _family(model: nn.Module) -> Family:
    family = family_of_network(type(model))
    if family is None:
        raise CheckpointError(f"{type(model).__name__} is not a network of this library; use its own load_state_dict")
    return family
