"""ViG in miniature: a memory read from both ends that costs what the pixels do, and what its parts are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.catalog.factory import create_model
from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, median_ms, relative_difference, time_by_turns, times_faster
from gatewise.claims.lab.intervals import exact, t_interval
from gatewise.claims.lab.plot import Bars, Lines
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.symbols import NearOrFar
from gatewise.claims.lab.training import Batch, Schedule, build, init_by_fan_in, train_side_by_side
from gatewise.efficiency.cost.count import count
from gatewise.networks.image.vig import GatedLinearMixer, Map, Vig, VigConfig, log_decays
from gatewise.ops.gated_linear_attention import gated_linear_attention
from gatewise.ops.gated_linear_attention_2d import gated_linear_attention_2d, gated_linear_attention_2d_reference


def tensors(grid: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Queries, keys, values and both log gates of three heads, as an untrained layer has them."""
    draw = generator(seed)
    q, k, v, f, r = (torch.randn(1, *grid, 3, width, generator=draw, dtype=dtype) for width in (32, 32, 64, 32, 32))
    return [q, k, v, *(F.logsigmoid(g) / 16 for g in (f, r))]


def check_forms(run: Run) -> Finding:
    """The operator against both recurrences, soft and hard gates, and a map that is turned around."""
    q, k, v, f, r = soft = tensors((14, 14), run.seed)
    hard = [q, k, v, 100 * f, 100 * r]
    single: list[Any] = [x.float() for x in soft]
    straight = gated_linear_attention_2d(q, k, v, f, r)
    expected = gated_linear_attention_2d_reference(q, k, v, f, r)
    turned = gated_linear_attention_2d(*(x.flip(1, 2) for x in (q, k, v, r, f)))
    errors = {
        "against both recurrences, float64": (straight, expected, 1e-12),
        "the same under gates 100 times as hard": (
            gated_linear_attention_2d(*hard),
            gated_linear_attention_2d_reference(*hard),
            1e-12,
        ),
        "the same in float32": (gated_linear_attention_2d(*single).double(), expected, 5e-6),
        "a map turned around, with the gates swapped": (turned.flip(1, 2), straight, 1e-12),
    }
    return Finding(
        measured=tuple(
            Measured(what, exact(relative_difference(ours, theirs)), "", at_most(largest))
            for what, (ours, theirs, largest) in errors.items()
        ),
    )


def check_reach(run: Run) -> Finding:
    """Of how many positions of a 14x14 map the first position's output depends, after a single mixer."""
    x = torch.randn(1, 14, 14, 192, generator=generator(run.seed)).requires_grad_()
    seen = {}
    for name, kind in {"the mixer": GatedLinearMixer, "forwards alone": ForwardsOnly}.items():
        mixer = build(run.seed, partial(kind, 192, 3, VigConfig()))
        gradient = torch.autograd.grad(mixer(x)[0, 0, 0].square().sum(), x)[0]
        seen[name] = (gradient.abs().sum(-1) > 0).sum().item()
    return Finding(
        measured=(
            Measured("positions that the first one sees", exact(seen["the mixer"]), "of 196", between(196, 196)),
            Measured("the same of a scan forwards alone", exact(seen["forwards alone"]), "of 196"),
        ),
    )


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Bytes of memory that autograd asks to keep within the block, without parameters. It must not run backward.

    What is asked for is let go at once, so that memory whose address is used again is counted again: a weak reference
    to the storage tells the two apart.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, ref[Any]] = {}
    total = 0

    def pack(tensor: Tensor) -> None:
        nonlocal total
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        known = seen.get(address)
        if address in own or (known is not None and known() is not None):
            return
        seen[address] = ref(storage)
        total += storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(pack, _refuse):
        yield lambda: total


def _refuse(_: None) -> Tensor:
    raise RuntimeError("what was counted is gone: there is no backward pass")


NETWORKS = {"ViG-T": "vig_tiny", "DeiT-T": "deit_tiny"}
COUNTED, TIMED = (224, 448, 896, 1024), (224, 448)


def measure_cost(run: Run) -> Finding:
    """MACs of ViG-T and DeiT-T over the size of the image; memory kept for training and time at the smaller ones."""
    with torch.device("meta"):
        empty = {title: create_model(name) for title, name in NETWORKS.items()}
        macs = {
            title: [count(model, torch.empty(1, 3, side, side)).macs for side in COUNTED]
            for title, model in empty.items()
        }
    models = {title: build(run.seed, partial(create_model, name)) for title, name in NETWORKS.items()}
    images = {side: torch.randn(1, 3, side, side, generator=generator(run.seed)) for side in TIMED}
    kept = {title: [kept_for_training(model, images[side]) for side in TIMED] for title, model in models.items()}
    run.say("timing both at two sizes")
    calls = {
        f"{title}, {side}": partial(infer, model.eval(), images[side])
        for title, model in models.items()
        for side in TIMED
    }
    times = time_by_turns(calls, run, seconds=15, max_rounds=15)
    growth = {title: times_faster(times[f"{title}, 448"], times[f"{title}, 224"]) for title in NETWORKS}
    pixels = [side * side / 1e6 for side in COUNTED]
    return Finding(
        measured=(
            Measured("MACs, 448 over 224 pixels a side, ViG-T", _ratio(macs["ViG-T"], 1, 0), "x", between(3.99, 4)),
            Measured("the same, DeiT-T", _ratio(macs["DeiT-T"], 1, 0), "x", at_least(5)),
            Measured("MACs at 896 over 448, ViG-T", _ratio(macs["ViG-T"], 2, 1), "x", between(3.99, 4)),
            Measured("the same, DeiT-T", _ratio(macs["DeiT-T"], 2, 1), "x", at_least(8)),
            Measured(
                "MACs at 1024, DeiT-T over ViG-T",
                exact(macs["DeiT-T"][3] / macs["ViG-T"][3]),
                "x",
                between(4, 5.3),
                Published("FLOPs at 1024, DeiT-T over ViG-T", "5.2x", "abstract", 5.2),
            ),
            Measured("kept for training, 448 over 224, ViG-T", _ratio(kept["ViG-T"], 1, 0), "x", between(3.9, 4.05)),
            Measured("kept for training at 224, ViG-T", exact(kept["ViG-T"][0] / 2**20), "MiB"),
            Measured("the same, DeiT-T with fused attention", exact(kept["DeiT-T"][0] / 2**20), "MiB"),
            Measured("time at 448 over 224, ViG-T", growth["ViG-T"], "x", at_most(5, 6)),
            Measured("the same, DeiT-T", growth["DeiT-T"], "x"),
            Measured("time at 448, DeiT-T over ViG-T", times_faster(times["DeiT-T, 448"], times["ViG-T, 448"]), "x"),
        ),
        charts=(
            Lines(
                "Multiply-accumulates of one image",
                "million pixels",
                "G",
                pixels,
                {title: [one / 1e9 for one in found] for title, found in macs.items()},
                log="xy",
            ),
        ),
        remark="Median times at 448: "
        + ", ".join(f"{title} {median_ms(times[f'{title}, 448']):.0f} ms" for title in NETWORKS)
        + ". The recurrence is counted; the published counts leave it out.",
    )


def kept_for_training(model: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters aside."""
    with saved_bytes(model) as total:
        model.train()(images)
    return total()


@torch.inference_mode()
def infer(model: nn.Module, images: Tensor) -> Tensor:
    """The logits."""
    logits: Tensor = model(images)
    return logits


def _ratio(values: list[int], more: int, less: int) -> Any:
    return exact(values[more] / values[less])


class WithoutLocality(GatedLinearMixer):
    """The attention alone: no convolution in front of it, and none to blend with."""

    def forward(self, x: Map) -> Map:
        qkv, decay, _ = self.project(x)
        return self.out(self.out_act(self.attention_norm(self._attend(qkv, decay)).flatten(-2)))


class SharedGates(WithoutLocality):
    """The gates of the scan forwards serve the scan backwards."""

    def _attend(self, qkv: Tensor, decay: Tensor) -> Tensor:
        forward = decay.chunk(2, dim=-1)[0]
        return super()._attend(qkv, torch.cat([forward, forward], dim=-1))


class ForwardsOnly(WithoutLocality):
    """One scan, from the first position on."""

    def _attend(self, qkv: Tensor, decay: Tensor) -> Tensor:
        width = self.key_dim
        parts = (*qkv.split([width, width, qkv.shape[-1] - 2 * width], dim=-1), log_decays(decay).chunk(2, dim=-1)[0])
        q, k, v, forward = (self._heads(part).flatten(1, 2) for part in parts)
        return gated_linear_attention(q, k, v, forward)[0].unflatten(1, qkv.shape[1:3])


KINDS: dict[str, type[GatedLinearMixer]] = {
    "forwards only": ForwardsOnly,
    "both ways, shared gates": SharedGates,
    "both ways, own gates": WithoutLocality,
    "own gates and locality": GatedLinearMixer,
}
CONFIG = VigConfig(
    image_size=NearOrFar.side,
    in_chans=NearOrFar.planes,
    num_classes=NearOrFar.symbols,
    patch_size=1,
    embed_dim=32,
    depth=1,
    num_heads=2,
    overlapping_stem=False,
)
SCHEDULE = Schedule(steps=300, batch_size=16, lr=5e-3)


def make_network(kind: type[GatedLinearMixer]) -> Vig:
    """The small network with mixers of this kind, a cell per token."""
    network = Vig(CONFIG)
    for block in network.blocks:
        block.register_module("mixer", kind(CONFIG.embed_dim, CONFIG.num_heads, CONFIG))
    return init_by_fan_in(network)


def before_the_far_symbol(batch: Batch) -> Tensor:
    """(B, Q): whether a dot asks for the far symbol and comes before all of it in the order of reading."""
    pictures, cells, _, asks_far = batch
    far = pictures[:, NearOrFar.symbols : 2 * NearOrFar.symbols].sum(dim=1).flatten(1)
    first = far.argmax(dim=1, keepdim=True)
    return (asks_far == 1) & (cells < first)


def compare_parts(run: Run) -> Finding:
    """Accuracy of the four kinds on new pictures after equal training, by what a dot asks for."""
    task = NearOrFar()

    def once(seed: int) -> dict[str, float]:
        networks = {name: build(seed, partial(make_network, kind)) for name, kind in KINDS.items()}
        train_side_by_side(networks, task, SCHEDULE, seed=seed, run=run)
        unseen = task.batch(500, generator(seed + 500))
        early, asks_far = before_the_far_symbol(unseen), unseen[3] == 1
        found = {}
        for name, network in networks.items():
            found[name] = task.percent_right(network, unseen)
            found[f"{name}: near"] = task.percent_right(network, unseen, of=~asks_far)
            found[f"{name}: far, behind the dot"] = task.percent_right(network, unseen, of=early)
        return found

    seeds = run.repeat(4, once)
    accuracy = {name: [one[name] for one in seeds] for name in seeds[0]}
    intervals = {name: t_interval(values) for name, values in accuracy.items()}

    def gain(before: str, after: str, of: str = "") -> Any:
        pairs = zip(accuracy[after + of], accuracy[before + of], strict=True)
        return t_interval([a - b for a, b in pairs])

    forwards, shared, own, full = KINDS
    grouped = [f"{name}{of}" for name in KINDS for of in (": near", ": far, behind the dot")]
    return Finding(
        measured=(
            *(Measured(f"accuracy, {name}", intervals[name], "%") for name in KINDS),
            Measured("gain by the scan backwards", gain(forwards, shared), "points", at_least(0)),
            Measured(
                "the same where the answer lies behind the dot",
                gain(forwards, shared, ": far, behind the dot"),
                "points",
                at_least(20, 0),
            ),
            Measured("gain by gates of its own", gain(shared, own), "points", at_least(0)),
            Measured("gain by locality", gain(own, full), "points", at_least(0)),
            Measured("the same where the answer is near", gain(own, full, ": near"), "points", at_least(10, 0)),
        ),
        charts=(
            Bars(
                f"Accuracy after {SCHEDULE.steps} steps, by where the answer stands",
                "% right (chance: 10)",
                {label: (intervals[label].value, intervals[label].low, intervals[label].high) for label in grouped},
                points={label: accuracy[label] for label in grouped},
                x_range=(0, 105),
            ),
        ),
    )


CLAIM = Claim(
    statement="Gated linear attention from both ends, with gates of its own for each and a convolution blended in by a "
    "further gate, reads whole images at a cost that grows with their pixels.",
    source="Liao et al. 2024, abstract and section 3",
    published=(
        Published("ImageNet-1K top-1 at 224, plain: T, S, B", "77.2, 81.7, 82.6 %", "repository"),
        Published("the same, hierarchical: T, S, B", "82.8, 83.8, 84.2 %", "repository"),
        Published("FLOPs of T at 1024x1024 against DeiT-T", "5.2x fewer", "abstract", 5.2),
        Published("GPU memory and speed there", "90 % less, 4.8x", "abstract"),
    ),
    design="The operator is held against both recurrences; what a mixer's first position depends on is read off its "
    "gradient; MACs of ViG-T and DeiT-T are counted up to 1024 pixels, and the memory that training keeps and the time "
    "are measured at 224 and 448. Then plain networks of one block (width 32, a cell per token) learn to name the "
    "symbol beside a dot or one far off, as the dot's kind asks (FocalNet's task): with one scan, with both under the "
    "same gates, with gates of their own, and with the convolution blended in.",
    limits="Symbols are not natural images, and a few hundred steps show how readily parts are used, not where "
    "training would end. All kinds keep their parameters: what a kind leaves out is ignored, not removed. Memory and "
    "time on a GPU with fused kernels are not measured here.",
    cautions=(
        "The published factor at 1024 counts less of ViG (it leaves out a projection of the perceptrons and the "
        "recurrence) and compares with attention that lays out its maps; on fused attention memory is linear too.",
        "At 224 pixels linear attention has nothing to gain: DeiT-T is the faster one there.",
        "No ImageNet accuracy is measured here.",
    ),
    budget_s=175,
    parts=(
        Part("Forms", "The operator against both recurrences, and a map turned around.", check_forms, 1),
        Part("Reach", "Positions that the first one's output depends on.", check_reach, 1),
        Part("Cost", "MACs, memory kept for training and time against DeiT-T over the image's size.", measure_cost, 22),
        Part(
            "Directions, gates and locality",
            "Accuracy on 500 new pictures after equal training, each kind adding one part; four seeds, differences "
            "within a seed.",
            compare_parts,
            125,
        ),
    ),
)
