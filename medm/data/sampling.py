"""Order of records in training, as a function of the position (epoch, step) alone.

There is no state to replay and no data to read. The order of an epoch is drawn for all ranks alike
and cut into global batches, the samples of one optimizer step; a rank takes its shard of each. So
the samples of a step depend neither on the number of ranks nor on how a step is divided into
micro-batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from medm.errors import RecipeError

logger = logging.getLogger(__name__)

WINDOW = 50
"""Global batches within which samples are sorted by length: enough to find neighbors, small enough
to stay random."""


OPEN_SHARDS = 16
"""Shards of a source whose samples are shuffled together: enough to mix them, few enough that a
disk reads each in one go."""


class IndexOrder(Protocol):
    """The record indices of an epoch, in order."""

    def __call__(self, epoch: int) -> np.ndarray:
        """Int64 indices; a function of the epoch alone."""
        ...

    def __len__(self) -> int:
        """Number of indices per epoch, the same for every epoch."""
        ...


@dataclass(frozen=True)
class Sequential:
    """Every record once, in the order of the files."""

    num_records: int

    def __len__(self) -> int:
        return self.num_records

    def __call__(self, epoch: int) -> np.ndarray:
        return np.arange(self.num_records)


@dataclass(frozen=True)
class Shuffle:
    """Every record once, in a random order."""

    num_records: int
    seed: int = 0

    def __len__(self) -> int:
        return self.num_records

    def __call__(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_records)


@dataclass(frozen=True)
class Subset:
    """Another order, of positions in a list of chosen records."""

    order: IndexOrder
    chosen: np.ndarray
    """Record indices, in ascending order."""

    def __len__(self) -> int:
        return len(self.order)

    def __call__(self, epoch: int) -> np.ndarray:
        return self.chosen[self.order(epoch)]


class Mixture:
    """Draws from several sources, each in proportion to its weight.

    Any stretch of an epoch holds these fractions: draw k of a source falls at a random moment of
    the k-th of equal intervals. Within a source, records come in shuffled rounds, and a record
    never comes twice within `min_distance` draws (if the source is large enough), not even across
    two rounds or two epochs.

    Args:
        sizes: records of each source; indices count through them in order.
        weights: one per source, above zero; only their proportions matter.
        draws: indices per epoch; by default the number of records.
        min_distance: length of the stretches without a repetition, the global batch.
        seed: of the rounds and moments.
        groups: of each source, the records of each shard; a round goes from shard to shard
            (`shard_order`). Without it a source is one group.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        draws: int | None = None,
        min_distance: int = 1,
        seed: int = 0,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if len(sizes) != len(weights) or min(weights, default=0) <= 0 or min(sizes, default=0) <= 0:
            raise RecipeError(
                f"a mixture needs a weight above 0 for each source: sizes {sizes}, weights "
                f"{weights}"
            )
        self.sizes, self.min_distance, self.seed = tuple(sizes), min_distance, seed
        self.groups = [[size] for size in sizes] if groups is None else groups
        self.fractions = np.asarray(weights, np.float64) / sum(weights)
        self.counts = _apportion(self.fractions, sum(sizes) if draws is None else draws)
        """Draws of each source per epoch: the fractions of all draws, rounded so that they add
        up."""
        self._first = np.cumsum([0, *sizes[:-1]])  # index of each source's first record
        for source, (size, fraction) in enumerate(zip(sizes, self.fractions, strict=True)):
            if size < fraction * min_distance:
                logger.warning(
                    "source %d has %d records but is drawn about %.0f times a step: records "
                    "repeat within a step; lower its weight or the batch size",
                    source,
                    size,
                    fraction * min_distance,
                )

    @property
    def unrepeated(self) -> int:
        """The largest number of consecutive draws among which no record can come twice.

        It holds for a mixture with this `min_distance`.
        """
        # A stretch holds at most two draws of a source more than its fraction of it: one interval
        # begun, one ended.
        sources = zip(self.sizes, self.fractions, strict=True)
        return max(1, int(min((size - 2) / fraction for size, fraction in sources)))

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __call__(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        sources = np.repeat(np.arange(len(self.sizes)), self.counts)
        moments = np.concatenate(
            [(np.arange(count) + rng.random(count)) / max(count, 1) for count in self.counts]
        )
        sources = sources[np.argsort(moments, kind="stable")]
        order = np.empty(len(self), np.int64)
        for source, count in enumerate(self.counts):
            order[sources == source] = self._records(source, epoch * int(count), int(count))
        return order

    def _records(self, source: int, start: int, count: int) -> np.ndarray:
        """Return draws `start` to `start + count` of a source, counted over all epochs."""
        size = self.sizes[source]
        rounds = range(start // size, -(-(start + count) // size))
        drawn = np.concatenate(
            [np.empty(0, np.int64), *(self._round(source, number) for number in rounds)]
        )
        skip = start - rounds.start * size
        return drawn[skip : skip + count] + self._first[source]

    def _round(self, source: int, number: int) -> np.ndarray:
        """Return a shuffled round whose start shares no record with the end of the last one."""
        size = self.sizes[source]
        if size < 3 * self.min_distance:
            # Too few to choose from: the same round again and again keeps the distance.
            return self._shuffled(source, 0)
        current = self._shuffled(source, number)
        if number == 0:
            return current
        # The ends of rounds are never changed below, so that this one needs no more than the raw
        # round before it.
        recent = self._shuffled(source, number - 1)[-self.min_distance :]
        repeated = np.flatnonzero(np.isin(current[: self.min_distance], recent))
        middle = np.arange(self.min_distance, size - self.min_distance)
        other = middle[~np.isin(current[middle], recent)][: len(repeated)]
        current[repeated], current[other] = current[other], current[repeated]
        return current

    def _shuffled(self, source: int, number: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, source, number, 1])
        return shard_order(self.groups[source], rng)


def shard_order(sizes: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Shuffle records so that few shards are read at a time: shards are permuted, and the records
    of `OPEN_SHARDS` of them in a row are permuted together.

    Args:
        sizes: records of each shard, in the order of the indices.
        rng: draws both. One shard draws what a permutation of its records does.
    """
    if len(sizes) == 1:
        return rng.permutation(sizes[0])
    starts = np.cumsum([0, *sizes])
    shards = rng.permutation(len(sizes))
    runs = [shards[start : start + OPEN_SHARDS] for start in range(0, len(shards), OPEN_SHARDS)]
    return np.concatenate(
        [
            rng.permutation(
                np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in run])
            )
            for run in runs
        ]
    )


def _apportion(fractions: np.ndarray, total: int) -> np.ndarray:
    """Return integers that add up to `total`, by the method of largest remainders.

    Each is within one of its fraction of the total.
    """
    exact = fractions * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]] += 1
    return counts


class DistributedBatchSampler(Sampler[list[int]]):
    """Batch sampler for `DataLoader`: the micro-batches of one rank, from any position.

    Every rank makes the same number of steps. With `drop_last` an incomplete global batch at the
    end of an epoch is left out; without, its samples are distributed evenly, and a rank that gets
    none has an empty micro-batch (which the collators turn into one without labels): no
    record is seen twice or lost.

    Args:
        order: the indices of each epoch.
        batch_size: samples of a micro-batch on one rank.
        rank: this process.
        world: number of processes.
        accumulation: micro-batches of an optimizer step.
        drop_last: whether an incomplete global batch is left out.
        lengths: tokens of each record by index; for the two options below.
        group_by_length: global batches of similar lengths, the longest first in an epoch, so that a
            batch that is too large for the memory fails at once. Data of one kind is as good as
            any.
        balance_ranks: distribute the samples of a global batch so that the ranks of each micro-step
            have about the same number of tokens.
        window: global batches that are sorted together.
        seed: of the order of grouped batches.
    """

    def __init__(
        self,
        order: IndexOrder,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        drop_last: bool = False,
        lengths: np.ndarray | Sequence[int] | None = None,
        group_by_length: bool = False,
        balance_ranks: bool = False,
        window: int = WINDOW,
        seed: int = 0,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        if min(batch_size, accumulation) < 1:
            raise ValueError(
                f"batch_size {batch_size} and accumulation {accumulation} must be at least 1"
            )
        if (group_by_length or balance_ranks) and lengths is None:
            raise ValueError(
                "grouping by length and balancing ranks need the lengths of the records"
            )
        self.order, self.batch_size, self.rank, self.world = order, batch_size, rank, world
        self.accumulation, self.drop_last, self.seed = accumulation, drop_last, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.group_by_length, self.balance_ranks, self.window = (
            group_by_length,
            balance_ranks,
            window,
        )
        self.epoch, self._done = 0, 0
        self._cached: tuple[int, np.ndarray] | None = None

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step, over all ranks and micro-batches."""
        return self.batch_size * self.world * self.accumulation

    def start(self, epoch: int, batches_done: int = 0) -> None:
        """Go to a position: the next iteration yields micro-batch `batches_done` of `epoch`.

        Reads nothing.
        """
        if not 0 <= batches_done <= len(self):
            raise ValueError(f"{batches_done} batches done, but an epoch has {len(self)}")
        self.epoch, self._done = epoch, batches_done

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch; the position within the present one is kept."""
        if epoch != self.epoch:
            self.start(epoch)

    def __len__(self) -> int:
        """Micro-batches of a whole epoch, the same on every rank."""
        full, rest = divmod(len(self.order), self.global_batch)
        partial = 0 if self.drop_last else -(-rest // (self.batch_size * self.world))
        return full * self.accumulation + partial

    def __iter__(self) -> Iterator[list[int]]:
        epoch, done, self._done = self.epoch, self._done, 0
        for step in range(done, len(self)):
            yield self.batch(epoch, step)

    def batch(self, epoch: int, step: int) -> list[int]:
        """Return this rank's shard of micro-batch `step` of an epoch."""
        number, micro = divmod(step, self.accumulation)
        start = number * self.global_batch
        samples = self._epoch_order(epoch)[start : start + self.global_batch]
        if self.balance_ranks and self.lengths is not None:
            samples = samples[np.argsort(-self.lengths[samples], kind="stable")]
        width = self.batch_size * self.world
        samples = samples[micro * width : (micro + 1) * width]
        if self.balance_ranks and self.lengths is not None:
            return [
                int(sample)
                for sample in samples[balance(self.lengths[samples], self.world)[self.rank]]
            ]
        return [int(sample) for sample in np.array_split(samples, self.world)[self.rank]]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            order = self.order(epoch)
            if self.group_by_length and self.lengths is not None:
                order = group_by_length(
                    order,
                    self.lengths,
                    self.global_batch,
                    seed=self.seed,
                    epoch=epoch,
                    window=self.window,
                )
            self._cached = (epoch, order)
        return self._cached[1]


def group_by_length(
    order: np.ndarray,
    lengths: np.ndarray,
    global_batch: int,
    *,
    seed: int,
    epoch: int,
    window: int = WINDOW,
) -> np.ndarray:
    """Reorder indices so that each global batch holds similar lengths.

    Indices are sorted within windows of the order; whole batches are then shuffled, the longest one
    to the front. An incomplete batch stays at the end.
    """
    size = window * global_batch
    blocks = [order[start : start + size] for start in range(0, len(order), size)]
    grouped = np.concatenate(
        [block[np.argsort(-lengths[block], kind="stable")] for block in blocks]
    )
    full = len(grouped) // global_batch
    batches = grouped[: full * global_batch].reshape(full, global_batch)
    if full:
        batches = batches[np.random.default_rng([seed, epoch, 2]).permutation(full)]
        longest = int(np.argmax(lengths[batches].max(axis=1)))
        batches[[0, longest]] = batches[[longest, 0]]
    return np.concatenate([batches.ravel(), grouped[full * global_batch :]])


def balance(lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """Distribute positions to `parts` groups with close sums of lengths.

    Their sizes differ by one at most. The longest goes to the group with the smallest
    sum that is not full.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes = [len(positions) for positions in np.array_split(order, parts)]
    chosen: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for position in order:
        part = min((p for p in range(parts) if len(chosen[p]) < sizes[p]), key=lambda p: sums[p])
        chosen[part].append(int(position))
        sums[part] += int(lengths[position])
    return [np.asarray(part, np.int64) for part in chosen]
