"""Global filter: convolve every channel, circularly, with a kernel as large as the map.

The kernel is given by the half of its spectrum that determines a real kernel, K: (H, V) with V = W // 2 + 1. With the
spectrum X of the map,

    X[u, v] = sum_{i, j} x[i, j] exp(-2 pi I (u i / H + v j / W))                   0 <= u < H, 0 <= v < V
    y[i, j] = 1 / (H W) sum_{u, v} m_v Re(K[u, v] X[u, v] exp(2 pi I (u i / H + v j / W)))

where m_v = 1 for v = 0 and 2 v = W, which are their own mirror images, and 2 for all others. This is y = x (*) k, a
circular convolution with k[i, j] = 1 / (H W) sum_{u, v} m_v Re(K[u, v] exp(2 pi I (u i / H + v j / W))).

A spectrum of another size is first resized bilinearly with corners aligned, real and imaginary part separately. The
result is an interpolated filter, which differs from the filter learned at the original size.

The filter uses the FFT. Exported programs contain real matrix products instead, since exchange formats have no complex
numbers: y = Re(E_H^-1 (K * (E_H x E_W)) E_W^-1), with the matrices of both transforms as constants. Height and width
are then fixed.

Source: Rao et al. 2021, arXiv:2107.00645 (GFNet), section 3.2; 2022, arXiv:2207.14284 (HorNet), section 3.1.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Maps = Float[Tensor, "batch channels height width"]
Spectrum = Float[Tensor, "channels rows columns 2"]


def global_filter(x: Maps, spectrum: Spectrum) -> Maps:
    """Return the filtered maps in the dtype of x. Half precision is transformed in float32.

    Args:
        spectrum: real and imaginary parts, of any size; resized if it is not (height, width // 2 + 1).
    Raises:
        ValueError: if shapes do not fit together.
    """
    _check(x, spectrum)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    fitted = resize_spectrum(spectrum.to(wide), x.shape[2], x.shape[3])
    filtered = _by_matrices if torch.compiler.is_exporting() else _by_fft
    return filtered(x.to(wide), fitted).to(x.dtype)


def global_filter_reference(x: Maps, spectrum: Spectrum) -> Maps:
    """Compute the definition in the given dtype: the kernel by its sum over frequencies, then shift by shift."""
    height, width = x.shape[2:]
    columns = width // 2 + 1
    over_rows, over_columns = _hats(spectrum.shape[1], height, x), _hats(spectrum.shape[2], columns, x)
    real, imaginary = torch.einsum("ur,crsp,vs->pcuv", over_rows, spectrum, over_columns)
    u, v, i, j = (torch.arange(count).to(x) for count in (height, columns, height, width))
    angle = 2 * math.pi * (u[:, None, None, None] * i[:, None] / height + v[:, None, None] * j / width)
    m = torch.tensor(_multiplicity(width)).to(x)
    kernel = torch.einsum("v,cuv,uvij->cij", m, real, angle.cos())
    kernel = (kernel - torch.einsum("v,cuv,uvij->cij", m, imaginary, angle.sin())) / (height * width)
    y = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            y = y + kernel[:, row, column, None, None] * x.roll((row, column), dims=(2, 3))
    return y


def resize_spectrum(spectrum: Spectrum, height: int, width: int) -> Float[Tensor, "channels new_rows new_columns 2"]:
    """Resize a spectrum to maps of this height and width, bilinearly with corners aligned, unless it already fits."""
    grid = (height, width // 2 + 1)
    if spectrum.shape[1:3] == grid:
        return spectrum
    planes = F.interpolate(spectrum.permute(0, 3, 1, 2), grid, mode="bilinear", align_corners=True)
    return planes.permute(0, 2, 3, 1)


def _by_fft(x: Tensor, spectrum: Tensor) -> Tensor:
    transformed = torch.fft.rfft2(x) * torch.view_as_complex(spectrum.contiguous())
    return torch.fft.irfft2(transformed, s=x.shape[2:])


def _by_matrices(x: Tensor, spectrum: Tensor) -> Tensor:
    """Compute the same in real arithmetic: four matrix products, with real and imaginary parts side by side."""
    to_columns, to_rows, from_rows, from_columns = _dft_matrices(x.shape[2], x.shape[3], x)
    # The products would lose too much accuracy in half precision.
    autocast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        parts = _turn(x @ to_columns) @ to_rows
        real, imaginary = parts.chunk(2, dim=-1)
        real_filter, imaginary_filter = spectrum.permute(3, 0, 2, 1).unbind()
        filtered = torch.cat(
            [
                real * real_filter - imaginary * imaginary_filter,
                real * imaginary_filter + imaginary * real_filter,
            ],
            dim=-1,
        )
        return _turn(filtered @ from_rows) @ from_columns


def _turn(parts: Tensor) -> Tensor:
    """Rearrange (..., a, [real b, imaginary b]) to (..., b, [real a, imaginary a])."""
    return parts.unflatten(-1, (2, -1)).transpose(-3, -1).flatten(-2)


def _dft_matrices(height: int, width: int, like: Tensor) -> list[Tensor]:
    """Return DFT matrices along width, along height, and back: (W, 2V), (2H, 2H), (2H, 2H), (2V, W).

    They are made from Python numbers, so that a tracer sees four constants instead of their computation.
    """
    cos, sin = _waves(width, width, width // 2 + 1)
    weight = [m / (height * width) for m in _multiplicity(width)]
    to_columns = [[*cos[j], *_negative(sin[j])] for j in range(width)]
    from_columns = [[w * cos[j][v] for j in range(width)] for v, w in enumerate(weight)]
    from_columns += [[-w * sin[j][v] for j in range(width)] for v, w in enumerate(weight)]
    cos, sin = _waves(height, height, height)
    to_rows = [[*cos[i], *_negative(sin[i])] for i in range(height)] + [[*sin[i], *cos[i]] for i in range(height)]
    from_rows = [list(row) for row in zip(*to_rows, strict=True)]
    tables = (to_columns, to_rows, from_rows, from_columns)
    return [torch.tensor(table, dtype=like.dtype, device=like.device) for table in tables]


def _multiplicity(width: int) -> list[float]:
    """Return how often each column of the half spectrum occurs in the whole one."""
    return [1.0 if v in (0, width / 2) else 2.0 for v in range(width // 2 + 1)]


def _negative(values: list[float]) -> list[float]:
    return [-value for value in values]


def _waves(period: int, rows: int, columns: int) -> tuple[list[list[float]], list[list[float]]]:
    """Return cosine and sine of 2 pi r c / period. Reducing the product first keeps large ones exact."""
    angles = [[2 * math.pi * (r * c % period) / period for c in range(columns)] for r in range(rows)]
    return [[math.cos(a) for a in row] for row in angles], [[math.sin(a) for a in row] for row in angles]


def _hats(old: int, new: int, like: Tensor) -> Tensor:
    """Return (new, old) weights of old samples in new ones; a single new sample is the first old one."""
    places = torch.linspace(0, old - 1 if new > 1 else 0, new, dtype=like.dtype, device=like.device)
    return (1 - (places[:, None] - torch.arange(old).to(like)).abs()).clamp_min(0)


def _check(x: Tensor, spectrum: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"maps must be (batch, channels, height, width), not {tuple(x.shape)}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"maps must have at least one row and one column, not {x.shape[2]} x {x.shape[3]}")
    if spectrum.ndim != 4 or spectrum.shape[0] != x.shape[1] or spectrum.shape[3] != 2 or 0 in spectrum.shape:
        raise ValueError(
            f"the spectrum must be (channels, rows, columns, 2) with the {x.shape[1]} channels of the maps, "
            f"not {tuple(spectrum.shape)}"
        )
