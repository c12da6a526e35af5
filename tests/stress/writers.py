"""Processes that replace one file again and again, to be killed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Writer:
    """A kind of file.

    Attributes:
        suffix: of its name.
        prepare: returns a function that writes the file.
        check: raises if the file is not whole.
    """

    suffix: str
    prepare: Callable[[], Callable[[Path], object]]
    check: Callable[[Path], object]


def _plan() -> Callable[[Path], object]:
    from gatewise.efficiency import optimize
    from gatewise.efficiency.acceleration.plans import default_plans
    from tests.stress.kinds.base import tiny_model
    from tests.stress.kinds.shipping import example

    plans = [plan for plan in default_plans("float32", example()) if plan.name == "onnxruntime"]
    return optimize(tiny_model(), example(), plans=plans, budget_s=2.0).save


def _export() -> Callable[[Path], object]:
    from gatewise.efficiency import export_onnx
    from tests.stress.kinds.base import tiny_model
    from tests.stress.kinds.shipping import example

    model = tiny_model()
    return lambda path: export_onnx(model, path, example())


def _quantized() -> Callable[[Path], object]:
    from gatewise.efficiency import quantize
    from tests.stress.kinds.base import tiny_model
    from tests.stress.kinds.shipping import example

    return quantize(tiny_model(), example()).save


def _check_plan(path: Path) -> None:
    from gatewise.efficiency import load_optimized

    load_optimized(path)


def _check_export(path: Path) -> None:
    import onnx

    onnx.checker.check_model(str(path), full_check=True)


def _check_quantized(path: Path) -> None:
    from gatewise.efficiency import load_quantized

    load_quantized(path)


WRITERS = {
    "plan": Writer(".zip", _plan, _check_plan),
    "export": Writer(".onnx", _export, _check_export),
    "quantized": Writer(".onnx", _quantized, _check_quantized),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=WRITERS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--once", action="store_true", help="write one time only")
    args = parser.parse_args()
    write = WRITERS[args.name].prepare()
    write(args.path)
    print("written", flush=True)
    while not args.once:
        write(args.path)


if __name__ == "__main__":
    sys.exit(main())
