"""Sequence packing: several samples in one row, each attending to itself alone.

A sample is never split. Attention per sample follows from `position_ids` that begin again at 0:
transformers (5.17 and later) builds the block mask from them without an attention mask and cache
(`use_cache=False`, else samples see each other), for "sdpa", "eager" and "flex_attention" in any
number of rows. Flash attention and the attention of `medm.llms`, which need no mask, take a single
row and `cu_seq_lens`, the start of each of its samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medm.data.collator import dummy_example, label_positions, round_up, stack_masks, stack_media
from medm.data.sampling import DistributedBatchSampler, IndexOrder
from medm.types import IGNORE_INDEX, ConversationBatch, Example


def plan_bins(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Group positions into bins of at most `capacity` by best fit, longest first.

    The lengths of a bin add up to at most the capacity. The time is proportional to the number of
    lengths. The number of bins depends on the lengths, not on their order. A length of 0 (a record
    that is left out) is in no bin.

    Raises:
        ValueError: a length is above the capacity.
    """
    values = np.asarray(lengths, np.int64)
    if len(values) and values.max() > capacity:
        raise ValueError(
            f"item {int(values.argmax())} has {int(values.max())} tokens, more than the "
            f"{capacity} of a row; items are never split: raise the capacity or limit the length "
            "of samples"
        )
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by their free tokens
    spaces = 0  # bit n is set where by_space[n] has a bin
    for position in np.argsort(-values, kind="stable").tolist():
        length = int(values[position])
        if length == 0:
            break
        fitting = spaces >> length
        if fitting:
            space = (
                length + (fitting & -fitting).bit_length() - 1
            )  # the smallest that is large enough
            number = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, number = capacity, len(bins)
            bins.append([])
        bins[number].append(position)
        by_space[space - length].append(number)
        spaces |= 1 << (space - length)
    return bins


@dataclass(frozen=True, slots=True)
class PackingCollator:
    """Packs examples into rows of at most `capacity` tokens.

    A batch has `position_ids` instead of an `attention_mask`. The first label of each example is
    not learned, since it would be predicted from the last token of another. The rest of a row is
    padding with positions of its own, so no example attends to it. Examples are kept in their order
    where that takes no more rows than best fit, as with the batches of `PackedBatches`.
    """

    pad_id: int
    """Token of padding."""
    capacity: int
    """Tokens of a row, at most."""
    padding_free: bool = False
    """All examples in a single row without padding, whatever its length (variable-length
    attention). The batch then also has the beginning of each, under transformers' names:
    `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`; other attention ignores them.
    """
    pad_to_multiple_of: int | None = None
    """Row lengths are rounded up to it."""
    with_label_positions: bool = False
    """The batch has `label_positions`, as with `Collator`."""

    def __call__(self, examples: Sequence[Example | None]) -> ConversationBatch:
        """Return a batch with one row per bin.

        Raises `ValueError` for an example longer than the capacity.
        """
        kept = [example for example in examples if example is not None]
        kept = kept or [dummy_example(self.pad_id)]
        rows = [kept] if self.padding_free else self._rows(kept)
        width = round_up(
            max(sum(len(e.input_ids) for e in row) for row in rows), self.pad_to_multiple_of
        )
        packed: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            rest = width - sum(len(example.input_ids) for example in row)
            packed["input_ids"].append([t for e in row for t in e.input_ids] + [self.pad_id] * rest)
            packed["labels"].append(
                [label for e in row for label in (IGNORE_INDEX, *e.labels[1:])]
                + [IGNORE_INDEX] * rest
            )
            packed["position_ids"].append(
                [p for e in row for p in range(len(e.input_ids))] + list(range(rest))
            )
        # Rows are written in the order of their examples, and so are pixels and masks.
        batch = ConversationBatch(
            input_ids=torch.tensor(packed["input_ids"]),
            labels=torch.tensor(packed["labels"]),
            position_ids=torch.tensor(packed["position_ids"]),
        )
        if self.with_label_positions:
            batch["label_positions"] = label_positions(batch["labels"])
        if self.padding_free:
            batch |= _boundaries(batch["position_ids"])
        written = [example for row in rows for example in row]
        return {**batch, **stack_media(written), **stack_masks(written)}

    def _rows(self, examples: list[Example]) -> list[list[Example]]:
        lengths = [len(example.input_ids) for example in examples]
        best = plan_bins(lengths, self.capacity)
        in_order: list[list[Example]] = []
        space = 0
        for example, length in zip(examples, lengths, strict=True):
            if length > space:
                in_order.append([])
                space = self.capacity
            in_order[-1].append(example)
            space -= length
        if len(in_order) <= len(best):
            return in_order
        return [[examples[position] for position in sorted(group)] for group in best]


def _boundaries(position_ids: torch.Tensor) -> ConversationBatch:
    """Return the arguments of variable-length attention for the samples of a single row.

    They are computed here so that no layer waits for the device.
    """
    starts = torch.nonzero(position_ids[0] == 0).flatten()
    ends = torch.cat([starts, torch.tensor([position_ids.shape[1]])]).to(
        torch.int32
    )  # (samples + 1,)
    longest = int(ends.diff().max())
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class _Bins:
    """An order of bins: the samples of an epoch, packed."""

    def __init__(self, order: IndexOrder, lengths: np.ndarray, capacity: int, seed: int) -> None:
        self.order, self.lengths, self.capacity, self.seed = order, lengths, capacity, seed
        first = self._plan(0)
        self._size = len(first)
        self._cached = (0, first)

    def __len__(self) -> int:
        return self._size

    def __call__(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, 3]).permutation(len(self))

    def bins(self, epoch: int) -> list[list[int]]:
        """Return the record indices of each bin, for the same number of bins in every epoch.

        The number only varies where an order draws other records each epoch (a mixture): then a few
        bins are left out or empty.
        """
        if self._cached[0] != epoch:
            bins = self._plan(epoch)
            if (
                len(bins) > self._size
            ):  # leave out bins at random, not the last ones, which hold the short samples
                chosen = np.random.default_rng([self.seed, epoch, 4]).permutation(len(bins))[
                    : self._size
                ]
                bins = [bins[number] for number in chosen]
            self._cached = (epoch, bins + [[]] * (self._size - len(bins)))
        return self._cached[1]

    def _plan(self, epoch: int) -> list[list[int]]:
        drawn = self.order(epoch)
        return [drawn[group].tolist() for group in plan_bins(self.lengths[drawn], self.capacity)]


class PackedBatches(DistributedBatchSampler):
    """`DistributedBatchSampler` of bins: a micro-batch holds the samples of `batch_size` rows.

    Used with `PackingCollator`.

    Args:
        order: the indices of each epoch.
        lengths: tokens of each record by index; 0 leaves a record out.
        capacity: tokens of a row.
        batch_size: rows of a micro-batch on one rank.
        seed: of the order of rows.
        settings: the other arguments of `DistributedBatchSampler` that apply to rows.
    """

    def __init__(
        self,
        order: IndexOrder,
        *,
        lengths: np.ndarray | Sequence[int],
        capacity: int,
        batch_size: int,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.bins = _Bins(order, np.asarray(lengths), capacity, seed)
        super().__init__(self.bins, batch_size=batch_size, seed=seed, **settings)

    def batch(self, epoch: int, step: int) -> list[int]:
        bins = self.bins.bins(epoch)
        return [index for number in super().batch(epoch, step) for index in bins[number]]
