"""Records to examples of any data pipeline, one at a time, in the workers of a DataLoader.

Nothing is random but the augmentation and what a pipeline draws (one caption of several). Both are
functions of (seed, epoch, index): the same example comes out in any worker, on any rank and after a
resume.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from medm.data.base import E, MediaSource
from medm.data.features import FeatureStore
from medm.data.file_reader import FileReader
from medm.data.limits import BadRecordsLimit, LengthLimit, TooLongError
from medm.data.mask_targets import masked_media, read_targets
from medm.data.records import Records
from medm.errors import DataError, InputLostError, RecipeError, machine_fault
from medm.imaging import Augment, ImagePreprocess, Preprocess, load_pixels, prepare
from medm.imaging.paths import MissingFileError
from medm.imaging.placement import Prepared
from medm.types import parse_view

logger = logging.getLogger(__name__)

COUNTED = ("bad", "too_long", "truncated")
"""Counts of a dataset: records left out as bad, left out as too long, and shortened."""

RETRY_SECONDS = (1.0, 3.0, 9.0, 20.0)
"""Seconds of the pauses between attempts to read a file that the machine failed to read. A network
share that is remounted is back within seconds."""


class ExampleDataset(Dataset[E | None], Generic[E]):
    """A map-style dataset of a pipeline's examples; None where the policy leaves a record out.

    Args:
        records: to read; their pipeline has a processor.
        load: function from file and preprocessing to (C, *spatial) float32, or (T, C, *spatial) of
            an image that is cut into tiles; may read a cache.
        prepare: the same with the placement of the pixels, for files that masks belong to.
        limit: the longest example, and what happens to a longer one; one that cannot be shortened
            counts as bad. None for no limit.
        bad_records: stop with the `DataError`, or leave the record out and count it.
        bad_records_limit: maximum number of bad records; checked by the reader of the counts of
            all ranks.
        usable: result of a check by record. An unusable record is left out without being read
            again. The files of a usable record existed, so a file that is missing now is lost, not
            the record's fault.
        augmentation: by view, random changes of the pixels. The view of a mask head moves with the
            usual view of its kind.
        features: by branch, cached features of a frozen encoder; they replace the pixels of the
            files.
        seed: of the augmentation, and of what the pipeline draws.
    """

    def __init__(
        self,
        records: Records[Any, E],
        *,
        load: Callable[[MediaSource, Preprocess], np.ndarray] = load_pixels,
        prepare: Callable[[MediaSource, Preprocess], Prepared] = prepare,
        limit: LengthLimit | None = None,
        bad_records: Literal["stop", "skip"] = "stop",
        bad_records_limit: BadRecordsLimit | None = None,
        usable: Sequence[bool] | np.ndarray | None = None,
        augmentation: Mapping[str, Augment] | None = None,
        features: Mapping[str, FeatureStore] | None = None,
        seed: int = 0,
    ) -> None:
        self.records, self.pipeline = records, records.pipeline
        self.load, self.prepare = load, prepare
        self.limit = limit or LengthLimit()
        self.preprocess = dict(self.pipeline.preprocess)
        self.bad_records, self.bad_records_limit = bad_records, bad_records_limit
        self.usable = None if usable is None else np.asarray(usable, bool)
        self.features = dict(features or {})
        self.augmentation, self.seed = dict(augmentation or {}), seed
        if unknown := sorted(self.augmentation.keys() - self.preprocess.keys()):
            raise RecipeError(
                f"data.augment: {unknown} are not branches of the model; it has "
                f"{sorted(self.preprocess)}"
            )
        view = self.pipeline.mask_view
        if view is not None and view.name in self.augmentation:
            kind = parse_view(view.name).kind
            for motion in self.augmentation[view.name].motions:
                raise RecipeError(
                    f"data.augment.{view.name}.{motion}: {kind}s and their masks move together; "
                    f"set data.augment.{kind}.{motion}, which moves this view alike"
                )
        for branch in self.augmentation:
            preprocess = self.preprocess[branch]
            if isinstance(preprocess, ImagePreprocess) and preprocess.tiles is not None:
                raise RecipeError(
                    f"data.augment.{branch}: images are cut into tiles, which would be changed one "
                    "by one and no longer fit each other; leave augment out, or set "
                    f"model.branches.{branch}.preprocess.tiles: null"
                )
        # Shared with the workers, a byte per record and count: written to by one of them at a time,
        # without a lock.
        self._left_out = torch.zeros(len(COUNTED), len(records), dtype=torch.bool).share_memory_()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, also for workers that are already running."""
        self._epoch.fill_(epoch)

    @property
    def counts(self) -> dict[str, int]:
        """Number of different records that were left out or shortened so far, by `COUNTED`.

        The counts are those of this process and its workers.
        """
        return {what: len(self.noted(what)) for what in COUNTED}

    @property
    def num_bad(self) -> int:
        """Number of different records that this process and its workers left out as bad so far."""
        return int(self._left_out[COUNTED.index("bad")].sum())

    def noted(self, what: str) -> list[int]:
        """Return the indices of the records counted under a name of `COUNTED`.

        They are those of this process and its workers.
        """
        return torch.nonzero(self._left_out[COUNTED.index(what)]).flatten().tolist()

    def place(self, index: int) -> str:
        """Return the annotation file of a record and its position there, for messages."""
        source, position = self.records.locate(index)
        return f"{self.records.files[source].path}, record {position}"

    def __getitem__(self, index: int) -> E | None:
        """Return the example, or None if the policy leaves the record out.

        Raises:
            DataError: with file, index and field; the policy is to stop.
            InputLostError: files cannot be read any more, and not through a fault of the record.
        """
        if self.usable is not None and not self.usable[index]:
            return None
        try:
            with self.records.placed(index):
                example = self._read(index)
                fitting = self.limit.apply(example, self.pipeline)
        except DataError as error:
            if self.bad_records == "stop" or isinstance(error, TooLongError):
                raise
            if self._note("bad", index):
                logger.warning("left out: %s", error)
            return None
        if fitting is not example:
            self._note("too_long" if fitting is None else "truncated", index)
        return fitting

    def _read(self, index: int) -> E:
        """Return the example; retry for a while after faults of the machine."""
        for seconds in (*RETRY_SECONDS, None):
            try:
                return self.read_once(index)
            except DataError as error:
                fault = machine_fault(error)
                if fault is None and (
                    self.usable is None or not isinstance(error, MissingFileError)
                ):
                    raise
                reason = f"{self.place(index)}: {error.reason}"
                if seconds is None:
                    found = (
                        f"{fault.strerror} (errno {fault.errno})"
                        if fault
                        else "it was there when the run began"
                    )
                    raise InputLostError(
                        f"{reason}: {found}, and reading it again for {sum(RETRY_SECONDS):.0f} s "
                        "did not help. Make the files available again, then continue with "
                        "--resume"
                    ) from error
                logger.warning("%s; reading it again in %g s", reason, seconds)
                time.sleep(seconds)
        raise AssertionError("unreachable")

    def read_once(self, index: int) -> E:
        """Return the example without retries, limits or counting. Raises `DataError`."""
        place = [self.seed, int(self._epoch), index]
        sample = self.pipeline.draw(self.records[index], np.random.default_rng([*place, 1]))
        sample = self.records.write_regions(index, sample)
        view = self.pipeline.mask_view
        reader = FileReader(
            self.load,
            self.prepare,
            self.preprocess,
            augmentation=self.augmentation,
            features=self.features,
            mask_view=None if view is None else view.name,
            rng=np.random.default_rng(place),
        )
        pixels = self.records.load_media(index, sample, reader.load)
        masks = None
        if view is not None and sample.masks:
            placements = dict(zip(masked_media(sample, view), reader.placements, strict=True))
            masks = read_targets(sample, self.records.root(index), placements, view)
        example = self.pipeline.example(sample, pixels, masks)
        for branch in self.features.keys() & example.pixels.keys():
            example.features[branch] = example.pixels.pop(branch)
        return example

    def _note(self, what: str, index: int) -> bool:
        """Count a record once, however often it is drawn. Return whether it was new."""
        noted = self._left_out[COUNTED.index(what)]
        new = not bool(noted[index])
        noted[index] = True
        return new
