"""From the `data` section of a recipe to the batch sampler of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medm.data.options import DataOptions
from medm.data.packing import PackedBatches
from medm.data.sampling import WINDOW, DistributedBatchSampler, IndexOrder, Mixture, Shuffle, Subset
from medm.errors import DataError


def build_batches(
    options: DataOptions,
    sizes: Sequence[int],
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 1,
    drop_last: bool = False,
    lengths: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
    groups: Sequence[Sequence[int]] | None = None,
) -> DistributedBatchSampler:
    """Return the batch sampler of training.

    Args:
        options: the recipe's `data`.
        sizes: records of each source (`Records.sizes`).
        batch_size: samples of a micro-batch on one rank; with packing, its rows.
        rank: this process.
        world: number of processes.
        accumulation: micro-batches of an optimizer step.
        drop_last: whether an incomplete last step is left out.
        lengths: tokens of each record, 0 for those that are left out, as a check gives them.
        seed: of every draw.
        groups: of each source, the records of each shard (`Records.groups`). An epoch then goes
            from shard to shard.

    Raises:
        DataError: no record can be used.
    """
    known = None if lengths is None else np.asarray(lengths)
    if known is not None and len(known) != sum(sizes):
        raise ValueError(f"{len(known)} lengths for {sum(sizes)} records")
    chosen = np.arange(sum(sizes)) if known is None else np.flatnonzero(known)
    if not len(chosen):
        raise DataError("no record is left to train on; 'medm data check' says why")
    global_batch = batch_size * world * accumulation
    order, window = _order(options, sizes, chosen, global_batch, seed, groups)
    if options.packing:
        if known is None or options.max_length is None:
            raise ValueError("packing needs the lengths of the records and data.max_length")
        return PackedBatches(
            order,
            lengths=known,
            capacity=options.max_length,
            batch_size=batch_size,
            rank=rank,
            world=world,
            accumulation=accumulation,
            drop_last=drop_last,
            seed=seed,
        )
    return DistributedBatchSampler(
        order,
        batch_size=batch_size,
        rank=rank,
        world=world,
        accumulation=accumulation,
        drop_last=drop_last,
        lengths=known,
        group_by_length=options.order == "length",
        balance_ranks=options.balance_ranks,
        window=window,
        seed=seed,
    )


def _order(
    options: DataOptions,
    sizes: Sequence[int],
    chosen: np.ndarray,
    global_batch: int,
    seed: int,
    groups: Sequence[Sequence[int]] | None,
) -> tuple[IndexOrder, int]:
    """Return the order of an epoch over the chosen records, and the window of sorting by length.

    The window is the number of global batches that may be sorted together.
    """
    weights = [source.weight for source in options.train if source.weight is not None]
    sharded = groups is not None and any(len(of_source) > 1 for of_source in groups)
    if not weights and not sharded:
        return Subset(Shuffle(len(chosen), seed), chosen), WINDOW
    counts, _ = np.histogram(chosen, bins=np.cumsum([0, *sizes]))
    kept = _kept_groups(groups, chosen) if groups is not None and sharded else None
    if not weights:
        used = np.flatnonzero(counts)
        mixture = Mixture(
            counts[used].tolist(),
            counts[used].tolist(),
            seed=seed,
            groups=None if kept is None else [kept[source] for source in used],
        )
        return Subset(mixture, chosen), WINDOW
    if not counts.all():
        empty = options.train[int(np.argmin(counts))].path
        raise DataError(
            "no record of this source can be used; 'medm data check' says why", file=empty
        )
    # Sorting by length would bring the repetitions of a short source together, so it stays within
    # what repeats none.
    free = Mixture(counts.tolist(), weights).unrepeated
    window = min(WINDOW, max(1, free // global_batch)) if options.order == "length" else 1
    draws = options.draws or len(chosen)
    mixture = Mixture(
        counts.tolist(),
        weights,
        draws=draws,
        min_distance=window * global_batch,
        seed=seed,
        groups=kept,
    )
    return Subset(mixture, chosen), window


def _kept_groups(groups: Sequence[Sequence[int]], chosen: np.ndarray) -> list[list[int]]:
    """Return of each source the chosen records of each shard."""
    sizes = [size for of_source in groups for size in of_source]
    counts, _ = np.histogram(chosen, bins=np.cumsum([0, *sizes]))
    ends = np.cumsum([len(of_source) for of_source in groups])[:-1]
    return [part[part > 0].tolist() for part in np.split(counts, ends)]
