"""Plans that `optimize` chose, kept in a file: what was searched for once is loaded in seconds.

A file holds the report, the network in the form that the plan starts from (ONNX, or a graph of `torch.export`), and the
example with the output that the plan gave for it. Loading builds the plan anew for the machine at hand, whose compilers
and runtimes may be others, and checks that output.
"""

from __future__ import annotations

import json
import pkgutil
import zipfile
from dataclasses import asdict
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from gatewise.efficiency.optimize import OptimizedModel, relative_error
from gatewise.efficiency.plans import Plan, Runner, Workshop, default_plans
from gatewise.efficiency.report import ORIGINAL, OptimizationReport, PlanResult
from gatewise.efficiency.time import Ratio
from gatewise.errors import Failure, UserError

FORMAT = 1
_REPORT, _TENSORS = "plan.json", "example.safetensors"
_ONNX, _INT8, _GRAPH = "network.onnx", "network.int8.onnx", "network.pt2"
_FORMS = {_ONNX: "onnx", _INT8: "int8", _GRAPH: "folded"}
"""Names of the network in a file, and what of a workshop each is."""


def save_plan(report: OptimizationReport, shop: Workshop, runner: Runner, path: Path) -> Path:
    """Write a chosen plan; see `OptimizedModel.save`."""
    plan = _plan_of(report, shop.example)
    if plan.needs == "modules":
        raise UserError(f"the plan {plan.name!r} is made of the network's own modules, which no file holds")
    if plan.needs == "onnx":
        name, network = _ONNX, shop.onnx
    elif plan.needs == "int8":
        name, network = _INT8, shop.int8
    else:
        name, network = _GRAPH, _graph_bytes(shop.model if plan.name == ORIGINAL else shop.folded, shop.example)
    with torch.no_grad():
        tensors = {"example": shop.example.cpu().contiguous(), "output": runner(shop.example).cpu().contiguous()}
    header = {"format": FORMAT, "torch": torch.__version__, "report": asdict(report)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr(_REPORT, json.dumps(header, indent=2))
        file.writestr(_TENSORS, save_tensors(tensors))
        file.writestr(name, network)
    return path


def load_optimized(path: str | Path) -> OptimizedModel:
    """The callable that `OptimizedModel.save` wrote, built anew on this machine for as many threads as torch has.

    Its report is that of the machine where the plan was chosen.

    Raises:
        UserError: if the file is no saved plan, or of a format or for a device that is not known here.
        Failure: if the plan cannot be built here, or gives another output than where it was saved.
    """
    header, tensors, form, network = _read(Path(path))
    report = _report_of(header["report"])
    if report.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"{path} holds a plan for {report.device}, and there is no such device here")
    example = tensors["example"].to(report.device)
    shop = _SavedWorkshop(example, form, network)
    plan = _plan_of(report, example)
    try:
        with torch.no_grad():
            runner = plan.build(shop)
            error = relative_error(runner(example), tensors["output"].to(report.device))
    except Exception as failure:
        # A plan leans on compilers and runtimes, each with errors of its own.
        raise Failure(f"the plan {plan.name!r} cannot be built here: {failure}") from failure
    if error > report.tolerance:
        raise Failure(
            f"the plan {plan.name!r} gives another output here than where it was saved: a difference of {error:.1e}, "
            f"more than {report.tolerance:g}"
        )
    return OptimizedModel(runner, report, shop)


class _SavedWorkshop(Workshop):
    """A workshop whose network comes from a file."""

    def __init__(self, example: Tensor, form: str, network: bytes) -> None:
        graph = _graph(network) if form == _GRAPH else None
        super().__init__(graph or nn.Module(), example)
        # What is cached is not computed.
        self.__dict__[_FORMS[form]] = graph or network


def _plan_of(report: OptimizationReport, example: Tensor) -> Plan:
    name = report.chosen.name
    if name == ORIGINAL:
        return Plan(ORIGINAL, lambda shop: shop.model)
    known = {plan.name: plan for plan in default_plans(report.precision, example)}
    if name not in known:
        raise UserError(
            f"only the library's own plans can be made again from a file, and {name!r} is none of them for this input"
        )
    return known[name]


def _graph_bytes(network: nn.Module, example: Tensor) -> bytes:
    # One sample would be taken for a constant of the network.
    batch = torch.cat([example, example[:1]]) if example.shape[0] == 1 else example
    buffer = BytesIO()
    try:
        with torch.no_grad():
            program = torch.export.export(network, (batch,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        torch.export.save(program, buffer)
    except Exception as error:
        # The exporter raises what its parts raise.
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Failure(f"the network cannot be written: {reason}") from error
    return buffer.getvalue()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str, bytes]:
    if not path.exists():
        raise UserError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no plan that `OptimizedModel.save` wrote") from error
    form = next((name for name in _FORMS if name in members), None)
    if _REPORT not in members or _TENSORS not in members or form is None:
        raise UserError(f"{path} is no plan that `OptimizedModel.save` wrote")
    header = json.loads(members[_REPORT])
    if header.get("format") != FORMAT:
        raise UserError(f"{path} has format {header.get('format')}; this version reads format {FORMAT}")
    return header, load_tensors(members[_TENSORS]), form, members[form]


def _graph(data: bytes) -> nn.Module:
    import gatewise.ops

    # The graph names operators, which exist once their modules are imported.
    for module in pkgutil.iter_modules(gatewise.ops.__path__):
        if not module.ispkg:
            import_module(f"gatewise.ops.{module.name}")
    return torch.export.load(BytesIO(data)).module()


def _report_of(fields: dict[str, Any]) -> OptimizationReport:
    plans = tuple(
        PlanResult(**{**plan, "ratio": Ratio(**plan["ratio"]) if plan["ratio"] else None}) for plan in fields["plans"]
    )
    return OptimizationReport(**{**fields, "plans": plans, "input_shape": tuple(fields["input_shape"])})
