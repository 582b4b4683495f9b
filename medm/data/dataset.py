"""Records to examples, one at a time, in the workers of a DataLoader.

Nothing is random but the augmentation, which is drawn from (seed, epoch, index): the same example comes out in
any worker, on any rank and after a resume.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from medm.data.features import FeatureStore
from medm.data.limits import BadRecordsLimit, LengthLimit, TooLongError, require_label
from medm.data.records import Records, missing_branch
from medm.errors import DataError, InputLostError, RecipeError, machine_fault
from medm.imaging import Augment, Preprocess, load_pixels
from medm.imaging.augment import augment
from medm.imaging.paths import MissingFileError
from medm.types import Encode, Example, Sample

logger = logging.getLogger(__name__)

COUNTED = ("bad", "too_long", "truncated")
"""What a dataset counts: records left out as bad, left out as too long, and shortened."""

RETRY_SECONDS = (1.0, 3.0, 9.0, 20.0)
"""Pauses before a file is read again that the machine, not its content, kept from being read: a network share that is
remounted is back within seconds."""


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
        bad_records_limit: how many may be left out as bad; who reads the counts of all ranks asks it.
        usable: by record, what a check found. One that was not usable is left out without being read again; one
            that was had its files, so that a file that is missing now is lost, not the record's fault.
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
        bad_records_limit: BadRecordsLimit | None = None,
        usable: Sequence[bool] | np.ndarray | None = None,
        augmentation: Mapping[str, Augment] | None = None,
        features: Mapping[str, FeatureStore] | None = None,
        generation: bool = False,
        seed: int = 0,
    ) -> None:
        self.records, self.encode, self.preprocess, self.load = records, encode, dict(preprocess), load
        self.limit = LengthLimit(max_length, too_long, frozenset(placeholder_ids))
        self.bad_records, self.bad_records_limit = bad_records, bad_records_limit
        self.usable = None if usable is None else np.asarray(usable, bool)
        self.features = dict(features or {})
        self.augmentation, self.generation, self.seed = dict(augmentation or {}), generation, seed
        if unknown := sorted(self.augmentation.keys() - self.preprocess.keys()):
            raise RecipeError(
                f"data.augment: {unknown} are not branches of the model; it has {sorted(self.preprocess)}"
            )
        # Shared with the workers, a byte per record and count: written to by one of them at a time, without a lock.
        self._left_out = torch.zeros(len(COUNTED), len(records), dtype=torch.bool).share_memory_()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, also to workers that are already running."""
        self._epoch.fill_(epoch)

    @property
    def counts(self) -> dict[str, int]:
        """Different records that this process and its workers left out or shortened so far, by `COUNTED`."""
        return {what: len(self.noted(what)) for what in COUNTED}

    @property
    def num_bad(self) -> int:
        """Different records that this process and its workers left out as bad so far."""
        return int(self._left_out[COUNTED.index("bad")].sum())

    def noted(self, what: str) -> list[int]:
        """Indices of the records that this process and its workers counted under a name of `COUNTED`."""
        return torch.nonzero(self._left_out[COUNTED.index(what)]).flatten().tolist()

    def place(self, index: int) -> str:
        """The annotation file of a record and its position there, for messages."""
        source, position = self.records.locate(index)
        return f"{self.records.files[source].path}, record {position}"

    def __getitem__(self, index: int) -> Example | None:
        """The example, or None where the policy leaves the record out.

        Raises:
            DataError: with file, index and field; the policy is to stop.
            InputLostError: files cannot be read any more, for a reason that is not the record's.
        """
        if self.usable is not None and not self.usable[index]:
            return None
        try:
            example = self._read(index)
            fitting = self.limit.apply(example)
        except DataError as error:
            source, position = self.records.locate(index)
            error.at(file=self.records.files[source].path, index=position)
            if self.bad_records == "stop" or isinstance(error, TooLongError):
                raise
            if self._note("bad", index):
                logger.warning("left out: %s", error)
            return None
        if fitting is not example:
            self._note("too_long" if fitting is None else "truncated", index)
        return fitting

    def _read(self, index: int) -> Example:
        """The example; what the machine is at fault for is tried again for a while."""
        for seconds in (*RETRY_SECONDS, None):
            try:
                return self.read_once(index)
            except DataError as error:
                fault = machine_fault(error)
                if fault is None and (self.usable is None or not isinstance(error, MissingFileError)):
                    raise
                reason = f"{self.place(index)}: {error.reason}"
                if seconds is None:
                    found = f"{fault.strerror} (errno {fault.errno})" if fault else "it was there when the run began"
                    raise InputLostError(
                        f"{reason}: {found}, and reading it again for {sum(RETRY_SECONDS):.0f} s did not help. "
                        "Make the files available again, then continue with --resume"
                    ) from error
                logger.warning("%s; reading it again in %g s", reason, seconds)
                time.sleep(seconds)
        raise AssertionError("unreachable")

    def read_once(self, index: int) -> Example:
        """The example as it is now: nothing is tried again, left out, cut or counted. Raises `DataError`."""
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
            raise InputLostError(f"{file.name} changed after its features were made; start the run again")
        return found

    def _note(self, what: str, index: int) -> bool:
        """Count a record once, however often it is drawn. Returns whether it was new."""
        noted = self._left_out[COUNTED.index(what)]
        new = not bool(noted[index])
        noted[index] = True
        return new
