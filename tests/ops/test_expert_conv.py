"""Convolution with experts against its definition."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.fidelity.fingerprint import fill, make_input, relative_error
from gatewise.ops.expert_conv import (
    expert_conv2d,
    expert_conv2d_reference,
    route_to_experts,
    split_by_expert,
    to_experts,
    to_images,
)
from tests.conftest import FINGERPRINTS


def unsorted(x, scores, weight, bias=None, **options):
    """The operator on images in any order."""
    routing = route_to_experts(scores)
    return to_images(expert_conv2d(to_experts(x, routing), weight, routing, bias, **options), routing)


def draw(batch, experts, in_dim=6, dim=4, kernel=3, groups=1, size=(7, 5), bias=True):
    shapes = [(batch, in_dim, *size), (batch, experts), (experts * dim, in_dim // groups, kernel, kernel)]
    shapes += [(experts * dim,)] if bias else []
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def gradients(y, inputs):
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    return torch.autograd.grad((y * cotangent).sum(), inputs)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 7),
    experts=st.integers(1, 4),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    groups=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    bias=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_definition(batch, experts, kernel, stride, padding, groups, size, bias):
    torch.manual_seed(0)
    inputs = draw(batch, experts, kernel=kernel, groups=groups, size=size, bias=bias)
    options = {"stride": stride, "padding": padding, "groups": groups}
    y, expected = unsorted(*inputs, **options), expert_conv2d_reference(*inputs, **options)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs))


def test_each_image_gets_a_plain_convolution_with_its_experts_rows():
    x, scores, weight, _ = draw(5, 3)
    y = unsorted(x, scores, weight, padding=1)
    for image, expert in enumerate(scores.argmax(1).tolist()):
        own = weight[4 * expert : 4 * expert + 4]
        torch.testing.assert_close(y[image : image + 1], F.conv2d(x[image : image + 1], own, padding=1))


def test_the_chosen_score_alone_gets_output_times_gradient():
    x, scores, weight, bias = draw(6, 3)
    y = unsorted(x, scores, weight, bias)
    cotangent = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, scores, cotangent)
    expected = torch.zeros_like(scores)
    expected[torch.arange(6), scores.argmax(1)] = (cotangent * y).sum(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected)


def test_gradients_of_several_layers_add_up_at_the_scores():
    x, scores, weight, _ = draw(4, 2, in_dim=4, dim=4)
    routing = route_to_experts(scores)
    first = expert_conv2d(to_experts(x, routing), weight, routing, padding=1)
    second = to_images(expert_conv2d(first, weight, routing, padding=1), routing)
    chain = expert_conv2d_reference(expert_conv2d_reference(x, scores, weight, padding=1), scores, weight, padding=1)
    torch.testing.assert_close(gradients(second, [scores]), gradients(chain, [scores]))


def test_the_published_gradients():
    record = json.loads((FINGERPRINTS / "advmoe" / "moe_conv.json").read_text())
    x, scores = (make_input(**spec).requires_grad_() for spec in record["inputs"].values())
    weight = fill("conv.weight", record["keys"]["conv.weight"]).requires_grad_()
    y = unsorted(x, scores, weight, stride=2, padding=1)
    assert scores.argmax(1).tolist() == record["expert_index"]
    cotangent = make_input("cotangent", y.shape)
    for name, found in zip(record["inputs"], torch.autograd.grad(y, (x, scores), cotangent), strict=True):
        assert relative_error(found, record["grads"][name]) < 1e-5
    assert relative_error(y, record["outputs"]["out"]) < 1e-5


def test_second_derivatives_exist():
    x, scores, weight, bias = draw(2, 2, in_dim=2, dim=1, size=(3, 3))

    def through_images(x, weight, bias):
        return unsorted(x, scores.detach(), weight, bias)

    assert torch.autograd.gradgradcheck(through_images, (x, weight, bias))


@pytest.mark.parametrize("layout", ["strided", "channels last"])
def test_other_memory_layouts_compute_the_same(layout):
    x, scores, weight, bias = draw(5, 3)
    expected = unsorted(x, scores, weight, bias, padding=1)
    if layout == "strided":
        x, weight = (t.repeat_interleave(2, dim=-1)[..., ::2] for t in (x, weight))
    else:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    torch.testing.assert_close(unsorted(x, scores, weight, bias, padding=1), expected)


def test_channels_last_stays_channels_last():
    x, scores, weight, _ = (t.float() for t in draw(6, 2))
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    assert unsorted(x, scores, weight).is_contiguous(memory_format=torch.channels_last)


def test_bf16_is_close_to_float32():
    x, scores, weight, bias = (t.detach().float() for t in draw(6, 3))
    half = unsorted(x.bfloat16(), scores, weight.bfloat16(), bias.bfloat16())
    expected = unsorted(x, scores, weight, bias)
    # Eight bits of mantissa, in inputs, weights and outputs.
    assert (half.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_autocast_keeps_the_precision_of_the_gradient_of_scores():
    x, scores, weight, _ = (t.detach().float().requires_grad_() for t in draw(4, 2))
    expected = unsorted(x, scores, weight)
    cotangent = torch.randn_like(expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = unsorted(x, scores, weight)
    assert y.dtype == torch.bfloat16
    (found,) = torch.autograd.grad(y, scores, cotangent.bfloat16())
    assert found.dtype == torch.float32
    (wanted,) = torch.autograd.grad(expected, scores, cotangent)
    # Eight bits of mantissa in the output and in its gradient, over sums of 60 terms of either sign.
    assert (found - wanted).abs().max() < 0.02 * (y * cotangent).abs().sum(dim=(1, 2, 3)).max()


def test_images_are_sorted_once_and_stay_in_order_within_an_expert():
    routing = route_to_experts(torch.eye(3)[[2, 0, 2, 1, 0]])
    assert routing.counts == (2, 1, 2)
    assert routing.order.tolist() == [1, 4, 3, 0, 2]
    x = torch.arange(5.0)[:, None, None, None]
    assert torch.equal(to_images(to_experts(x, routing), routing), x)
    assert [(own.start, own.stop, alone.counts) for own, alone in split_by_expert(routing)] == [
        (0, 2, (2, 0, 0)),
        (2, 3, (0, 1, 0)),
        (3, 5, (0, 0, 2)),
    ]


@pytest.mark.parametrize("batch", [1, 6])
def test_one_expert_runs_without_sorting_cutting_or_joining(batch, monkeypatch):
    x, _, weight, _ = (t.detach() for t in draw(batch, 3))
    routing = route_to_experts(torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64).expand(batch, -1))
    assert routing.order is None
    assert routing.visited == [1]
    assert to_experts(x, routing) is x
    assert to_images(x, routing) is x
    seen = []
    monkeypatch.setattr(F, "conv2d", lambda x, weight, *rest, **options: seen.append((x, weight)) or x)
    expert_conv2d(x, weight, routing)
    ((images, rows),) = seen
    assert images is x
    assert rows.data_ptr() == weight[4:8].data_ptr()
    assert rows.shape == (4, 6, 3, 3)


def test_arithmetic_is_that_of_one_expert():
    from torch.utils.flop_counter import FlopCounterMode

    x, scores, weight, _ = (t.detach() for t in draw(6, 3))
    with FlopCounterMode(display=False) as counter:
        unsorted(x, scores, weight, padding=1)
    assert counter.get_total_flops() == 2 * 6 * 7 * 5 * 4 * 6 * 9


def test_an_empty_batch_has_an_empty_output():
    _, _, weight, _ = draw(1, 3)
    x, scores = torch.zeros(0, 6, 7, 5, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64)
    assert unsorted(x, scores, weight).shape == (0, 4, 5, 3)


def test_the_first_of_equal_scores_is_chosen():
    assert route_to_experts(torch.ones(2, 3)).counts == (2, 0, 0)


def test_without_values_the_first_expert_stands_for_any():
    assert route_to_experts(torch.zeros(5, 3, device="meta")).counts == (5, 0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_told_with_their_number(bad):
    scores = torch.randn(8, 2)
    scores[[1, 4, 6], 1] = bad
    with pytest.raises(ValueError, match="router produced non-finite scores for 3 of 8 images"):
        route_to_experts(scores)


def test_a_weight_that_cannot_be_shared_out_and_a_foreign_routing_are_refused():
    x, scores, weight, _ = draw(4, 2)
    routing = route_to_experts(scores)
    with pytest.raises(ValueError, match="weight's 7 rows must be a multiple of the number of experts, 2"):
        expert_conv2d(x, weight[:7], routing)
    with pytest.raises(ValueError, match="the routing is of 4 images, the batch has 3"):
        expert_conv2d(x[:3], weight, routing)


@pytest.mark.untyped
@pytest.mark.parametrize("shape", [(4,), (4, 0), (4, 2, 1)])
def test_scores_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"scores must be \(batch, experts\), not"):
        route_to_experts(torch.zeros(shape))


@pytest.mark.untyped
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("groups", [1, 2])
def test_compiled_values_and_gradients_are_the_same(batch, groups):
    inputs = draw(batch, 3, groups=groups)
    torch._dynamo.reset()
    compiled = torch.compile(unsorted, fullgraph=True, backend="aot_eager")
    options = {"padding": 1, "groups": groups}
    y, expected = compiled(*inputs, **options), unsorted(*inputs, **options)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs))


class Layer(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x, scores):
        return unsorted(x, scores, self.weight, padding=1)


@pytest.mark.untyped
def test_an_exported_program_takes_any_number_of_images_and_any_choice():
    x, scores, weight, _ = (t.detach() for t in draw(4, 3))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(Layer(weight), (x, scores), dynamic_shapes=(batch, batch)).module()
    for images in (1, 3, 9):
        x, scores, *_ = (t.detach() for t in draw(images, 3))
        torch.testing.assert_close(program(x, scores), unsorted(x, scores, weight, padding=1))


@pytest.mark.untyped
def test_one_image_costs_one_expert_in_a_static_graph_too():
    x, scores, weight, _ = (t.detach() for t in draw(1, 3))
    program = torch.export.export(Layer(weight), (x, scores))
    (conv,) = [node for node in program.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert conv.meta["val"].shape == (1, 4, 7, 5)
    assert conv.args[1].meta["val"].shape == (4, 6, 3, 3)
