"""Every network compiles whole and exports with any batch size."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import SMALL, small_model
from tests.networks.image.test_contract import images, sizes

pytestmark = [pytest.mark.untyped, pytest.mark.parametrize("name", SMALL)]

# Whether a graph is whole is decided before any backend sees it. What comes behind (decompositions, gradients,
# operators without storage) takes three times as long, and the first test goes through it.
TRACED = {"fullgraph": True, "backend": "eager"}


def test_compiles_without_a_graph_break(name):
    model, x = small_model(name), images(name).requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    gradient = torch.autograd.grad(compiled(x).square().sum(), x)[0]
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5)


def test_training_compiles_without_a_graph_break(name):
    model, x = small_model(name, drop_path_rate=0.2).train(), images(name)
    torch._dynamo.reset()
    torch.compile(model, **TRACED)(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_exports_with_a_dynamic_batch(name):
    model, x = small_model(name), images(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for other in (x, images(name, 5)):
        assert torch.allclose(program.module()(other), model(other), rtol=1e-4, atol=1e-5)


def test_pyramid_compiles_without_a_graph_break(name):
    model, x = small_model(name), torch.randn(1, 3, *sizes(name)[-1])
    torch._dynamo.reset()
    compiled = torch.compile(model.forward_pyramid, **TRACED)
    for level, expected in zip(compiled(x), model.forward_pyramid(x), strict=True):
        assert torch.allclose(level, expected, rtol=1e-4, atol=1e-4)
