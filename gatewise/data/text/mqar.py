"""Multi-query associative recall: key-value pairs, then queries for the values of some of the keys.

    inputs    k1 v1 k2 v2 k3 v3 0 k3 0  0 0 k1 0  0 0 k2 0  0
    targets    .  .  .  .  .  . . v3 .  . . v1 .  . . v2 .  .

It distinguishes mixers that look things up (attention, or a large enough state) from those that mix only by position.
Keys come from the lower half of the vocabulary without 0, the filler token. Values come from the upper half. A query is
at the j-th even position after the pairs with probability proportional to j^(a - 1), so with a = 0.01 most come soon.

Source: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023, arXiv:2312.04927,
section 4.2 and appendix E. The values of the first positions follow the published generator bit for bit (`exact`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gatewise.data.loading import Batch, Share, eval_batches
from gatewise.data.module import require_at_least
from gatewise.data.randomness import frozen_generator
from gatewise.data.text.sequences import IGNORED, Plan, SequenceData, SequenceSource, in_batches
from gatewise.errors import UserError

MOST_TOKENS = 2**31
"""Largest number of tokens in a segment."""

_LARGEST_SEED = 2**32 - 1
_BLOCK = 4096
"""Number of rows that the fast generator draws at a time."""


class Segment(NamedTuple):
    """Examples of one difficulty."""

    num_kv_pairs: int
    input_seq_len: int
    num_examples: int


class Examples(NamedTuple):
    """Inputs and targets, int32 (N, T). Targets are `IGNORED` where there is no query."""

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]


@dataclass(frozen=True)
class Rules:
    """Settings that all segments of a data set share.

    Args:
        vocab_size: size of the vocabulary, larger than the longest sequence.
        power_a: exponent of the query positions: small values put queries soon after the pairs, 1 spreads them evenly.
        num_passes: number of times that the list of pairs occurs before the queries.
        random_non_queries: fill with random tokens instead of 0.
    Raises:
        UserError: if a number is out of range.
    """

    vocab_size: int = 8192
    power_a: float = 0.01
    num_passes: int = 1
    random_non_queries: bool = False

    def __post_init__(self) -> None:
        require_at_least("vocab_size", 4, self.vocab_size)
        require_at_least("num_passes", 1, self.num_passes)
        if not self.power_a > 0:
            raise UserError(f"power_a must be positive, not {self.power_a}")
        if math.isinf(self.power_a):
            raise UserError("power_a must be finite")

    def check(self, segment: Segment) -> None:
        """Raise a `UserError` if this segment is impossible.

        Keys never run out, because 4 * num_kv_pairs <= input_seq_len < vocab_size leaves enough in half the vocabulary.
        """
        pairs, length, examples = segment
        require_at_least("num_kv_pairs of a segment", 1, pairs)
        require_at_least("num_examples of a segment", 1, examples)
        if examples * length > MOST_TOKENS:
            raise UserError(
                f"num_examples {examples:,} of length {length:,} are more than the {MOST_TOKENS:,} tokens that a "
                "segment may have: it is made in memory"
            )
        if length % 2:
            raise UserError(f"input_seq_len must be even, not {length}")
        if self.vocab_size <= length:
            raise UserError(f"vocab_size must be larger than input_seq_len {length}, not {self.vocab_size}")
        if 2 * pairs * self.num_passes + 2 * pairs > length:
            raise UserError(
                f"{pairs} pairs in {self.num_passes} passes do not fit: 2 * num_kv_pairs * num_passes + 2 * "
                f"num_kv_pairs is {2 * pairs * self.num_passes + 2 * pairs}, and input_seq_len is {length}"
            )


def exact_examples(
    segment: Segment, rules: Rules, seed: int, filler: torch.Generator | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return inputs and targets, int64 (N, T), as the published generator draws them.

    Args:
        seed: seed of NumPy's legacy generator.
        filler: generator of random fillers; None: PyTorch's generator with the same seed.
    Raises:
        UserError: if the segment does not fit the rules.
    """
    rules.check(segment)
    pairs, _, examples = segment
    generator = np.random.RandomState(seed)
    half = rules.vocab_size // 2
    gaps_p = _gap_probabilities(segment, rules)
    # The order of the draws matters: all keys first, then all values, then all gaps, row by row.
    keys = _choices(generator, examples, np.arange(1, half), pairs)
    values = _choices(generator, examples, np.arange(half, rules.vocab_size), pairs)
    gaps = _choices(generator, examples, np.arange(len(gaps_p)), pairs, gaps_p)
    inputs, targets = _assemble(segment, rules, keys, values, gaps)
    if rules.random_non_queries:
        draws = torch.randint(rules.vocab_size, inputs.shape, generator=filler or torch.Generator().manual_seed(seed))
        inputs = np.where(inputs == 0, draws.numpy(), inputs)
    return inputs, targets


def fast_examples(segment: Segment, rules: Rules, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return examples with the same distribution as `exact_examples`, drawn for all rows at once.

    Raises:
        UserError: if the segment does not fit the rules.
    """
    rules.check(segment)
    half = rules.vocab_size // 2
    gaps_p = _gap_probabilities(segment, rules)
    blocks = []
    for number, start in enumerate(range(0, segment.num_examples, _BLOCK)):
        rows = min(_BLOCK, segment.num_examples - start)
        generator = frozen_generator("mqar", seed, number)
        keys = 1 + _distinct(generator, rows, segment.num_kv_pairs, half - 1)
        values = half + _distinct(generator, rows, segment.num_kv_pairs, rules.vocab_size - half)
        # Arrivals with exponential times of rates p are ordered like successive draws in proportion to p.
        arrivals = generator.standard_exponential((rows, len(gaps_p))) / gaps_p
        gaps = arrivals.argsort(axis=1)[:, : segment.num_kv_pairs]
        inputs, targets = _assemble(segment, rules, keys, values, gaps)
        if rules.random_non_queries:
            inputs = np.where(inputs == 0, generator.randint(rules.vocab_size, size=inputs.shape), inputs)
        blocks.append((inputs, targets))
    return np.concatenate([inputs for inputs, _ in blocks]), np.concatenate([targets for _, targets in blocks])


def segment_seeds(seed: int, train: int, val: int) -> tuple[list[int], list[int]]:
    """Return the seeds of the training and validation segments, from disjoint halves of the 32-bit numbers."""
    generator = np.random.RandomState(seed)
    return (
        generator.randint(0, 2**31, size=train, dtype=np.int64).tolist(),
        generator.randint(2**31, 2**32, size=val, dtype=np.int64).tolist(),
    )


class MQAR(SequenceData):
    """Multi-query associative recall in segments. All examples of a batch are from one segment.

    Args:
        train_segments: training segments, each (number of pairs, length, number of examples).
        val_segments: validation segments, which are also the test segments, as in the paper.
        vocab_size: size of the vocabulary, larger than the longest sequence.
        power_a: exponent a of the query positions: position j after the pairs has probability proportional to
            j^(a - 1).
        num_passes: number of times that the list of pairs occurs.
        random_non_queries: fill with random tokens instead of token 0.
        exact: use the published generator, bit for bit. It takes 0.3 ms per example. The fast generator of the same
            distribution takes 0.003 ms (4 pairs) to 0.06 ms (64 pairs).
        shuffle: draw a new order of examples and batches in every epoch, instead of a fixed order.
        batch_size: number of sequences per training batch and process.
        eval_batch_size: batch size for validation and test; None: `batch_size`.
        num_workers: number of data-loading processes; 0 loads in the training process.
        seed: random seed of the examples and their order.
    """

    def __init__(
        self,
        train_segments: list[tuple[int, int, int]],
        val_segments: list[tuple[int, int, int]],
        *,
        vocab_size: int = 8192,
        power_a: float = 0.01,
        num_passes: int = 1,
        random_non_queries: bool = False,
        exact: bool = False,
        shuffle: bool = False,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 123,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        if seed > _LARGEST_SEED:
            raise UserError(f"seed must be below 2^32 for NumPy's legacy generator, not {seed}")
        self.rules = Rules(vocab_size, power_a, num_passes, random_non_queries)
        self.vocab_size = vocab_size
        self.train_segments = _segments("train_segments", train_segments, self.rules)
        self.val_segments = _segments("val_segments", val_segments, self.rules)
        self.exact = exact
        self.shuffle = shuffle
        self.input_size = (max(segment.input_seq_len for segment in (*self.train_segments, *self.val_segments)),)

    def _load(self) -> dict[str, SequenceSource]:
        train, val = segment_seeds(self.seed, len(self.train_segments), len(self.val_segments))
        validating = self._source(self.val_segments, val)
        return {"train": self._source(self.train_segments, train), "val": validating, "test": validating}

    def _source(self, segments: Sequence[Segment], seeds: Sequence[int]) -> SegmentSource:
        found = [
            _examples(segment, self.rules, seed, self.exact) for segment, seed in zip(segments, seeds, strict=True)
        ]
        return SegmentSource(found)

    def _plan(self, source: SequenceSource) -> Plan:
        assert isinstance(source, SegmentSource)
        if not self.shuffle:
            return lambda global_batch, _: np.concatenate([in_batches(rows, global_batch) for rows in source.segments])
        return partial(_shuffled, source.segments)

    def _eval_batches(self, source: SequenceSource, share: Share) -> list[range]:
        assert isinstance(source, SegmentSource)
        return [
            range(rows[0] + batch.start, rows[0] + batch.stop)
            for rows in source.segments
            for batch in eval_batches(len(rows), self.eval_batch_size, share)
        ]


class SegmentSource(SequenceSource):
    """Examples of several segments. A batch is from one segment.

    Attributes:
        segments: indices of the examples of each segment.
    """

    def __init__(self, examples: Sequence[Examples]) -> None:
        self._examples = examples
        self._starts = np.cumsum([0, *(len(found.inputs) for found in examples)])
        bounds = zip(self._starts[:-1], self._starts[1:], strict=True)
        self.segments = [np.arange(start, end, dtype=np.int64) for start, end in bounds]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, indices: Sequence[int]) -> Batch:
        segment = int(np.searchsorted(self._starts, indices[0], side="right")) - 1
        rows = np.asarray(indices) - self._starts[segment]
        inputs, targets = self._examples[segment]
        return torch.from_numpy(inputs[rows]).long(), torch.from_numpy(targets[rows]).long()


def _shuffled(
    segments: Sequence[NDArray[np.int64]], global_batch: int, generator: np.random.RandomState
) -> NDArray[np.int64]:
    batches = np.concatenate([in_batches(generator.permutation(rows), global_batch) for rows in segments])
    return batches[generator.permutation(len(batches))]


# Networks that are compared train on the same examples, often in one process.
@lru_cache(maxsize=32)
def _examples(segment: Segment, rules: Rules, seed: int, exact: bool) -> Examples:
    inputs, targets = (exact_examples if exact else fast_examples)(segment, rules, seed)
    return Examples(inputs.astype(np.int32), targets.astype(np.int32))


def _segments(field: str, given: Sequence[tuple[int, int, int]], rules: Rules) -> list[Segment]:
    if not given:
        raise UserError(f"{field} must name at least one segment (number of pairs, length, number of examples)")
    for numbers in given:
        if len(numbers) != 3 or not all(isinstance(number, int) for number in numbers):
            raise UserError(f"a segment of {field} is (number of pairs, length, number of examples), not {numbers!r}")
    segments = [Segment(*numbers) for numbers in given]
    for segment in segments:
        rules.check(segment)
    return segments


def _gap_probabilities(segment: Segment, rules: Rules) -> NDArray[np.float64]:
    space = (segment.input_seq_len - 2 * segment.num_kv_pairs * rules.num_passes) // 2
    weights = rules.power_a * np.arange(1, space + 1) ** (rules.power_a - 1)
    return weights / weights.sum()


def _choices(
    generator: np.random.RandomState,
    rows: int,
    population: NDArray[np.int64],
    size: int,
    p: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    return np.stack([generator.choice(population, size=size, replace=False, p=p) for _ in range(rows)])


def _distinct(generator: np.random.RandomState, rows: int, size: int, population: int) -> NDArray[np.int64]:
    """Return `size` distinct numbers below `population` in each of `rows`, with all ordered choices equally likely.

    Floyd's algorithm: a number drawn twice is replaced by the largest possible one. The order is drawn afterwards.
    """
    chosen = np.empty((rows, size), dtype=np.int64)
    for place, largest in enumerate(range(population - size, population)):
        drawn = generator.randint(largest + 1, size=rows)
        taken = (chosen[:, :place] == drawn[:, None]).any(axis=1)
        chosen[:, place] = np.where(taken, largest, drawn)
    return np.take_along_axis(chosen, generator.random_sample((rows, size)).argsort(axis=1), axis=1)


def _assemble(
    segment: Segment, rules: Rules, keys: NDArray[np.int64], values: NDArray[np.int64], gaps: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return inputs and targets from keys, values and the even query positions, counted from the end of the pairs."""
    context = 2 * segment.num_kv_pairs * rules.num_passes
    inputs = np.zeros((len(keys), segment.input_seq_len), dtype=np.int64)
    targets = np.full_like(inputs, IGNORED)
    inputs[:, 0:context:2] = np.tile(keys, rules.num_passes)
    inputs[:, 1:context:2] = np.tile(values, rules.num_passes)
    asked = context + 2 * gaps
    np.put_along_axis(inputs, asked, keys, axis=1)
    np.put_along_axis(targets, asked, values, axis=1)
    return inputs, targets
