"""Pictures made of symbols, one plane each, with questions asked at some of their cells.

Seeing what a symbol is takes no learning here, so that what a comparison measures is context: which other cells a
network can take into account at the one that asks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from gatewise.claims.lab.training import Batch
from gatewise.networks.image._base import ImageNetwork


class SymbolTask:
    """Name one of `symbols` at every cell that asks.

    Subclasses define `batch`, which returns pictures (B, planes, side, side), the cells that ask (B, Q), the right
    answers (B, Q), and whatever else they want to know of a question (B, Q).
    """

    symbols: int
    planes: int
    side: int

    def logits(self, model: ImageNetwork, batch: Batch) -> Float[Tensor, "batch questions symbols"]:
        """The network's classifier at the cells that ask, in the place of the mean over all cells."""
        pictures, cells = batch[:2]
        features = model.forward_features(pictures).flatten(2)
        asked = features.gather(2, cells[:, None].expand(-1, features.shape[1], -1))
        return model.forward_head(rearrange(asked, "b c q -> (b q) c 1 1")).unflatten(0, cells.shape)

    def loss(self, model: ImageNetwork, batch: Batch) -> Tensor:
        """Cross-entropy over all questions."""
        return F.cross_entropy(self.logits(model, batch).flatten(0, 1), batch[2].flatten())

    @torch.no_grad()
    def percent_right(self, model: ImageNetwork, batch: Batch, of: Tensor | None = None) -> float:
        """Of all questions, or of those where `of` (B, Q) is true."""
        right = self.logits(model, batch).argmax(-1) == batch[2]
        return 100 * (right if of is None else right[of]).float().mean().item()

    def empty(self, size: int) -> Float[Tensor, "batch planes cells"]:
        """Pictures without symbols, to be filled at [sample, plane, cell]."""
        return torch.zeros(size, self.planes, self.side**2)

    def cell(self, row_and_column: Int[Tensor, "*cells 2"]) -> Int[Tensor, "*cells"]:
        """The number of a cell."""
        return row_and_column[..., 0] * self.side + row_and_column[..., 1]

    def as_images(self, pictures: Float[Tensor, "batch planes cells"]) -> Float[Tensor, "batch planes side side"]:
        """Channels-last images."""
        return pictures.unflatten(2, (self.side, self.side)).contiguous(memory_format=torch.channels_last)


class SymbolNearby(SymbolTask):
    """At each of four dots, name the one of ten symbols that stands 1 to 4 cells away, in any direction.

    The picture has 20x20 cells, one plane per symbol and one for the dots. Each dot is the middle of a neighborhood of
    9x9 cells of its own with one symbol in it, so that no other symbol is within 4 cells; all four are shifted together
    by up to two cells.
    """

    symbols, reach, across, shift = 10, 4, 2, 2
    planes = symbols + 1
    width = 2 * reach + 1
    side = across * width + shift

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Pictures (B, 11, 20, 20), the cells that ask (B, 4), what they should be told (B, 4), and its distance."""
        middles = torch.arange(self.across) * self.width + self.reach
        dots = torch.cartesian_prod(middles, middles)
        dots = dots + torch.randint(self.shift + 1, (size, 1, 2), generator=generator)
        questions = dots.shape[:2]
        distance = torch.randint(1, self.reach + 1, questions, generator=generator)
        steps = torch.arange(-self.reach, self.reach + 1)
        offsets = torch.cartesian_prod(steps, steps)
        at_distance = (offsets.abs().amax(-1) == distance.reshape(-1, 1)).float()
        offset = offsets[torch.multinomial(at_distance, 1, generator=generator).reshape(questions)]
        symbol = torch.randint(self.symbols, questions, generator=generator)
        pictures, sample = self.empty(size), torch.arange(size)[:, None]
        pictures[sample, symbol, self.cell(dots + offset)] = 1
        pictures[sample, self.symbols, self.cell(dots)] = 1
        return self.as_images(pictures), self.cell(dots), symbol, distance


class NearOrFar(SymbolTask):
    """At each dot, name one of ten symbols: the one beside it, or the one far off, as the dot's own kind says.

    The picture has 12x12 cells in 4x4 blocks of 3x3, one plane per symbol: ten that stand beside dots, ten that stand
    far off, two kinds of dot. The far symbol fills a random block. Six dots take the middles of blocks at least two
    away, 5 to 10 cells from it; each has a symbol on one of its eight neighbors.
    """

    symbols, blocks, dots = 10, 4, 6
    planes = 2 * symbols + 2
    side = 3 * blocks

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Pictures (B, 22, 12, 12), the cells that ask (B, 6), what they should be told (B, 6), and 1 where far."""
        block = torch.cartesian_prod(torch.arange(self.blocks), torch.arange(self.blocks))
        distant = (block[:, None] - block[None]).abs().amax(-1) >= 2
        far_block = torch.randint(len(block), (size,), generator=generator)
        dots = 3 * block[torch.multinomial(distant[far_block].float(), self.dots, generator=generator)] + 1
        questions = (size, self.dots)
        near = torch.randint(self.symbols, questions, generator=generator)
        far = torch.randint(self.symbols, (size, 1), generator=generator)
        asks_far = torch.randint(2, questions, generator=generator)
        neighbor = torch.randint(8, questions, generator=generator)
        neighbor = neighbor + (neighbor >= 4)
        offset = torch.stack([neighbor // 3 - 1, neighbor % 3 - 1], dim=-1)
        pictures, sample = self.empty(size), torch.arange(size)[:, None]
        pictures[sample, near, self.cell(dots + offset)] = 1
        within = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        pictures[sample, self.symbols + far, self.cell(3 * block[far_block][:, None] + within)] = 1
        pictures[sample, 2 * self.symbols + asks_far, self.cell(dots)] = 1
        return self.as_images(pictures), self.cell(dots), torch.where(asks_far == 1, far, near), asks_far
