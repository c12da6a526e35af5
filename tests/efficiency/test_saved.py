"""A plan that was chosen is loaded again and computes the same, or says why it cannot."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from gatewise.efficiency import load_optimized, optimize
from gatewise.efficiency.acceleration.plan import Plan
from gatewise.efficiency.acceleration.plans import default_plans
from gatewise.errors import Failure, UserError
from tests.conftest import small_model
from tests.efficiency.plan_files import change, set_field

pytestmark = pytest.mark.untyped


def optimized(model, example, *names):
    """The network by the library's plan of that name, if it is faster than a network that waits."""
    plans = [plan for plan in default_plans("float32", example) if plan.name in names]
    return optimize(model, example, plans=plans, budget_s=2.0)


@pytest.fixture
def slow_tiny(tiny, monkeypatch):
    """A network that any plan beats: it waits, which its copies do not."""
    once = type(tiny).forward

    def forward(self, x):
        if self is tiny:
            time.sleep(0.02)
        return once(self, x)

    monkeypatch.setattr(type(tiny), "forward", forward)
    return tiny


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "eager, channels-last", "compiled"])
def test_a_saved_plan_computes_the_same_for_any_batch(slow_tiny, name, tmp_path):
    fast = optimized(slow_tiny, torch.randn(1, 3, 16, 16), name)
    assert fast.report.chosen.name == name
    loaded = load_optimized(fast.save(tmp_path / "plans" / "tiny.zip"))
    assert loaded.report == fast.report
    for size in (1, 3):
        x = torch.randn(size, 3, 16, 16)
        torch.testing.assert_close(loaded(x), fast(x), rtol=1e-5, atol=1e-5)


def test_a_plan_in_integers_is_saved_with_its_codes(slow_tiny, tmp_path):
    calibration = torch.randn(8, 3, 16, 16)
    plans = [plan for plan in default_plans("int8", calibration[:1]) if plan.name == "int8, onnxruntime"]
    fast = optimize(slow_tiny, calibration[:1], "int8", calibration=calibration, plans=plans, budget_s=2.0)
    assert fast.report.chosen.name == "int8, onnxruntime"
    loaded = load_optimized(fast.save(tmp_path / "int8.zip"))
    assert torch.equal(loaded(calibration), fast(calibration))
    assert not torch.equal(loaded(calibration), slow_tiny(calibration))


def test_the_original_can_be_saved_with_operators_of_the_library(tmp_path):
    model = small_model("unireplknet_a")
    fast = optimize(model, torch.randn(2, 3, 64, 64), plans=[])
    loaded = load_optimized(fast.save(tmp_path / "original.zip"))
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(loaded(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_plan_of_the_callers_own_cannot_be_saved(slow_tiny, images, tmp_path):
    fast = optimize(slow_tiny, images, plans=[Plan("mine", lambda context: context.folded)], budget_s=2.0)
    assert fast.report.chosen.name == "mine"
    with pytest.raises(UserError, match="'mine' is not one of them"):
        fast.save(tmp_path / "plan.zip")
    assert not (tmp_path / "plan.zip").exists()


def test_a_plan_of_modules_cannot_be_saved(slow_tiny, tmp_path, monkeypatch):
    fused = Plan("blocks fused", lambda context: context.folded, "modules")
    monkeypatch.setattr("gatewise.efficiency.acceleration.plan_file.default_plans", lambda *arguments: [fused])
    fast = optimize(slow_tiny, torch.randn(1, 3, 16, 16), plans=[fused], budget_s=2.0)
    with pytest.raises(UserError, match="'blocks fused' is made of the network's own modules"):
        fast.save(tmp_path / "plan.zip")


@pytest.fixture
def saved(slow_tiny, tmp_path):
    return optimized(slow_tiny, torch.randn(1, 3, 16, 16), "onnxruntime").save(tmp_path / "plan.zip")


def test_a_plan_is_found_by_its_key_whatever_it_is_called_now(saved, monkeypatch):
    plans = default_plans("float32", torch.randn(1, 3, 16, 16))
    renamed = [replace(plan, name=f"renamed {plan.name}") for plan in plans]
    monkeypatch.setattr("gatewise.efficiency.acceleration.saved.default_plans", lambda *arguments: renamed)
    assert load_optimized(saved).report.chosen.name == "onnxruntime"


def test_an_unknown_plan_is_refused(saved):
    change(saved, "plan.json", lambda data: set_field(data, "plan", value="magic"))
    with pytest.raises(UserError, match="the plan 'magic', which this version does not have"):
        load_optimized(saved)


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8"])
@pytest.mark.parametrize("batch", [1, 8])
def test_every_plan_that_can_be_saved_has_a_key_of_its_own(precision, batch):
    plans = default_plans(precision, torch.randn(batch, 3, 16, 16))
    keys = [plan.key for plan in plans if plan.needs != "modules"]
    assert all(keys)
    assert len(set(keys)) == len(keys)


def test_another_output_than_where_it_was_saved_is_a_failure(saved):
    from safetensors.torch import load, save

    change(saved, "example.safetensors", lambda data: save({**load(data), "output": load(data)["output"] + 1}))
    with pytest.raises(Failure, match="computes another output here"):
        load_optimized(saved)


def test_what_is_no_plan_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_optimized(tmp_path / "none.zip")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(UserError, match="is not a plan that"):
        load_optimized(tmp_path / "text.zip")
    change(saved, "plan.json", lambda data: set_field(data, "format", value=9))
    with pytest.raises(UserError, match="format 9; this version reads format 2: optimize the network"):
        load_optimized(saved)


def test_a_plan_for_a_device_that_is_not_there_is_refused(saved):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    change(saved, "plan.json", lambda data: set_field(data, "report", "device", value="cuda:0"))
    with pytest.raises(UserError, match="there is no such device"):
        load_optimized(saved)


def test_a_network_that_is_no_onnx_is_refused_in_one_line(saved):
    change(saved, "network.onnx", lambda data: b"broken")
    with pytest.raises(UserError, match="network.onnx of .* is not an ONNX file, or is damaged: [^\n]*$"):
        load_optimized(saved)


def test_a_network_that_no_runtime_takes_is_a_failure_with_the_reason(saved):
    import onnx

    def empty(data):
        return onnx.ModelProto(ir_version=10).SerializeToString()

    change(saved, "network.onnx", empty)
    with pytest.raises(Failure, match="'onnxruntime' cannot be built here: [^\n]*$"):
        load_optimized(saved)
