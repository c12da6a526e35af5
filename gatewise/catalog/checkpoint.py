"""Loading published and own checkpoints.

Files are safetensors, NumPy archives or torch files; torch files are read with `weights_only=True` alone, so that a
file with code in it is refused instead of run. Wrappers are peeled, keys and axes are mapped by the family's layouts,
and every key must be used and every parameter filled.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Family, family_of_network
from gatewise.errors import CheckpointError, MissingExtraError

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")
_EMA_WRAPPERS = ("state_dict_ema", "model_ema", "params_ema")
_PREFIXES = ("module.", "model.", "_orig_mod.", "network.", "backbone.")
_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".npz", ".safetensors", ".tar")
# Saved by older versions of PyTorch or not at all; it only counts batches.
_OPTIONAL = re.compile(r"(.*\.)?num_batches_tracked")


def load_checkpoint(
    model: nn.Module,
    source: str | Path,
    *,
    replace_head: bool = False,
    adapt: bool = False,
    ema: bool = True,
    layout: str | None = None,
) -> KeyLayout:
    """Fill `model` with the weights at `source`, in whichever of its family's key layouts they are.

    Args:
        model: a network of this library.
        source: a path, an http(s) URL, or a Hugging Face hub id (`owner/name`, optionally with `hf-hub:` before it).
        replace_head: leave the head as initialised if the checkpoint's has another shape or is absent.
        adapt: let the family transfer weights between sizes that its paper defines a transfer for (see its `adapt`).
        ema: prefer averaged weights where the file holds both.
        layout: the name of the key layout, where two have the same names and shapes; None finds the one that fits.
    Returns:
        The layout that fitted.
    Raises:
        CheckpointError: if the file is missing, damaged, holds anything but plain data, or does not fit; the message
            lists every unused key and every unfilled parameter of the closest layout.
    """
    state = peel(read_checkpoint(source), ema=ema)
    return load_state(model, state, replace_head=replace_head, adapt=adapt, origin=str(source), layout=layout)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    replace_head: bool = False,
    adapt: bool = False,
    origin: str = "the state dict",
    layout: str | None = None,
) -> KeyLayout:
    """`load_checkpoint` for tensors that are already in memory."""
    family = _family(model)
    candidates = _layouts(model, family)
    if layout is not None:
        candidates = [_named(layout, candidates)]
    fits = [_fit(model, family, candidate, state, replace_head, adapt) for candidate in candidates]
    best = min(fits, key=lambda fit: len(fit.problems))
    if best.problems:
        raise CheckpointError(_mismatch(model, family, state, best, origin))
    with torch.no_grad():
        model.load_state_dict(best.tensors, strict=False)
    return best.layout


def export_state(model: nn.Module, layout: str) -> dict[str, Tensor]:
    """The model's weights under the names (and axes) of a published layout, such as "timm".

    Raises:
        CheckpointError: if the model's family has no layout of that name.
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


def read_checkpoint(source: str | Path) -> Any:
    """What a checkpoint file holds, tensors on the CPU.

    Raises:
        CheckpointError: if there is no such file, or it is damaged, or holds code or objects instead of plain data.
    """
    if str(source).endswith(".tar.gz"):
        raise CheckpointError(
            f"{source} holds TensorFlow variables: export them to one file with "
            "numpy.savez(FILE, **{name: tf.train.load_variable(PREFIX, name) for name in NAMES}), and load that"
        )
    path = _fetch(str(source))
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {str(source)!r}: expected a file, an http(s) URL or a hub id")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            return _read_numpy(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: {_refusal(error)}; only tensors and plain containers are read, because loading "
            "anything else can run code. If you trust the file, save its state dict alone and load that"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError, ValueError, KeyError, SafetensorError) as error:
        reason = _first_line(error)
        raise CheckpointError(f"{path} cannot be read ({reason}); it may be truncated: fetch it again") from error


def peel(content: Any, *, ema: bool = True) -> dict[str, Tensor]:
    """The state dict inside the wrappers and prefixes that training scripts put around it.

    Raises:
        CheckpointError: if there is no state dict in `content`.
    """
    wrappers = (*_EMA_WRAPPERS, *_WRAPPERS) if ema else (*_WRAPPERS, *_EMA_WRAPPERS)
    while isinstance(content, Mapping):
        inner = next((content[name] for name in wrappers if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError("the checkpoint holds no state dict (a mapping from names to tensors)")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
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
    """Our keys of all problems."""

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
    mapped, origin = {}, {}
    for key, tensor in state.items():
        if layout.drops(key):
            continue
        ours = layout.to_ours(key)
        mapped[ours] = layout.tensor_to_ours(key, tensor) if layout.tensor_to_ours else tensor
        origin[ours] = key
    if layout.unpack:
        mapped = layout.unpack(mapped)
    if adapt:
        mapped = _adapter(model)(mapped)
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


def _adapter(model: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    adapt = getattr(model, "adapt", None)
    if adapt is None:
        raise CheckpointError(f"{type(model).__name__} defines no transfer between sizes; load it without adapt=True")
    return cast(Callable[[dict[str, Tensor]], dict[str, Tensor]], adapt)


def _with_shape(tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """The tensor in this shape if they differ in trailing unit axes alone: a linear map stored as a 1x1 convolution."""
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
    """Variants of the family that the state fits in all but the head."""
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


def _fetch(source: str) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    url = urlparse(source)
    if url.scheme in ("http", "https"):
        return _download(source, Path(url.path).name)
    hub_id = source.removeprefix("hf-hub:")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) and path.suffix.lower() not in (
        ".pth",
        ".pt",
        ".ckpt",
        ".bin",
        ".npz",
        ".safetensors",
        ".tar",
    ):
        return _download_from_hub(hub_id)
    return path


def _download(url: str, name: str) -> Path:
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(target), progress=True)
        except OSError as error:
            raise CheckpointError(f"cannot download {url}: {_first_line(error)}") from error
    return target


def _download_from_hub(hub_id: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError("hub ids need the package huggingface_hub: pip install huggingface_hub") from error
    for name in ("model.safetensors", "pytorch_model.bin"):
        try:
            return Path(hf_hub_download(hub_id, name))
        except LocalEntryNotFoundError as error:
            raise CheckpointError(f"cannot reach the hub for {hub_id!r}, and it is not in the local cache") from error
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            raise CheckpointError(f"cannot fetch {hub_id!r} from the hub: {_first_line(error)}") from error
    raise CheckpointError(f"the hub's {hub_id!r} holds neither model.safetensors nor pytorch_model.bin")


def _read_numpy(path: Path) -> dict[str, Tensor]:
    import numpy as np

    with np.load(path, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def _refusal(error: Exception) -> str:
    match = re.search(r"(?:GLOBAL|Unsupported (?:class|global):?(?: GLOBAL)?)\s+(\S+)", str(error))
    return f"it wants to load {match[1]}" if match else _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
