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

from medm.data.features import FeatureStore
from medm.data.limits import LengthLimit, TooLongError, require_label
from medm.data.records import Records, missing_branch
from medm.errors import DataError, RecipeError
from medm.imaging import Augment, Preprocess, load_pixels
from medm.imaging.augment import augment
from medm.types import Encode, Example, Sample

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
        too_long: what happens to a longer one, as in `LengthLimit`; one that cannot be shortened counts as bad.
        placeholder_ids: token ids that stand for vision tokens, which are never cut.
        bad_records: stop with the `DataError`, or leave the record out and count it.
        bad_records_limit: with "skip", stop all the same after more than so many.
        augmentation: by branch, random changes of the pixels.
        features: by branch, what a frozen encoder made of the files; stands in the place of their pixels.
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
        augmentation: Mapping[str, Augment] | None = None,
        features: Mapping[str, FeatureStore] | None = None,
        generation: bool = False,
        seed: int = 0,
    ) -> None:
        self.records, self.encode, self.preprocess, self.load = records, encode, dict(preprocess), load
        self.limit = LengthLimit(max_length, too_long, frozenset(placeholder_ids))
        self.bad_records, self.bad_records_limit = bad_records, bad_records_limit
        self.features = dict(features or {})
        self.augmentation, self.generation, self.seed = dict(augmentation or {}), generation, seed
        if unknown := sorted(self.augmentation.keys() - self.preprocess.keys()):
            raise RecipeError(
                f"data.augment: {unknown} are not branches of the model; it has {sorted(self.preprocess)}"
            )
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
            example = self._example(index)
            fitting = self.limit.apply(example)
        except DataError as error:
            source, position = self.records.locate(index)
            error.at(file=self.records.files[source].path, index=position)
            if self.bad_records == "stop" or isinstance(error, TooLongError):
                raise
            self._leave_out(error)
            return None
        if fitting is not example:
            self._count("too_long" if fitting is None else "truncated")
        return fitting

    def _example(self, index: int) -> Example:
        sample = self.records[index]
        pixels = self._pixels(sample, index)
        example = self.encode(sample, pixels, generation=self.generation)
        for branch in self.features.keys() & example.pixels.keys():
            example.features[branch] = example.pixels.pop(branch)
        if not self.generation:
            require_label(example)
        return example

    def _pixels(self, sample: Sample, index: int) -> dict[str, list[np.ndarray]]:
        """The preprocessed pixels of every branch, in the order of their placeholders."""
        pixels: dict[str, list[np.ndarray]] = {}
        rng = np.random.default_rng([self.seed, int(self._epoch), index])
        for position, media in enumerate(sample.media):
            try:
                if media.branch not in self.preprocess:
                    raise DataError(missing_branch(media.branch, self.preprocess))
                array = self._load(self.records.media_path(index, media), media.branch)
            except DataError as error:
                raise error.at(field=self.records.media_field(index, position)) from None
            if media.branch in self.augmentation:
                array = augment(self.augmentation[media.branch], array, rng)
            pixels.setdefault(media.branch, []).append(array)
        return pixels

    def _load(self, file: Path, branch: str) -> np.ndarray:
        if branch not in self.features:
            return self.load(file, self.preprocess[branch])
        found = self.features[branch].get(file)
        if found is None:
            self.load(file, self.preprocess[branch])  # a file that cannot be read says why
            raise DataError(f"{file.name} changed after its features were made; start the run again")
        return found

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
