"""Quantization in miniature: 8-bit integers cost little accuracy, a quarter of the size and half of the time.

What decides is where scales are. One scale per weight fails where the channels of a folded depthwise convolution have
ranges that differ by orders of magnitude; a scale per channel does not see that difference, and training with simulated
quantization wins back what is left, with 4-bit weights too.

A network of seconds has no such channels by itself. They are made here by the scaling symmetry of a ReLU: the float
network stays the same function. How far ranges are spread is a choice. A factor on a kernel has to be undone in the
maps around it, and maps have one scale each, whatever weights have: factors of 0.01 to 100 on the maps themselves would
ruin their codes, and with them a scale per channel as well, which says nothing about weights. So the factors of
depthwise kernels span three decades, and the map in front and the map behind carry one and a half each: the difference
of weights is as large as in networks in use, and maps keep eight codes at least for their quietest channel. What
happens where the map in front carries everything is shown beside it, without a verdict. The symmetry is exact for
ReLU, and not for ReLU6: MobileNetV2's configuration is left aside for a separable network with ReLU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.catalog.registry import family_of
from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, relative_difference, time_by_turns, times_faster
from gatewise.claims.lab.clothes import Clothes
from gatewise.claims.lab.comparison import Comparison
from gatewise.claims.lab.intervals import bootstrap, exact, t_interval
from gatewise.claims.lab.plot import Bars
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Schedule, build, one_thread_each, train_side_by_side
from gatewise.claims.quantization.identities import (
    LAYERS,
    code_differences,
    correction_error,
    training_against_inference,
    zeros_missed,
)
from gatewise.claims.quantization.network import SeparableNetwork, disparity, disperse
from gatewise.efficiency.acceleration.export import onnx_bytes, onnx_session
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.quantization.quantize import QuantizedModel, quantize
from gatewise.efficiency.quantization.weights import quantize_weights
from gatewise.fidelity.fingerprint import fill
from gatewise.methods.quantization_aware import convert, prepare_qat
from gatewise.networks.image.mobilenetv2 import MobileNetV2, layouts
from gatewise.ops.quantize import signal_to_noise

NETWORK = "mobilenetv2_100"

CALIBRATION = Published("lost without training, 8 bits, a scale per channel", "within 2 %", "abstract")
TRAINING = Published("lost with training, 8 bits", "within 1 %", "abstract")
FOUR_BITS = Published("lost with training, 4-bit weights", "2 % to 10 %, more for smaller networks", "abstract")
SIZE = Published("model size in 8 bits", "4x smaller", "abstract")
SPEED = Published("speed of 8 bits on CPUs", "2x to 3x", "abstract")
COLLAPSE = Published(
    "MobileNetV2's top-1: float; calibrated with one scale per weight; with a scale per channel",
    "about 0.719; 0.001; 0.698",
    "results tables, recalled",
)


def integers(model: nn.Module, batches: Any, **options: Any) -> QuantizedModel:
    """`quantize` on one thread; what it warns of with one scale per weight is what is measured here."""
    with one_thread_each(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="one scale for all channels of depthwise convolutions")
        return quantize(model, batches, **options)


def check_identities(run: Run) -> Finding:
    """Check the exact properties of kernels, batch norm in training, and grids."""
    differences = {}
    for name, make in LAYERS.items():
        run.say(f"a {name} convolution in integers")
        conv = build(run.seed, make)
        x = torch.randn(4, conv.in_channels, 12, 12, generator=generator(run.seed))
        differences[name] = code_differences(conv, x)
    return Finding(
        measured=(
            *(
                Measured(f"{name}, onnxruntime against {what}", exact(codes), "codes of 255", at_most(1))
                for name, both in differences.items()
                for what, codes in zip(("simulation", "integer arithmetic"), both, strict=True)
            ),
            Measured("grids without an exact 0, of 1,000", exact(zeros_missed(run.seed)), "", between(0, 0)),
            Measured(
                "correction against batch norm in training: relative difference",
                exact(correction_error(run.seed)),
                "",
                at_most(1e-6),
            ),
            Measured(
                "training minus inference, frozen", exact(training_against_inference(True, run.seed)), "", between(0, 0)
            ),
            Measured("the same before the freeze", exact(training_against_inference(False, run.seed))),
        ),
        remark="A value that lies between two codes to the last bit may fall to either side.",
    )


def mobilenet() -> MobileNetV2:
    """MobileNetV2 with deterministic weights: each tensor is drawn from its name in torchvision's checkpoint."""
    family = family_of(NETWORK)
    config = family.variants[NETWORK].config
    layout = layouts(config)[0]
    network = family.network(config).eval()
    filled = {key: fill(layout.to_theirs(key), own.shape) for key, own in network.state_dict().items() if own.ndim}
    network.load_state_dict(filled, strict=False)
    return network


@torch.no_grad()
def measure_weights(run: Run) -> Finding:
    """Signal over quantization noise in the logits of MobileNetV2, where weights alone are rounded."""
    network = mobilenet()
    x = torch.randn(1, 3, 160, 160, generator=generator(run.seed))
    with one_thread_each():
        logits = network(x)
        noise = {
            (bits, per_channel): signal_to_noise(logits, quantize_weights(network, bits, per_channel=per_channel)(x))
            for bits in (8, 4)
            for per_channel in (False, True)
        }
    names = {False: "one scale per weight", True: "a scale per channel"}
    gains = {bits: noise[bits, True] - noise[bits, False] for bits in (8, 4)}
    return Finding(
        measured=(
            *(Measured(f"{bits} bits, {names[own]}", exact(value), "dB") for (bits, own), value in noise.items()),
            *(
                Measured(f"{bits} bits, gained by a scale per channel", exact(gain), "dB", at_least(3))
                for bits, gain in gains.items()
            ),
        ),
        charts=(
            Bars(
                "MobileNetV2's logits, weights quantized alone",
                "signal to quantization noise, dB",
                {f"{bits} bits: {names[own]}": (value,) * 3 for (bits, own), value in noise.items()},
            ),
        ),
        remark="Weights are drawn at random, and differ less between channels than trained ones do.",
    )


SPREAD = 1000.0
"""The largest factor of a depthwise kernel over the smallest."""
FLOAT = Schedule(steps=600, batch_size=64, lr=5e-3)
TUNING = Schedule(steps=120, batch_size=64, lr=3e-4, weight_decay=0.0)
AWARE: dict[str, Any] = {"activation_delay": 12, "freeze_after": 40, "decay": 0.9, "input_shape": (1, 28, 28)}
"""Activations are rounded after a tenth of the steps, batch norms are frozen after a third."""
SEEDS = 5
CALIBRATION_BATCHES = 8

ORIGINAL, TRAINED_ON = "float", "float: trained on"
COARSE, FINE, FOUR = "8 bits: one scale per weight", "8 bits: a scale per channel", "4-bit weights: a scale per channel"
CALIBRATED: dict[str, dict[str, Any]] = {COARSE: {"per_channel": False}, FINE: {}, FOUR: {"weight_bits": 4}}
TRAINED, FOUR_TRAINED = "8 bits: trained", "4-bit weights: trained"
AWARE_BITS = {TRAINED: 8, FOUR_TRAINED: 4}
ONE_SIDED = f"{FINE}, map in front carries all"


def alike(form: str) -> str:
    """The name of a form of the network without factors."""
    return f"{form}, channels alike"


@dataclass(frozen=True)
class Forms:
    """One float network as it was trained, with unlike channels, and what was trained on from there."""

    plain: SeparableNetwork
    dispersed: SeparableNetwork
    tuned: dict[str, nn.Module]


def train_forms(seed: int, task: Clothes, run: Run) -> Forms:
    """Train in float; then on, side by side, in float and for integers."""
    plain = build(seed, SeparableNetwork)
    train_side_by_side({ORIGINAL: plain}, task, FLOAT, seed=seed, run=run)
    dispersed = disperse(deepcopy(plain), SPREAD, generator(seed))
    tuned: dict[str, nn.Module] = {TRAINED_ON: deepcopy(dispersed)}
    for name, bits in AWARE_BITS.items():
        tuned[name] = prepare_qat(deepcopy(dispersed), weight_bits=bits, **AWARE)
    train_side_by_side(tuned, task, TUNING, seed=seed, run=run)
    return Forms(plain, dispersed, tuned)


def measure_forms(forms: Forms, task: Clothes, seed: int, run: Run) -> dict[str, float]:
    """Accuracies in percent: of floats in PyTorch, of integers in onnxruntime."""
    batches = [task.batch(64, generator(seed + index))[0] for index in range(CALIBRATION_BATCHES)]
    one_sided = disperse(deepcopy(forms.plain), SPREAD, generator(seed), behind=0)
    makes: dict[str, Callable[[], QuantizedModel]] = {
        **{name: partial(integers, forms.dispersed, batches, **options) for name, options in CALIBRATED.items()},
        **{alike(name): partial(integers, forms.plain, batches, **CALIBRATED[name]) for name in (COARSE, FOUR)},
        **{name: partial(convert, forms.tuned[name], batches) for name in AWARE_BITS},
        ONE_SIDED: partial(integers, one_sided, batches),
    }
    floats = {ORIGINAL: forms.dispersed, TRAINED_ON: forms.tuned[TRAINED_ON]}
    with one_thread_each():
        found = {name: task.percent_right(network) for name, network in floats.items()}
        for name, make in makes.items():
            run.check_time()
            run.say(f"seed {seed}, {name}")
            found[name] = task.percent_right(make().as_module())
    return found


@torch.no_grad()
def dispersion(forms: Forms, images: Tensor) -> tuple[float, float, float]:
    """Return the relative change of the outputs, and the kernels' disparity before and after the factors."""
    difference = relative_difference(forms.dispersed(images), forms.plain(images))
    return difference, disparity(forms.plain), disparity(forms.dispersed)


def compare_forms(run: Run) -> Finding:
    """Points that a trained network loses in each form, within seeds."""
    task = Clothes()

    def once(seed: int) -> tuple[dict[str, float], tuple[float, float, float]]:
        forms = train_forms(seed, task, run)
        return measure_forms(forms, task, seed, run), dispersion(forms, task.test[0][:100])

    seeds = run.repeat(SEEDS, once)
    differences, before, after = zip(*(figures for _, figures in seeds), strict=True)
    found = Comparison({name: [accuracy[name] for accuracy, _ in seeds] for name in seeds[0][0]})
    unlike = (
        Measured("outputs changed by the factors: relative difference", exact(max(differences)), "", at_most(1e-5)),
        Measured("widest depthwise kernel over narrowest, channels alike", t_interval(before), "x"),
        Measured("the same with factors", t_interval(after), "x"),
    )
    return Finding(
        measured=(*unlike, *_losses(found)),
        charts=(found.chart("Accuracy on clothes, integers in onnxruntime", "% of 2,000 test images", (0, 100)),),
        remark="Channels alike: the network before the factors, which does well with one scale per weight. Where the "
        "map in front carries a factor whole, its quiet channels lose their codes, and no scales of weights help.",
    )


def _losses(found: Comparison) -> tuple[Measured, ...]:
    """Points below the float network: what is expected of each form, and what stands beside it."""
    lost = {name: found.gap(ORIGINAL, name) for name in found.accuracy}
    beside = (alike(COARSE), alike(FOUR), ONE_SIDED, TRAINED_ON)
    return (
        Measured("accuracy, float", found.intervals[ORIGINAL], "%"),
        # The paper's network answers at random; a form that loses less than is called harmless does not collapse.
        Measured(f"lost, {COARSE}", lost[COARSE], "points", at_least(20, contrary_below=2), COLLAPSE),
        Measured(f"lost, {FINE}", lost[FINE], "points", at_most(2), CALIBRATION),
        Measured(f"lost, {TRAINED}", lost[TRAINED], "points", at_most(1), TRAINING),
        Measured(f"lost, {FOUR}", lost[FOUR], "points", at_least(10, contrary_below=2)),
        Measured(f"lost, {FOUR_TRAINED}", lost[FOUR_TRAINED], "points", at_most(10), FOUR_BITS),
        Measured(
            "4-bit weights, won back by training",
            found.gap(FOUR_TRAINED, FOUR),
            "points",
            at_least(lost[FOUR].value / 2, contrary_below=0),
        ),
        *(Measured(f"lost, {name}", lost[name], "points") for name in beside),
    )


@cache
def integer_mobilenet(seed: int) -> QuantizedModel:
    """MobileNetV2 at 224 pixels, weights and activations in 8 bits."""
    return integers(mobilenet(), torch.randn(4, 3, 224, 224, generator=generator(seed)))


@torch.no_grad()
def measure_size(run: Run) -> Finding:
    """Files of MobileNetV2 as float32 and as codes."""
    network, images = mobilenet(), torch.randn(4, 3, 224, 224, generator=generator(run.seed))
    forms = {"8 bits": integer_mobilenet(run.seed)}
    for name, bits in (("8-bit weights alone", 8), ("4-bit weights alone", 4)):
        run.check_time()
        run.say(name)
        forms[name] = integers(network, images, weights_only=True, weight_bits=bits)
    reports = {name: form.report for name, form in forms.items()}
    ratios = {name: report.bytes_before / report.bytes_after for name, report in reports.items()}
    alike = F.cosine_similarity(forms["8 bits"](images), network(images)).min().item()
    before = reports["8 bits"].bytes_before
    megabytes = {"float32": before / 1e6} | {name: report.bytes_after / 1e6 for name, report in reports.items()}
    return Finding(
        measured=(
            Measured("float32", exact(before / 1e6), "MB"),
            # Scales, biases of 32 bits and the graph itself are no smaller.
            Measured("8 bits", exact(ratios["8 bits"]), "x smaller", at_least(3.5), SIZE),
            Measured("8-bit weights alone", exact(ratios["8-bit weights alone"]), "x smaller", at_least(3.5), SIZE),
            Measured("4-bit weights alone", exact(ratios["4-bit weights alone"]), "x smaller"),
            Measured("8 bits, cosine to the float logits, worst of 4", exact(alike), "", at_least(0.97)),
        ),
        charts=(Bars("File of MobileNetV2", "MB", {name: (size,) * 3 for name, size in megabytes.items()}),),
    )


def has_vnni() -> bool:
    """Whether this processor multiplies 8-bit integers and adds them up in 32 bits with one instruction (x86)."""
    return torch.cpu._is_vnni_supported()


def measure_speed(run: Run) -> Finding:
    """Latency of MobileNetV2 at 224 pixels in onnxruntime, one thread, as float32 and in 8 bits."""
    x = torch.randn(1, 3, 224, 224, generator=generator(run.seed))
    quantized = integer_mobilenet(run.seed)
    plain = onnx_session(onnx_bytes(fold(mobilenet()), x), threads=1)
    run.say("timing both forms")
    times = time_by_turns({"float32": partial(plain, x), "8 bits": partial(quantized, x)}, run, 15, max_rounds=200)
    per_image = {name: bootstrap([1e3 * seconds for seconds in samples]) for name, samples in times.items()}
    expected = at_least(1.5, contrary_below=1) if has_vnni() else None
    return Finding(
        measured=(
            *(Measured(name, ms, "ms an image") for name, ms in per_image.items()),
            Measured(
                "8 bits over float32", times_faster(times["float32"], times["8 bits"]), "x faster", expected, SPEED
            ),
        ),
        charts=(
            Bars(
                "MobileNetV2 in onnxruntime",
                "ms an image, one thread",
                {name: (ms.value, ms.low, ms.high) for name, ms in per_image.items()},
            ),
        ),
        remark=f"This processor has {'' if expected else 'no '}VNNI instructions, for which the figure is expected.",
    )


CLAIM = Claim(
    statement="Weights with a scale per channel and activations with one scale each, 8 bits, cost hardly any accuracy, "
    "without training; training with simulated quantization costs less still, and makes 4-bit weights usable. Files "
    "are a quarter, and integers run two to three times as fast on a CPU.",
    source="Krishnamoorthi 2018, abstract",
    published=(CALIBRATION, TRAINING, FOUR_BITS, SIZE, SPEED, COLLAPSE),
    design="Integer kernels, batch norm in training and grids are held to what holds of them exactly; the weights of "
    "MobileNetV2 are rounded with one scale and with a scale per channel; a separable network of 50 thousand "
    f"parameters learns 10,000 pictures of clothes (Fashion-MNIST, {FLOAT.steps} steps), gets depthwise kernels whose "
    f"ranges span {SPREAD:,.0f} without changing its function, and is quantized: calibrated, or trained for "
    f"{TUNING.steps} steps more. All its accuracies are of integers in onnxruntime. MobileNetV2 is weighed and timed.",
    limits="A small network and small images. Channels of this network are alike until they are made to differ, so "
    "that what one scale per weight costs is what the chosen factors make it cost. Times are a server's CPU, not a "
    "phone's.",
    cautions=(
        "The paper's figures per network are quoted from memory, and are approximate.",
        "A scale per channel mends weights alone: where a map's own channels differ by orders of magnitude, its quiet "
        "ones lose their codes.",
        "8 bits are faster where the processor has instructions for them, and the runtime takes uint8 activations "
        "with int8 weights; x86 without VNNI needs weights of 7 bits.",
    ),
    budget_s=240,
    parts=(
        Part(
            "Identities",
            "A convolution with ReLU in onnxruntime against its simulation and against integer arithmetic; batch norm "
            "corrected for rounded weights against batch norm in training; training against inference once batch norm "
            "is frozen.",
            check_identities,
            seconds=10,
        ),
        Part(
            "Weights alone",
            "MobileNetV2 at 160 pixels, batch norm folded, weights rounded to 8 and 4 bits, with one scale per weight "
            "and with a scale per channel.",
            measure_weights,
            seconds=5,
        ),
        Part(
            "Accuracy",
            f"One trained network as float32, calibrated and trained for integers; paired within {SEEDS} seeds.",
            compare_forms,
            seconds=170,
        ),
        Part(
            "Size",
            "ONNX files of MobileNetV2: float32, 8 bits, and weights alone.",
            measure_size,
            seconds=15,
        ),
        Part(
            "Speed",
            "MobileNetV2 at 224 pixels in onnxruntime, one thread, batch 1: float32 and 8 bits, interleaved.",
            measure_speed,
            seconds=20,
        ),
    ),
)
