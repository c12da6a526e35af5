"""Scanning a PyTorch pickle without running or allocating anything in it.

A file of weights is a small program for a stack machine. `torch.load(weights_only=True)` creates no arbitrary objects,
but it trusts every size, follows every cycle, and supports many kinds of tensors. Here the program first runs with
inert descriptions in place of tensors, storages and classes. Anything other than plain data is refused by name.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from gatewise.files.torch_content import (
    DamagedPickleError,
    Global,
    Holder,
    RefusedPickleError,
    Storage,
    TensorLike,
)

_LARGEST_TUPLE_KEY = 16
_COPIES_PER_BYTE = 10
_FREE_COPIES = 2**20
_MOST_AXES = 64

ITEM_SIZES = {
    "float64": 8, "double": 8, "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2,
    "int64": 8, "long": 8, "int32": 4, "int": 4, "int16": 2, "short": 2, "int8": 1, "uint8": 1, "bool": 1,
    "uint16": 2, "uint32": 4, "uint64": 8,
    "complex32": 4, "chalf": 4, "complex64": 8, "cfloat": 8, "complex128": 16, "cdouble": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip
"""Bytes per element, by the name of the data type in the module `torch`."""
_STORAGES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16, "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4,
}  # fmt: skip
_ODD_TENSORS = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_meta_tensor_no_storage": "meta (without data)",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_qtensor": "quantized",
    "_rebuild_wrapper_subclass": "wrapped",
    "_rebuild_device_tensor_from_numpy": "accelerator-specific",
    "_rebuild_device_tensor_from_cpu_tensor": "accelerator-specific",
    "_rebuild_xla_tensor": "accelerator-specific",
}
"""Functions that rebuild tensors other than plain arrays in memory, and the names of such tensors."""


class _Mark:
    """Marker of the start of a container's items on the stack."""


_MARK = _Mark()


class PickleScanner:
    """Interpreter of one pickle that produces descriptions instead of objects.

    Args:
        data: bytes that contain the pickle.
        at: position of its start; afterwards, of its end.
        open_storage: function from the parts of a storage id, which it checks, to a description of the storage.
    """

    def __init__(self, data: bytes, at: int, open_storage: Callable[[tuple[Any, ...]], Storage]) -> None:
        self._data = data
        self.at = at
        self.open_storage = open_storage
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.tensors: list[TensorLike] = []
        # Remaining budget for copies of values that the pickle refers to repeatedly.
        self._copies_left = _COPIES_PER_BYTE * len(data) + _FREE_COPIES

    def run(self) -> Any:
        """Return the value of the pickle, with its tensors in `tensors`. Another call runs the next pickle.

        Raises:
            DamagedPickleError: if the pickle is incomplete.
            RefusedPickleError: if it is not plain data.
        """
        self._stack, self._memo, self.tensors = [], {}, []
        while True:
            code = self._take(1)
            if code == b".":
                return self._pop()
            step = _INSTRUCTIONS.get(code)
            if step is None:
                raise RefusedPickleError(f"it uses pickle instruction {code[0]}, which weights do not need")
            step(self)

    def _protocol(self) -> None:
        # The instructions are self-describing, whatever the protocol.
        self._take(1)

    def _take(self, count: int) -> bytes:
        taken = self._data[self.at : self.at + count]
        if len(taken) < count:
            raise DamagedPickleError("its pickle breaks off")
        self.at += count
        return taken

    def _line(self) -> str:
        end = self._data.find(b"\n", self.at)
        if end < 0:
            raise DamagedPickleError("its pickle breaks off")
        line = self._data[self.at : end]
        self.at = end + 1
        return _decoded(line)

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise DamagedPickleError("its pickle takes a value that is not there")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _items(self) -> list[Any]:
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                items = self._stack[place + 1 :]
                del self._stack[place:]
                return items
        raise DamagedPickleError("its pickle ends a container that it did not begin")

    def _last(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self._pop() for _ in range(count)]))

    def _remember(self, place: int) -> None:
        self._memo[place] = self._top()

    def _recall(self, place: int) -> None:
        if place not in self._memo:
            raise DamagedPickleError("its pickle refers to a value that is not there")
        self._push(self._memo[place])

    def _global(self) -> None:
        module, name = self._line(), self._line()
        # Python 2 wrote some files.
        module = {"__builtin__": "builtins"}.get(module, module)
        path = f"{module}.{name}"
        if path not in _ALLOWED:
            raise RefusedPickleError(f"it wants to load {path.removeprefix('builtins.')}")
        self._push(Global(path))

    def _storage(self) -> None:
        saved = self._pop()
        if not isinstance(saved, tuple) or not saved or _text(saved[0]) != "storage":
            raise RefusedPickleError("it wants to load an object by a persistent id that is not a storage's")
        self._push(self.open_storage(saved[1:]))

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise DamagedPickleError("its pickle appends to something that is not a list")
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise DamagedPickleError("its pickle fills something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    def _new_object(self) -> None:
        arguments = self._pop()
        self._push(self._call(self._pop(), arguments, new=True))

    def _reduce(self) -> None:
        arguments = self._pop()
        self._push(self._call(self._pop(), arguments, new=False))

    def _call(self, function: Any, arguments: Any, new: bool) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise RefusedPickleError("it wants to call something that is not a function")
        path = function.path
        name = path.removeprefix("torch._utils.")
        if path == "torch._tensor._rebuild_from_type_v2":
            return self._of_type(arguments)
        if name in _ODD_TENSORS:
            return self._tensor(TensorLike(odd=_ODD_TENSORS[name]))
        if name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return self._tensor(_strided(arguments))
        if name in ("_rebuild_parameter", "_rebuild_parameter_with_state", "torch.nn.parameter.Parameter"):
            if not arguments or not isinstance(arguments[0], TensorLike):
                raise DamagedPickleError("its pickle makes a parameter of something that is not a tensor")
            return arguments[0]
        self._copies_left -= sum(len(part) for part in arguments if hasattr(part, "__len__"))
        if self._copies_left < 0:
            raise RefusedPickleError("it copies the same values again and again")
        return _plain_object(path, arguments, new)

    def _of_type(self, arguments: tuple[Any, ...]) -> Any:
        """Return a tensor with attributes, or of a subclass."""
        if len(arguments) != 4 or arguments[1] not in (
            Global("torch.Tensor"),
            Global("torch._tensor.Tensor"),
            Global("torch.nn.parameter.Parameter"),
        ):
            raise RefusedPickleError("it wants to load a subclass of torch.Tensor")
        return self._call(arguments[0], arguments[2], new=False)

    def _tensor(self, tensor: TensorLike) -> TensorLike:
        self.tensors.append(tensor)
        return tensor

    def _build(self) -> None:
        state = self._pop()
        target = self._top()
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise RefusedPickleError("it wants to set the state of an object by something that is not a dictionary")
        if isinstance(target, Holder):
            target.attributes.update(state)
        # PyTorch keeps the versions of modules in the attribute `_metadata` of a state dict.
        elif type(target) is OrderedDict and all(name.startswith("_") and name[1:2] != "_" for name in state):
            target.__dict__.update(state)
        else:
            raise RefusedPickleError(f"it wants to set the attributes {', '.join(state)[:100]} of an object")


def _strided(arguments: tuple[Any, ...]) -> TensorLike:
    """Return the tensor that arguments of `torch._utils._rebuild_tensor_v2` describe, if it fits in its storage."""
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise DamagedPickleError("its pickle makes a tensor of something that is not a storage")
    storage, offset, size, stride = arguments[:4]
    sizes = (size, stride)
    if not all(isinstance(numbers, tuple) and all(_is_count(number) for number in numbers) for numbers in sizes):
        raise DamagedPickleError("a tensor has a shape that is not made of numbers")
    if not _is_count(offset) or len(size) != len(stride):
        raise DamagedPickleError("a tensor has a shape that does not fit its strides")
    if len(size) > _MOST_AXES:
        raise DamagedPickleError(f"a tensor has {len(size)} axes")
    item_size = storage.item_size
    if versioned := [argument for argument in arguments[6:7] if isinstance(argument, Global)]:
        # `_rebuild_tensor_v3` names a data type, because its storage is untyped.
        item_size = ITEM_SIZES.get(versioned[0].path.removeprefix("torch."), 0)
        if not item_size:
            raise DamagedPickleError(f"a tensor has the data type {versioned[0].path}")
    elements = prod(size)
    if elements:
        end = offset + 1 + sum((number - 1) * step for number, step in zip(size, stride, strict=True))
        if end * item_size > storage.count * storage.item_size:
            raise DamagedPickleError(
                f"a tensor of shape {_shown(size)} takes {end * item_size:,} bytes of a storage of "
                f"{storage.count * storage.item_size:,}"
            )
    return TensorLike(nbytes=elements * item_size)


def _plain_object(path: str, arguments: tuple[Any, ...], new: bool) -> Any:
    """Return one of the Python objects that a file may contain."""
    first = arguments[0] if arguments else None
    if path in ("collections.OrderedDict", "collections.Counter"):
        kind = OrderedDict if path == "collections.OrderedDict" else Counter
        if not arguments:
            return kind()
        if len(arguments) == 1 and isinstance(first, dict):
            return kind(first)
        if len(arguments) == 1 and isinstance(first, list) and kind is OrderedDict:
            return OrderedDict(_pair(item) for item in first)
    if path == "argparse.Namespace" and not arguments:
        return Holder()
    if new:
        raise RefusedPickleError(f"it wants to make an object of {path}")
    if path == "torch.Size" and isinstance(first, tuple | list) and all(_is_count(number) for number in first):
        return tuple(first)
    if path == "torch.serialization._get_layout" and len(arguments) == 1 and isinstance(first, str):
        return Global(path)
    if path == "torch.device" and all(isinstance(part, str | int) for part in arguments):
        return Global(path)
    if path == "builtins.set" and len(arguments) == 1 and isinstance(first, list):
        return {_checked_key(item) for item in first}
    if path == "builtins.complex" and all(isinstance(part, float | int) for part in arguments) and len(arguments) == 2:
        return complex(float(arguments[0]), float(arguments[1]))
    if path == "_codecs.encode" and len(arguments) == 2 and isinstance(first, str) and arguments[1] == "latin1":
        try:
            return first.encode("latin1")
        except UnicodeEncodeError as error:
            raise DamagedPickleError(f"its bytes are damaged: {error}") from error
    if path == "builtins.bytearray" and (not arguments or (len(arguments) == 1 and isinstance(first, bytes))):
        return bytearray(first or b"")
    raise RefusedPickleError(f"it wants to call {path.removeprefix('builtins.')}")


def _pair(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DamagedPickleError("its pickle makes a dictionary of something that is not pairs")
    return _checked_key(item[0]), item[1]


def _checked_key(key: Any) -> Any:
    """Return a key whose hash needs no recursion, because a deep tuple would overflow the stack."""
    parts = key if isinstance(key, tuple) and len(key) <= _LARGEST_TUPLE_KEY else (key,)
    if not all(part is None or isinstance(part, str | bytes | int | float | complex | Global) for part in parts):
        raise RefusedPickleError(f"it has a dictionary whose key is a {type(key).__name__}")
    return key


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _text(value: Any) -> Any:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise DamagedPickleError("its pickle holds text that is not UTF-8") from error


def _shown(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size[:8])) + (" x ..." if len(size) > 8 else "") or "()"


def storage_item_size(kind: Any) -> int | None:
    """Return the bytes per element of a storage class, or None if the name is not one."""
    name = kind.path.removeprefix("torch.storage.").removeprefix("torch.") if isinstance(kind, Global) else ""
    return 1 if name == "UntypedStorage" else _STORAGES.get(name)


_ALLOWED = frozenset(
    [
        "collections.OrderedDict",
        "collections.Counter",
        "argparse.Namespace",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.Size",
        "torch.Tensor",
        "torch._tensor.Tensor",
        "torch.device",
        "torch._tensor._rebuild_from_type_v2",
        "torch.storage.UntypedStorage",
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.set",
        "builtins.complex",
        *(f"torch.{name}" for name in (*ITEM_SIZES, *_STORAGES)),
        *(f"torch.per_{name}" for name in ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric")),
        "torch.per_channel_affine_float_qparams",
        *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3")),
        *(f"torch._utils._rebuild_{name}" for name in ("parameter", "parameter_with_state")),
        *(f"torch._utils.{name}" for name in _ODD_TENSORS),
    ]
)

_INSTRUCTIONS: Mapping[bytes, Callable[[PickleScanner], None]] = {
    b"\x80": PickleScanner._protocol,
    b"c": PickleScanner._global,
    b"\x81": PickleScanner._new_object,
    b"R": PickleScanner._reduce,
    b"b": PickleScanner._build,
    b"Q": PickleScanner._storage,
    b"a": lambda s: s._append([s._pop()]),
    b"e": lambda s: s._append(s._items()),
    b"s": lambda s: s._set_items(list(s._last(2))),
    b"u": lambda s: s._set_items(s._items()),
    b"(": lambda s: s._push(_MARK),
    b"t": lambda s: s._push(tuple(s._items())),
    b"\x85": lambda s: s._push(s._last(1)),
    b"\x86": lambda s: s._push(s._last(2)),
    b"\x87": lambda s: s._push(s._last(3)),
    b"N": lambda s: s._push(None),
    b"\x88": lambda s: s._push(True),
    b"\x89": lambda s: s._push(False),
    b")": lambda s: s._push(()),
    b"]": lambda s: s._push([]),
    b"}": lambda s: s._push({}),
    b"\x8f": lambda s: s._push(set()),
    b"J": lambda s: s._push(s._number("<i")),
    b"K": lambda s: s._push(s._number("<B")),
    b"M": lambda s: s._push(s._number("<H")),
    b"G": lambda s: s._push(s._number(">d")),
    b"X": lambda s: s._push(_decoded(s._take(s._number("<I")))),
    b"U": lambda s: s._push(_decoded(s._take(s._number("<B")))),
    b"\x8a": lambda s: s._push(int.from_bytes(s._take(s._number("<B")), "little", signed=True)),
    b"h": lambda s: s._recall(s._number("<B")),
    b"j": lambda s: s._recall(s._number("<I")),
    b"q": lambda s: s._remember(s._number("<B")),
    b"r": lambda s: s._remember(s._number("<I")),
}
"""Instructions that PyTorch's own `weights_only` unpickler supports."""
