"""Volume cache of a recipe: reading through it, and filling it before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from medm.children import safe_path
from medm.data.base import MediaSource
from medm.data.options import CacheOptions
from medm.data.records import Records
from medm.data.volume_cache import MediaCache
from medm.errors import DataError
from medm.imaging import Preprocess, load_pixels, prepare
from medm.imaging.notices import Notice, collected
from medm.imaging.placement import Prepared
from medm.stopping import ignore_stops

MAX_KEPT = 1000
"""Number of problems that are kept with place and reason; further ones are only counted."""


@dataclass(frozen=True, slots=True)
class MediaLoader:
    """Loads files as prepared arrays, through a cache where there is one."""

    cache: MediaCache | None = None
    kinds: frozenset[str] = frozenset()
    """Kinds of file that the cache is for."""

    def __call__(self, source: MediaSource, preprocess: Preprocess) -> np.ndarray:
        """Return the pixels as `medm.imaging.load_pixels`. Raises `MediaError` likewise."""
        cached = self._cached(source, preprocess)
        if cached is None:
            return load_pixels(source, preprocess)
        return cached[0].load(cached[1], preprocess)

    def prepare(self, source: MediaSource, preprocess: Preprocess) -> Prepared:
        """Return pixels and placement as `medm.imaging.prepare`. Raises `MediaError` likewise."""
        cached = self._cached(source, preprocess)
        if cached is None:
            return prepare(source, preprocess)
        return cached[0].prepare(cached[1], preprocess)

    def _cached(
        self, source: MediaSource, preprocess: Preprocess
    ) -> tuple[MediaCache, Path] | None:
        """Return the cache and the file in it; None for what is not cached."""
        if self.cache is None or preprocess.kind not in self.kinds or not isinstance(source, Path):
            return None
        return self.cache, source


def media_cache(options: CacheOptions, *, device: str = "cpu", evict: bool = True) -> MediaCache:
    """Return the cache that a recipe names."""
    return MediaCache(options.dir, round(options.max_gb * 1e9), device=device, evict=evict)


def loader(options: CacheOptions | None, *, device: str = "cpu") -> MediaLoader:
    """Return the function that loads a file as a prepared array.

    It reads through the cache that a recipe names; without a cache it reads the file each time.

    Args:
        options: `data.cache`.
        device: for the preparation of volumes that are not in the cache; no GPU in forked
            workers.
    """
    if options is None:
        return MediaLoader()
    return MediaLoader(media_cache(options, device=device), frozenset(options.branches))


@dataclass(slots=True)
class FillReport:
    """Result of filling a cache."""

    files: int = 0
    """Different files that were looked at."""
    num_bad: int = 0
    bad: list[DataError] = field(default_factory=list)
    """The first files and records that cannot be used, with annotation file, record, field and
    reason."""
    num_warnings: int = 0
    warnings: list[str] = field(default_factory=list)
    """The first warnings about files that are used anyway, such as a blank volume."""

    def note(self, error: DataError) -> None:
        """Count a problem."""
        self.num_bad += 1
        if len(self.bad) < MAX_KEPT:
            self.bad.append(error)

    def warn(self, notices: Sequence[Notice]) -> None:
        """Count the warnings about a file."""
        self.num_warnings += len(notices)
        self.warnings += [notice.message for notice in notices[: MAX_KEPT - len(self.warnings)]]


@dataclass(frozen=True, slots=True)
class FilePlace:
    """A file, and where it is named first."""

    path: Path
    name: str
    """The path as the record has it."""
    view: str
    records: Records
    index: int
    media: int

    def error(self, reason: str) -> DataError:
        """Return the error of the file, with annotation file, record and field."""
        source, position = self.records.locate(self.index)
        field = self.records.media_field(self.index, self.media)
        return DataError(reason, file=self.records.files[source].path, index=position, field=field)


class _FileDataset(Dataset[tuple["str | None", list[Notice], Any]]):
    """Dataset that loads files in workers and returns the problems of each, not its pixels.

    With `results` it also returns what `load` returns.
    """

    def __init__(
        self,
        files: list[tuple[Path, Preprocess]],
        load: Callable[[Path, Any], object],
        *,
        results: bool,
    ) -> None:
        self.files, self.load, self.results = files, load, results

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str | None, list[Notice], Any]:
        reason = result = None
        with collected() as notices:
            try:
                result = self.load(*self.files[index])
            except DataError as error:
                reason = error.reason
        return reason, notices, result if self.results else None


def fill(
    data: Sequence[Records],
    preprocess: Mapping[str, Preprocess],
    load: Callable[[Path, Any], np.ndarray],
    *,
    workers: int = 0,
    start: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FillReport:
    """Load every file of some branches once, through the cache.

    A second call resumes: it only verifies the entries that exist.

    Args:
        data: whose files are loaded; a file that several records name is loaded once.
        preprocess: the views whose files are loaded, and how they are prepared.
        load: `load` of a cache.
        workers: processes; 0 for this one.
        start: start method of the processes ("spawn" if they use a GPU); None for the default.
        progress: called with (files done, files in all) after each.
    """
    report = FillReport()
    places = list(file_places(data, preprocess, report.note))
    load_places(places, preprocess, load, report, workers=workers, start=start, progress=progress)
    return report


def load_places(
    places: Sequence[FilePlace],
    preprocess: Mapping[str, Preprocess],
    load: Callable[[Path, Any], object],
    report: FillReport,
    *,
    workers: int = 0,
    start: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep: Callable[[FilePlace, str | None, Any], None] | None = None,
) -> None:
    """Load files once, and count them and their problems in a report.

    Args:
        places: the files.
        preprocess: how the files of each view are prepared.
        load: returns something small where `keep` takes it.
        report: of the run.
        workers: as of `fill`.
        start: as of `fill`.
        progress: as of `fill`.
        keep: called with each file, the reason why it cannot be used, and the result of `load`.
    """
    files = [(place.path, preprocess[place.view]) for place in places]
    # batch_size None: one file at a time and in order, so that a reason belongs to its place.
    loading = DataLoader(
        _FileDataset(files, load, results=keep is not None),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=start if workers else None,
        worker_init_fn=ignore_stops,
    )
    with safe_path():
        for place, (reason, notices, result) in zip(places, loading, strict=True):
            report.files += 1
            report.warn(notices)
            if reason is not None:
                report.note(place.error(reason))
            if keep is not None:
                keep(place, reason, result)
            if progress is not None:
                progress(report.files, len(places))


def file_places(
    data: Sequence[Records],
    preprocess: Mapping[str, Preprocess],
    note: Callable[[DataError], None],
) -> Iterator[FilePlace]:
    """Yield each file of some views once, in the order of the records.

    Args:
        data: the records.
        preprocess: the views.
        note: called with the error of each record that cannot be used.
    """
    seen: set[tuple[str, Path]] = set()
    for records in data:
        for index in range(len(records)):
            try:
                with records.placed(index):
                    sample = records[index]
                    for number, media in enumerate(sample.media):
                        views = records.views(sample, number)
                        for view in (name for name in views if name in preprocess):
                            path = records.media_path(index, media)
                            if (view, path) not in seen:
                                seen.add((view, path))
                                name = media.path or str(path)
                                yield FilePlace(path, name, view, records, index, number)
            except DataError as error:
                note(error)
