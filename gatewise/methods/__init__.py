"""Training and compression methods for any network, one file per method. `_base` defines the three kinds."""

from __future__ import annotations

from gatewise.methods._base import (
    Engine,
    LossTerm,
    Method,
    Step,
    StepProcedure,
    find_method,
    list_methods,
    register_loss_term,
    register_step_procedure,
    register_transform,
)
from gatewise.methods.evonorm import swap_norms
from gatewise.methods.freeze_batch_norm import freeze_batch_norm
from gatewise.methods.hgf_gates import HGFGates
from gatewise.methods.pack_ternary import pack_ternary
from gatewise.methods.quantization_aware import convert, prepare_qat

__all__ = [
    "Engine",
    "HGFGates",
    "LossTerm",
    "Method",
    "Step",
    "StepProcedure",
    "convert",
    "find_method",
    "freeze_batch_norm",
    "list_methods",
    "pack_ternary",
    "prepare_qat",
    "register_loss_term",
    "register_step_procedure",
    "register_transform",
    "swap_norms",
]
