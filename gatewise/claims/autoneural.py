"""AutoNeural's vision encoder in miniature: what it costs as images grow, and how well its layers take to integers.

The encoder is built of convolutions, each followed by a norm over channels. It is counted beside a vision transformer;
its shared key head is counted and timed; and a small encoder and a small transformer that have learnt the same pictures
are run with weights and activations of 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, between
from gatewise.claims.lab.checks import generator, median_ms, time_by_turns
from gatewise.claims.lab.clothes import Clothes
from gatewise.claims.lab.intervals import Interval, exact, t_interval
from gatewise.claims.lab.plot import Bars, Lines
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Schedule, build, init_by_fan_in, train_side_by_side
from gatewise.efficiency.cost.count import count
from gatewise.networks.image.mobilenetv5 import MobileNetV5, MobileNetV5Config, MultiQueryAttention
from gatewise.networks.image.vig import Deit, DeitConfig

SIDES = (256, 512, 768)
PUBLISHED_GMACS = (43.7, 181.8, 435.7)


def check_cost(run: Run) -> Finding:
    """Parameters and MACs of the encoder at three sizes, beside a transformer of as many parameters."""
    with torch.device("meta"):
        encoder = MobileNetV5(MobileNetV5Config()).eval()
        ours = [count(encoder, torch.empty(1, 3, side, side)).macs / 1e9 for side in SIDES]
        theirs = []
        for side in SIDES:
            run.say(f"counting a transformer at {side} pixels")
            vit = Deit(
                DeitConfig(
                    image_size=side, patch_size=14 if side % 14 == 0 else 16, embed_dim=1024, depth=24, num_heads=16
                )
            )
            theirs.append(count(vit.eval(), torch.empty(1, 3, side, side)).macs / 1e9)
        parameters = sum(p.numel() for p in encoder.parameters())
        tokens = [encoder.forward_features(torch.empty(1, 3, side, side)).shape[2:].numel() for side in SIDES]
    wrong = sum(abs(found / stated - 1) > 0.01 for found, stated in zip(ours, PUBLISHED_GMACS, strict=True))
    return Finding(
        measured=(
            Measured("parameters of the encoder", exact(parameters), "", between(294_126_912, 294_126_912)),
            Measured("sizes whose MACs are off the stated ones by over 1 %", exact(wrong), "", between(0, 0)),
            Measured("vectors for the language model at every size", exact(max(tokens)), "", between(256, 256)),
            Measured("encoder, MACs at 768 over 256 pixels", exact(ours[2] / ours[0]), "x", between(9, 10.5)),
            Measured("transformer of 304 million, the same", exact(theirs[2] / theirs[0]), "x", at_least(10)),
        ),
        charts=(
            Lines(
                "Cost of an image",
                "pixels a side",
                "billion MACs",
                SIDES,
                {"MobileNetV5, 294 M": ours, "vision transformer, 304 M": theirs},
                log="xy",
            ),
        ),
    )


class ManyHeads(MultiQueryAttention):
    """The same attention with keys and values for every head: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__(dim, num_heads, head_dim)
        self.key_all = nn.Conv2d(dim, num_heads * head_dim, 1, bias=False)
        self.value_all = nn.Conv2d(dim, num_heads * head_dim, 1, bias=False)
        self.register_module("key", None)
        self.register_module("value", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            part(y).unflatten(1, self.heads).flatten(3).transpose(2, 3)
            for part in (self.query, self.key_all, self.value_all)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)
        out = self.output(mixed.unflatten(2, x.shape[2:]))
        return x if self.gamma is None else x + out * self.gamma[:, None, None]


def time_attention(run: Run) -> Finding:
    """Time and weights of attention with one key head, at full and half resolution of keys, and with many."""
    dim, heads, head_dim = 160, 6, 32
    layers: dict[str, nn.Module] = {
        "keys for every head": build(run.seed, partial(ManyHeads, dim, heads, head_dim)),
        "one key head": build(run.seed, partial(MultiQueryAttention, dim, heads, head_dim)),
        "one key head, keys at half resolution": build(run.seed, partial(MultiQueryAttention, dim, heads, head_dim, 2)),
    }
    x = torch.randn(1, dim, 40, 40, generator=generator(run.seed))
    with torch.no_grad():
        calls: dict[str, Callable[[], Tensor]] = {name: partial(layer.eval(), x) for name, layer in layers.items()}
        times = time_by_turns(calls, run, seconds=6)
    weights = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    many, one, half = (sorted(values)[len(values) // 2] for values in times.values())
    numbers = list(weights.values())
    return Finding(
        measured=(
            Measured("weights, keys for every head over one", exact(numbers[0] / numbers[1]), "x", at_least(1.4)),
            Measured("time, the same", exact(many / one), "x"),
            Measured("time, keys at full over half resolution", exact(one / half), "x", at_least(1)),
        ),
        charts=(
            Bars(
                f"Attention on 40x40 positions, width {dim}",
                "ms, one thread",
                {name: (median_ms(samples),) * 3 for name, samples in times.items()},
            ),
        ),
    )


CONV = MobileNetV5Config(
    num_classes=10,
    in_chans=1,
    blocks=(
        ("er_k3_s1_e4_c24",),
        ("uir_a3_k5_s2_e4_c48", "uir_a5_k0_s1_e4_c48"),
        ("uir_a3_k5_s2_e4_c64", "mqa_h4_d16_c64", "uir_a0_k0_s1_e2_c64"),
    ),
    stem_dim=16,
    fused_dim=96,
    grid_size=4,
    out_indices=(0, 1, 2),
)
VIT = DeitConfig(num_classes=10, in_chans=1, image_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=4)
SCHEDULE = Schedule(steps=250, batch_size=32, lr=2e-3)


def make_encoder() -> MobileNetV5:
    """The small encoder; scales begin at 0.5, for the published 1e-5 takes thousands of steps to grow."""
    network = init_by_fan_in(MobileNetV5(CONV))
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    return network


class FramedClothes(Clothes):
    """Clothes with two pixels of background on every side, 32x32, the smallest that the encoder takes."""

    def __init__(self) -> None:
        super().__init__()
        self.train, self.test = (
            (nn.functional.pad(images, (2, 2, 2, 2), value=images.min().item()), labels)
            for images, labels in (self.train, self.test)
        )


MAKES: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV5": make_encoder,
    "vision transformer": lambda: init_by_fan_in(Deit(VIT)),
}


def quantize(x: Tensor, bits: int, scale_of: Tensor) -> Tensor:
    """`x` rounded to multiples of scale_of / (2^(bits - 1) - 1), symmetric about zero."""
    levels = 2 ** (bits - 1) - 1
    step = scale_of.clamp(min=1e-12) / levels
    return (x / step).round().clamp(-levels, levels) * step


@contextmanager
def integers(network: nn.Module, weight_bits: int, act_bits: int, ranges: dict[str, Tensor]) -> Iterator[None]:
    """Within the block, inputs and weights of convolutions and linear layers are rounded: weights per output channel,
    inputs per tensor with ranges that were seen before."""
    handles, kept = [], {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            kept[module] = module.weight.data
            largest = module.weight.data.flatten(1).abs().amax(dim=1).reshape(-1, *[1] * (module.weight.ndim - 1))
            module.weight.data = quantize(module.weight.data, weight_bits, largest)
            rounding = partial(_round_input, bits=act_bits, largest=ranges[name])
            handles.append(module.register_forward_pre_hook(rounding))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, weight in kept.items():
            module.weight.data = weight


def _round_input(module: nn.Module, inputs: tuple[Tensor, ...], bits: int, largest: Tensor) -> tuple[Tensor, ...]:
    return (quantize(inputs[0], bits, largest), *inputs[1:])


@torch.no_grad()
def input_ranges(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The largest magnitude that the input of each convolution and linear layer has on these images."""
    ranges: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ranges[name] = inputs[0].abs().max()

    handles = [
        module.register_forward_pre_hook(partial(keep, name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    network(images)
    for handle in handles:
        handle.remove()
    return ranges


@torch.no_grad()
def signal_to_noise(network: nn.Module, images: Tensor, calibration: Tensor, weight_bits: int, act_bits: int) -> float:
    """Decibels of the logits over the error that rounding makes in them."""
    expected = network(images)
    with integers(network, weight_bits, act_bits, input_ranges(network, calibration)):
        found = network(images)
    return 10 * torch.log10(expected.square().sum() / (expected - found).square().sum()).item()


def compare_quantized(run: Run) -> Finding:
    """Decibels that trained networks keep with 8-bit weights and 8-bit or 16-bit activations."""
    task: Any = FramedClothes()

    def once(seed: int) -> dict[str, float]:
        networks = {name: build(seed, make) for name, make in MAKES.items()}
        train_side_by_side(networks, task, SCHEDULE, seed=seed, run=run)
        images, calibration = task.test[0][:500], task.train[0][::100]
        found = {}
        for name, network in networks.items():
            found[f"{name}, accuracy"] = task.percent_right(network)
            for bits in (8, 16):
                found[f"{name}, W8A{bits}"] = signal_to_noise(network, images, calibration, 8, bits)
        return found

    seeds = run.repeat(3, once)
    found = {name: [one[name] for one in seeds] for name in seeds[0]}
    intervals = {name: t_interval(values) for name, values in found.items()}

    def ahead(bits: int) -> Interval:
        ours, theirs = (found[f"{name}, W8A{bits}"] for name in MAKES)
        return t_interval([a - b for a, b in zip(ours, theirs, strict=True)])

    decibels = {name: one for name, one in intervals.items() if "accuracy" not in name}
    return Finding(
        measured=(
            *(Measured(name, one, "%" if "accuracy" in name else "dB") for name, one in intervals.items()),
            Measured("MobileNetV5 ahead, W8A8", ahead(8), "dB", at_least(0)),
            Measured("MobileNetV5 ahead, W8A16", ahead(16), "dB", at_least(0)),
        ),
        charts=(
            Bars(
                "Signal over rounding noise in the logits",
                "dB",
                {name: (one.value, one.low, one.high) for name, one in decibels.items()},
                points={name: found[name] for name in decibels},
            ),
        ),
    )


CLAIM = Claim(
    statement="A convolutional vision encoder with norms behind every convolution costs less on large images than a "
    "vision transformer, gives a fixed number of vectors, and loses less when it is run in integers.",
    source="AutoNeural 2025, abstract",
    published=(
        Published("signal over quantization noise: InternViT, MobileNetV5", "28, 45 dB", "model card"),
        Published("latency at 256, 512 pixels: InternViT", "163.3, 1415.0 ms", "public digests, on an NPU"),
        Published("latency at 256, 512, 768 pixels: MobileNetV5", "28.0, 101.7, 278.1 ms", "public digests, on an NPU"),
    ),
    design="Parameters and MACs of the published encoder are counted at three sizes beside a transformer of 304 "
    "million; attention with one key head is timed against attention with as many as queries have. Then a small "
    f"encoder and a small transformer learn 10,000 pictures of clothes (Fashion-MNIST) for {SCHEDULE.steps} equal "
    "steps, and run with weights of 8 bits, per channel, and activations of 8 or 16, per tensor.",
    limits="This is the encoder alone: projector and language model, and with them time to first token and decoding "
    "speed, are not part of it. Rounding is simulated in floating point. Small transformers trained briefly have few "
    "of the outliers that make large ones hard to quantize, so that the gap may be small here, or the other way round.",
    cautions=(
        "Published latencies are an NPU's; MACs grow alike, a CPU's or GPU's times need not.",
        "The weights used with the published encoder are Gemma 3n's; AutoNeural's own cannot be loaded.",
    ),
    budget_s=170,
    parts=(
        Part("Cost", "Parameters and MACs at 256, 512 and 768 pixels; the fixed grid.", check_cost, 15),
        Part("Shared keys", "Weights and time of attention layers, 40x40 positions.", time_attention, 10),
        Part("Integers", "Signal over rounding noise after equal training, three seeds.", compare_quantized, 120),
    ),
)
