"""What a network costs on this machine, why it is slow, and how to make it faster and smaller."""

from __future__ import annotations

from gatewise.efficiency._operators import Operator
from gatewise.efficiency.block_fusion import fuse_blocks, plan_tiles
from gatewise.efficiency.count import Cost, ModuleCost, StageCost, count
from gatewise.efficiency.device import Device, device
from gatewise.efficiency.export import ExportReport, export_onnx
from gatewise.efficiency.fold import fold
from gatewise.efficiency.gap import EfficiencyGap, efficiency_gap
from gatewise.efficiency.memory import StageMemory, memory_by_stage
from gatewise.efficiency.optimize import OptimizedModel, optimize
from gatewise.efficiency.quantization.sensitivity import SensitivityReport, mixed_precision, sensitivity
from gatewise.efficiency.quantize import QuantizationReport, QuantizedModel, load_quantized, quantize
from gatewise.efficiency.report import OptimizationReport, PlanResult
from gatewise.efficiency.saved import load_optimized
from gatewise.efficiency.time import Ratio, Timing, measure, peak_memory, ratio
from gatewise.efficiency.waterline import Bound, Waterline, waterline

__all__ = [
    "Bound",
    "Cost",
    "Device",
    "EfficiencyGap",
    "ExportReport",
    "ModuleCost",
    "Operator",
    "OptimizationReport",
    "OptimizedModel",
    "PlanResult",
    "QuantizationReport",
    "QuantizedModel",
    "Ratio",
    "SensitivityReport",
    "StageCost",
    "StageMemory",
    "Timing",
    "Waterline",
    "count",
    "device",
    "efficiency_gap",
    "export_onnx",
    "fold",
    "fuse_blocks",
    "load_optimized",
    "load_quantized",
    "measure",
    "memory_by_stage",
    "mixed_precision",
    "optimize",
    "peak_memory",
    "plan_tiles",
    "quantize",
    "ratio",
    "sensitivity",
    "waterline",
]
