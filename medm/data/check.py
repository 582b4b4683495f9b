"""Check of annotation files and of every file that they name.

Runs the data pipeline that training runs, with blank pixels of the right shapes in place of the
files' own. Needs no torch where the pipeline has no processor. Reports places and reasons, never
the content of a record, except in the preview on request.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import merge
from pathlib import Path
from typing import Any

import numpy as np

from medm.data.base import AnyPipeline, MediaSource, Segment
from medm.data.compact import PlacedTexts, SeenTexts
from medm.data.concepts import ConceptCounts
from medm.data.limits import LengthLimit
from medm.data.mask_check import check_masks
from medm.data.mask_targets import blank_targets
from medm.data.options import DataOptions, SourceOptions, format_of
from medm.data.record_files import check_beginning
from medm.data.records import Records
from medm.data.shards import ShardFile, check_shards
from medm.data.tables import check_header
from medm.errors import DataError, RecipeError
from medm.imaging import Preprocess, VolumePreprocess
from medm.imaging.notices import Notice, collected
from medm.imaging.paths import MissingFileError
from medm.imaging.probe import count_items, probe
from medm.types import BaseSample, parse_view

MAX_KEPT = 1000
"""Number of bad records that are kept with place and reason; further ones are only counted."""

MAX_BAD_FILES = 10_000
"""So many bad files are kept with their reason; where there are more, a file is looked at for each
record that names it."""


@dataclass(slots=True)
class Report:
    """Result of a check."""

    files: dict[str, int] = field(default_factory=dict)
    """Records looked at in each annotation file."""
    records: int = 0
    """Records looked at, good and bad."""
    counts: Counter[str] = field(default_factory=Counter)
    """Counts of the pipeline in good records, by noun (`Pipeline.nouns`)."""
    text_only: int = 0
    """Good records without image or volume."""
    media: Counter[str] = field(default_factory=Counter)
    """Images and volumes of good records by branch; masks, and those of absent targets."""
    concepts: ConceptCounts = field(default_factory=ConceptCounts)
    """Phrases of the masks of good records."""
    tasks: Counter[str] = field(default_factory=Counter)
    """Good records by task; "" for those that name none."""
    bad: list[DataError] = field(default_factory=list)
    """The first bad records, with file, index, field and reason."""
    num_bad: int = 0
    num_unreadable: int = 0
    """Annotation files that cannot be read; they count in `num_bad` too."""
    num_changed_shards: int = 0
    """Tar shards whose checksum is not that of their manifest; they count in `num_bad` too."""
    found_files: Counter[int] = field(default_factory=Counter)
    """Images and volumes that exist, by source."""
    without_file: Counter[int] = field(default_factory=Counter)
    """Records that name a file which does not exist, by source."""
    num_folded: int = 0
    """Bad records that an error about their whole source in `bad` stands for, beyond the first."""
    warnings: list[str] = field(default_factory=list)
    """The first warnings about files that are used all the same, such as a blank image."""
    num_warnings: int = 0
    duplicate_ids: list[tuple[str, str, int]] = field(default_factory=list)
    """(id, file, index) of the first records whose id another one had before."""
    num_duplicate_ids: int = 0
    lengths: list[int] = field(default_factory=list)
    """Length of each record in order, after shortening; 0 for bad ones and those left out. Empty
    without a processor."""
    num_too_long: int = 0
    """Records that the policy leaves out for their length."""
    num_truncated: int = 0
    """Records that the policy shortens."""
    preview: list[Segment] = field(default_factory=list)
    """The first good record as the model sees it."""
    preview_at: int | None = None
    """Its position among all records."""
    bad_at: list[int] = field(default_factory=list)
    """Positions of `bad`; -1 for a file that cannot be opened."""
    starts: list[tuple[int, str]] = field(default_factory=list)
    """Position of each source's first record, and its file."""
    roots: list[Path] = field(default_factory=list)
    """Folder of each source's images and volumes."""
    ids: PlacedTexts = field(default_factory=PlacedTexts)
    """Position and id of the records that have one; only in the report of a shard."""

    @property
    def ok(self) -> bool:
        """True if every record can be used."""
        return self.num_bad == 0

    def lines(self) -> list[str]:
        """Return the report as text: bad records first, the totals last."""
        lines = [f"{error}" for error in self.bad]
        more = self.num_bad - self.num_folded - len(self.bad)
        if more > 0:
            lines.append(f"... and {more} more bad records")
        lines += [f"warning: {message}" for message in self.warnings]
        if self.num_warnings > len(self.warnings):
            lines.append(f"... and {self.num_warnings - len(self.warnings)} more warnings")
        lines += [f"{file}: {_counted(count, 'record')}" for file, count in self.files.items()]
        if self.num_unreadable:
            lines.append(f"{_counted(self.num_unreadable, 'annotation file')} cannot be read")
        if self.num_changed_shards:
            lines.append(f"{_counted(self.num_changed_shards, 'shard')} not as in the manifest")
        if self.files:
            media = [_counted(count, branch) for branch, count in sorted(self.media.items())] or [
                "no images or volumes"
            ]
            counts = [_counted(count, noun) for noun, count in self.counts.items()]
            bad = self.num_bad - self.num_unreadable - self.num_changed_shards
            lines.append(
                f"{_counted(self.records, 'record')}, {bad} bad; "
                f"{'the good ones have ' if bad else ''}{', '.join([*counts, *media])}, "
                f"{self.text_only} text only"
            )
        if self.num_warnings:
            lines.append(f"{self.num_warnings} warnings about files")
        if set(self.tasks) - {""}:
            tasks = sorted(self.tasks.items(), key=lambda entry: (-entry[1], entry[0]))
            lines.append("tasks: " + ", ".join(f"{task or '(none)'} {n}" for task, n in tasks))
        if self.num_duplicate_ids:
            name, file, index = self.duplicate_ids[0]
            lines.append(
                f"{_counted(self.num_duplicate_ids, 'record')} with an id that an earlier one has "
                f"(not an error); the first: {name!r} at {file}, record {index}"
            )
        if any(self.lengths):
            lines += self._length_lines()
        if self.preview:
            lines.append("the first record as the model sees it; [x] is learned, [ ] is not:")
            lines += [f"  [{'x' if part.learned else ' '}] {part.text!r}" for part in self.preview]
        return lines

    def _length_lines(self) -> list[str]:
        values = np.asarray([length for length in self.lengths if length])
        middle, high = np.percentile(values, [50, 95]).astype(int)
        lines = [
            f"tokens per record: {values.min()} to {values.max()}, median {middle}, 95 % up to "
            f"{high}"
        ]
        counts, edges = np.histogram(values, bins=min(10, len(np.unique(values))))
        for count, low, top in zip(counts, edges, edges[1:], strict=False):
            bar = "#" * round(40 * int(count) / int(counts.max()))
            lines.append(f"  {int(np.ceil(low)):>7} .. {int(top):>7} {count:>9} {bar}")
        if self.num_too_long or self.num_truncated:
            lines.append(f"too long: {self.num_too_long} left out, {self.num_truncated} shortened")
        return lines


@dataclass(slots=True)
class _Checker:
    """The settings of one check and its state between records."""

    pipeline: AnyPipeline
    decode: bool
    preview: bool
    limit: LengthLimit
    report: Report
    source: int = 0
    """Number of the source that is checked."""
    seen_files: SeenTexts = field(default_factory=SeenTexts)
    """Files already checked for a view: a good volume is no image."""
    bad_files: dict[tuple[Path, str], str] = field(default_factory=dict)
    """What is wrong with those that cannot be used, of at most `MAX_BAD_FILES`."""

    def record(self, records: Records[Any, Any], index: int, *, position: int) -> None:
        """Check one record and add it to the report. Raises `DataError` when it is bad.

        Args:
            records: of one file.
            index: of the record in it.
            position: of the record among all files.
        """
        sample = records[index]
        if sample.id is not None:
            self.report.ids.append(position, sample.id)
        sample = records.write_regions(index, sample)
        pixels = records.load_media(index, sample, self._blank)
        masks = self._check_masks(records, index, sample)
        view = self.pipeline.mask_view
        if self.pipeline.makes_examples:
            with records.placed(index):
                targets = blank_targets(sample, view) if view is not None and sample.masks else None
                example = self.pipeline.example(sample, pixels, targets)
                fitting = self.limit.apply(example, self.pipeline)
            self.report.num_too_long += fitting is None
            self.report.num_truncated += fitting is not None and fitting is not example
            self.report.lengths.append(0 if fitting is None else self.pipeline.length(fitting))
            if self.preview and fitting is not None and self.report.preview_at is None:
                self.report.preview, self.report.preview_at = (
                    self.pipeline.preview(fitting),
                    position,
                )
        self.report.counts.update(self.pipeline.counts(sample))
        self.report.text_only += not sample.media
        self.report.media.update(media.branch for media in sample.media)
        self.report.media.update(masks)
        self.report.media.update("region" for _ in getattr(sample, "regions", ()))
        self.report.concepts.add(sample)
        self.report.tasks[sample.task or ""] += 1

    def _check_masks(
        self, records: Records[Any, Any], index: int, sample: BaseSample
    ) -> Counter[str]:
        """Check the masks of a record and count them. Raises `DataError`."""
        if not sample.masks:
            return Counter()
        views = self.pipeline.preprocess.values() if self.pipeline.makes_examples else ()
        series = {view.series for view in views if isinstance(view, VolumePreprocess)}
        with records.placed(index):
            return check_masks(
                sample,
                records.root(index),
                lambda media: records.media_path(index, sample.media[media]),
                decode=self.decode,
                several="largest" if "largest" in series else "only",
            )

    def _blank(self, file: MediaSource, view: str) -> np.ndarray:
        """Check a file, once for each view that reads it, and return blank pixels in its place."""
        preprocess = self.pipeline.preprocess[view] if self.pipeline.makes_examples else None
        self.report.found_files[self.source] += 1
        if not isinstance(file, Path):
            self._probe(file, view, preprocess)
            return blank_pixels(preprocess, file)
        key = file, view
        if key in self.bad_files:
            raise DataError(self.bad_files[key])
        if self.seen_files.add(f"{view}\0{file}") or len(self.bad_files) == MAX_BAD_FILES:
            try:
                self._probe(file, view, preprocess)
            except DataError as error:
                if len(self.bad_files) < MAX_BAD_FILES:
                    self.bad_files[key] = error.reason
                raise
        return blank_pixels(preprocess, file)

    def _probe(self, file: MediaSource, view: str, preprocess: Preprocess | None) -> None:
        with collected() as notices:
            probe(
                file,
                kind=parse_view(view).kind if preprocess is None else preprocess.kind,
                decode=self.decode,
                series=preprocess.series if isinstance(preprocess, VolumePreprocess) else "only",
                preprocess=preprocess,
            )
        _note_warnings(self.report, notices)


def check(
    sources: Sequence[SourceOptions],
    pipeline: AnyPipeline,
    *,
    decode: bool = False,
    preview: bool = False,
    length_limit: LengthLimit | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    shard: tuple[int, int] | None = None,
) -> Report:
    """Read every record, check every file that it names once, and report what is bad.

    Args:
        sources: the annotation files. One that cannot be opened at all is reported like a bad
            record.
        pipeline: of the kind of model. Without a processor, records and files are checked alone;
            with one also the examples of the model, and their lengths.
        decode: read every image and volume in full; otherwise only as far as their header.
        preview: show the first good record as the model sees it. Needs a processor.
        length_limit: the longest example, and what training will do with a longer one; with "error"
            it is a bad record.
        limit: look only at the first N records of each file.
        progress: called with (records done, all records) at intervals.
        shard: (number, of how many), where several ranks divide the work: the records whose
            position among all leaves this remainder. Their reports are put together by `merged`.
    """
    report = Report(counts=Counter(dict.fromkeys(pipeline.nouns, 0)))
    checker = _Checker(pipeline, decode, preview, length_limit or LengthLimit(), report)
    number, shards = shard or (0, 1)
    opened = []
    for source in sources:
        try:
            opened.append(Records([source], pipeline))
        except DataError as error:
            if number == 0:
                report.num_unreadable += 1
                _note_bad(report, error, position=-1)
    totals = [len(records) if limit is None else min(limit, len(records)) for records in opened]
    position = -1
    for checker.source, (records, total) in enumerate(zip(opened, totals, strict=True)):
        file = str(records.files[0].path)
        report.files[file] = report.files.get(file, 0) + total
        report.starts.append((position + 1, file))
        report.roots.append(records.root(0).resolve())
        if decode and number == 0 and isinstance(file_of := records.files[0], ShardFile):
            for wrong in file_of.verify():
                report.num_changed_shards += 1
                _note_bad(report, wrong, position=-1)
        for index in range(total):
            position += 1
            if position % shards != number:
                continue
            report.records += 1
            try:
                checker.record(records, index, position=position)
            except DataError as error:
                report.without_file[checker.source] += isinstance(error, MissingFileError)
                _note_bad(report, error, position=position)
                report.lengths += [0] if pipeline.makes_examples else []
            if progress is not None and report.records % 1000 == 0:
                progress(position + 1, sum(totals))
    return merged([report]) if shard is None else report


def require_sources(options: DataOptions, formats: Collection[str] = ("json",)) -> None:
    """Check that the annotation files and folders of a recipe exist, before anything is loaded.

    Args:
        options: the recipe's `data`.
        formats: forms that the pipeline reads (`Pipeline.formats`).

    Raises:
        RecipeError: names the key and the problem.
    """
    for section in ("train", "eval"):
        for number, source in enumerate(getattr(options, section)):
            place = f"data.{section}.{number}"
            try:
                _check_form(Path(source.path), formats)
            except DataError as error:
                raise RecipeError(f"{place}.path: {source.path}: {error.reason}") from None
            if source.root is not None and not Path(source.root).is_dir():
                raise RecipeError(f"{place}.root: {source.root}: no such folder")


def _check_form(path: Path, formats: Collection[str]) -> None:
    """Check that an annotation file exists and begins as its form does. Raises `DataError`."""
    form = format_of(str(path))
    if form == "table" and form in formats:
        check_header(path)
    elif form == "shards" and form in formats:
        check_shards(path)
    else:
        check_beginning(path)


def _note_bad(report: Report, error: DataError, *, position: int) -> None:
    report.num_bad += 1
    if len(report.bad) < MAX_KEPT:
        report.bad.append(error)
        report.bad_at.append(position)


def _note_warnings(report: Report, notices: Sequence[Notice]) -> None:
    report.num_warnings += len(notices)
    report.warnings += [notice.message for notice in notices[: MAX_KEPT - len(report.warnings)]]


def merged(reports: Sequence[Report]) -> Report:
    """Return one report of the shards of a check, in the order of their numbers.

    It equals that of one rank that looked at all records.
    """
    whole = Report(files=dict(reports[0].files), starts=reports[0].starts, roots=reports[0].roots)
    for report in reports:
        whole.records += report.records
        whole.counts.update(report.counts)
        whole.text_only += report.text_only
        whole.media.update(report.media)
        whole.concepts.merge(report.concepts)
        whole.tasks.update(report.tasks)
        whole.num_bad += report.num_bad
        whole.num_unreadable += report.num_unreadable
        whole.num_changed_shards += report.num_changed_shards
        whole.found_files.update(report.found_files)
        whole.without_file.update(report.without_file)
        whole.num_warnings += report.num_warnings
        whole.warnings += report.warnings[: MAX_KEPT - len(whole.warnings)]
        whole.num_too_long += report.num_too_long
        whole.num_truncated += report.num_truncated
    bad = sorted(
        (
            (at, error)
            for report in reports
            for at, error in zip(report.bad_at, report.bad, strict=True)
        ),
        key=lambda entry: entry[0],
    )
    whole.bad_at, whole.bad = (
        [at for at, _ in bad[:MAX_KEPT]],
        [error for _, error in bad[:MAX_KEPT]],
    )
    _merge_wrong_roots(whole)
    shown = [report for report in reports if report.preview_at is not None]
    if shown:
        first = min(shown, key=lambda report: report.preview_at or 0)
        whole.preview, whole.preview_at = first.preview, first.preview_at
    whole.lengths = [0] * sum(len(report.lengths) for report in reports)
    for number, report in enumerate(reports):
        whole.lengths[number :: len(reports)] = report.lengths
    _note_duplicates(whole, merge(*(report.ids for report in reports)))
    return whole


def _merge_wrong_roots(whole: Report) -> None:
    """Merge the errors of a source into one where its root is wrong: none of its files exists."""
    for number, (start, file) in enumerate(whole.starts):
        end = whole.starts[number + 1][0] if number + 1 < len(whole.starts) else whole.records
        count = whole.without_file[number]
        if whole.found_files[number] or count < 2:
            continue
        of_source = [
            isinstance(error, MissingFileError) and start <= at < end
            for at, error in zip(whole.bad_at, whole.bad, strict=True)
        ]
        first = whole.bad[of_source.index(True)]
        wrong_root = DataError(
            f"no file of this source exists under its root {whole.roots[number]}: is the folder "
            f"right? Set `root` of the source in the recipe, or --root. {count} records name "
            f"files; the first is record {first.index}, field '{first.field}': {first.reason}",
            file=file,
        )
        kept = [
            (at, error)
            for at, error, fold in zip(whole.bad_at, whole.bad, of_source, strict=True)
            if not fold
        ]
        kept.insert(0, (start, wrong_root))
        whole.bad_at, whole.bad = [at for at, _ in kept], [error for _, error in kept]
        whole.num_folded += count - 1


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _note_duplicates(whole: Report, ids: Iterable[tuple[int, str]]) -> None:
    """Note the ids that an earlier record had. `ids`: with positions, in order."""
    seen = SeenTexts()
    for position, name in ids:
        if not seen.add(name):
            whole.num_duplicate_ids += 1
            if len(whole.duplicate_ids) < MAX_KEPT:
                start, file = whole.starts[
                    bisect_right(whole.starts, position, key=lambda entry: entry[0]) - 1
                ]
                whole.duplicate_ids.append((name, file, position - start))


def blank_pixels(preprocess: Preprocess | None, file: MediaSource | None = None) -> np.ndarray:
    """Return zeros of the shape that a prepared file has, without memory of their own.

    The array is empty if no model gives the shape.

    Args:
        preprocess: of the view that reads the file.
        file: the file, or a seekable stream. The header of an image that is cut into tiles gives
            their number; without a file there is one.

    Raises:
        MediaError: the header cannot be read.
    """
    if preprocess is None:
        return np.empty(0, np.float32)
    channels = preprocess.channels if preprocess.kind == "image" else preprocess.num_channels
    shape: tuple[int, ...] = (channels, *(preprocess.size or (1, 1, 1)))
    if preprocess.kind == "image" and preprocess.tiles is not None:
        shape = (1 if file is None else count_items(file, preprocess), *shape)
    return np.broadcast_to(np.float32(0), shape)
