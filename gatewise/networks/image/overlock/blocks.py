"""Blocks of OverLoCK: large kernels for Base-Net and Overview-Net, context mixing for the Focus-Net.

The file also has the block that the authors offer for other networks, context mixing without an overview.

Paper: Lou and Yu 2025, arXiv:2502.20087. Where the paper is silent, we follow the published code.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.depthwise_conv import DepthwiseConv2d
from gatewise.layers.dilated_reparam import DilatedReparam
from gatewise.layers.drop_path import DropPath
from gatewise.layers.fold_norm import fold_into_previous, scale_outputs
from gatewise.layers.gated_context_mixing import GatedContextMixing, squeezed_dim
from gatewise.layers.grn import GlobalResponseNorm
from gatewise.layers.norm import LayerNorm2d
from gatewise.layers.squeeze_excite import SqueezeExcite

Maps = Float[Tensor, "batch channels height width"]
Block = TypeVar("Block", bound=nn.Module)

BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Large kernel -> (kernel, dilation) of its branches, as in the published code."""


class ResidualDepthwise(DepthwiseConv2d):
    """x + depthwise 3x3 of x: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3)

    def forward(self, x: Maps) -> Maps:
        return x + super().forward(x)

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """Return an equivalent plain convolution, with the identity added to the center of its kernel."""
        new = DepthwiseConv2d(self.in_channels, 3).to(self.weight)
        new.load_state_dict(self.state_dict())
        new.weight[:, :, 1, 1] += 1
        return new.requires_grad_(self.weight.requires_grad).train(self.training)


class Affine(nn.Module):
    """A weight (initially `init`) and a bias (initially 0) per channel: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, init: float = 1.0) -> None:
        super().__init__()
        # Shape of the published weights. With four axes, the usual rule applies weight decay to it, as published.
        self.weight = nn.Parameter(torch.full((dim, 1, 1, 1), float(init)))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Maps) -> Maps:
        return x * self.weight[..., 0] + self.bias[:, None, None]


class Residual(nn.Module):
    """A branch added to its identity, with one of the two scaled: (B, C, H, W) twice -> (B, C, H, W).

    Args:
        scale_init: initial scale; None for no scale.
        scale_identity: whether to scale the identity instead of the branch.
    """

    def __init__(self, dim: int, scale_init: float | None, scale_identity: bool, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.affine = None if scale_init is None else Affine(dim, scale_init)
        self.scale_identity = scale_identity
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, identity: Maps, branch: Maps) -> Maps:
        if self.affine is None:
            return identity + self.drop_path(branch)
        if self.scale_identity:
            return self.affine(identity) + self.drop_path(branch)
        return identity + self.drop_path(self.affine(branch))

    @torch.no_grad()
    def fold_into(self, last: nn.Conv2d) -> None:
        """Move the scale of a branch into its last convolution. A scale on the identity cannot be folded."""
        if self.affine is None or self.scale_identity:
            return
        scale_outputs(last, self.affine.weight.flatten())
        last.bias += self.affine.bias
        self.affine = None


class ConvMlp(nn.Module):
    """project(GRN(depthwise(gelu(expand(x))))): (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(dim, hidden, 1)
        self.depthwise: nn.Conv2d = ResidualDepthwise(hidden)
        self.grn = GlobalResponseNorm(hidden)
        self.project = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Maps) -> Maps:
        return self.project(self.grn(self.depthwise(F.gelu(self.expand(x)))))

    @torch.no_grad()
    def merged(self) -> ConvMlp:
        """Return an equivalent MLP with the depthwise residual in its kernel and the bias of GRN in the projection."""
        new = deepcopy(self)
        new.depthwise = _merge_residual(self.depthwise)
        if new.grn.bias is not None:
            new.project.bias += new.project.weight[:, :, 0, 0] @ new.grn.bias.flatten()
            new.grn.bias = None
        return new


class RepConvBlock(nn.Module):
    """Block of Base-Net and Overview-Net: (B, C, H, W) -> (B, C, H, W).

        z = x + depthwise(x)
        y = scale(z) + MLP(SE(BN(DRB(LN(z)))))

    Args:
        scale_init: initial value of the scale; None for no scale.
        scale_identity: whether the scale is on z, as written, instead of on what is added to z.
        deploy: whether the large kernel is a single convolution without branches.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        mlp_ratio: float = 4,
        scale_init: float | None = None,
        scale_identity: bool = False,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.depthwise: nn.Conv2d = ResidualDepthwise(dim)
        self.norm = LayerNorm2d(dim)
        self.large = DilatedReparam(dim, kernel_size, BRANCHES, deploy)
        self.large_norm: nn.Module = nn.BatchNorm2d(dim)
        self.se = SqueezeExcite(dim, squeezed_dim(dim), nn.GELU)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.residual = Residual(dim, scale_init, scale_identity, drop_path_rate)

    def forward(self, x: Maps) -> Maps:
        z = self.depthwise(x)
        return self.residual(z, self.mlp(self.se(self.large_norm(self.large(self.norm(z))))))

    def merged(self) -> RepConvBlock:
        """Return an equivalent block for eval mode with everything folded, computed in float64 and rounded once.

        Raises:
            ValueError: if called in training mode.
        """
        new = _in_float64(self)
        new.depthwise, new.large, new.mlp = _merge_residual(new.depthwise), new.large.merged(), new.mlp.merged()
        if isinstance(new.large_norm, nn.BatchNorm2d):
            fold_into_previous(new.large.large, new.large_norm)
            new.large_norm = nn.Identity()
        new.residual.fold_into(new.mlp.project)
        return new.to(self.norm.weight.dtype)


class Refinement(nn.Module):
    """Last part of blocks with context mixing: identity and branch (B, C, H, W) -> (B, C, H, W).

    z = join(identity, branch);   z <- z + depthwise(z);   join(z, MLP(LN(z)))
    """

    def __init__(
        self, dim: int, hidden: int, scale_init: float | None, scale_identity: bool, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.residual1 = Residual(dim, scale_init, scale_identity, drop_path_rate)
        self.depthwise: nn.Conv2d = ResidualDepthwise(dim)
        self.norm = LayerNorm2d(dim)
        self.mlp = ConvMlp(dim, hidden)
        self.residual2 = Residual(dim, scale_init, scale_identity, drop_path_rate)

    def forward(self, identity: Maps, branch: Maps) -> Maps:
        z = self.depthwise(self.residual1(identity, branch))
        return self.residual2(z, self.mlp(self.norm(z)))

    def merged(self) -> Refinement:
        """Return an equivalent module with the last branch's scale and the depthwise residual folded."""
        new = deepcopy(self)
        new.depthwise, new.mlp = _merge_residual(self.depthwise), self.mlp.merged()
        new.residual2.fold_into(new.mlp.project)
        return new


class Fusion(nn.Module):
    """Fusion of features and overview to the features' width: (B, C + D, H, W) -> (B, C, H, W).

    GRN(W gelu(BN(depthwise(z))))
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv2d(in_dim, 3)
        self.norm: nn.Module = nn.BatchNorm2d(in_dim)
        self.project = nn.Conv2d(in_dim, dim, 1)
        self.grn = GlobalResponseNorm(dim)

    def forward(self, z: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return self.grn(self.project(F.gelu(self.norm(self.depthwise(z)))))

    def merged(self) -> Fusion:
        """Return an equivalent module for eval mode, with the norm folded into the depthwise convolution."""
        new = deepcopy(self)
        if isinstance(new.norm, nn.BatchNorm2d):
            fold_into_previous(new.depthwise, new.norm)
            new.norm = nn.Identity()
        return new


class FocusBlock(nn.Module):
    """Block of the Focus-Net, on concatenated features and overview: (B, C + D, H, W) -> (B, C + D, H, W).

        z = [x, scale_h(h) + scale_r(overview)];   z <- z + depthwise(z);   n = LN(z)
        f = fusion(n)
        refine(z, mixing(value f, query n[:C], key n[C:]))

    x are the first C channels. h are the last D, the overview as earlier blocks left it. Every block but the first adds
    the original overview again.

    Args:
        dim: number of feature channels C.
        context_dim: number of overview channels D.
        mlp_ratio: hidden width of the MLP relative to C.
        is_first: whether this is the first block, which uses h unchanged.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        kernel_size: int,
        small_kernel_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4,
        scale_init: float | None = None,
        scale_identity: bool = False,
        drop_path_rate: float = 0.0,
        is_first: bool = False,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        whole = dim + context_dim
        self.dims = [dim, context_dim]
        self.kept_scale = None if is_first else Affine(context_dim)
        self.overview_scale = None if is_first else Affine(context_dim)
        self.depthwise: nn.Conv2d = ResidualDepthwise(whole)
        self.norm = LayerNorm2d(whole)
        self.fusion = Fusion(whole, dim)
        self.mixing = GatedContextMixing(
            dim, context_dim, whole, kernel_size, small_kernel_size, num_heads, BRANCHES, deploy
        )
        self.refine = Refinement(whole, int(dim * mlp_ratio), scale_init, scale_identity, drop_path_rate)

    def forward(
        self,
        z: Float[Tensor, "batch both height width"],
        overview: Float[Tensor, "batch context_dim height width"],
    ) -> Float[Tensor, "batch both height width"]:
        if self.kept_scale is not None and self.overview_scale is not None:
            x, h = z.split(self.dims, dim=1)
            z = torch.cat([x, self.kept_scale(h) + self.overview_scale(overview)], dim=1)
        z = self.depthwise(z)
        normed = self.norm(z)
        query, key = normed.split(self.dims, dim=1)
        return self.refine(z, self.mixing(self.fusion(normed), query, key))

    def merged(self) -> FocusBlock:
        """Return an equivalent block for eval mode with everything folded, computed in float64 and rounded once.

        Raises:
            ValueError: if called in training mode.
        """
        new = _in_float64(self)
        new.depthwise, new.fusion = _merge_residual(new.depthwise), new.fusion.merged()
        new.mixing, new.refine = new.mixing.merged(), new.refine.merged()
        new.refine.residual1.fold_into(new.mixing.project)
        return new.to(self.norm.weight.dtype)


class ContextMixingBlock(nn.Module):
    """Context mixing for other networks, where features are their own context: (B, C, H, W) -> (B, C, H, W).

        z = x + depthwise(x);   n = LN(z);   refine(z, mixing(value n, query n, key n))

    The value is projected before mixing. Tables of relative positions start with a standard deviation of 0.02.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        small_kernel_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4,
        scale_init: float | None = None,
        scale_identity: bool = False,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.depthwise: nn.Conv2d = ResidualDepthwise(dim)
        self.norm = LayerNorm2d(dim)
        self.mixing = GatedContextMixing(
            dim, dim, dim, kernel_size, small_kernel_size, num_heads, BRANCHES, deploy, project_value=True
        )
        self.refine = Refinement(dim, int(dim * mlp_ratio), scale_init, scale_identity, drop_path_rate)
        for table in (self.mixing.mixer.small_table, self.mixing.mixer.large_table):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, x: Maps) -> Maps:
        z = self.depthwise(x)
        normed = self.norm(z)
        return self.refine(z, self.mixing(normed, normed, normed))

    def merged(self) -> ContextMixingBlock:
        """Return an equivalent block for eval mode with everything folded, computed in float64 and rounded once.

        Raises:
            ValueError: if called in training mode.
        """
        new = _in_float64(self)
        new.depthwise = _merge_residual(new.depthwise)
        new.mixing, new.refine = new.mixing.merged(), new.refine.merged()
        new.refine.residual1.fold_into(new.mixing.project)
        return new.to(self.norm.weight.dtype)


def _merge_residual(depthwise: nn.Conv2d) -> nn.Conv2d:
    return depthwise.merged() if isinstance(depthwise, ResidualDepthwise) else depthwise


def _in_float64(block: Block) -> Block:
    """Return a float64 copy for merging."""
    if block.training:
        raise ValueError("blocks can only be merged in eval mode, where norms are fixed: call .eval() first")
    return deepcopy(block).double()
