"""Contract of a data pipeline: it turns the records of a kind of model into examples and batches.

A pipeline needs no torch before its collators are built: `medm data check` reads annotation files
without it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    ClassVar,
    Generic,
    NamedTuple,
    Self,
    TypeAlias,
    TypeVar,
)

from medm.errors import DataError, RecipeError
from medm.imaging.marks import MarkedImage
from medm.types import BaseSample, Batch, MaskTargets, MediaExample, Processor, views_of

if TYPE_CHECKING:
    import numpy as np

    from medm.data.options import DataOptions, Format, SourceOptions
    from medm.imaging import Preprocess


MediaSource: TypeAlias = Path | BinaryIO | MarkedImage
"""An image or volume: a file, a stream of one that lies in a shard, or an image with marks."""

S = TypeVar("S", bound=BaseSample)
"""A record as a pipeline reads it."""
E = TypeVar("E", bound=MediaExample)
"""A sample as the model takes it, before batching."""
P = TypeVar("P", bound=Processor)
"""The processor of the models that a pipeline serves."""

Collate: TypeAlias = Callable[[Sequence[E | None]], Batch]
"""Examples to a batch. None stands for a record that was left out; if all were, nothing in the
batch is learned."""


@dataclass(slots=True)
class Segment:
    """A stretch of an example in a preview that is learned, or not."""

    text: str
    learned: bool


class MaskView(NamedTuple):
    """The view of a mask head, and the grid of the masks that it learns."""

    name: str
    """`image@masks` or `volume@masks`."""
    grid: tuple[int, ...]


class Pipeline(ABC, Generic[S, E, P]):
    """Turns the records of annotation files into examples, and examples into batches.

    Training, inference and `medm data check` run the same pipeline. `medm.data.pipelines` has the
    table; a kind of model names the one that it uses (`ModelKind.pipeline`).

    Args:
        processor: of the model. Without it records are only read, as for a check of files alone.
        inference: examples are prompts: the reply may be missing, and nothing is learned.
        needs_mask: training batches carry an `attention_mask` (`ModelKind.needs_mask`).
    """

    nouns: ClassVar[tuple[str, ...]] = ()
    """Names of what `counts` counts, in the singular and in the order of a report."""
    unit: ClassVar[str] = "tokens"
    """Unit of `length`, for messages."""
    formats: ClassVar[frozenset[Format]] = frozenset({"json"})
    """Forms of annotation files that it reads (`medm.data.options.format_of`)."""

    def __init__(
        self, processor: P | None = None, *, inference: bool = False, needs_mask: bool = True
    ) -> None:
        self._processor, self.inference, self.needs_mask = processor, inference, needs_mask

    @property
    def makes_examples(self) -> bool:
        """True if the pipeline has a processor, so that records become examples."""
        return self._processor is not None

    @property
    def processor(self) -> P:
        """The processor. Raises `ValueError` if the pipeline has none."""
        if self._processor is None:
            raise ValueError(
                f"{type(self).__name__} has no processor: it reads records, but makes no examples"
            )
        return self._processor

    @property
    def preprocess(self) -> Mapping[str, Preprocess]:
        """Preprocessing of the pixels by view."""
        return self.processor.preprocess

    @property
    def mask_view(self) -> MaskView | None:
        """The view of the model's mask head; None where no masks are learned."""
        return None

    def views(self, sample: S, number: int) -> list[str]:
        """Return the views that a file of a sample is read for; that of a mask head comes last.

        Args:
            sample: the record.
            number: position of the file in `sample.media`.

        Raises:
            DataError: the model has no view of that kind of file.
        """
        kind = sample.media[number].branch
        views = views_of(kind, self.preprocess)
        if not views:
            raise DataError(missing_branch(kind, self.preprocess))
        return views

    def with_processor(self, processor: P) -> Self:
        """Return the same pipeline for a processor."""
        changed = copy.copy(self)
        changed._processor = processor
        return changed

    def check_options(self, options: DataOptions) -> None:
        """Raise `RecipeError` for `data` settings that do not fit these records."""
        if options.packing:
            raise RecipeError(
                f"data.packing: {type(self).__name__} puts one record in a row; set data.packing: "
                "false"
            )

    @abstractmethod
    def read(self, record: object, *, file: Path, index: int) -> S:
        """Check one record, as the JSON parser gave it, and read it.

        Args:
            record: the record.
            file: the annotation file, for the sample.
            index: position of the record in it, from 0.

        Raises:
            DataError: with field and reason; nothing is dropped or fixed.
        """

    def check_columns(self, columns: Collection[str]) -> None:
        """Refuse a table that lacks a column which every record needs. Raises `DataError`.

        Args:
            columns: the fields that its columns give.
        """

    def of_source(self, sample: S, source: SourceOptions) -> S:
        """Return a sample with what its source sets for all records. Raises `DataError`."""
        if sample.task is None and source.task is not None:
            return replace(sample, task=source.task)
        return sample

    def draw(self, sample: S, rng: np.random.Generator) -> S:
        """Return a sample with what is drawn anew each epoch, such as one of its captions.

        Args:
            sample: as `read` and `of_source` gave it.
            rng: a function of seed, epoch and record alone, so that neither a resume nor the number
                of workers changes the draw.
        """
        return sample

    def write_regions(self, sample: S, size_of: Callable[[int], tuple[int, int]], root: Path) -> S:
        """Return a sample whose regions are text, where its model reads them so.

        Args:
            sample: the record.
            size_of: height and width of the upright image at a position of `sample.media`.
            root: folder that paths of masks are relative to.

        Raises:
            DataError: a region that its model cannot read, or that does not lie in its image.
        """
        return sample

    def with_marks(
        self, source: MediaSource, sample: S, media: int, view: str, root: Path
    ) -> MediaSource:
        """Return a file with the regions of it that are drawn on its pixels for a view.

        Args:
            source: the file, or a stream of it.
            sample: the record.
            media: position of the file in `sample.media`.
            view: the view that reads it.
            root: folder that paths of masks are relative to.

        Raises:
            DataError: a region that cannot be read.
        """
        return source

    @abstractmethod
    def media_field(self, record: object, number: int) -> str:
        """Return the field that names file `number` of a sample's `media`, for messages.

        The record is a good one.
        """

    def counts(self, sample: S) -> Mapping[str, int]:
        """Count what a report totals, by `nouns`."""
        return {}

    @abstractmethod
    def make_example(self, sample: S, pixels: Mapping[str, list[np.ndarray]]) -> E:
        """Make an example of a sample.

        A check passes blank pixels of the right shapes: only the pixels of the example may depend
        on their values.

        Raises:
            DataError: the model cannot take the sample.
        """

    def make_masked_example(
        self, sample: S, pixels: Mapping[str, list[np.ndarray]], masks: MaskTargets
    ) -> E:
        """Make an example of a sample with masks, for a pipeline that has a `mask_view`.

        Raises:
            DataError: as `make_example`.
        """
        raise NotImplementedError(f"{type(self).__name__} has a mask_view and makes no masks")

    def require_usable(self, example: E) -> None:
        """Raise `DataError` for an example without anything to learn."""

    def example(
        self,
        sample: S,
        pixels: Mapping[str, list[np.ndarray]],
        masks: MaskTargets | None = None,
    ) -> E:
        """Return the usable example of a sample, with its masks where the model learns them.

        Raises `DataError`, as `make_example` and `require_usable` do.
        """
        if masks is None:
            example = self.make_example(sample, pixels)
        else:
            example = self.make_masked_example(sample, pixels, masks)
        self.require_usable(example)
        return example

    @abstractmethod
    def length(self, example: E) -> int:
        """Return the length, at least 1, for `data.max_length` and `data.order: length`."""

    def shorten(self, example: E, max_length: int) -> E:
        """Return an example cut to `max_length`, for `data.too_long: truncate_text`.

        Placeholders and control tokens are never cut. Raises `DataError` if that is impossible.
        """
        raise DataError(
            f"{self.length(example)} {self.unit}, but data.max_length is {max_length}, and "
            "records of this kind are never cut; raise it, or set data.too_long to skip"
        )

    def preview(self, example: E) -> list[Segment]:
        """Return an example as text, cut where learning begins and ends."""
        return []

    @abstractmethod
    def training_collator(self, options: DataOptions, *, padding_free: bool = False) -> Collate[E]:
        """Return the collator of training.

        Args:
            options: the recipe's `data`, which `check_options` accepts.
            padding_free: with packing, put a whole batch into one row without padding.
        """

    @abstractmethod
    def eval_collator(self) -> Collate[E]:
        """Return the collator of held-out data, one row a record."""


AnyPipeline: TypeAlias = Pipeline[Any, Any, Any]


def missing_branch(branch: str, known: Collection[str]) -> str:
    """Return why a record's image or volume cannot be used by this model, which has some views."""
    kinds = sorted({name.partition("@")[0] for name in known})
    return (
        f"the model takes no {branch}s; it takes "
        f"{' and '.join(f'{kind}s' for kind in kinds) or 'text only'}"
    )
