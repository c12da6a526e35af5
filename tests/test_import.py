"""`import gatewise` and the first commands are light."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torchvision", "timm", "lightning", "triton", "matplotlib", "torchmetrics", "onnx", "onnxruntime", "sklearn")


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stderr.splitlines()}


def test_import_loads_nothing_heavy():
    assert loaded_after("import gatewise").isdisjoint((*HEAVY, "torch"))


def test_networks_layers_and_ops_need_nothing_above_torch():
    code = "import gatewise as gw, gatewise.ops, gatewise.layers\ngw.create_model('mobilenetv2_035')"
    loaded = loaded_after(code)
    assert "torch" in loaded
    assert loaded.isdisjoint(set(HEAVY) - {"triton"})


@pytest.mark.parametrize("arguments", [["--help"], ["papers"], ["papers", "focalnet"], ["list"]])
def test_first_commands_do_not_import_torch(arguments):
    loaded = loaded_after(f"from gatewise.cli import main\nassert main({arguments!r}) == 0")
    assert loaded.isdisjoint((*HEAVY, "torch"))


def test_every_public_name_resolves():
    import gatewise

    for name in gatewise.__all__:
        assert getattr(gatewise, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = gatewise.nonsense
