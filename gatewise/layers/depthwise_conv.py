"""Depthwise convolution for all networks: `nn.Conv2d` with one filter per channel and the fastest known kernel.

Libraries are fast at the 3x3 kernels that most networks use. In other cases (the gradients of 5x5 and larger kernels on
a CPU, channels-last maps on CUDA), `gatewise.ops.large_depthwise_conv` takes over, which documents the measurements.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, fx, nn

from gatewise.ops.large_depthwise_conv import large_depthwise_conv


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution: (B, C, H, W) -> (B, C, H', W'), with the weights and the keys of `nn.Conv2d`.

    Args:
        kernel_size: side of the kernel, or (rows, columns).
        padding: padding on each side; None to keep the map's size at stride 1.
    Raises:
        ValueError: if the kernel is even and `padding` is None.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        *,
        padding: int | tuple[int, int] | None = None,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if padding is None:
            if rows % 2 == 0 or columns % 2 == 0:
                raise ValueError(f"a kernel that keeps the map's size has odd sides, not {rows} and {columns}")
            padding = dilation * (rows // 2), dilation * (columns // 2)
        super().__init__(dim, dim, (rows, columns), stride, padding, dilation, groups=dim, bias=bias)

    @property
    def keeps_size(self) -> bool:
        """Whether the kernel is square and odd, and the output has the size of the input."""
        size, dilation = self.kernel_size[0], self.dilation[0]
        margin = dilation * (size // 2)
        return (
            self.kernel_size == (size, size)
            and size % 2 == 1
            and self.stride == (1, 1)
            and self.dilation == (dilation, dilation)
            and self.padding == (margin, margin)
            and self.padding_mode == "zeros"
        )

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels h w"]:
        if not self.keeps_size:
            return super().forward(x)
        return large_depthwise_conv(x, self.weight, self.bias, dilation=self.dilation[0])


def conv2d(
    in_dim: int,
    dim: int,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = True,
) -> nn.Conv2d:
    """Return a `DepthwiseConv2d` if every channel is a group, else an `nn.Conv2d` with the same arguments."""
    if groups == in_dim == dim > 1:
        return DepthwiseConv2d(dim, kernel_size, stride, padding=padding, dilation=dilation, bias=bias)
    return nn.Conv2d(in_dim, dim, kernel_size, stride, padding, dilation, groups, bias)


# Graph tracers record the operator as one call, because it reads shapes and devices, which they lack.
fx.wrap("large_depthwise_conv")
