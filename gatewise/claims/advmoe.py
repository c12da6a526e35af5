"""AdvMoE in miniature: what experts in convolutions compute, what they cost, and whether labels keep them busy.

The claim of robustness needs the alternating adversarial training and is not reproduced here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.catalog.registry import family_of
from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, median_ms, randomise, relative_difference, time_by_turns
from gatewise.claims.lab.digits import Digits, digits
from gatewise.claims.lab.intervals import bootstrap, exact, t_interval
from gatewise.claims.lab.plot import Bars
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Batch, Schedule, build, train_side_by_side
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.cost.count import count
from gatewise.networks.image.advmoe import ExpertConv2d, ResNetMoE, ResNetMoEConfig, RoutedNetwork
from gatewise.ops.expert_conv import (
    ExpertRouting,
    expert_conv2d,
    expert_conv2d_reference,
    route_to_experts,
    to_experts,
    to_images,
)

EXPERTS = 2
PUBLISHED_SHARE = {"ResNet-18": 0.346, "VGG-16-BN": 0.381, "WRN-28-10": 0.258}
"""MACs of router and pathway over those of the dense network, from the published networks: half-width, two experts."""
PAIRS = {
    "ResNet-18": ("resnet18_cifar_moe", "resnet18_cifar_ori"),
    "VGG-16-BN": ("vgg16_bn_moe", "vgg16_bn_ori"),
    "WRN-28-10": ("wrn_28_10_cifar_moe", "wrn_28_10_cifar_ori"),
}


def registered(name: str) -> RoutedNetwork:
    """The network registered under this name."""
    family = family_of(name)
    network: RoutedNetwork = family.network(family.variants[name].config)
    return network


def turns(batch: int, experts: int = EXPERTS) -> Tensor:
    """Scores that send the images to all experts in turn."""
    return torch.eye(experts)[torch.arange(batch) % experts]


def operator_errors(seed: int) -> tuple[float, float]:
    """Largest relative differences of outputs and of gradients of scores, from all experts computed and masked."""
    draw = generator(seed)
    x, scores, weight = (
        torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_()
        for shape in ((9, 6, 9, 8), (9, 3), (15, 6, 3, 3))
    )
    routing = route_to_experts(scores)
    y = to_images(expert_conv2d(to_experts(x, routing), weight, routing, padding=1), routing)
    masked = expert_conv2d_reference(x, scores, weight, padding=1)
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=draw)
    found, expected = (torch.autograd.grad(output, scores, cotangent)[0] for output in (y, masked))
    return relative_difference(y, masked), relative_difference(found, expected)


def thin_network(network: ResNetMoE, expert: int) -> ResNetMoE:
    """The dense network with one expert's rows in the place of each convolution with experts."""
    config: Any = network.config
    rows = {f"{path}.weight" for path, module in network.named_modules() if isinstance(module, ExpertConv2d)}
    thin = ResNetMoE(replace(config, n_expert=1)).eval()
    state = {
        key: value.chunk(config.n_expert)[expert] if key in rows else value
        for key, value in network.state_dict().items()
        if not key.startswith("router.")
    }
    thin.load_state_dict(state)
    return thin


@torch.no_grad()
def check_identities(run: Run) -> Finding:
    """The operator against its definition, a mixed batch against thin networks, and the folded network."""
    config = ResNetMoEConfig(num_classes=10, ratio=0.125)
    network = randomise(build(run.seed, lambda: ResNetMoE(config)), run.seed)
    images, scores = torch.rand(6, 3, 32, 32, generator=generator(run.seed)), turns(6)
    logits = network(images, scores)
    alone = [thin_network(network, e)(images[i : i + 1]) for i, e in enumerate(scores.argmax(1).tolist())]
    with torch.enable_grad():
        of_outputs, of_scores = operator_errors(run.seed)
    of_folding = relative_difference(folded(network)(images, scores), logits)
    return Finding(
        measured=(
            Measured("difference from all experts, masked", exact(of_outputs), "", at_most(1e-12)),
            Measured("of the straight-through gradient of scores", exact(of_scores), "", at_most(1e-12)),
            Measured(
                "mixed batch against a thin network for each image",
                exact(relative_difference(logits, torch.cat(alone))),
                "",
                at_most(1e-5),
            ),
            Measured("folded network, experts mixed", exact(of_folding), "", at_most(1e-4)),
        ),
    )


def macs(network: Callable[[], nn.Module], size: int) -> tuple[int, int]:
    """(whole network, router) for one image; nothing is allocated."""
    with torch.device("meta"):
        model = network()
    image = torch.empty(1, 3, size, size, device="meta")
    router = getattr(model, "router", None)
    return count(model, image).macs, 0 if router is None else count(router, image).macs


def count_cost(run: Run) -> Finding:
    """MACs of router and pathway over those of the dense network, for the networks of the paper."""
    shares, pathways = {}, {}
    for title, (sparse, dense) in PAIRS.items():
        (whole, router), (reference, _) = macs(partial(registered, sparse), 32), macs(partial(registered, dense), 32)
        shares[title], pathways[title] = whole / reference, (whole - router) / reference
    large, large_router = macs(partial(registered, "resnet18_imagenet_moe"), 128)
    large_dense, _ = macs(partial(registered, "resnet18_imagenet_ori"), 128)
    return Finding(
        measured=(
            *(
                Measured(
                    f"{title}: MACs, router and pathway over dense",
                    exact(share),
                    "",
                    between(PUBLISHED_SHARE[title] - 0.001, PUBLISHED_SHARE[title] + 0.001),
                    Published("inference cost against the dense network", "more than 50 % lower", "abstract"),
                )
                for title, share in shares.items()
            ),
            *(Measured(f"{title}: pathway alone", exact(share)) for title, share in pathways.items()),
            Measured("ResNet-18 for large images, 128 pixels: router and pathway", exact(large / large_dense)),
            Measured("there, the router alone", exact(large_router / large_dense)),
        ),
        charts=(
            Bars(
                "MACs over those of the dense network",
                "share",
                {title: (share,) * 3 for title, share in shares.items()},
                published=PUBLISHED_SHARE,
                limit=0.5,
                limit_label="half",
            ),
        ),
        remark="The router works on the image as it is. At 32 pixels it costs 40.6 million MACs, at 128 sixteen times "
        "that: more than a dense ResNet-18 with its stem of stride 4. There experts save nothing with this router.",
    )


@torch.no_grad()
def balance(network: RoutedNetwork, images: Tensor) -> None:
    """Shift the router's scores so that two experts share these images evenly."""
    if network.router is None:
        raise ValueError("a network without a router cannot be balanced")
    first, second = network.scores(images).unbind(1)
    gap = (first - second).sort().values
    middle = len(gap) // 2
    network.router.fc.bias[1] += (gap[middle - 1] + gap[middle]) / 2


@torch.no_grad()
def all_experts(network: RoutedNetwork, images: Tensor) -> Tensor:
    """Logits as the published code computes them: all experts everywhere, of which each image keeps its own."""
    scores = network.scores(images)
    routing = ExpertRouting(scores.shape[1], scores.argmax(dim=1))
    return network.forward_head(network.run_stages(images, routing)[-1])


def folded(network: RoutedNetwork) -> RoutedNetwork:
    """The network folded, laid out channels-last."""
    result = fold(network)
    if not isinstance(result, RoutedNetwork):
        raise TypeError(f"folding must keep the network's class, not give {type(result).__name__}")
    return result.to(memory_format=torch.channels_last)


@torch.no_grad()
def time_inference(run: Run) -> Finding:
    """Time of the folded networks at two batch sizes, the experts' over the dense one's."""
    images = torch.rand(16, 3, 32, 32, generator=generator(run.seed)).contiguous(memory_format=torch.channels_last)
    sparse = build(run.seed, partial(registered, "resnet18_cifar_moe")).eval()
    balance(sparse, images)
    dense = build(run.seed, partial(registered, "resnet18_cifar_ori")).eval()
    sparse, dense = folded(sparse), folded(dense)
    measured, bars = [], {}
    for batch, seconds in ((1, 10), (16, 25)):
        run.say(f"timing inference of {batch} images")
        x = images[:batch]
        calls = {"dense": partial(dense, x), "experts": partial(sparse, x), "masked": partial(all_experts, sparse, x)}
        times = time_by_turns(calls, run, seconds)
        for name, title in (("experts", "grouped"), ("masked", "all experts computed and masked")):
            ratio = bootstrap([a / b for a, b in zip(times[name], times["dense"], strict=True)])
            expected = at_most(0.55, contrary_above=1.0) if name == "experts" else None
            measured.append(Measured(f"batch {batch}: time over dense, {title}", ratio, "", expected))
            bars[f"{name}: batch {batch}"] = (ratio.value, ratio.low, ratio.high)
        measured.append(Measured(f"batch {batch}: dense", exact(median_ms(times["dense"])), "ms"))
    load = sparse.expert_load(images)
    measured.append(Measured("images of the busier expert, of 16", exact(max(load)), "", at_most(8)))
    return Finding(
        measured=tuple(measured),
        charts=(Bars("Time over that of the dense ResNet-18", "share", bars, limit=0.55, limit_label="55 %"),),
    )


class Learner(nn.Module):
    """A small ResNet with experts that learns the digits; how its router learns is the subclass's matter."""

    def __init__(self) -> None:
        super().__init__()
        config = ResNetMoEConfig(num_classes=10, in_chans=1, n_expert=EXPERTS, ratio=0.25, depths=(1, 1))
        self.network = ResNetMoE(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Objective that is minimized."""
        raise NotImplementedError


class TaughtByLabels(Learner):
    """The router learns label modulo experts, as the published one does, and nothing from the logits."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        scores = self.network.scores(images)
        logits = self.network(images, scores.detach())
        return F.cross_entropy(logits, labels) + F.cross_entropy(scores, labels % EXPERTS)


class LeftToItself(Learner):
    """The router learns from the logits' straight-through gradient alone."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.network(images), labels)


class RoutedDigits(Digits):
    """Digits, with the loss that the learner brings."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if not isinstance(model, Learner):
            raise TypeError(f"the digits are for a Learner, not {type(model).__name__}")
        return model.loss(*batch)


SCHEDULE = Schedule(steps=160, batch_size=32, lr=1e-2)
LEARNERS: dict[str, Callable[[], Learner]] = {"label modulo 2": TaughtByLabels, "logits alone": LeftToItself}


@torch.no_grad()
def busiest_share(model: Learner) -> float:
    """Percent of the test images that the busiest expert serves: 50 if even, 100 if the router has collapsed."""
    images, _ = digits()[1]
    load = model.network.expert_load(images)
    return 100 * max(load) / sum(load)


@torch.no_grad()
def agreement(model: Learner) -> float:
    """Percent of the test images that go to the expert of their label."""
    images, labels = digits()[1]
    return 100 * (model.network.scores(images).argmax(1) == labels % EXPERTS).float().mean().item()


def compare_routing(run: Run) -> Finding:
    """Load of the experts and accuracy, with a router that learns labels and one that is left to itself."""
    task = RoutedDigits()

    def once(seed: int) -> dict[str, tuple[float, float, float]]:
        models = {name: build(seed, make) for name, make in LEARNERS.items()}
        train_side_by_side(models, task, SCHEDULE, seed=seed, run=run)
        return {name: (busiest_share(m), agreement(m), task.percent_right(m)) for name, m in models.items()}

    seeds = run.repeat(5, once)
    load, agreed, right = ({name: [one[name][i] for one in seeds] for name in LEARNERS} for i in range(3))
    taught, free = LEARNERS
    intervals = {name: t_interval(values) for name, values in load.items()}
    return Finding(
        measured=(
            Measured("busiest expert, router taught by labels", intervals[taught], "% of images", at_most(60, 90)),
            Measured("images at the expert of their label", t_interval(agreed[taught]), "%", at_least(85, 60)),
            Measured("accuracy, router taught by labels", t_interval(right[taught]), "%", at_least(90, 50)),
            Measured("busiest expert, router left to the logits", intervals[free], "% of images"),
            Measured("accuracy, router left to the logits", t_interval(right[free]), "%"),
        ),
        charts=(
            Bars(
                "Share of the busiest of two experts",
                "% of test images",
                {name: (one.value, one.low, one.high) for name, one in intervals.items()},
                points=load,
                x_range=(0, 105),
            ),
        ),
        remark="Digits are clean and training is plain: this shows what the router's labels do to the load of the "
        "experts, and nothing about robustness.",
    )


CLAIM = Claim(
    statement="A convolutional network whose layers hold experts, one of which a small router chooses for each image, "
    "costs less than half of the dense network at inference; trained adversarially in alternation, it is also more "
    "robust than that network.",
    source="Zhang et al. 2023 (arXiv:2308.10110), abstract",
    published=(
        Published("inference cost against the dense network", "more than 50 % lower", "abstract"),
        Published("robust accuracy over the dense network (not reproduced here)", "+1 to +4 %", "abstract"),
    ),
    design="Convolutions with experts are compared with their definition, and a mixed batch with the thin network of "
    "each image's expert; MACs of router and pathway are counted against the dense networks of the paper; a ResNet-18 "
    "with two experts of half width is timed against the dense one, both folded; and small networks learn digits "
    f"({SCHEDULE.steps} steps, plain training) with a router that is taught label modulo 2, as the published one is, "
    "or left to the gradient of the logits.",
    limits="The adversarial claim is not reproduced here: nothing is attacked and nothing is trained against attacks. "
    "Times are a CPU's, and of weights that are not trained; what images go to which expert does not change them.",
    cautions=(
        "The saving holds for small images. The router sees the whole image at full resolution: at 128 pixels it alone "
        "costs more than a dense ResNet-18 with the stem for large images.",
        "The published code computes all experts and masks them, so that it does not have the saving that MACs of the "
        "pathway promise; neither has a compiled or exported network of more than one image.",
        "Published runs report vanishing gradients and scores that are no numbers, after which one expert serves all "
        "images; here that is an error, and `expert_load` tells a router that collapses.",
        "The published robust accuracies choose the checkpoint by the test set.",
    ),
    budget_s=160,
    parts=(
        Part(
            "Identities",
            "The operator in float64 against all experts computed and masked, with the gradient of scores; a narrow "
            "ResNet-18 on a mixed batch against the thin network of each image's expert; the folded network.",
            check_identities,
            seconds=5,
        ),
        Part(
            "MACs",
            "Router and pathway over the dense network: ResNet-18, VGG-16-BN and WRN-28-10 with two experts of half "
            "width at 32 pixels, and the ResNet-18 for large images at 128.",
            count_cost,
            seconds=5,
        ),
        Part(
            "Time",
            "ResNet-18 with two experts of half width that share the images evenly, its router included, against the "
            "dense one: both folded, channels-last, one thread, interleaved, batches of 1 and 16.",
            time_inference,
            seconds=45,
        ),
        Part(
            "Load of the experts",
            "Share of the busiest of two experts on unseen digits, with a router taught by label modulo 2 and one left "
            "to the logits; five seeds.",
            compare_routing,
            seconds=80,
        ),
    ),
)
