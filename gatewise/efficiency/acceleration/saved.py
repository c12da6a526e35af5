"""Load plans that `optimize` chose and saved, in seconds instead of a new search.

Loading rebuilds the plan for the current machine, whose compilers and runtimes may differ, and checks its output
against the one in the file. Nothing in a file is executed (`graph_file`). The checksums detect damage but are not a
signature.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from gatewise.efficiency._fields import SMALLEST, read_fields
from gatewise.efficiency.acceleration.graph_file import read_graph
from gatewise.efficiency.acceleration.onnx_file import read_onnx
from gatewise.efficiency.acceleration.optimize import OptimizedModel, relative_error
from gatewise.efficiency.acceleration.plan import Plan, PlanContext
from gatewise.efficiency.acceleration.plan_file import AS_IT_IS, EXAMPLE, FORMAT, FORMS, GRAPH, REPORT, TENSORS
from gatewise.efficiency.acceleration.plans import default_plans
from gatewise.efficiency.acceleration.report import OptimizationReport
from gatewise.efficiency.acceleration.runners import Runner
from gatewise.errors import Failure, UserError
from gatewise.files import parse_json, read_members, require_regular

_LIMITS = {
    "threads": (1, 2**20),
    "tolerance": (SMALLEST, 1e3),
    "input_shape": (1, 2**40),
    "median_ms": (0, 1e12),
    "spread_ms": (0, 1e12),
    "build_s": (0, 1e12),
    # Infinite for a plan whose output has another shape.
    "error": (0, float("inf")),
}


def load_optimized(path: str | Path) -> OptimizedModel:
    """Load a callable that `OptimizedModel.save` wrote, rebuilt on this machine for as many threads as torch uses.

    Its report is that of the machine where the plan was chosen.

    Raises:
        UserError: if the file is not a saved plan, is damaged, or has an unknown format or device.
        Failure: if the plan cannot be built here, or its output differs from the saved one.
    """
    key, report, members = _read(Path(path))
    device = _device(report.device, path)
    tensors = _example(members[EXAMPLE], report, path)
    example = tensors["example"].to(device)
    plan = _plan(key, report, example, path)
    form = next(form for form, names in FORMS.items() if names <= members.keys())
    if plan.needs != form:
        raise UserError(f"{path} is not a valid plan: {plan.name!r} needs another form of the network than it holds")
    context = _SavedContext(example, form, _network(form, members, str(path)), device)
    try:
        with torch.no_grad():
            runner = plan.build(context)
            runner = _at_full_precision(runner, device.type) if form == "folded" else runner
            error = relative_error(runner(example), tensors["output"].to(device))
    except Exception as failure:
        # A plan relies on compilers and runtimes, each with its own errors.
        reason = next((line for line in str(failure).splitlines() if line.strip()), type(failure).__name__)
        raise Failure(f"the plan {plan.name!r} cannot be built here: {reason}") from failure
    if not error <= report.tolerance:
        raise Failure(
            f"the plan {plan.name!r} computes another output here than where it was saved: they differ by {error:.1e}, "
            f"more than {report.tolerance:g}"
        )
    return OptimizedModel(runner, report, context)


class _SavedContext(PlanContext):
    """A context whose network comes from a file."""

    def __init__(self, example: Tensor, form: str, network: nn.Module | bytes, device: torch.device) -> None:
        graph = _moved(network, device) if isinstance(network, nn.Module) else None
        super().__init__(graph or nn.Module(), example)
        # Filling the cache keeps the cached property from being computed.
        self.__dict__[form] = graph or network


def _plan(key: Any, report: OptimizationReport, example: Tensor, path: str | Path) -> Plan:
    if key == AS_IT_IS.key:
        return AS_IT_IS
    known = {plan.key: plan for plan in default_plans(report.precision, example) if plan.key}
    if not isinstance(key, str) or key not in known:
        raise UserError(f"{path} holds the plan {key!r:.80}, which this version does not have for its input")
    return known[key]


def _read(path: Path) -> tuple[Any, OptimizationReport, dict[str, bytes]]:
    """Return the plan's key, the report and the other members, after checking their checksums."""
    if not path.exists():
        raise UserError(f"there is no file {path}")
    foreign = f"{path} is not a plan that `OptimizedModel.save` wrote"
    if not zipfile.is_zipfile(require_regular(path, "plan")):
        raise UserError(foreign)
    # Read the header first, since a file of another format has other members.
    header = _header(read_members(path, "plan", {REPORT}).get(REPORT), path, foreign)
    members = read_members(path, "plan")
    del members[REPORT]
    for form in FORMS.values():
        if members.keys() == {EXAMPLE, *form}:
            break
    else:
        raise UserError(f"{foreign}: its members are {', '.join(sorted(members))[:200]}")
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    if header["sha256"] != sums:
        wrong = next((name for name in sums if header["sha256"].get(name) != sums[name]), "of another file")
        raise UserError(f"{path} is damaged: the checksum of its member {wrong!r} does not agree")
    report = read_fields(OptimizationReport, header["report"], f"the report of {path}", _LIMITS)
    if [plan.status for plan in report.plans].count("chosen") != 1:
        raise UserError(f"the report of {path} must have one chosen plan among its plans")
    return header["plan"], report, members


def _header(content: bytes | None, path: Path, foreign: str) -> dict[str, Any]:
    if content is None:
        raise UserError(foreign)
    header = parse_json(content, f"{REPORT} of {path}", allow_nonfinite=True)
    if not isinstance(header, dict):
        raise UserError(foreign)
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {header.get('format')!r:.40}; this version reads format {FORMAT}: "
            "optimize the network and save the plan again"
        )
    if header.keys() != {"format", "torch", "plan", "report", "sha256"} or not isinstance(header["sha256"], dict):
        raise UserError(f"{foreign}: its header has the fields {', '.join(sorted(header))[:200]}")
    return header


def _device(name: str, path: str | Path) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{path} holds a plan for {name!r:.80}, which is not a device") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"{path} holds a plan for {name!r:.80}, and plans are for cpu and cuda devices")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{path} holds a plan for {name}, and there is no such device here")
    return device


def _example(content: bytes, report: OptimizationReport, path: str | Path) -> dict[str, Tensor]:
    tensors = _tensors(content, f"{EXAMPLE} of {path}")
    if tensors.keys() != {"example", "output"} or tuple(tensors["example"].shape) != report.input_shape:
        raise UserError(f"{path} is not a valid plan: its example is not a batch of shape {report.input_shape}")
    if tensors["example"].ndim < 2 or tensors["output"].dtype != torch.float32:
        raise UserError(f"{path} is not a valid plan: its example or its output has the wrong shape or dtype")
    return tensors


def _network(form: str, members: Mapping[str, bytes], path: str) -> nn.Module | bytes:
    """Return the network that a plan starts from, after checking it."""
    if form != "folded":
        (name,) = FORMS[form]
        read_onnx(members[name], f"{name} of {path}")
        return members[name]
    content = parse_json(members[GRAPH], f"{GRAPH} of {path}")
    tensors = _tensors(members[TENSORS], f"{TENSORS} of {path}")
    try:
        return read_graph(content, tensors)
    except UserError as error:
        raise UserError(f"{path} is not accepted: {error}") from error


def _tensors(content: bytes, what: str) -> dict[str, Tensor]:
    try:
        return load_tensors(content)
    # A dtype that this version of PyTorch lacks raises KeyError.
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} is not a safetensors file, or is damaged: {error}") from error


def _moved(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network on a device, including its constants, which are not buffers."""
    for name, value in vars(network).items():
        if isinstance(value, Tensor):
            setattr(network, name, value.to(device))
    return network.to(device)


def _at_full_precision(run: Callable[[Tensor], Tensor], device: str) -> Runner:
    """Return a runner that ignores the caller's `torch.autocast`.

    A graph does not record whether an operator was inside or outside of the network's own autocast blocks.
    """

    def call(x: Tensor) -> Tensor:
        with torch.autocast(device, enabled=False):
            return run(x)

    return call
