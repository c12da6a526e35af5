from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops.chunked_cross_entropy import chunked_cross_entropy, chunked_cross_entropy_reference


def inputs(batch=(5, 7), dim=6, vocab=11, dtype=torch.float64, ignored=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*batch, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocab, batch, generator=generator)
    targets[torch.rand(batch, generator=generator) < ignored] = -100
    return hidden, weight, targets


def assert_equal_with_gradients(hidden, weight, targets, **options):
    expected = chunked_cross_entropy_reference(hidden, weight, targets, reduction=options.get("reduction", "mean"))
    found = chunked_cross_entropy(hidden, weight, targets, **options)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    gradients = [torch.autograd.grad(loss, (hidden, weight), upstream) for loss in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(1, 40),
    st.sampled_from(["mean", "sum", "none"]),
)
def test_values_and_gradients_are_those_of_all_logits_at_once(batch, time, dim, vocab, chunk_size, reduction):
    hidden, weight, targets = inputs((batch, time), dim, vocab)
    targets[0, 0] = 0
    assert_equal_with_gradients(hidden, weight, targets, reduction=reduction, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4, 35, None])
def test_gradients_pass_the_numerical_check(chunk_size):
    hidden, weight, targets = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, chunk_size=chunk_size), (hidden, weight)
    )
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, chunk_size=chunk_size, reduction="none"), (hidden, weight)
    )


def test_non_contiguous_inputs_are_taken():
    hidden, weight, targets = inputs((7, 5))
    assert_equal_with_gradients(hidden.transpose(0, 1), weight, targets.T, chunk_size=3)


def test_a_flat_batch_and_other_ignored_indices_are_taken():
    hidden, weight, targets = inputs((9,))
    targets[targets == -100] = 3
    expected = chunked_cross_entropy_reference(hidden, weight, targets, ignore_index=3)
    torch.testing.assert_close(chunked_cross_entropy(hidden, weight, targets, ignore_index=3, chunk_size=2), expected)


def test_ignored_targets_have_no_loss_and_no_gradient():
    hidden, weight, targets = inputs((6,))
    targets[:3] = -100
    losses = chunked_cross_entropy(hidden, weight, targets, reduction="none", chunk_size=2)
    assert losses[:3].tolist() == [0, 0, 0]
    assert (torch.autograd.grad(losses.sum(), hidden)[0][:3] == 0).all()


def test_without_a_target_that_counts_the_mean_is_nan_as_in_pytorch_and_the_sum_is_zero():
    hidden, weight, targets = inputs(ignored=1.1)
    assert chunked_cross_entropy(hidden, weight, targets).isnan()
    assert chunked_cross_entropy(hidden, weight, targets, reduction="sum") == 0


@pytest.mark.parametrize("which", [0, 1])
def test_what_needs_no_gradient_gets_none(which):
    hidden, weight, targets = inputs()
    both = [hidden, weight]
    both[which] = both[which].detach()
    chunked_cross_entropy(*both, targets).backward()
    assert [tensor.grad is None for tensor in (hidden, weight)] == [which == 0, which == 1]


def test_bf16_stays_close_to_float32():
    hidden, weight, targets = inputs((64,), 32, 50, torch.float32)
    reference = chunked_cross_entropy(hidden, weight, targets)
    wanted = torch.autograd.grad(reference, (hidden, weight))
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    loss = chunked_cross_entropy(*half, targets, chunk_size=5)
    assert loss.dtype == torch.float32
    # bf16 keeps 8 bits: logits of about 15 are off by up to 0.03 each.
    torch.testing.assert_close(loss, reference, rtol=2e-2, atol=2e-2)
    for found, expected in zip(torch.autograd.grad(loss, half), wanted, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() / expected.norm() < 0.03


def test_autocast_takes_the_products_in_its_precision_and_returns_float32_gradients():
    hidden, weight, targets = inputs((64,), 32, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, chunk_size=7)
    half = chunked_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, chunk_size=7)
    assert torch.equal(loss, half)
    assert {gradient.dtype for gradient in torch.autograd.grad(loss, (hidden, weight))} == {torch.float32}


def largest_allocation(run) -> int:
    """The most bytes that one operator within `run()` asks for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    return max(event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")


def test_neither_pass_holds_more_logits_than_a_chunk():
    hidden, weight, targets = inputs((400,), 4, 300, torch.float32)
    all_logits, chunk = 400 * 300 * 4, 10 * 300 * 4
    chunked = largest_allocation(lambda: chunked_cross_entropy(hidden, weight, targets, chunk_size=10).backward())
    at_once = largest_allocation(lambda: chunked_cross_entropy_reference(hidden, weight, targets).backward())
    assert at_once >= all_logits
    assert chunked <= chunk + 64  # bytes to fill up the last line of the cache


@pytest.mark.untyped
def test_it_compiles_without_a_graph_break_and_gives_the_same():
    hidden, weight, targets = inputs((3, 5), dtype=torch.float32)

    def step(h, w, y):
        return chunked_cross_entropy(h * 2, w, y, chunk_size=4)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(hidden, weight, targets), step(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    )


@pytest.mark.untyped
def test_the_operators_keep_the_rules_of_custom_operators():
    hidden, weight, targets = inputs((6,), dtype=torch.float32)
    torch.library.opcheck(torch.ops.gatewise.linear_cross_entropy.default, (hidden, weight, targets, -100, 4))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, y: (h[..., :5], w, y), "hidden states"),
        (lambda h, w, y: (h, w, y[:, :3]), "hidden states"),
        (lambda h, w, y: (h, w, y.int()), "targets must be int64, not torch.int32"),
        (lambda h, w, y: (h.float(), w, y), "one type, not torch.float32 and torch.float64"),
        (lambda h, w, y: (h, w, y.fill_(11)), "targets must be from 0 to 10 or -100, not 11"),
        (lambda h, w, y: (h, w, y.fill_(-1)), "targets must be from 0 to 10 or -100, not -1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(*change(*inputs()))


@pytest.mark.untyped
@pytest.mark.parametrize("options", [{"reduction": "max"}, {"chunk_size": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        chunked_cross_entropy(*inputs(), **options)
