"""HER-Seg's encoder in miniature: what grows with the pixels, what training keeps, and that it segments."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, relative_difference
from gatewise.claims.lab.intervals import exact, t_interval
from gatewise.claims.lab.kept_bytes import kept_bytes
from gatewise.claims.lab.plot import Bars, Lines, Pictures
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Batch, Schedule, build, train_side_by_side
from gatewise.efficiency.cost.count import count
from gatewise.layers.conv import ConvNormAct
from gatewise.networks.image.herseg import CEEncoder, CEEncoderConfig
from gatewise.ops.kernel_attention import kernel_attention, kernel_attention_reference

PARAMETERS = {24: 78_708, 48: 264_552, 96: 957_648, 192: 3_629_472, 384: 14_115_648}


def check_attention(run: Run) -> Finding:
    """Kernel attention against its map of all pairs; parameters and MACs of the encoder as pixels grow."""
    draw = generator(run.seed)
    q, k, turned_q, turned_k = (torch.randn(2, 144, 4, 8, generator=draw).abs() for _ in range(4))
    v = torch.randn(2, 144, 4, 8, generator=draw)
    found = kernel_attention(q, k, v, turned=(turned_q, turned_k))
    expected = kernel_attention_reference(
        *(x.double() for x in (q, k, v)), turned=(turned_q.double(), turned_k.double())
    )
    with torch.device("meta"):
        wrong = sum(
            sum(p.numel() for p in CEEncoder(CEEncoderConfig(embed_dim=dim)).parameters()) != number
            for dim, number in PARAMETERS.items()
        )
        encoder = CEEncoder(CEEncoderConfig()).eval()
        macs = [count(encoder, torch.empty(1, 3, side, side)).macs / 1e9 for side in (256, 512, 1024)]
    return Finding(
        measured=(
            Measured(
                "relative difference from the map of all pairs",
                exact(relative_difference(found.double(), expected)),
                "",
                at_most(1e-5),
            ),
            Measured("encoders with other numbers of parameters than published", exact(wrong), "", between(0, 0)),
            Measured("MACs of the encoder at 1024 pixels", exact(macs[2]), "G", between(3.9, 3.98)),
            Measured("MACs, 1024 over 256 pixels", exact(macs[2] / macs[0]), "x", between(15.9, 16.1)),
        ),
    )


class UNet(nn.Module):
    """Usual network for segmenting medical images, widths 32 to 256: (B, 3, H, W) -> (B, 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        dims = (32, 64, 128, 256)
        self.down = nn.ModuleList(_pair(before, dim) for before, dim in zip((3, *dims[:-1]), dims, strict=True))
        self.widen = nn.ModuleList(nn.ConvTranspose2d(dim, dim // 2, 2, 2) for dim in dims[:0:-1])
        self.up = nn.ModuleList(_pair(dim, dim // 2) for dim in dims[:0:-1])
        self.head = nn.Conv2d(dims[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for index, pair in enumerate(self.down):
            x = pair(F.max_pool2d(x, 2) if index else x)
            levels.append(x)
        for widen, pair, level in zip(self.widen, self.up, levels[-2::-1], strict=True):
            x = pair(torch.cat([level, widen(x)], dim=1))
        return self.head(x)


def _pair(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(ConvNormAct(in_dim, dim, 3, act=nn.ReLU), ConvNormAct(dim, dim, 3, act=nn.ReLU))


SIDES = (128, 256, 512)


def measure_memory(run: Run) -> Finding:
    """Compare the memory that the encoder and a U-Net keep of one image for the backward pass, as pixels grow."""
    networks: dict[str, nn.Module] = {
        "CE-Encoder, width 96": build(run.seed, partial(CEEncoder, CEEncoderConfig())),
        "U-Net, widths 32 to 256": build(run.seed, UNet),
    }
    kept: dict[str, list[float]] = {name: [] for name in networks}
    for side in SIDES:
        for name, network in networks.items():
            run.say(f"{name} at {side} pixels")
            kept[name].append(kept_bytes(network, torch.zeros(1, 3, side, side)) / 2**20)
            run.check_time()
    ours, theirs = kept.values()
    return Finding(
        measured=(
            Measured("kept for training at 512 pixels, encoder", exact(ours[-1]), "MiB"),
            Measured("the same, U-Net over encoder", exact(theirs[-1] / ours[-1]), "x", at_least(4)),
            Measured("encoder, 512 over 128 pixels", exact(ours[-1] / ours[0]), "x", between(15, 16.5)),
        ),
        charts=(Lines("Kept for the backward pass", "pixels a side", "MiB", SIDES, kept, log="xy"),),
        remark="Parameters, 3.7 MiB for the encoder and 7.4 MiB for the U-Net, do not count here.",
    )


class Segmenter(nn.Module):
    """The encoder and a map from each token to its pixels: (B, 3, H, W) -> (B, 1, H, W)."""

    def __init__(self, dim: int = 24, patch: int = 8) -> None:
        super().__init__()
        config = CEEncoderConfig(
            embed_dim=dim, depths=(1, 1, 2), num_heads=(3, 6), patch_size=patch, drop_path_rate=0.0
        )
        self.encoder = CEEncoder(config)
        self.head = nn.ConvTranspose2d(dim, 1, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder.forward_features(x))


class Ellipses:
    """Noisy pictures of one bright ellipse each among strokes of the same brightness, 64x64, and its mask."""

    side = 64

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        images, masks = draw_ellipses(size, self.side, generator)
        return images.contiguous(memory_format=torch.channels_last), masks

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Dice and focal loss as published: over the whole batch, 0.8 and 0.2."""
        return segmentation_loss(model(batch[0]), batch[1])

    @torch.no_grad()
    def dice(self, model: nn.Module) -> float:
        """Mean over 100 new pictures, at a threshold of one half."""
        images, masks = draw_ellipses(100, self.side, generator(10_000))
        found = (model(images) > 0).float()
        both = (found * masks).sum(dim=(1, 2, 3))
        return ((2 * both + 1) / (found.sum(dim=(1, 2, 3)) + masks.sum(dim=(1, 2, 3)) + 1)).mean().item()


def draw_ellipses(count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) and masks (B, 1, S, S)."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    place = torch.linspace(-1, 1, side)
    rows, columns = place[:, None], place[None, :]
    angle = uniform(0, torch.pi)
    dy, dx = rows - uniform(-0.5, 0.5), columns - uniform(-0.5, 0.5)
    along, across = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    masks = ((along / uniform(0.25, 0.5)) ** 2 + (across / uniform(0.15, 0.3)) ** 2 < 1).float()
    # A stroke runs through the whole picture: brightness alone does not tell the ellipse.
    turn = uniform(0, torch.pi)
    stroke = (rows * turn.cos() + columns * turn.sin() - uniform(-0.6, 0.6)).abs() < 0.06
    noise = 0.4 * torch.randn(count, 3, side, side, generator=generator)
    bright = torch.maximum(masks, stroke.float())
    return bright[:, None] + noise, masks[:, None]


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """0.8 Dice + 0.2 focal loss over the whole batch, as published; the cross-entropy is taken from logits."""
    p = logits.sigmoid()
    dice = 1 - (2 * (p * masks).sum() + 1) / (p.sum() + masks.sum() + 1)
    entropy = F.binary_cross_entropy_with_logits(logits, masks)
    return 0.8 * dice + 0.2 * 0.8 * (1 - (-entropy).exp()) ** 2 * entropy


SCHEDULE = Schedule(steps=600, batch_size=8, lr=4e-3, weight_decay=0.0)


def train_segmenter(run: Run) -> Finding:
    """Dice on new pictures after a short training, over several seeds."""
    task: Any = Ellipses()
    pictures: dict[str, list[list[float]]] = {}

    def once(seed: int) -> float:
        network = build(seed, Segmenter)
        train_side_by_side({"CE-Encoder": network}, task, SCHEDULE, seed=seed, run=run)
        if not pictures:
            images, masks = draw_ellipses(1, Ellipses.side, generator(7))
            with torch.no_grad():
                found = network(images).sigmoid()
            pictures.update(picture=images[0, 0].tolist(), mask=masks[0, 0].tolist(), found=found[0, 0].tolist())
        return task.dice(network)

    scores = run.repeat(3, once)
    interval = t_interval(scores)
    return Finding(
        measured=(Measured("Dice on new pictures", interval, "", at_least(0.9)),),
        charts=(
            Pictures("A picture, its mask, and what was found", pictures),
            Bars(
                f"Dice after {SCHEDULE.steps} steps",
                "Dice on 100 pictures",
                {"CE-Encoder": (interval.value, interval.low, interval.high)},
                points={"CE-Encoder": scores},
                limit=0.9,
                limit_label="0.9",
            ),
        ),
    )


CLAIM = Claim(
    statement="A single-scale encoder with gated linear attention makes high-resolution segmentation trainable in "
    "little memory: everything grows with the pixels alone.",
    source="HER-Seg 2025, abstract",
    published=(
        Published("training memory per 1024x1024 image", "0.59 GB", "abstract"),
        Published("inference at 1024x1024, norms and activations included", "9.39 GFLOPs", "abstract"),
    ),
    design="Kernel attention is held against its map of all pairs, and parameters and MACs of the encoders are "
    "counted. What the backward pass keeps of one image is counted at three sizes, beside a U-Net of 1.9 million "
    "parameters. Then an encoder of width 24 with a linear map to pixels learns to find ellipses between strokes, "
    f"64x64, in {SCHEDULE.steps} steps with the published loss.",
    limits="This is the encoder; the mask decoder of the paper, and so its total cost and its memory at 1024x1024, is "
    "not part of it. The pictures are drawn, not medical.",
    cautions=(
        "Accuracy tables of the paper could not be read: no score on medical images is claimed.",
        "Bytes are those of distinct tensors kept for the backward pass, not what an allocator holds at its peak.",
    ),
    budget_s=150,
    parts=(
        Part("Attention and cost", "Against all pairs; parameters; MACs at three sizes.", check_attention, 5),
        Part("Memory", "Kept for training at 128, 256 and 512 pixels, beside a U-Net.", measure_memory, 25),
        Part("Ellipses", "Dice on new pictures, three seeds.", train_segmenter, 100),
    ),
)
