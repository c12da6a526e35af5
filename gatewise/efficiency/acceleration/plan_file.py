"""The file of a saved plan: its members and how it is written.

A file is a zip archive. It holds the report with checksums of the other members, the network in the form that the plan
starts from (ONNX, or a graph as plain data), and the example with the plan's output for it.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from gatewise.efficiency.acceleration.graph_file import write_graph
from gatewise.efficiency.acceleration.plan import Plan, PlanContext
from gatewise.efficiency.acceleration.plans import default_plans
from gatewise.efficiency.acceleration.report import ORIGINAL, OptimizationReport
from gatewise.efficiency.acceleration.runners import Runner
from gatewise.errors import Failure, UserError
from gatewise.files import write_atomically

FORMAT = 2
REPORT, EXAMPLE = "plan.json", "example.safetensors"
ONNX, INT8, GRAPH, TENSORS = "network.onnx", "network.int8.onnx", "network.json", "network.safetensors"
FORMS = {"onnx": {ONNX}, "int8": {INT8}, "folded": {GRAPH, TENSORS}}
"""Parts of a context that a file can store, and the members that each consists of."""

AS_IT_IS = Plan(ORIGINAL, lambda context: context.model, key="original")
"""The plan for a network that no other plan makes faster."""


def save_plan(report: OptimizationReport, context: PlanContext, runner: Runner, path: Path) -> Path:
    """Write a chosen plan with the form of the network that it starts from; see `OptimizedModel.save`."""
    plan = _chosen(report, context.example)
    if plan.needs == "modules":
        raise UserError(f"the plan {plan.name!r} is made of the network's own modules, which no file holds")
    if plan.needs == "onnx":
        network = {ONNX: context.onnx}
    elif plan.needs == "int8":
        network = {INT8: context.int8}
    else:
        network = _graph_members(context.model if plan.name == ORIGINAL else context.folded, context.example)
    with torch.no_grad():
        tensors = {"example": context.example.cpu().contiguous(), "output": runner(context.example).cpu().contiguous()}
    members = {EXAMPLE: save_tensors(tensors), **network}
    header = {
        "format": FORMAT,
        "torch": torch.__version__,
        "plan": plan.key,
        "report": asdict(report),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
    }
    write_atomically(path, partial(_write_archive, {REPORT: json.dumps(header, indent=2).encode(), **members}))
    return path


def _chosen(report: OptimizationReport, example: Tensor) -> Plan:
    name = report.chosen.name
    if name == ORIGINAL:
        return AS_IT_IS
    known = {plan.name: plan for plan in default_plans(report.precision, example)}
    if name not in known:
        raise UserError(f"only the library's own plans can be rebuilt from a file, and {name!r} is not one of them")
    return known[name]


def _graph_members(network: nn.Module, example: Tensor) -> dict[str, bytes]:
    content, tensors = write_graph(network, example)
    try:
        return {GRAPH: json.dumps(content, allow_nan=False).encode(), TENSORS: save_tensors(tensors)}
    except (KeyError, SafetensorError, ValueError) as error:
        # A dtype that safetensors does not support.
        raise Failure(f"the network cannot be written: safetensors does not support its tensors: {error}") from error


def _write_archive(members: Mapping[str, bytes], file: IO[bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
