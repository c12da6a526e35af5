"""YaRN: rotary frequencies for contexts longer than in training.

A channel pair that turns often within the trained length L distinguishes nearby tokens and keeps its frequency. A pair
that turns less than once only encodes distant positions, which are compressed by the factor s. The pairs between are
blended. A longer context flattens the softmax, which a factor on cosine and sine compensates for.

    r_i = L f_i / 2 pi                      turns of pair i within the trained length
    f_i' = (1 - g_i) f_i / s + g_i f_i      g_i: 1 where r_i >= 32, 0 where r_i <= 1, linear between

Source: Peng et al. 2023, arXiv:2309.00071, eq. (17)-(19) and section 3.4. The published code, which inference engines
follow, makes the blend rise linearly over the channel pairs instead of over their turns; that is the default here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gatewise.layers.rotary import inverse_frequencies


@dataclass(frozen=True)
class Yarn:
    """Options of a context extension.

    Args:
        factor: new length relative to the trained one.
        original_length: context length in training, in tokens.
        fast_turns: number of turns within the trained length from which pairs keep their frequency.
        slow_turns: number of turns up to which pairs are slowed down by the whole factor.
        blend: variable in which the weight of the old frequency is linear in between, "channels" or "turns".
        magnitude: factor on cosine and sine; None for 0.1 ln(factor) + 1.
    """

    factor: float
    original_length: int
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    blend: Literal["channels", "turns"] = "channels"
    magnitude: float | None = None

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"YaRN extends contexts by a factor of at least 1, not {self.factor}")
        if self.original_length < 1:
            raise ValueError(f"original_length must be positive, not {self.original_length}")
        if not 0 < self.slow_turns < self.fast_turns:
            raise ValueError(
                f"YaRN needs 0 < slow_turns < fast_turns, not slow_turns {self.slow_turns} and "
                f"fast_turns {self.fast_turns}"
            )
        if self.blend not in ("channels", "turns"):
            raise ValueError(f"blend must be channels or turns, not {self.blend!r}")

    @property
    def rotary_magnitude(self) -> float:
        """Factor on cosine and sine. Source: arXiv:2309.00071, eq. (22)."""
        return 0.1 * math.log(self.factor) + 1.0 if self.magnitude is None else self.magnitude


def yarn_frequencies(
    yarn: Yarn, head_dim: int, base: float = 10000.0, device: torch.device | None = None
) -> Float[Tensor, " half"]:
    """Return the frequencies of the extended context, in float32. Raises a ValueError if the width is odd."""
    frequencies = inverse_frequencies(head_dim, base, device)
    kept = _kept_over_channels(yarn, head_dim, base, device) if yarn.blend == "channels" else _kept(yarn, frequencies)
    return kept * frequencies + (1 - kept) * frequencies / yarn.factor


def _kept(yarn: Yarn, frequencies: Tensor) -> Tensor:
    """Return the weight of the old frequency, linear in the turns."""
    turns = yarn.original_length * frequencies / (2 * math.pi)
    return ((turns - yarn.slow_turns) / (yarn.fast_turns - yarn.slow_turns)).clamp(0, 1)


def _kept_over_channels(yarn: Yarn, head_dim: int, base: float, device: torch.device | None) -> Tensor:
    """Return the weight of the old frequency, linear between the pairs with these two numbers of turns."""

    def pair_with(turns: float) -> float:
        return head_dim * math.log(yarn.original_length / (2 * math.pi * turns)) / (2 * math.log(base))

    first = max(math.floor(pair_with(yarn.fast_turns)), 0)
    last = min(math.ceil(pair_with(yarn.slow_turns)), head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    # If both bounds fall on one pair, a thousandth approximates a step.
    return 1 - ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
