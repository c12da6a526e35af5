"""Reading PyTorch weight files, which are checked completely before PyTorch reads them.

There are two formats. A zip archive has a pickle, `NAME/data.pkl`, and each storage as a member `NAME/data/KEY`. The
legacy format is a series of pickles followed by the storages, each after its number of elements. Sizes that the pickle
claims are compared with the file, and the checksums of the archive with its content.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path
from typing import Any

import torch

from gatewise.errors import UserError
from gatewise.files.regular import require_regular, starts_with
from gatewise.files.torch_content import DamagedPickleError, RefusedPickleError, Storage, require_plain
from gatewise.files.torch_pickle import PickleScanner, storage_item_size
from gatewise.files.zip import FREE_BYTES, LARGEST_EXPANSION, check_archive, list_members, read_members

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_LARGEST_PICKLE = 512 * 2**20
"""Largest accepted pickle in bytes, not counting the weights."""
_WHY = "only tensors and plain containers are read, because loading anything else can run code"


def read_torch(path: str | Path, what: str = "file") -> Any:
    """Return the content of a `torch.save` file, with tensors on the CPU.

    Args:
        path: path of the file.
        what: role of the file in error messages.
    Raises:
        UserError: if it is damaged, claims wrong sizes, or contains anything but plain tensors in plain containers.
    """
    file = require_regular(path, what)
    name = f"{what} {str(path)!r}"
    try:
        if starts_with(file, b"PK\x03\x04"):
            _check_zip(file, what, name)
        else:
            _check_legacy(file)
    except RefusedPickleError as error:
        raise UserError(
            f"{name} is refused: {error}; {_WHY}. If you trust the file, save only its state dict and load that"
        ) from error
    except DamagedPickleError as error:
        raise UserError(f"{name} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"{name} cannot be opened: {error.strerror or error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    # The file has been checked. PyTorch may still raise any error, whose text advises to run the file.
    except Exception as error:
        raise UserError(f"{name} cannot be loaded by PyTorch {torch.__version__}: {_safe_line(error)}") from error


def _check_zip(file: Path, what: str, name: str) -> None:
    if any(member.endswith("/constants.pkl") for member in list_members(file, what)):
        raise RefusedPickleError("it is a TorchScript archive, which holds a program")
    members = check_archive(file, what, stored_only=True)
    # PyTorch uses the folder of the first member, and ignores case in names.
    folder = next(iter(members), "").partition("/")[0]
    if len({member.lower() for member in members}) < len(members):
        raise UserError(f"{name} is damaged: two of its members have the same name")
    pickle = f"{folder}/data.pkl"
    if pickle not in members:
        raise UserError(f"{name} is not a file of weights: the archive has no data.pkl")
    if members[pickle] > _LARGEST_PICKLE:
        raise RefusedPickleError(f"its pickle has {members[pickle]:,} bytes")

    def open_storage(parts: tuple[Any, ...]) -> Storage:
        storage = _storage(parts[:4])
        size, claimed = members.get(f"{folder}/data/{storage.key}"), storage.count * storage.item_size
        if size != claimed:
            has = "which it does not have" if size is None else f"whose size is {size:,} bytes and not {claimed:,}"
            raise DamagedPickleError(f"a tensor lies in the storage {storage.key!r}, {has}")
        return storage

    scanner = PickleScanner(read_members(file, what, [pickle])[pickle], 0, open_storage)
    _check_content(scanner, scanner.run(), sum(members.values()))


def _check_legacy(file: Path) -> None:
    size = file.stat().st_size
    if size > _LARGEST_PICKLE:
        with file.open("rb") as opened:
            start = opened.read(_LARGEST_PICKLE)
    else:
        start = file.read_bytes()
    storages: dict[str, Storage] = {}

    def open_storage(parts: tuple[Any, ...]) -> Storage:
        storage = _storage(parts[:4])
        known = storages.setdefault(storage.key, storage)
        if storage != known or storage.count * storage.item_size > size:
            raise DamagedPickleError(f"a tensor lies in the storage {storage.key!r}, which is not as large as that")
        view = parts[4] if len(parts) > 4 else None
        if view is None:
            return storage
        if not isinstance(view, tuple) or len(view) != 3 or not all(type(part) is int for part in view[1:]):
            raise DamagedPickleError("a view of a storage has no place and size")
        _, offset, count = view
        if offset < 0 or count < 0 or offset + count > storage.count:
            raise DamagedPickleError(f"a view of the storage {storage.key!r} is outside of it")
        return Storage(storage.key, storage.item_size, count)

    if not start.startswith(b"\x80"):
        raise DamagedPickleError("it is not a file of weights that PyTorch wrote")
    scanner = PickleScanner(start, 0, _no_storage)
    if scanner.run() != _MAGIC or scanner.run() != _PROTOCOL:
        raise DamagedPickleError("it is not a file of weights that PyTorch wrote")
    require_plain(scanner.run())
    scanner.open_storage = open_storage
    content = scanner.run()
    _check_content(scanner, content, size)
    scanner.open_storage = _no_storage
    keys = scanner.run()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise DamagedPickleError("the list of its storages does not fit its tensors")
    _check_storages(file, scanner.at, [storages[key] for key in keys], size)


def _check_storages(file: Path, place: int, storages: list[Storage], size: int) -> None:
    """Compare the number of elements before each storage with the pickle, and skip the data."""
    with file.open("rb") as opened:
        for storage in storages:
            opened.seek(place)
            counted = opened.read(8)
            if len(counted) < 8 or struct.unpack("<q", counted)[0] != storage.count:
                raise DamagedPickleError(f"its storage {storage.key!r} is not of {storage.count:,} elements")
            place += 8 + storage.count * storage.item_size
            if place > size:
                raise DamagedPickleError(f"its storage {storage.key!r} breaks off")


def _check_content(scanner: PickleScanner, content: Any, size: int) -> None:
    require_plain(content)
    claimed = sum(tensor.nbytes for tensor in scanner.tensors)
    # Tensors may share memory, but no real weights repeat one element without end.
    if claimed > LARGEST_EXPANSION * size + FREE_BYTES:
        raise RefusedPickleError(f"{size:,} bytes claim to be tensors of {claimed:,}")


def _storage(parts: tuple[Any, ...]) -> Storage:
    if len(parts) != 4:
        raise DamagedPickleError("a storage is not described as it should be")
    kind, key, location, count = parts
    item_size = storage_item_size(kind)
    if item_size is None or not isinstance(key, str) or not isinstance(location, str):
        raise DamagedPickleError("a storage is not described as it should be")
    if type(count) is not int or not 0 <= count < 2**63:
        raise DamagedPickleError(f"its storage {key!r} has {count!r} elements")
    return Storage(key, item_size, count)


def _no_storage(parts: tuple[Any, ...]) -> Storage:
    raise DamagedPickleError("a tensor is where only numbers and texts belong")


def _safe_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return type(error).__name__ if not line or "weights_only" in line or "Weights only" in line else line[:300]
