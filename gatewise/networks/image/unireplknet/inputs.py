"""Conversion of audio, video and time series to images for UniRepLKNet.

The network is unchanged except for its input channels and, in the published video and time-series models, kernels of 11
in the last stage: `create_model("unireplknet_s", in_chans=1, kernel_sizes=...)`.

Paper: Ding et al. 2024, arXiv:2410.08049, section on universal perception, and the published code.
"""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def spectrogram_to_image(x: Float[Tensor, "batch time frequency"]) -> Float[Tensor, "batch 1 frequency time"]:
    """Return a spectrogram as an image with time from left to right."""
    return rearrange(x, "b t f -> b 1 f t")


def frames_to_mosaic(
    x: Float[Tensor, "batch channels time height width"], columns: int
) -> Float[Tensor, "batch channels tall wide"]:
    """Arrange frames side by side, row by row, with `columns` frames per row.

    Raises:
        ValueError: if the frames do not fill whole rows.
    """
    _check_rows(x.shape[2], columns)
    return rearrange(x, "b c (rows columns) h w -> b c (rows h) (columns w)", columns=columns)


def frames_to_image_by_memory(
    x: Float[Tensor, "batch channels time height width"], columns: int
) -> Float[Tensor, "batch channels tall wide"]:
    """Reshape frames in memory order to an image of the mosaic's size, as the published code does.

    A row of that image holds `columns` successive rows of one frame. Vertically adjacent pixels of a frame end up
    `width` apart in a row. The published video model was trained on this; for a new network, `frames_to_mosaic` keeps
    frames whole.

    Raises:
        ValueError: if the frames do not fill whole rows.
    """
    batch, channels, time, height, width = x.shape
    _check_rows(time, columns)
    return x.reshape(batch, channels, time // columns * height, columns * width)


def series_to_image(x: Float[Tensor, "batch steps values"], side: int) -> Float[Tensor, "batch 1 side side"]:
    """Return the embedded steps of a time series, concatenated, as a square image (48 x 768 values in 192 x 192).

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
