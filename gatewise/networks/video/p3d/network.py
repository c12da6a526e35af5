"""P3D: a video ResNet with 3x3x3 convolutions factorized into space and time.

A 3x3x3 convolution costs three times as much as a 3x3 one and has no pre-trained weights to start from. Pseudo-3D
blocks replace it with a 1x3x3 convolution (space, weights from images) and a 3x1x1 one (time), wired in three ways: in
sequence (A), in parallel (B), or in sequence with a shortcut around the second (C). Mixing the three along the depth
does better than any single one. Time halves after the stem and after each of the first three stages. One frame of
features is left, which the last stage processes as an image.

Paper: Qiu et al., "Learning Spatio-Temporal Representation with Pseudo-3D Residual Networks", 2017, arXiv:1711.10305.
The widely used PyTorch port differs from the published Caffe network in two ways. Its first max pooling is shifted by a
pixel (`pool`), and it pools a fixed 5x5 window at the end. Here the average is global, as in the Caffe network, which
equals the port's at 160 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from math import sqrt
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, register
from gatewise.layers.clip_conv import FrameConv, TemporalConv, channels_last, halve_time
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.linear_head import linear_head
from gatewise.networks.video._base import ClipFeatureInfo, VideoConfig, VideoNetwork
from gatewise.networks.video.p3d.caffe import caffe_layouts

Pool = Literal["port", "caffe"]
POOLS = ("port", "caffe")
EXPANSION = 4
"""Width of a block's output relative to that of its middle."""

COLORS = 3
PSEUDO_3D_STAGES = 3
"""Number of stages whose blocks see time; the fourth sees single frames."""


@dataclass(frozen=True)
class P3DConfig(VideoConfig):
    """Sizes and options of a P3D.

    Args:
        in_chans: number of input channels: 3 for color, 2 for optical flow (x and y).
        drop_rate: dropout rate before the classifier: 0.5 in the port and for Kinetics, 0.1 for Sports-1M, 0.7 for
            flow.
        depths: number of blocks per stage.
        base_width: channels of the stem; the middle of a block has as many in the first stage, and twice as many in
            each next one.
        struc: wirings of the blocks; block n of the first three stages has struc[n mod len(struc)].
        pool: border handling of the first max pooling. "port" pads by one pixel and drops incomplete windows. "caffe"
            does not pad and clips windows, so that all of them start one pixel later.
        temporal_pool: handling of clips that leave more than one frame of features: None raises an error, "mean"
            averages their logits.
    """

    num_classes: int = 400
    drop_rate: float = 0.5
    depths: tuple[int, ...] = (3, 4, 6, 3)
    base_width: int = 64
    struc: tuple[str, ...] = ("A", "B", "C")
    pool: Pool = "port"
    temporal_pool: Literal["mean"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) != PSEUDO_3D_STAGES + 1 or min(self.depths) < 1:
            raise ValueError(f"depths must be four positive numbers of blocks, not {self.depths}")
        if self.base_width < 1:
            raise ValueError(f"base_width must be positive, not {self.base_width}")
        if not self.struc or not set(self.struc) <= set(WIRINGS):
            raise ValueError(f"struc must be one or more of {', '.join(WIRINGS)}, not {self.struc}")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, not {self.pool!r}")
        if self.temporal_pool not in (None, "mean"):
            raise ValueError(f"temporal_pool must be None or 'mean', not {self.temporal_pool!r}")

    def planes(self, stage: int) -> int:
        """Return the number of channels in the middle of a stage's blocks."""
        return self.base_width * 2**stage

    def wirings(self) -> list[list[str | None]]:
        """Return each block's letter by stage, cycling through the first three stages; None in the last stage."""
        letters = cycle(self.struc)
        pseudo_3d: list[list[str | None]] = [list(islice(letters, depth)) for depth in self.depths[:PSEUDO_3D_STAGES]]
        return [*pseudo_3d, [None] * self.depths[-1]]

    def frames_left(self, time: int) -> int:
        """Return the number of feature frames left of a clip of `time` frames."""
        pooled = -(-time // 2) if self.pool == "caffe" else time // 2
        return pooled // 2**PSEUDO_3D_STAGES

    @property
    def frames(self) -> tuple[int, int]:
        """Fewest and most frames of a clip that leave one feature frame."""
        lost = 1 if self.pool == "caffe" else 0
        return 16 - lost, 31 - lost


Unit = Callable[[Tensor], Tensor]


def serial(spatial: Unit, temporal: Unit, x: Tensor) -> Tensor:
    """P3D-A: T(S(x)), equation (3) of the paper."""
    return temporal(spatial(x))


def parallel(spatial: Unit, temporal: Unit, x: Tensor) -> Tensor:
    """P3D-B: S(x) + T(x), equation (4). Both read the same memory layout without a copy."""
    return spatial(x) + temporal(x)


def serial_with_shortcut(spatial: Unit, temporal: Unit, x: Tensor) -> Tensor:
    """P3D-C: S(x) + T(S(x)), equation (5)."""
    y = spatial(x)
    return y + temporal(y)


WIRINGS = {"A": serial, "B": parallel, "C": serial_with_shortcut}


class Pseudo3dConv(nn.Module):
    """A 1x3x3 and a 3x1x1 convolution, each with norm and ReLU, wired as `wiring` says. Keeps the shape."""

    def __init__(self, dim: int, wiring: str) -> None:
        super().__init__()
        self.wiring = wiring
        self.spatial = FrameConv(dim, dim, 3, act=nn.ReLU)
        self.temporal = TemporalConv(dim, dim, 3)

    def forward(self, x: Float[Tensor, "batch dim time height width"]) -> Float[Tensor, "batch dim time height width"]:
        return WIRINGS[self.wiring](self.spatial, self.temporal, x)

    def extra_repr(self) -> str:
        return f"wiring={self.wiring}"


class Bottleneck(nn.Module):
    """Narrow 1x1 convolution, middle, wide 1x1 convolution, and shortcut: (B, C, T, H, W) -> (B, C', T, H', W').

    Args:
        middle: module that keeps the shape and the `planes` channels.
        stride: spatial stride of the first convolution, as in Caffe's ResNets.
        project: whether the shortcut has a 1x1 convolution, needed if the shapes differ.
    """

    def __init__(
        self,
        in_dim: int,
        planes: int,
        middle: nn.Module,
        stride: int = 1,
        project: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        dim = EXPANSION * planes
        self.reduce = FrameConv(in_dim, planes, 1, stride, act=nn.ReLU)
        self.middle = middle
        self.expand = FrameConv(planes, dim, 1, act=None)
        self.shortcut = FrameConv(in_dim, dim, 1, stride, act=None) if project else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.act = nn.ReLU()

    def forward(self, x: Float[Tensor, "batch in_dim time height width"]) -> Float[Tensor, "batch dim time h w"]:
        y = self.expand(self.middle(self.reduce(x)))
        return self.act(self.drop_path(y) + self.shortcut(x))


def _middle(planes: int, wiring: str | None) -> nn.Module:
    """Return a block's middle: a pseudo-3D convolution, or a 3x3 one per frame if there is no wiring."""
    return FrameConv(planes, planes, 3, act=nn.ReLU) if wiring is None else Pseudo3dConv(planes, wiring)


def _stem_pool(pool: Pool) -> nn.MaxPool3d:
    if pool == "caffe":
        return nn.MaxPool3d((2, 3, 3), stride=2, ceil_mode=True)
    return nn.MaxPool3d((2, 3, 3), stride=2, padding=(0, 1, 1))


class P3D(VideoNetwork):
    """Stem, three stages of pseudo-3D bottlenecks, one of 2-D bottlenecks, global pooling, linear classifier."""

    min_size = 32

    def __init__(self, config: P3DConfig) -> None:
        super().__init__(config)
        self.stem = FrameConv(config.in_chans, config.base_width, 7, 2, act=nn.ReLU)
        self.stem_pool = _stem_pool(config.pool)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.stages = nn.ModuleList()
        dim = config.base_width
        for stage, letters in enumerate(config.wirings()):
            blocks = nn.Sequential()
            for letter, rate in zip(letters, rates[stage], strict=True):
                first, planes = len(blocks) == 0, config.planes(stage)
                stride = 2 if first and stage > 0 else 1
                blocks.append(Bottleneck(dim, planes, _middle(planes, letter), stride, first, rate))
                dim = EXPANSION * planes
            self.stages.append(blocks)
        self.drop = nn.Dropout(config.drop_rate)
        self.head = self.make_head(config.num_classes)
        self.min_frames = config.frames[0]
        for part in (self.stem, *self.stages[:PSEUDO_3D_STAGES]):
            part.apply(_init_weights)

    @property
    def feature_info(self) -> list[ClipFeatureInfo]:
        return [ClipFeatureInfo(EXPANSION * self.config.planes(i), 2 ** (i + 1), 2 ** (i + 2)) for i in range(4)]

    def forward_features(
        self, x: Float[Tensor, "batch channels time height width"]
    ) -> Float[Tensor, "batch features t h w"]:
        """Return the last stage's map. It has one frame, or several if `temporal_pool` handles them.

        Raises:
            ValueError: if `x` is not a valid batch of clips, or is too long.
        """
        self.check_input(x)
        if self.config.temporal_pool is None and self.config.frames_left(x.shape[2]) > 1:
            fewest, most = self.config.frames
            raise ValueError(
                f"{self.title} leaves one frame in sixteen and expects clips of {fewest} to {most} frames, not "
                f"{x.shape[2]}; with temporal_pool='mean' it averages the logits of several"
            )
        return self.stage_outputs(x)[-1]

    def forward_head(self, features: Float[Tensor, "batch features t h w"]) -> Float[Tensor, "batch classes"]:
        pooled = features.mean(dim=(3, 4)).transpose(1, 2)
        return self.head(self.drop(pooled)).mean(dim=1)

    def forward_pyramid(
        self, x: Float[Tensor, "batch channels time height width"]
    ) -> list[Float[Tensor, "batch _ _ _ _"]]:
        """Return the output of each stage before time is halved, for clips of any length from the minimum."""
        self.check_input(x)
        return self.stage_outputs(x)[1:]

    def stage_outputs(
        self, x: Float[Tensor, "batch channels time height width"]
    ) -> list[Float[Tensor, "batch _ _ _ _"]]:
        """Return the outputs of the stem's pooling and of each stage."""
        # Setting the memory format here avoids copies in the convolutions. It is set again after the stem because the
        # strides of a one-channel clip do not reveal the format, and the convolution may choose the other one.
        outputs = [self.stem_pool(channels_last(self.stem(channels_last(x))))]
        for index, stage in enumerate(self.stages):
            x = halve_time(outputs[-1]) if index else outputs[-1]
            x = self.run_blocks(stage.children(), x)
            outputs.append(x)
        return outputs

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(EXPANSION * self.config.planes(PSEUDO_3D_STAGES), num_classes)

    def freeze_norms(self, stages: int = PSEUDO_3D_STAGES) -> None:
        """Freeze the batch norms of the first `stages` stages, never the stem's, for fine-tuning.

        The port freezes those of three stages, the Caffe network those of all four.
        """
        parts = [module for stage in self.stages[:stages] for module in stage.modules()]
        self.freeze([module for module in parts if isinstance(module, nn.BatchNorm2d)])

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a 2-D ResNet's weights, already under our names, for this network. Temporal parts start near zero.

        Kernels over time are drawn from a normal distribution with standard deviation 0.001 for color and from Xavier's
        uniform distribution for flow, as in the Caffe network. Their norms keep their initial values. For flow, the
        stem gets the mean over colors. (ResNets that stride in the 3x3 convolution, such as torchvision's, are fine as
        initialization, but are not reproduced exactly.)
        """
        adapted = dict(state)
        for key, parameter in self.state_dict().items():
            if ".middle.temporal." in key and key not in state:
                adapted[key] = self._kernel_over_time(parameter) if key.endswith("conv.weight") else parameter
        stem = state.get("stem.conv.weight")
        if stem is not None and stem.shape[1] != self.config.in_chans:
            adapted["stem.conv.weight"] = stem.mean(dim=1, keepdim=True).repeat(1, self.config.in_chans, 1, 1)
        return adapted

    def _kernel_over_time(self, like: Tensor) -> Tensor:
        if self.config.in_chans == COLORS:
            return torch.empty_like(like).normal_(std=0.001)
        bound = sqrt(3 / like[0].numel())
        return torch.empty_like(like).uniform_(-bound, bound)


def _init_weights(module: nn.Module) -> None:
    """Initialize like the port: variance 2 / (kT kH C'), without the kernel's width. The last stage is unchanged."""
    if isinstance(module, FrameConv):
        kernel_time, kernel_height = 1, module.conv.kernel_size[0]
    elif isinstance(module, TemporalConv):
        kernel_time, kernel_height = module.conv.kernel_size
    else:
        return
    fan = kernel_time * kernel_height * module.conv.out_channels
    nn.init.normal_(module.conv.weight, std=sqrt(2 / fan))


_PORT_RULES: tuple[Rule, ...] = (
    ("^conv1_custom", "stem.conv"),
    ("^bn1", "stem.norm"),
    ("^fc", "head"),
    ("^layer{i+1}.{b}", "stages.{i}.{b}"),
    ("conv1", "reduce.conv"),
    ("bn1", "reduce.norm"),
    ("conv2", "middle.spatial.conv"),
    ("bn2", "middle.spatial.norm"),
    ("conv3", "middle.temporal.conv"),
    ("bn3", "middle.temporal.norm"),
    ("conv_normal", "middle.conv"),
    ("bn_normal", "middle.norm"),
    ("conv4", "expand.conv"),
    ("bn4", "expand.norm"),
    ("downsample.0", "shortcut.conv"),
    ("downsample.1", "shortcut.norm"),
)


def _kernel_to_ours(key: str, tensor: Tensor) -> Tensor:
    """Return a kernel over space or time without the axis that it does not span."""
    if tensor.ndim != 5:
        return tensor
    return tensor.squeeze(2) if tensor.shape[2] == 1 else tensor.squeeze(4)


def _kernel_to_theirs(key: str, tensor: Tensor) -> Tensor:
    if tensor.ndim != 4 or key.startswith("layer4."):
        return tensor
    return tensor.unsqueeze(4) if ".conv3." in key else tensor.unsqueeze(2)


PORT = KeyLayout("port", _PORT_RULES, tensor_to_ours=_kernel_to_ours, tensor_to_theirs=_kernel_to_theirs)


_RESNET = KeyLayout(
    "resnet",
    (
        ("^conv1", "stem.conv"),
        ("^bn1", "stem.norm"),
        ("^fc", "head"),
        ("^layer{i+1}.{b}", "stages.{i}.{b}"),
        ("conv1", "reduce.conv"),
        ("bn1", "reduce.norm"),
        ("^stages.3.{b}.conv2", "stages.3.{b}.middle.conv"),
        ("^stages.3.{b}.bn2", "stages.3.{b}.middle.norm"),
        ("conv2", "middle.spatial.conv"),
        ("bn2", "middle.spatial.norm"),
        ("conv3", "expand.conv"),
        ("bn3", "expand.norm"),
        ("downsample.0", "shortcut.conv"),
        ("downsample.1", "shortcut.norm"),
    ),
    pack=lambda state: {key: tensor for key, tensor in state.items() if ".temporal." not in key},
)
"""Image ResNet with torchvision's names. Load it with `adapt=True`, which initializes the missing parts."""


def layouts(config: P3DConfig) -> list[KeyLayout]:
    """Return the layouts of the port, the Caffe network (variances or inverse standard deviations), and ResNets."""
    return [PORT, *caffe_layouts(config.depths, config.num_classes), _RESNET]


def _clips(size: int = 160, **fields: Any) -> Variant:
    config = P3DConfig(**fields)
    return Variant(config, input_size=(config.in_chans, 16, size, size))


RESNET_101 = (3, 4, 23, 3)
RESNET_152 = (3, 8, 36, 3)

register(
    P3D,
    paper="p3d",
    layouts=layouts,
    fresh_with_head=("head.",),
    variants={
        "p3d63": _clips(),
        "p3d131": _clips(depths=RESNET_101),
        "p3d199": _clips(depths=RESNET_152),
        "p3d199_flow": _clips(depths=RESNET_152, in_chans=2),
        "p3d199_k600_224": _clips(224, depths=RESNET_152, num_classes=600),
        "p3d199_k600_299": _clips(299, depths=RESNET_152, num_classes=600),
        # Form for weights of the Caffe network, whose first pooling and dropout differ.
        "caffe_p3d199_sports1m": _clips(depths=RESNET_152, num_classes=487, drop_rate=0.1, pool="caffe"),
        "caffe_p3d199": _clips(depths=RESNET_152, pool="caffe"),
        "caffe_p3d199_flow": _clips(depths=RESNET_152, in_chans=2, drop_rate=0.7, pool="caffe"),
    },
)
