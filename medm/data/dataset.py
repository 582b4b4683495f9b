"""Records to examples, one at a time, in the workers of a DataLoader.

Nothing is random but the augmentation, which is drawn from (seed, epoch, index): the same example comes out in
any worker, on any rank and after a resume.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from medm.data.records import Records
from medm.errors import DataError
from medm.imaging import Preprocess, load_pixels
from medm.types import IGNORE_INDEX, Encode, Example, Sample

logger = logging.getLogger(__name__)

COUNTED = ("bad", "too_long", "truncated")
"""What a dataset counts: records left out as bad, left out as too long, and shortened."""

_MAX_WORKERS = 1024


class ConversationDataset(Dataset[Example | None]):
    """A map-style dataset whose items are `Example`s, or None where the policy leaves a record out.

    Args:
        records: what is read.
        encode: sample and pixels to tokens; a model's processor has it.
        preprocess: by branch, what is done to the pixels; its keys are the branches that the model has.
        load: file and description to (C, *spatial) float32; a cache fits in here.
        max_length: longest example in tokens; None for no limit.
        too_long: what happens to a longer one. Text is cut at the end, but never a placeholder or the last
            label: an example that cannot be cut so counts as bad.
        placeholder_ids: token ids that stand for vision tokens, which are never cut.
        bad_records: stop with the `DataError`, or leave the record out and count it.
        bad_records_limit: with "skip", stop all the same after more than so many.
        augment: by branch, a random change of the pixels.
        generation: examples end where the reply begins, and have no labels.
        seed: of the augmentation.
    """

    def __init__(
        self,
        records: Records,
        encode: Encode,
        preprocess: Mapping[str, Preprocess],
        *,
        load: Callable[[Path, Any], np.ndarray] = load_pixels,
        max_length: int | None = None,
        too_long: Literal["error", "truncate_text", "skip"] = "error",
        placeholder_ids: Collection[int] = (),
        bad_records: Literal["stop", "skip"] = "stop",
        bad_records_limit: int | None = None,
        augment: Mapping[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] | None = None,
        generation: bool = False,
        seed: int = 0,
    ) -> None:
        self.records, self.encode, self.preprocess, self.load = records, encode, dict(preprocess), load
        self.max_length, self.too_long, self.placeholder_ids = max_length, too_long, frozenset(placeholder_ids)
        self.bad_records, self.bad_records_limit = bad_records, bad_records_limit
        self.augment, self.generation, self.seed = dict(augment or {}), generation, seed
        # Shared with the workers. Each has a row of its own to count in, so that no lock is needed.
        self._counts = torch.zeros(1 + _MAX_WORKERS, len(COUNTED), dtype=torch.int64).share_memory_()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, also to workers that are already running."""
        self._epoch.fill_(epoch)

    @property
    def counts(self) -> dict[str, int]:
        """How many records this process and its workers left out or shortened so far, by `COUNTED`."""
        return dict(zip(COUNTED, self._counts.sum(0).tolist(), strict=True))

    def __getitem__(self, index: int) -> Example | None:
        """Raises `DataError` with file, index and field, unless the policy is to leave such a record out."""
        try:
            example = self._fit(self._example(index))
        except DataError as error:
            source, position = self.records.locate(index)
            error.at(file=self.records.files[source].path, index=position)
            if self.bad_records == "stop":
                raise
            return self._leave_out(error)
        if example is None:
            self._count("too_long")
        return example

    def _example(self, index: int) -> Example:
        sample = self.records[index]
        pixels = self._pixels(sample, index)
        example = self.encode(sample, pixels, generation=self.generation)
        if not self.generation and all(label == IGNORE_INDEX for label in example.labels):
            raise DataError("no token of this record is learned: the replies are empty once encoded")
        return example

    def _pixels(self, sample: Sample, index: int) -> dict[str, list[np.ndarray]]:
        """The preprocessed pixels of every branch, in the order of their placeholders."""
        pixels: dict[str, list[np.ndarray]] = {}
        rng = np.random.default_rng([self.seed, int(self._epoch), index])
        for position, media in enumerate(sample.media):
            try:
                if media.branch not in self.preprocess:
                    raise DataError(missing_branch(media.branch, self.preprocess))
                array = self.load(self.records.media_path(index, media), self.preprocess[media.branch])
            except DataError as error:
                raise error.at(field=self.records.media_field(index, position)) from None
            if media.branch in self.augment:
                array = self.augment[media.branch](array, rng)
            pixels.setdefault(media.branch, []).append(array)
        return pixels

    def _fit(self, example: Example) -> Example | None:
        """The example within `max_length`, or None where the policy is to leave it out."""
        length = len(example.input_ids)
        if self.max_length is None or length <= self.max_length:
            return example
        if self.too_long == "skip":
            return None
        if self.too_long == "truncate_text":
            example = truncate_text(example, self.max_length, self.placeholder_ids)
            self._count("truncated")
            return example
        raise DataError(
            f"{length} tokens, vision tokens included, but data.max_length is {self.max_length}; raise it, or set "
            "data.too_long to truncate_text or skip"
        )

    def _leave_out(self, error: DataError) -> None:
        self._count("bad")
        logger.warning("left out: %s", error)
        bad = self.counts["bad"]
        if self.bad_records_limit is not None and bad > self.bad_records_limit:
            raise DataError(
                f"{bad} records were left out as bad, more than data.bad_records_limit = {self.bad_records_limit}; "
                f"the last one: {error}"
            )

    def _count(self, what: str) -> None:
        worker = get_worker_info()
        self._counts[0 if worker is None else 1 + worker.id, COUNTED.index(what)] += 1


def truncate_text(example: Example, max_length: int, placeholder_ids: Collection[int]) -> Example:
    """The first `max_length` tokens. Raises `DataError` where that would cut a placeholder or leave no label."""
    cut = [token for token in example.input_ids[max_length:] if token in placeholder_ids]
    length = len(example.input_ids)
    if cut:
        raise DataError(
            f"{length} tokens cannot be cut to data.max_length = {max_length}: {len(cut)} vision tokens stand beyond "
            "it, and images are never cut; raise max_length or shorten the text before the image"
        )
    labels = example.labels[:max_length]
    if all(label == IGNORE_INDEX for label in labels):
        raise DataError(
            f"{length} tokens cut to data.max_length = {max_length} leave nothing of the reply to learn; raise it or "
            "shorten the question"
        )
    return Example(example.input_ids[:max_length], labels, example.pixels, example.task_id, example.meta)


def missing_branch(branch: str, known: Collection[str]) -> str:
    """Why a record's image or volume cannot be used by this model."""
    return f"the record holds a {branch}, but the model has no branch of that name; it has {sorted(known) or 'none'}"
