"""Read checkpoints from a path, a URL or a hub id: tensors and plain data, checked before they are loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from gatewise.errors import CheckpointError, Failure, MissingExtraError, UserError
from gatewise.files.download import download
from gatewise.files.numpy_files import read_npz
from gatewise.files.regular import starts_with
from gatewise.files.safetensors import is_safetensors, read_safetensors
from gatewise.files.torch_files import read_torch
from gatewise.files.zip import list_members

_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".npz", ".safetensors", ".tar")
_ROLE = "checkpoint"


def read_checkpoint(source: str | Path) -> Any:
    """Return the content of a checkpoint file, with tensors on the CPU.

    Args:
        source: a path, an http(s) URL, or a Hugging Face hub id (`owner/name`, optionally with `hf-hub:` before it).
    Raises:
        CheckpointError: if the file does not exist, is damaged, or holds code or objects instead of plain data.
        Failure: if the download cache cannot be written.
    """
    if str(source).endswith(".tar.gz"):
        raise CheckpointError(
            f"{source} holds TensorFlow variables: export them to one file with "
            "numpy.savez(FILE, **{name: tf.train.load_variable(PREFIX, name) for name in NAMES}), and load that"
        )
    path = _find(str(source))
    try:
        found = path.is_file()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no checkpoint at {str(source)[:200]!r}: {error}") from error
    if not found:
        raise CheckpointError(f"no checkpoint at {str(source)!r}: expected a file, an http(s) URL or a hub id")
    try:
        return _read(path)
    except UserError as error:
        reason = str(error).removeprefix(f"{_ROLE} {str(path)!r} ")
        if reason.startswith(("is refused", "cannot be")):
            raise CheckpointError(f"{path} {reason}") from error
        reason = f"it {reason}" if reason != str(error) else reason
        raise CheckpointError(f"{path} cannot be read ({reason}); it may be truncated: fetch it again") from error


def _read(path: Path) -> Any:
    """Read the content in the file's actual format; the file name matters only if the content does not tell."""
    if path.suffix == ".npz" and not starts_with(path, b"PK\x03\x04", _ROLE):
        return _read_arrays(path)
    if starts_with(path, b"PK\x03\x04", _ROLE):
        is_npz = all(member.endswith(".npy") for member in list_members(path, _ROLE))
        return _read_arrays(path) if is_npz else read_torch(path, _ROLE)
    if path.suffix == ".safetensors" or is_safetensors(path):
        return read_safetensors(path, _ROLE)
    return read_torch(path, _ROLE)


def _read_arrays(path: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in read_npz(path, _ROLE).items()}


def _find(source: str) -> Path:
    try:
        path = Path(source).expanduser()
        if path.exists():
            return path
    # A home folder of an unknown user, or a name that is too long, as a URL may be.
    except (RuntimeError, OSError):
        path = Path(source)
    if re.match(r"https?://", source, re.IGNORECASE):
        return _download(source)
    hub_id = source.removeprefix("hf-hub:")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) and path.suffix.lower() not in _SUFFIXES:
        return _download_from_hub(hub_id)
    return path


def _download(url: str) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    # PyTorch keeps the tilde if there is no home folder.
    if not os.environ.get("TORCH_HOME") and str(folder).startswith("~"):
        raise CheckpointError(f"there is no home folder to download {url} to: set TORCH_HOME to a folder")
    try:
        return download(url, folder)
    except Failure as error:
        raise Failure(f"{error}; TORCH_HOME chooses another folder for downloads") from error
    except UserError as error:
        raise CheckpointError(str(error)) from error


def _download_from_hub(hub_id: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise MissingExtraError("hub ids need the package huggingface_hub: pip install huggingface_hub") from error
    for name in ("model.safetensors", "pytorch_model.bin"):
        try:
            return Path(hf_hub_download(hub_id, name))
        except LocalEntryNotFoundError as error:
            raise CheckpointError(f"cannot reach the hub for {hub_id!r}, and it is not in the local cache") from error
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"cannot fetch {hub_id!r} from the hub: {reason}") from error
    raise CheckpointError(f"the hub's {hub_id!r} holds neither model.safetensors nor pytorch_model.bin")
