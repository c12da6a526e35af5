"""`optimize` never returns anything wrong or slower, and says what it did."""

from __future__ import annotations

import json
import time
from functools import partial

import pytest
import torch
from torch import nn

import gatewise
from gatewise.efficiency import optimize as optimize_at_length
from gatewise.efficiency.acceleration.plan import Plan, PlanContext
from gatewise.efficiency.acceleration.plans import (
    compiled,
    default_plans,
    eager,
    onnxruntime_per_thread,
    onnxruntime_session,
    openvino_one_thread,
    openvino_per_thread,
    openvino_session,
)
from gatewise.efficiency.acceleration.runners import PIECE, NotApplicableError, in_pieces
from tests.conftest import small_model

optimize = partial(optimize_at_length, budget_s=3.0)
"""Measures for a tenth of a second or three, not for half a minute."""

RUNTIMES = {
    "onnxruntime": onnxruntime_session,
    "onnxruntime, per thread": onnxruntime_per_thread,
    "openvino": partial(openvino_session, dtype=torch.float32),
    "openvino, per thread": partial(openvino_per_thread, dtype=torch.float32),
}


class Slow(nn.Module):
    """Takes 5 ms, so that any plan that skips the wait is faster."""

    def forward(self, x):
        time.sleep(0.005)
        return 2 * x


def double(x):
    return 2 * x


def slow_double(x):
    time.sleep(0.02)
    return 2 * x


FAST = Plan("fast", lambda context: double)
SLOWER = Plan("slower one", lambda context: slow_double)


@pytest.fixture
def slow():
    return Slow().eval()


@pytest.fixture
def rows():
    return torch.randn(3, 4)


def by_name(fast):
    return {plan.name: plan for plan in fast.report.plans}


def test_the_fastest_right_plan_is_chosen(slow, rows):
    fast = optimize(slow, rows, plans=[SLOWER, FAST])
    assert fast.report.chosen.name == "fast"
    assert fast.report.speedup > 1
    assert torch.equal(fast(rows), 2 * rows)


def test_the_original_is_returned_where_every_plan_is_slower(slow, rows):
    fast = optimize(slow, rows, plans=[SLOWER])
    assert fast.report.chosen.name == "original"
    assert fast.report.speedup == 1
    plan = by_name(fast)["slower one"]
    assert plan.status == "slower"
    assert plan.ratio.median < 1
    assert torch.equal(fast(rows), slow(rows))


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (lambda x: 2.001 * x, "5.0e-04"),
        (lambda x: torch.full_like(x, float("nan")), "inf"),
        (lambda x: (2 * x)[:, :1], "inf"),
        (lambda x: (2 * x).double(), "inf"),
        # Right for the example, wrong for every other batch size.
        (lambda x: 2 * x if x.shape[0] == 3 else x, "5.0e-01"),
    ],
    ids=["inexact", "not finite", "another shape", "another dtype", "one batch size"],
)
def test_a_wrong_plan_is_rejected_however_fast(slow, rows, output, error):
    fast = optimize(slow, rows, plans=[Plan("wrong one", lambda context: output)])
    plan = by_name(fast)["wrong one"]
    assert plan.status == "wrong"
    assert f"differs from the original by {error}" in plan.note
    assert plan.median_ms is None
    assert fast.report.chosen.name == "original"


def test_a_plan_that_mixes_the_samples_of_a_batch_is_rejected():
    class Mixes(nn.Module):
        def forward(self, x):
            time.sleep(0.002)
            return x - x.mean(dim=0)

    plan = Plan("pieces", lambda context: in_pieces(lambda x: x - x.mean(dim=0), 2))
    fast = optimize(Mixes().eval(), torch.randn(2, 4), plans=[plan])
    assert by_name(fast)["pieces"].status == "wrong"


def test_failing_plans_are_reported_with_their_reason(slow, rows):
    def breaks(context):
        raise RuntimeError("no compiler here\nsecond line")

    def not_for_rows(context):
        raise NotApplicableError("for images")

    fast = optimize(slow, rows, plans=[Plan("broken", breaks), Plan("images", not_for_rows), FAST])
    plans = by_name(fast)
    assert (plans["broken"].status, plans["broken"].note) == ("failed", "RuntimeError: no compiler here")
    assert (plans["images"].status, plans["images"].note) == ("not applicable", "for images")
    assert fast.report.chosen.name == "fast"


def test_no_plan_is_begun_after_the_budget(slow, rows):
    def dawdle(context):
        time.sleep(0.05)
        return double

    fast = optimize(slow, rows, budget_s=0.02, plans=[Plan("first", dawdle), FAST])
    plans = by_name(fast)
    assert plans["first"].status == "chosen"
    assert (plans["fast"].status, plans["fast"].note) == ("not tried", "the budget of 0.02 s is spent")


def test_the_report_tells_all(slow, rows):
    report = optimize(slow, rows, plans=[FAST, SLOWER]).report
    assert report.original.name == "original"
    assert report.original.ratio.median == 1
    assert report.original.median_ms > 5
    assert report.chosen.error == 0
    assert report.chosen.build_s >= 0
    assert report.input_shape == (3, 4)
    text = str(report)
    for word in ("original", "fast", "slower one", "chosen", "ms", "tolerance 0.0001", "x ("):
        assert word in text
    assert json.loads(json.dumps(report.to_dict()))["precision"] == "float32"


def test_bf16_has_a_tolerance_of_its_own(slow, rows):
    rounded = Plan("rounded", lambda context: lambda x: (2 * x.bfloat16()).float())
    assert by_name(optimize(slow, rows, plans=[rounded]))["rounded"].status == "wrong"
    fast = optimize(slow, rows, "bf16", plans=[rounded])
    assert fast.report.chosen.name == "rounded"
    assert 1e-4 < fast.report.chosen.error < fast.report.tolerance
    assert fast(rows).dtype == torch.float32


def test_another_shape_dtype_or_device_is_refused(slow, rows):
    fast = optimize(slow, rows, plans=[FAST])
    assert fast(torch.randn(7, 4)).shape == (7, 4)
    with pytest.raises(ValueError, match=r"optimized for batches of \(4,\), not for shape \(3, 5\)"):
        fast(torch.randn(3, 5))
    with pytest.raises(ValueError, match="expected float32 on cpu, not torch.float64"):
        fast(rows.double())
    with pytest.raises(ValueError, match="not for shape"):
        fast(rows[:0])


def test_mistakes_are_named(tiny, images):
    with pytest.raises(ValueError, match="precision must be one of float32, bf16, int8, not 'int4'"):
        optimize(tiny, images, "int4")
    with pytest.raises(ValueError, match=r"in training mode; call .eval\(\) first"):
        optimize(tiny.train(), images)
    tiny.eval()
    with pytest.raises(ValueError, match="cannot run on an example of shape"):
        optimize(tiny, torch.randn(1, 4, 16, 16), plans=[])
    with pytest.raises(ValueError, match="takes a float32 network"):
        optimize(tiny.double(), images.double(), plans=[])
    with pytest.raises(ValueError, match="budget_s must be"):
        optimize(tiny.float(), images, budget_s=0)
    with pytest.raises(ValueError, match="different names"):
        optimize(tiny, images, plans=[FAST, FAST])
    tiny.head.bias.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        optimize(tiny, images, plans=[])


@pytest.mark.parametrize("options", [{"precision": "int8"}, {"calibration": torch.zeros(1, 3, 16, 16)}])
def test_integers_and_calibration_go_together(tiny, images, options):
    with pytest.raises(ValueError, match="int8, and only int8, needs calibration"):
        optimize(tiny, images, **options)


def test_the_model_is_not_touched(tiny, images):
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    optimize(tiny, images, plans=[Plan("channels-last", lambda context: eager(context, torch.float32))])
    assert all(torch.equal(before[key], value) for key, value in tiny.state_dict().items())
    assert tiny.conv.weight.is_contiguous()
    assert isinstance(tiny.norm, nn.BatchNorm2d)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 11])
def test_pieces_serve_any_batch_and_see_one_size_only(size):
    seen = []

    def run(x):
        seen.append(x.shape[0])
        return 2 * x

    x = torch.randn(size, 3)
    assert torch.equal(in_pieces(run, 4)(x), 2 * x)
    assert set(seen) == {4}


def test_plans_suit_precision_device_and_batch():
    def names(precision, batch, device="cpu"):
        return [plan.name for plan in default_plans(precision, torch.empty(batch, 3, 8, 8, device=device))]

    assert "onnxruntime" in names("float32", 1)
    assert not any("bf16" in name for name in names("float32", 16))
    assert set(names("float32", 16)) < set(names("bf16", 16))
    assert f"compiled, pieces of {PIECE}" in names("float32", 16)
    assert not any("pieces" in name for name in names("float32", PIECE))
    assert names("int8", 1)[:2] == ["int8, openvino", "int8, onnxruntime"]
    assert set(names("bf16", 16)) < set(names("int8", 16))
    # What leans on the CPU's libraries is left out elsewhere.
    assert names("float32", 16, "meta") == ["compiled", "eager, folded", "eager, channels-last"]
    assert names("bf16", 1)[0] == "openvino in bf16"
    assert [name for name in names("bf16", 1) if name.startswith("compiled")][:2] == ["compiled in bf16", "compiled"]


@pytest.mark.untyped
@pytest.mark.parametrize("plan", RUNTIMES.values(), ids=RUNTIMES)
def test_runtimes_give_the_same_for_any_batch(tiny, plan, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    runner = plan(PlanContext(tiny, torch.randn(4, 3, 16, 16)))
    for size in (1, 4, 7):
        x = torch.randn(size, 3, 16, 16)
        torch.testing.assert_close(runner(x), tiny(x), rtol=1e-4, atol=1e-5)


@pytest.mark.untyped
def test_openvino_keeps_earlier_outputs_and_computes_in_bfloat16_where_asked(tiny, images):
    openvino = pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    exact = openvino_session(PlanContext(tiny, images), torch.float32)
    first = exact(images)
    kept = first.clone()
    exact(images + 1)
    assert torch.equal(first, kept)
    rounded = openvino_session(PlanContext(tiny, images), torch.bfloat16)(images)
    # OpenVINO computes in float32 where the processor has no instructions for bfloat16.
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert torch.equal(rounded, first) == ("BF16" not in capabilities)
    assert (rounded - first).abs().max() <= 5e-2 * first.abs().max()


def test_without_openvino_its_plans_say_how_to_get_it(tiny, images, monkeypatch):
    monkeypatch.setattr("gatewise.efficiency.acceleration.plans.openvino_installed", lambda: False)
    for name in ("openvino", "openvino, per thread"):
        with pytest.raises(NotApplicableError, match=r"pip install 'gatewise\[openvino\]'"):
            RUNTIMES[name](PlanContext(tiny, images))


@pytest.mark.untyped
def test_a_single_thread_is_tried_for_a_single_image(tiny, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    runner = openvino_one_thread(PlanContext(tiny, torch.randn(1, 3, 16, 16)), torch.float32)
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(runner(x), tiny(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(NotApplicableError, match="one image where there are several threads"):
        openvino_one_thread(PlanContext(tiny, torch.randn(2, 3, 16, 16)), torch.float32)


@pytest.mark.parametrize("name", ["openvino, per thread", "onnxruntime, per thread"])
def test_one_image_is_not_spread_over_threads(tiny, name):
    with pytest.raises(NotApplicableError, match="two images or more per thread"):
        RUNTIMES[name](PlanContext(tiny, torch.randn(1, 3, 16, 16)))


@pytest.mark.untyped
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_compiled_plan_is_exact_and_leaves_no_global_state(dtype, tolerance, tiny, images):
    from torch._inductor import config

    threads, default, freezing = torch.get_num_threads(), torch.get_default_dtype(), config.freezing
    with torch.no_grad():
        runner = compiled(PlanContext(tiny, images), dtype, size=2, unroll=True)
        for size in (1, 2, 3):
            x = torch.randn(size, 3, 16, 16)
            expected = tiny(x)
            assert (runner(x) - expected).abs().max() <= tolerance * expected.abs().max()
    assert (torch.get_num_threads(), torch.get_default_dtype(), config.freezing) == (threads, default, freezing)


@pytest.mark.untyped
def test_the_default_plans_make_a_network_of_the_library_fast_or_leave_it():
    model = small_model("inception_next_atto")
    example = torch.randn(1, 3, 32, 32)
    # The budget admits the first plan; what compiles is tested above.
    fast = gatewise.optimize(model, example, budget_s=0.01)
    assert by_name(fast)["openvino"].status in ("chosen", "slower")
    assert fast.report.speedup >= 1
    for size in (1, 3):
        x = torch.randn(size, 3, 32, 32)
        torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-3, atol=1e-4)
