"""How sound, video and time series become the images that UniRepLKNet reads.

The network stays as it is but for its channels and, in the published video and time-series models, kernels of 11 in
the last stage: `create_model("unireplknet_s", in_chans=1, kernel_sizes=...)`.

Paper: Ding et al. 2024, arXiv:2410.08049, section on universal perception, and the published code.
"""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def spectrogram_to_image(x: Float[Tensor, "batch time frequency"]) -> Float[Tensor, "batch 1 frequency time"]:
    """A spectrogram as a picture with time from left to right."""
    return rearrange(x, "b t f -> b 1 f t")


def frames_to_mosaic(
    x: Float[Tensor, "batch channels time height width"], columns: int
) -> Float[Tensor, "batch channels tall wide"]:
    """Frames side by side, row by row, `columns` to a row.

    Raises:
        ValueError: if the frames do not fill whole rows.
    """
    _check_rows(x.shape[2], columns)
    return rearrange(x, "b c (rows columns) h w -> b c (rows h) (columns w)", columns=columns)


def frames_to_image_by_memory(
    x: Float[Tensor, "batch channels time height width"], columns: int
) -> Float[Tensor, "batch channels tall wide"]:
    """Frames read off in the order of memory into a picture of the mosaic's size, as the published code does.

    A row of that picture holds `columns` successive rows of one frame: neighboring pixels of a frame lie `width` apart
    where they were one above the other. The published video model was trained on this; for a new network,
    `frames_to_mosaic` keeps frames whole.

    Raises:
        ValueError: if the frames do not fill whole rows.
    """
    batch, channels, time, height, width = x.shape
    _check_rows(time, columns)
    return x.reshape(batch, channels, time // columns * height, columns * width)


def series_to_image(x: Float[Tensor, "batch steps values"], side: int) -> Float[Tensor, "batch 1 side side"]:
    """The embedded steps of a time series, one after the other in a square picture (48 x 768 values in 192 x 192).

    Raises:
        ValueError: if the values do not fill the square.
    """
    if x.shape[1] * x.shape[2] != side * side:
        raise ValueError(
            f"{x.shape[1]} steps of {x.shape[2]} values must fill a square of {side} x {side}, "
            f"but they are {x.shape[1] * x.shape[2]} values, not {side * side}"
        )
    return x.reshape(x.shape[0], 1, side, side)


def _check_rows(frames: int, columns: int) -> None:
    if columns < 1 or frames % columns:
        raise ValueError(f"{frames} frames must fill rows of {columns}: pass a divisor of the number of frames")
