"""Pictures of gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from gatewise.gates.capture import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(image: Float[Tensor, "channels height width"], readings: Sequence[Reading], index: int = 0) -> Figure:
    """Draw one row per reading: the image, then one picture per gate.

    Signed gates are drawn red (positive) and blue (negative) around white, on one scale per row, so that levels can
    be compared. Magnitudes, which have no sign, run from dark to bright on their own scale.

    Args:
        image: image with values in [0, 1].
        readings: readings of (B, H, W) maps; those of one network have the same names.
        index: index of the image in the batch that was read.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for reading in readings for name in reading.maps))
    columns = 1 + len(names)
    figure = Figure(figsize=(1.6 * columns, 1.75 * len(readings)), layout="constrained")
    axes = figure.subplots(len(readings), columns, squeeze=False)
    picture = image.clamp(0, 1).permute(1, 2, 0).numpy()
    for row, reading in zip(axes, readings, strict=True):
        row[0].imshow(np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture)
        row[0].set_ylabel(reading.path, fontsize=7)
        signed = [gate[index].numpy() for name, gate in reading.maps.items() if not _is_magnitude(name)]
        limit = max((np.abs(gate).max() for gate in signed), default=1.0) or 1.0
        for axis, name in zip(row[1:], names, strict=True):
            if name not in reading.maps:
                axis.set_axis_off()
                continue
            gate = reading.maps[name][index].numpy()
            if _is_magnitude(name):
                axis.imshow(gate, cmap="magma", interpolation="nearest")
            else:
                axis.imshow(gate, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    for axis, title in zip(axes[0], ["image", *names], strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def _is_magnitude(name: str) -> bool:
    return name == "modulator"
