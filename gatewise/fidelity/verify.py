"""Verify that a network computes what the reference computes, using digests of the reference's outputs.

A digest record states the reference's constructor arguments, its keys, its inputs and its outputs. The paper's file in
`gatewise.fidelity.cases` builds the same network here, every parameter is filled by its reference key, and outputs,
intermediate outputs and gradients are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.errors import UserError
from gatewise.fidelity._record import LARGEST, RecordError, check_digests, check_run, read_record
from gatewise.fidelity.case import Case, Outputs
from gatewise.fidelity.cases import find_case
from gatewise.fidelity.fingerprint import fill, make_input, relative_error

TOLERANCE = 1e-4
# Input gradients of deep networks amplify float32 rounding, and the reference's gradients do so too.
GRADIENT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Result:
    """Outcome for one file. `errors` maps "output ...", "tap ..." and "grad ..." to relative errors."""

    path: str
    status: str
    errors: Mapping[str, float] = field(default_factory=dict)
    parameters: tuple[int, int] | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.status == "skipped" or not self.errors:
            return f"{self.status:8}{self.path}: {self.reason}"
        worst = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        return f"{self.status:8}{self.path}: {worst}, {self._count()}" + (f" ({self.reason})" if self.reason else "")

    def _count(self) -> str:
        if self.parameters is None:
            return "parameters not stated"
        ours, theirs = self.parameters
        return f"parameters exact ({ours:,})" if ours == theirs else f"parameters {ours:,}, not {theirs:,}"


@dataclass(frozen=True)
class Report:
    """Results of several files."""

    results: tuple[Result, ...]

    def count(self, status: str) -> int:
        """Return how many files are "passed", "failed" or "skipped"."""
        return sum(result.status == status for result in self.results)

    @property
    def ok(self) -> bool:
        """Whether nothing failed and something passed."""
        return self.count("failed") == 0 and self.count("passed") > 0

    def __str__(self) -> str:
        last = ", ".join(f"{self.count(status)} {status}" for status in ("passed", "failed", "skipped"))
        return "\n".join([*map(str, self.results), last])


def verify(*paths: str | Path, tolerance: float = TOLERANCE, gradient_tolerance: float = GRADIENT_TOLERANCE) -> Report:
    """Compare our networks with digests of the reference implementations.

    Args:
        *paths: digest files (JSON).
        tolerance: largest relative error of outputs and taps, relative to the output's standard deviation.
        gradient_tolerance: the same for gradients with respect to the input.
    Returns:
        One result per file: passed, failed, or skipped if no registered family has a mapping for the record.
    Raises:
        UserError: if a file is missing or is not a digest record, one of its fields is malformed, or its sizes are too
            large.
    """
    for name, value in {"tolerance": tolerance, "gradient_tolerance": gradient_tolerance}.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name} must be a finite number of at least 0, not {value}")
    records = [(str(path), read_record(path)) for path in paths]
    return Report(tuple(_verify(path, record, tolerance, gradient_tolerance) for path, record in records))


def build_case(record: Mapping[str, Any]) -> Case | None:
    """Build our module for a digest record, filled by the reference's keys; None if no paper has a mapping for it."""
    case = find_case(record)
    if case is not None:
        fill_case(case, record["keys"])
    return case


def fill_case(case: Case, keys: Mapping[str, list[int]]) -> None:
    """Fill the case's module with the values of each reference key, where the layout maps it.

    Raises:
        ValueError: if a key has no counterpart, or a parameter or running statistic gets no value.
    """
    wanted = {**dict(case.module.named_parameters()), **_running_statistics(case.module)}
    values, origin = {}, {}
    for key, shape in keys.items():
        tensor = fill(key, shape)
        ours = case.to_ours(key)
        values[ours] = tensor if case.layout.tensor_to_ours is None else case.layout.tensor_to_ours(key, tensor)
        origin[ours] = key
    if case.layout.unpack is not None:
        values = case.layout.unpack(values)
    for ours in values:
        if ours not in wanted:
            raise ValueError(f"reference key {origin.get(ours)} maps to {ours}, which the module does not have")
    filled = {ours: tensor.reshape(wanted[ours].shape) for ours, tensor in values.items()}
    if missing := sorted(set(wanted) - set(filled)):
        raise ValueError(f"the record has no values for {', '.join(missing)}")
    case.module.load_state_dict(filled, strict=False)


def _running_statistics(module: nn.Module) -> dict[str, Tensor]:
    return {key: b for key, b in module.named_buffers() if key.rsplit(".", 1)[-1] in ("running_mean", "running_var")}


def _verify(path: str, record: Mapping[str, Any], tolerance: float, gradient_tolerance: float) -> Result:
    if missing := [name for name in ("config", "keys", "inputs", "outputs") if name not in record]:
        return Result(path, "skipped", reason=f"worked examples, not a run of a network (no {missing[0]})")
    if record.get("mode", "eval") != "eval":
        return Result(path, "skipped", reason=f"mode {record['mode']!r}, not a run in eval mode")
    check_run(path, record)
    reason = ""
    try:
        _require_small_network(path, record)
        case = build_case(record)
        if case is None:
            variant = record.get("variant", "?")
            return Result(path, "skipped", reason=f"no mapping for {record['system']} {variant}")
        check_digests(path, record)
        errors = compare_case(case, record)
        if any(error > gradient_tolerance for name, error in errors.items() if name.startswith("grad")):
            # If an activation is within rounding of its kink, its gradient depends on the processor's convolutions.
            with torch.backends.mkldnn.flags(enabled=False):
                errors = compare_case(case, record)
            reason = "gradients with PyTorch's own convolutions: oneDNN's round differently on this processor"
    except RecordError:
        raise
    except Exception as error:
        # A network that cannot be built or run as the record says has failed; the reason stays visible.
        return Result(path, "failed", reason=f"{type(error).__name__}: {error}")
    parameters = _parameters(case.module, record)
    within = all(e <= (gradient_tolerance if name.startswith("grad") else tolerance) for name, e in errors.items())
    exact = parameters is None or parameters[0] == parameters[1]
    return Result(path, "passed" if within and exact else "failed", errors, parameters, reason)


def _require_small_network(path: str, record: Mapping[str, Any]) -> None:
    """Build the record's network without memory first, since its configuration may ask for any size."""
    with torch.device("meta"):
        case = find_case(record)
    claimed = 0 if case is None else sum(tensor.nbytes for tensor in case.module.state_dict().values())
    if claimed > LARGEST:
        raise RecordError(
            f"{path} is refused: its config describes a network of {claimed:,} bytes; at most {LARGEST:,} are accepted"
        )


def _parameters(module: nn.Module, record: Mapping[str, Any]) -> tuple[int, int] | None:
    if "params" not in record:
        return None
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return trained, record["params"]


def compare_case(case: Case, record: Mapping[str, Any]) -> dict[str, float]:
    """Return relative errors of every output, tap and gradient that the record stores."""
    module = case.module.eval()
    gradients = [digest for digest in record.get("grads", {}).values() if isinstance(digest, dict)]
    # The case itself handles what is done to an input after it is made ("then", in words).
    specs = [{name: value for name, value in spec.items() if name != "then"} for spec in record["inputs"].values()]
    inputs = [make_input(**spec) for spec in specs]
    inputs = [x.requires_grad_(bool(gradients) and x.is_floating_point()) for x in inputs]
    with _listening(case, record.get("taps", {})) as tapped, torch.set_grad_enabled(bool(gradients)):
        outputs = _named(case.run(module, *inputs), list(record["outputs"]))
    errors = {name: relative_error(outputs[name], stored) for name, stored in record["outputs"].items()}
    for path, stored in record.get("taps", {}).items():
        errors[f"tap {path}"] = relative_error(tapped[path], stored)
    if gradients:
        errors |= _gradient_errors(case, outputs, inputs, record)
    return errors


def _gradient_errors(
    case: Case, outputs: dict[str, Tensor], inputs: list[Tensor], record: Mapping[str, Any]
) -> dict[str, float]:
    """Return gradients of sum(output * cotangent) for inputs and, if the record has them, for parameters.

    With several outputs, each has a cotangent named after it.
    """
    # A record may have the gradient of only one of its outputs.
    of = record.get("grads_of", case.grads_of)
    if of in outputs:
        outputs = {of: outputs[of]}
    single = len(outputs) == 1
    total = torch.stack(
        [
            (output * make_input("cotangent" if single else f"cotangent:{name}", output.shape)).sum()
            for name, output in outputs.items()
        ]
    ).sum()
    stored = {name: value for name, value in record["grads"].items() if isinstance(value, dict)}
    of_inputs = [name for name in stored if name not in record["keys"]]
    differentiable = [x for x in inputs if x.requires_grad]
    if len(of_inputs) != len(differentiable):
        raise ValueError(f"the record has gradients of {', '.join(of_inputs)}, the case {len(differentiable)} inputs")
    parameters = dict(case.module.named_parameters()) if len(of_inputs) < len(stored) else {}
    gradients = torch.autograd.grad(total, [*differentiable, *parameters.values()])
    found = dict(zip([*of_inputs, *parameters], gradients, strict=True))
    theirs = case.layout.pack(found) if case.layout.pack is not None else found
    places = {name: name if name in of_inputs else case.to_ours(name) for name in stored}
    return {f"grad {name}": relative_error(_like(theirs[places[name]], value), value) for name, value in stored.items()}


def _like(gradient: Tensor, stored: Mapping[str, Any]) -> Tensor:
    """Reshape the gradient to the reference's shape (a linear layer may be stored as a 1x1 convolution)."""
    return gradient.reshape(stored["shape"]) if gradient.numel() == math.prod(stored["shape"]) else gradient


def _named(outputs: Outputs, names: list[str]) -> dict[str, Tensor]:
    if isinstance(outputs, dict):
        return outputs
    tensors = outputs if isinstance(outputs, list) else [outputs]
    if len(tensors) != len(names):
        raise ValueError(f"the record has outputs {', '.join(names)}; {len(tensors)} came")
    return dict(zip(names, tensors, strict=True))


@contextmanager
def _listening(case: Case, taps: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of submodules while the module runs, under their reference paths."""
    heard: dict[str, Tensor] = {}
    handles = []
    for path in taps:
        ours, lay_out = case.tap_path(path)

        def hear(_module: nn.Module, _inputs: Any, output: Tensor, path: str = path, lay_out: Any = lay_out) -> None:
            heard[path] = lay_out(output.detach())

        handles.append(case.module.get_submodule(ours).register_forward_hook(hear))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
