"""Several annotation files as one sequence of samples, read on access by a data pipeline."""

from __future__ import annotations

import copy
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Self

from medm.data.base import AnyPipeline, E, MediaSource, Pipeline, S
from medm.data.options import SourceOptions, format_of
from medm.data.record_files import RecordFile, RecordSource
from medm.data.shards import ShardFile
from medm.data.tables import TableFile
from medm.errors import DataError
from medm.imaging import resolve_inside
from medm.imaging.images import check_image
from medm.types import Media, Processor

if TYPE_CHECKING:
    import numpy as np


def open_source(source: SourceOptions, pipeline: AnyPipeline) -> RecordSource:
    """Open an annotation file in the form that its name says.

    Raises:
        DataError: it cannot be opened, or the pipeline does not read the form.
    """
    form = format_of(source.path)
    if form == "table" and form in pipeline.formats:
        return TableFile(source.path, source.columns, pipeline.check_columns)
    if form == "shards" and form in pipeline.formats and source.columns is None:
        return ShardFile(source.path, source.root)
    if source.columns is not None:
        raise DataError("`columns` is for tables, and the file is not one", file=source.path)
    return RecordFile(source.path)  # a table that is not read says so at opening


def _first_groups(groups: Sequence[int], limit: int) -> tuple[int, ...]:
    """Return the groups of the first `limit` records."""
    starts = itertools.accumulate(groups, initial=0)
    sizes = (min(size, limit - start) for start, size in zip(starts, groups, strict=False))
    return tuple(size for size in sizes if size > 0)


class Records(Sequence[S], Generic[S, E]):
    """All records of several annotation files in sequence, read on access.

    Args:
        sources: annotation files. They are opened, and their record offsets found, here.
        pipeline: reads the records, and knows which fields name files.
    """

    def __init__(self, sources: Sequence[SourceOptions], pipeline: Pipeline[S, E, Any]) -> None:
        self.sources, self.pipeline = tuple(sources), pipeline
        self.files = tuple(open_source(source, pipeline) for source in self.sources)
        self.sizes = tuple(
            len(file) if source.limit is None else min(len(file), source.limit)
            for file, source in zip(self.files, self.sources, strict=True)
        )
        """Records of each source."""
        self.groups = tuple(
            _first_groups(file.groups, size)
            for file, size in zip(self.files, self.sizes, strict=True)
        )
        """Of each source, the records of each shard."""
        self._ends = list(itertools.accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def with_processor(self, processor: Processor) -> Self:
        """Return the same records, whose pipeline makes examples for a processor."""
        changed = copy.copy(self)
        changed.pipeline = self.pipeline.with_processor(processor)
        return changed

    def locate(self, index: int) -> tuple[int, int]:
        """Return source and position within its file of record `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        source = bisect_right(self._ends, index)
        return source, index - (self._ends[source - 1] if source else 0)

    @contextmanager
    def placed(self, index: int) -> Iterator[None]:
        """Add annotation file and position of record `index` to a `DataError` raised inside."""
        try:
            yield
        except DataError as error:
            source, position = self.locate(index)
            file = self.files[source]
            if error.index is None and (place := file.place(position)):
                error.reason = f"{place}: {error.reason}"
            error.at(file=file.path, index=position)
            raise

    def __getitem__(self, index: int) -> S:  # type: ignore[override]  # no slices: they would read the file
        """Return sample `index`. Raises `DataError` with file, index, field and reason."""
        source, position = self.locate(index)
        file = self.files[source]
        with self.placed(index):
            sample = self.pipeline.read(file[position], file=file.path, index=position)
            return self.pipeline.of_source(sample, self.sources[source])

    def root(self, index: int) -> Path:
        """Return the folder that the paths of record `index` are relative to."""
        source, _ = self.locate(index)
        root = self.sources[source].root
        return Path(root) if root is not None else self.files[source].path.parent

    def media_path(self, index: int, media: Media) -> Path:
        """Return the file of an image or volume.

        Raises `MediaError` for a path outside the root, and `DataError` for one in a shard.
        """
        if media.path is None:
            raise DataError(f"the {media.branch} has no path")
        source, _ = self.locate(index)
        if format_of(self.sources[source].path) == "shards":
            raise DataError(f"the {media.branch} lies in a shard and is no file of its own")
        return resolve_inside(self.root(index), media.path)

    def media_source(self, index: int, media: Media) -> Path | BinaryIO:
        """The file of an image or volume, or a stream where it lies in a shard.

        Raises:
            DataError: it lies outside the root, or is missing in its shard.
        """
        source, position = self.locate(index)
        inside = self.files[source].open_media(position, media.path or "")
        if inside is None:
            return self.media_path(index, media)
        if media.branch != "image":
            raise DataError(f"a {media.branch} in a shard is not read; name its file in JSON")
        return inside

    def write_regions(self, index: int, sample: S) -> S:
        """Return a sample of record `index` whose regions are text, where its model reads them so.

        Raises:
            DataError: with file, index and field; see `Pipeline.write_regions`.
        """

        def size_of(media: int) -> tuple[int, int]:
            return check_image(self.media_source(index, sample.media[media]))

        with self.placed(index):
            return self.pipeline.write_regions(sample, size_of, self.root(index))

    def media_field(self, index: int, media_index: int) -> str:
        """Return the field that names file `media_index` of a sample, for messages.

        Reads the record again.
        """
        source, position = self.locate(index)
        return self.pipeline.media_field(self.files[source][position], media_index)

    def load_media(
        self, index: int, sample: S, load: Callable[[MediaSource, str], np.ndarray]
    ) -> dict[str, list[np.ndarray]]:
        """Load every image and volume of record `index`, by view, in the order of `sample.media`.

        Args:
            index: the record.
            sample: the record as the pipeline read it.
            load: function from a file, or a stream of it, and one of its views to an array.

        Raises:
            DataError: with file, index and field; also for a kind of file of which the model has no
                view.
        """
        pixels: dict[str, list[np.ndarray]] = {}
        with self.placed(index):
            for number, media in enumerate(sample.media):
                try:
                    for view in self.views(sample, number):
                        source = self.pipeline.with_marks(
                            self.media_source(index, media), sample, number, view, self.root(index)
                        )
                        array = load(source, view)
                        pixels.setdefault(view, []).append(array)
                except DataError as error:
                    raise error.at(field=self.media_field(index, number)) from None
        return pixels

    def views(self, sample: S, number: int) -> list[str]:
        """Return the views that file `number` of a sample is read for; its kind without a model.

        Raises:
            DataError: the model has no view of that kind of file.
        """
        if not self.pipeline.makes_examples:
            return [sample.media[number].branch]
        return self.pipeline.views(sample, number)
