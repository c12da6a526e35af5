"""Cost of a network on this machine, reasons why it is slow, and ways to make it faster and smaller."""

from __future__ import annotations

from gatewise.efficiency.acceleration.block_fusion import fuse_blocks, plan_tiles
from gatewise.efficiency.acceleration.export import ExportReport, export_onnx
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.acceleration.optimize import OptimizedModel, optimize
from gatewise.efficiency.acceleration.report import OptimizationReport, PlanResult
from gatewise.efficiency.acceleration.saved import load_optimized
from gatewise.efficiency.bounds.device import Device, device
from gatewise.efficiency.bounds.gap import EfficiencyGap, efficiency_gap
from gatewise.efficiency.bounds.waterline import Bound, Waterline, waterline
from gatewise.efficiency.cost.count import Cost, ModuleCost, StageCost, count
from gatewise.efficiency.cost.memory import StageMemory, memory_by_stage
from gatewise.efficiency.cost.operators import Operator
from gatewise.efficiency.quantization.quantize import QuantizationReport, QuantizedModel, load_quantized, quantize
from gatewise.efficiency.quantization.sensitivity import SensitivityReport, mixed_precision, sensitivity
from gatewise.efficiency.timing.measure import Ratio, Timing, measure, peak_memory, ratio

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
