"""A network as a graph in plain data: JSON for the calls, with tensors beside it. Reading a file runs no code from it.

    {"tensors": [{"name": "conv.weight", "kind": "parameter", "order": [0, 2, 3, 1]}, ...],
     "nodes": [{"input": true},
               {"tensor": 0},
               {"call": "aten::conv2d", "args": [{"node": 0}, {"node": 1}], "kwargs": {}}, ...],
     "output": 2}

Nodes are identified by position and refer only to earlier ones. Names in a file never become code: the graph built from
it uses names made here. A call is looked up in a list of computing operators (`graph_operators`) and checked against
the operator's signature. `order` lists a tensor's axes from the largest stride down, where that is not the usual order;
the tensor is stored in this order.
"""

from __future__ import annotations

import math
import operator
import pkgutil
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatewise.efficiency.acceleration.graph_operators import CHECK_MESSAGE, check_call, find_function, name_of
from gatewise.errors import Failure, UserError

KINDS = ("parameter", "buffer", "constant")
"""Kinds of tensors. Parameters and buffers follow the network into another dtype; constants do not."""

DEEPEST = 4
"""Deepest nesting of lists in an argument."""

_DEVICES = ("cpu", "cuda")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_FORMATS = {
    str(value).removeprefix("torch."): value
    for value in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
_LAYOUTS = {"strided": torch.strided}
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

# Assertions on dtypes and sizes from tracing always hold in the traced graph.
_DROPPED = ("_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size")
_MESSAGES = {"aten::_assert_scalar": 1, "aten::_assert_async.msg": 1}


def write_graph(network: nn.Module, example: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a network as plain data for `read_graph`, and its tensors by name.

    Args:
        network: any module that `torch.export` accepts, in eval mode, with one input and one output tensor.
        example: a batch; the graph accepts batches of any size.
    Raises:
        Failure: if the network cannot be exported, or its graph holds something that a file cannot. The message says
            what.
    """
    # The exporter would treat a single sample as a constant of the network.
    batch = torch.cat([example, example[:1]]) if example.shape[0] == 1 else example
    try:
        with torch.no_grad():
            program = torch.export.export(network, (batch,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
            graph: Any = program.module()
    except Exception as error:
        # The exporter runs the network's own code, and raises whatever that code or its own raises.
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Failure(f"the network cannot be written: {reason}") from error
    try:
        return _Writer().write(graph)
    except UserError as error:
        raise Failure(f"the network cannot be written: {error}") from error


def read_graph(content: Any, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """Return the network that `write_graph` wrote, after every part of the content has been checked.

    Args:
        content: parsed JSON.
        tensors: the network's tensors by name.
    Raises:
        UserError: if the content is not such a graph, calls a forbidden function, or does not fit the tensors.
    """
    import gatewise.ops

    # The graph names custom operators, which exist once their modules are imported.
    for module in pkgutil.iter_modules(gatewise.ops.__path__):
        import_module(f"gatewise.ops.{module.name}")
    fields = _fields(content, "a graph", {"tensors": list, "nodes": list, "output": int})
    root = nn.Module()
    places = [_place(root, position, entry, tensors) for position, entry in enumerate(fields["tensors"])]
    if len({name for name, _ in places}) != len(tensors) or len(places) != len(tensors):
        raise UserError(f"its graph names {len(places)} tensors, and the file holds {len(tensors)}")
    graph = _Reader([attribute for _, attribute in places]).read(fields["nodes"], fields["output"])
    constants = {name: value for name, value in vars(root).items() if isinstance(value, Tensor)}
    built = fx.GraphModule(root, graph)
    for name, value in constants.items():
        # A graph module stores buffers as plain tensors.
        if name in built._buffers:
            delattr(built, name)
            setattr(built, name, value)
    return built.eval()


class _Writer:
    """Turns an exported graph into plain data."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.table: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self._positions: dict[tuple[object, ...], int] = {}

    def write(self, graph: fx.GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self.nodes.append({"input": True})
        results = self._walk(graph, [{"node": 0}])
        if len(results) != 1 or not isinstance(results[0], dict):
            raise UserError(f"it returns {len(results)} values, and a file holds networks with one output")
        return {"tensors": self.table, "nodes": self.nodes, "output": results[0]["node"]}, self.tensors

    def _walk(self, module: fx.GraphModule, inputs: list[Any]) -> list[Any]:
        """Write the nodes of a graph, and return references to its outputs."""
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given, None)
                if values[node] is None:
                    raise UserError("it takes more than one input, and a file holds networks with one")
            elif node.op == "output":
                results = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
                return [self._value(result, values) for result in results]
            elif not _is_idle(node):
                values[node] = self._node(module, node, values)
        raise UserError("its graph has no output")

    def _node(self, module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            found: Any = module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            # The body of a block such as `torch.autocast`; the call that uses it decides what becomes of it.
            return found if isinstance(found, fx.GraphModule) else self._tensor(str(node.target), found, module)
        if node.op != "call_function":
            raise UserError(f"its graph calls the module {node.target}, and a file can only hold operators")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._block(node, values)
        arguments: list[Any] = list(node.args)
        if node.target is operator.getitem and isinstance(values[arguments[0]], list):
            # An item of a block's result, which was written inline.
            return values[arguments[0]][arguments[1]]
        name = name_of(node.target)
        if name in _MESSAGES:
            arguments[_MESSAGES[name]] = CHECK_MESSAGE
        check_call(find_function(name), arguments, node.kwargs)
        positional = [self._value(value, values) for value in arguments]
        named = {key: self._value(value, values) for key, value in node.kwargs.items()}
        return self._add({"call": name, "args": positional, "kwargs": named})

    def _block(self, node: fx.Node, values: dict[fx.Node, Any]) -> list[Any]:
        """Write the body of a block inline, if it computes the same outside of it at full-precision inference."""
        kind = node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else ""
        arguments = list(node.args)
        if kind == "wrap_with_autocast" and arguments[2] is False:
            body, inputs = arguments[4], arguments[5:]
        elif kind == "wrap_with_set_grad_enabled":
            body, inputs = arguments[1], arguments[2:]
        else:
            raise UserError(f"its graph has a block of kind {kind}, which no file holds")
        if not isinstance(body, fx.Node) or not isinstance(values.get(body), fx.GraphModule):
            raise UserError(f"its graph has a block of kind {kind} without a body")
        return self._walk(values[body], [self._value(value, values) for value in inputs])

    def _tensor(self, name: str, value: Any, module: nn.Module) -> dict[str, int]:
        if not isinstance(value, Tensor):
            raise UserError(f"its graph uses {name}, which is a {type(value).__name__}, not a tensor")
        if value.layout is not torch.strided or type(value) not in (Tensor, nn.Parameter):
            raise UserError(f"its tensor {name} is not an ordinary one (dense, and not of a subclass)")
        tensor = value.detach()
        kind = "parameter" if isinstance(value, nn.Parameter) else "constant"
        if name in dict(module.named_buffers(remove_duplicate=False)):
            kind = "buffer"
        place = tensor.data_ptr() if tensor.numel() else name
        same = (place, kind, value.requires_grad, tensor.dtype, tensor.shape, tensor.stride())
        if same not in self._positions:
            self._positions[same] = len(self.table)
            unique = name if name not in self.tensors else f"{name}#{len(self.table)}"
            order = _order(tensor)
            usual = order == list(range(tensor.ndim))
            self.table.append({"name": unique, "kind": kind} | ({} if usual else {"order": order}))
            if kind == "parameter" and value.requires_grad:
                # PyTorch's matrix products choose their summation order by this flag, even if no gradients are kept.
                self.table[-1]["requires_grad"] = True
            stored = tensor if usual else tensor.permute(order)
            # A separate copy: the file never stores two names for one storage.
            self.tensors[unique] = stored.resolve_conj().resolve_neg().cpu().contiguous().clone()
        return self._add({"tensor": self._positions[same]})

    def _add(self, node: dict[str, Any]) -> dict[str, int]:
        self.nodes.append(node)
        return {"node": len(self.nodes) - 1}

    def _value(self, value: Any, values: dict[fx.Node, Any]) -> Any:
        """Return an argument as plain data."""
        if isinstance(value, fx.Node):
            return values[value]
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, slice):
            return {"slice": [self._value(part, values) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, tuple):
            return {"tuple": [self._value(part, values) for part in value]}
        if isinstance(value, list):
            return [self._value(part, values) for part in value]
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.memory_format):
            return {"memory_format": str(value).removeprefix("torch.")}
        if isinstance(value, torch.layout) and value is torch.strided:
            return {"layout": "strided"}
        raise UserError(f"its graph has an argument of type {type(value).__name__}, which no file holds")


def _is_idle(node: fx.Node) -> bool:
    """Return whether nothing depends on the node."""
    if node.op == "call_module" and str(node.target).endswith("_guards_fn"):
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "get_attr" and not node.users
    name = node.target.name().partition("::")[2].partition(".")[0]
    return name in _DROPPED or (name == "promote_types" and not node.users)


def _order(tensor: Tensor) -> list[int]:
    """Return the axes from the largest stride down, if the tensor is then dense; else the usual order."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], axis))
    usual = list(range(tensor.ndim))
    return order if not tensor.is_contiguous() and tensor.permute(order).is_contiguous() else usual


def _place(root: nn.Module, position: int, entry: Any, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Attach the tensor of a table entry to `root`. Return the names of the tensor and of the attribute."""
    what = f"tensor {position} of its graph"
    fields = _fields(entry, what, {"name": str, "kind": str}, {"order": list, "requires_grad": bool})
    name, kind, attribute = fields["name"], fields["kind"], f"tensor_{position}"
    if name not in tensors:
        raise UserError(f"{what} is called {name!r:.80}, which the file does not hold")
    tensor = tensors[name]
    order = fields.get("order", list(range(tensor.ndim)))
    if any(type(axis) is not int for axis in order) or sorted(order) != list(range(tensor.ndim)):
        raise UserError(f"{what} has {tensor.ndim} axes, and its order is {order!r:.80}")
    # Cloned into PyTorch's usual alignment, since kernels choose their summation order by it.
    tensor = tensor.clone().permute([order.index(axis) for axis in range(tensor.ndim)])
    if kind not in KINDS:
        raise UserError(f"{what} must be one of {', '.join(KINDS)}, not {kind!r:.80}")
    if kind == "parameter":
        try:
            root.register_parameter(attribute, nn.Parameter(tensor, fields.get("requires_grad", False)))
        except RuntimeError as error:
            raise UserError(f"{what} cannot be a parameter: {str(error).splitlines()[0]}") from error
    elif kind == "buffer":
        root.register_buffer(attribute, tensor)
    else:
        setattr(root, attribute, tensor)
    return name, attribute


class _Reader:
    """Builds a graph from plain data; nothing of it runs before all of it has been checked."""

    def __init__(self, attributes: list[str]) -> None:
        self._attributes = attributes
        self._graph = fx.Graph()
        self._nodes: list[fx.Node] = []
        self._tags: dict[str, Callable[[Any, int], Any]] = {
            "node": lambda value, _: self._reference(value),
            "float": lambda value, _: _entry(_FLOATS, value, "number"),
            "dtype": lambda value, _: _entry(_DTYPES, value, "dtype"),
            "memory_format": lambda value, _: _entry(_FORMATS, value, "memory format"),
            "layout": lambda value, _: _entry(_LAYOUTS, value, "layout"),
            "device": lambda value, _: _device(value),
            "tuple": lambda value, depth: tuple(self._list(value, depth)),
            "slice": lambda value, depth: self._slice(value, depth),
        }

    def read(self, nodes: list[Any], output: int) -> fx.Graph:
        for position, node in enumerate(nodes):
            try:
                self._nodes.append(self._node(position, node))
            except UserError as error:
                raise UserError(f"node {position}: {error}") from error
        self._graph.output(self._reference(output))
        return self._graph

    def _node(self, position: int, node: Any) -> fx.Node:
        if position == 0:
            if node != {"input": True}:
                raise UserError("the first node of a graph must be its input")
            return self._graph.placeholder("x")
        if isinstance(node, dict) and "tensor" in node:
            number = _fields(node, "a tensor's node", {"tensor": int})["tensor"]
            if not 0 <= number < len(self._attributes):
                raise UserError(f"there is no tensor {number}")
            return self._graph.create_node("get_attr", self._attributes[number])
        fields = _fields(node, "a call", {"call": str, "args": list, "kwargs": dict})
        function = find_function(fields["call"])
        args = tuple(self._value(value, 0) for value in fields["args"])
        kwargs = {key: self._value(value, 0) for key, value in fields["kwargs"].items()}
        check_call(function, args, kwargs)
        return self._graph.call_function(function, args, kwargs)

    def _value(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool | str | float):
            return value
        if isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                raise UserError("an integer needs more than 64 bits")
            return value
        if isinstance(value, list):
            return self._list(value, depth)
        if len(value) != 1 or (tag := next(iter(value))) not in self._tags:
            raise UserError(f"an argument must be plain or have one known tag, not {value!r:.80}")
        return self._tags[tag](value[tag], depth)

    def _list(self, value: Any, depth: int) -> list[Any]:
        if not isinstance(value, list) or depth >= DEEPEST:
            raise UserError(f"expected a list, nested at most {DEEPEST} deep, not {value!r:.80}")
        return [self._value(part, depth + 1) for part in value]

    def _slice(self, value: Any, depth: int) -> slice:
        parts = self._list(value, depth)
        if len(parts) != 3 or not all(part is None or isinstance(part, int | fx.Node) for part in parts):
            raise UserError(f"a slice has three numbers, not {value!r:.80}")
        return slice(*parts)

    def _reference(self, value: Any) -> fx.Node:
        if type(value) is not int or not 0 <= value < len(self._nodes):
            raise UserError(f"there is no node {value!r:.80} to refer to before this place")
        return self._nodes[value]


def _device(value: Any) -> torch.device:
    kind, _, index = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind not in _DEVICES or (index and not (index.isascii() and index.isdigit() and len(index) <= 3)):
        raise UserError(f"a device must be one of {', '.join(_DEVICES)}, not {value!r:.80}")
    return torch.device(kind, int(index)) if index else torch.device(kind)


def _entry(table: Mapping[str, Any], value: Any, what: str) -> Any:
    if not isinstance(value, str) or value not in table:
        raise UserError(f"there is no {what} {value!r:.80}")
    return table[value]


def _fields(value: Any, what: str, required: Mapping[str, type], optional: Mapping[str, type] | None = None) -> Any:
    """Return `value` if it is a mapping with these fields of these types, and no others."""
    known = {**required, **(optional or {})}
    if not isinstance(value, dict) or not set(required) <= set(value) <= set(known):
        raise UserError(f"{what} must have the fields {', '.join(required)}, and came as {value!r:.80}")
    for name, kind in known.items():
        if name in value and type(value[name]) is not kind:
            raise UserError(f"{name} of {what} must be a {kind.__name__}, not {value[name]!r:.80}")
    return value
