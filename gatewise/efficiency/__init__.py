"""What a network costs on this machine, and how to make it cheaper: count, time, fold, optimize, export."""

from __future__ import annotations

from gatewise.efficiency.block_fusion import fuse_blocks, plan_tiles
from gatewise.efficiency.count import Cost, StageCost, count
from gatewise.efficiency.export import ExportReport, export_onnx
from gatewise.efficiency.fold import fold
from gatewise.efficiency.optimize import OptimizedModel, optimize
from gatewise.efficiency.report import OptimizationReport, PlanResult
from gatewise.efficiency.saved import load_optimized
from gatewise.efficiency.time import Ratio, Timing, measure, peak_memory, ratio

__all__ = [
    "Cost",
    "ExportReport",
    "OptimizationReport",
    "OptimizedModel",
    "PlanResult",
    "Ratio",
    "StageCost",
    "Timing",
    "count",
    "export_onnx",
    "fold",
    "fuse_blocks",
    "load_optimized",
    "measure",
    "optimize",
    "peak_memory",
    "plan_tiles",
    "ratio",
]
