"""HGF in miniature: what a gated low-rank correction wins back of what ternary weights lose.

Decoders of the same shape learn to predict the bytes of Python source: in full precision, ternary, ternary with gated
corrections, and in full precision with differential attention.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, relative_difference
from gatewise.claims.lab.intervals import exact, t_interval
from gatewise.claims.lab.plot import Bars, Lines
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.tokens import ByteText
from gatewise.claims.lab.training import Schedule, build, init_by_fan_in, train_side_by_side
from gatewise.layers.ternary import HybridGatedLinear, TernaryLinear
from gatewise.methods.pack_ternary import pack_ternary
from gatewise.networks.sequence.hgf import HGF, HGFConfig
from gatewise.ops.fake_quantize import TERNARY, fake_quantize

WIDTH = 64


def with_best_correction(weight: torch.Tensor, rank: int) -> HybridGatedLinear:
    """A map whose correction is the best of this rank for what rounding takes from `weight`."""
    layer = HybridGatedLinear(weight.shape[1], weight.shape[0], rank).to(weight.dtype)
    u, s, vh = torch.linalg.svd(weight - fake_quantize(weight, TERNARY))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.lora_a.copy_(vh[:rank])
        layer.lora_b.copy_(u[:, :rank] * s[:rank] / layer.gamma)
    return layer


def check_layer(run: Run) -> Finding:
    """A closed gate, the error that is left at growing rank, and the packed form."""
    draw = generator(run.seed)
    weight = torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64)
    x = torch.randn(256, WIDTH, generator=draw, dtype=torch.float64)
    exactly = x @ weight.T
    ranks = (1, 4, 8, 16, 32, WIDTH)
    errors = []
    with torch.no_grad():
        for rank in ranks:
            y = with_best_correction(weight, rank)(x)
            errors.append(((y - exactly).norm() / exactly.norm()).item())
        layer = with_best_correction(weight, 8)
        layer.gate.zero_()
        closed = relative_difference(layer(x), TernaryLinear.forward(layer, x))
        integers = torch.randint(-127, 128, (64, WIDTH), generator=draw).float()
        plain = TernaryLinear(WIDTH, WIDTH)
        packed = relative_difference(plain.packed()(integers), plain(integers))
    bytes_per_weight = plain.packed().nbytes / plain.weight.numel()
    rises = sum(later > earlier for earlier, later in pairwise(errors))
    return Finding(
        measured=(
            Measured("difference of a closed gate from the ternary map", exact(closed), "", between(0, 0)),
            Measured("error left without a correction's rank limit", exact(errors[-1]), "", at_most(1e-10)),
            Measured("times the error rises with the rank", exact(rises), "", between(0, 0)),
            Measured("packed against unpacked, integer inputs", exact(packed), "", at_most(1e-6)),
            Measured("bytes per packed weight over float16's", exact(bytes_per_weight / 2), "", at_most(0.126)),
            Measured("share of zeros among ternary codes", exact(plain.zero_share()), "", between(0.2, 0.45)),
        ),
        charts=(
            Lines(
                "What rounding to three values takes, and a best correction gives back",
                "rank of the correction",
                "relative error of the output",
                list(ranks),
                {f"{WIDTH}x{WIDTH}": [max(error, 1e-12) for error in errors]},
                log="x",
            ),
        ),
    )


SHAPE: dict[str, Any] = {"vocab_size": 256, "dim": WIDTH, "depth": 2, "num_heads": 4, "hidden_dim": 128, "rank": 8}
KINDS: dict[str, dict[str, Any]] = {
    "full precision": {"attention": "softmax", "weights": "full"},
    "ternary": {"attention": "softmax", "weights": "ternary"},
    "HGF": {"attention": "softmax", "weights": "hybrid", "correct_mlp": True},
    "differential, full": {"attention": "differential", "weights": "full"},
}
SCHEDULE = Schedule(steps=900, batch_size=8, lr=4e-3)
CONTEXT = 64


def make_network(kind: str) -> HGF:
    """A decoder of one of the kinds."""
    return init_by_fan_in(HGF(HGFConfig(**SHAPE, **KINDS[kind])))


def bytes_of(network: nn.Module) -> int:
    """Of the blocks as they are deployed: packed where ternary, float16 otherwise."""
    has_ternary = any(isinstance(module, TernaryLinear) for module in network.modules())
    blocks = (pack_ternary(network) if has_ternary else network).get_submodule("blocks")
    full = sum(2 * parameter.numel() for parameter in blocks.parameters())
    return full + sum(buffer.numel() * buffer.element_size() for name, buffer in blocks.named_buffers() if _kept(name))


def _kept(name: str) -> bool:
    """Whether a buffer is stored: rotary frequencies are computed anew."""
    return not name.endswith("frequencies")


def account_memory(run: Run) -> Finding:
    """Parameters and bytes that the correction adds to the ternary blocks."""
    networks = {kind: build(run.seed, partial(make_network, kind)) for kind in ("full precision", "ternary", "HGF")}
    size = {kind: bytes_of(network) for kind, network in networks.items()}
    count = {
        kind: sum(parameter.numel() for parameter in network.get_submodule("blocks").parameters())
        for kind, network in networks.items()
    }
    reported = Published("memory of the correction over the ternary backbone", "12-15 %", "abstract")
    return Finding(
        measured=(
            Measured(
                "ternary blocks over float16 blocks, bytes",
                exact(size["ternary"] / size["full precision"]),
                "",
                at_most(0.14),
            ),
            Measured("parameters that the correction adds", exact(100 * (count["HGF"] / count["ternary"] - 1)), "%"),
            Measured(
                "bytes that it adds, in float16", exact(100 * (size["HGF"] / size["ternary"] - 1)), "%", None, reported
            ),
        ),
        remark="A correction of rank d / 8 in float16 costs more bytes than the ternary weights it corrects. The "
        "published 12-15 % can be a count of parameters, or bytes with embeddings counted in; bytes of the blocks "
        "alone they cannot be at a rank that is a fixed share of the width.",
    )


def compare_weights(run: Run) -> Finding:
    """Validation loss after equal training, over several seeds."""
    task = ByteText(CONTEXT)

    def once(seed: int) -> dict[str, float]:
        networks = {kind: build(seed, partial(make_network, kind)) for kind in KINDS}
        train_side_by_side(networks, task, SCHEDULE, seed=seed, run=run)
        return {kind: task.validation_loss(network) for kind, network in networks.items()}

    seeds = run.repeat(4, once)
    losses = {kind: [one[kind] for one in seeds] for kind in KINDS}
    intervals = {kind: t_interval(values) for kind, values in losses.items()}

    def gap(worse: str, better: str) -> list[float]:
        return [a - b for a, b in zip(losses[worse], losses[better], strict=True)]

    lost, won = gap("ternary", "full precision"), gap("ternary", "HGF")
    share = [100 * win / loss for win, loss in zip(won, lost, strict=True) if loss > 0]
    recovered = Published("share of the gap that HGF wins back", "54.8 %", "from the losses in the abstract", 54.8)
    return Finding(
        measured=(
            *(Measured(f"validation loss, {kind}", interval, "nats/byte") for kind, interval in intervals.items()),
            Measured("ternary minus full precision", t_interval(lost), "nats/byte", at_least(0)),
            Measured("ternary minus HGF", t_interval(won), "nats/byte", at_least(0)),
            *(
                [Measured("share of the gap that HGF wins back", t_interval(share), "%", None, recovered)]
                if share
                else []
            ),
            Measured(
                "differential, full minus full precision", t_interval(gap("differential, full", "full precision"))
            ),
        ),
        charts=(
            Bars(
                "Validation loss on Python source",
                "nats per byte",
                {kind: (one.value, one.low, one.high) for kind, one in intervals.items()},
                points=losses,
            ),
        ),
        remark="The order is what this size can show. The share won back depends on rank, learning rates and length "
        "of training; it is reported, not judged. That full-precision differential attention is unstable, as the paper "
        "says, is not to be expected in so short a run.",
    )


CLAIM = Claim(
    statement="A low-rank correction in full precision, let in by one learned gate per projection, wins back about "
    "half of the quality that 1.58-bit weights lose, for little memory.",
    source="Trejo Pizzo 2026, abstract",
    published=(
        Published("TinyStories validation loss: FP16, HGF, BitNet b1.58", "0.8490, 0.9306, 1.0294", "abstract"),
        Published("differential attention in full precision", "above 1.68, unstable", "abstract"),
    ),
    design="A single map is examined: closed gate, the error left at each rank, the packed form. Bytes and parameters "
    f"of a decoder's blocks are counted. Then four decoders (two blocks of width {WIDTH}) are trained on bytes of "
    f"Python's standard library for {SCHEDULE.steps} equal steps and validated on unseen text.",
    limits="A few hundred steps of a small decoder on source code. Corrections are on all maps, not on attention's "
    "alone, without the schedule of the gates. The published code is not available: ranks, initial values and "
    "learning rates here are ours.",
    cautions=(
        "The sign of the difference shows at this size; the published 55 % does not, and should not be expected.",
        "Ternary training is no faster or smaller by itself: the latent weights are there in full. Pack for inference.",
    ),
    budget_s=230,
    parts=(
        Part("One map", "Closed gate, best corrections of growing rank, packed weights.", check_layer, 2),
        Part("Memory", "Bytes and parameters of ternary blocks with and without corrections.", account_memory, 2),
        Part(
            "Text",
            f"Four decoders, {SCHEDULE.steps} steps of {SCHEDULE.batch_size} windows of {CONTEXT} bytes; differences "
            "within a seed.",
            compare_weights,
            200,
        ),
    ),
)
