"""The data pipeline of pairs: an image or volume and one of its captions, for contrast."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypedDict

from medm.data.base import Collate, Pipeline, Segment
from medm.data.captions import candidates, same_label
from medm.data.options import Format, format_of
from medm.errors import DataError, RecipeError
from medm.types import BaseSample, Kind, Media, Processor

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from medm.data.options import DataOptions, SourceOptions

_MEDIA: Mapping[str, Kind] = {"image": "image", "volume": "volume"}
_OWN_FIELDS = {*_MEDIA, "caption", "captions", "label", "id", "source", "task"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(BaseSample):
    """One record, checked."""

    item: Media
    captions: tuple[str, ...]
    """Captions from which one is drawn; the first stands for the record where nothing is drawn.
    Empty only in inference."""
    label: str | int | None = None
    """Class of the record: pairs with equal labels are no negatives of each other."""
    source: str | None = None
    """Name of the data set that the record comes from."""

    @property
    def media(self) -> tuple[Media, ...]:
        return (self.item,)


@dataclass(slots=True)
class PairExample:
    """A pair as the model takes it, before batching; a `MediaExample`."""

    input_ids: list[int]
    attention_mask: list[int]
    """Same length as `input_ids`, 0 at padding."""
    pair_label: int
    pixels: dict[str, list[np.ndarray]]
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    task_id: int = 0


class PairBatch(TypedDict, total=False):
    """A batch of N pairs. A batch without pairs has no rows and no `pixels`."""

    input_ids: Tensor
    """(N, T) int64, padded on the right. Absent where inference records have no captions."""
    attention_mask: Tensor
    """(N, T) int64, 0 at padding."""
    pair_labels: Tensor
    """(N,) int64 of 63 bits: equal where two pairs have an equal caption or label, on any rank and
    in any batch; otherwise different."""
    pixels: dict[str, Tensor]
    """By view (N, C, *spatial) float32."""
    features: dict[str, Tensor]
    """By branch (N, prefix + prod(grid), D), in place of the branch's pixels: the cached output of
    the encoder."""


class PairProcessor(Processor, Protocol):
    """Processor of a kind of model whose records are pairs."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def pad_id(self) -> int:
        """Id that fills up short rows."""
        ...

    def encode_text(self, texts: str | Sequence[str]) -> Mapping[str, Tensor]:
        """Return `input_ids` and `attention_mask`, (N, T) int64, padded on the right."""
        ...


class Pairs(Pipeline[Pair, PairExample, PairProcessor]):
    """Pairs of an image or volume and a caption; each pair is one item of a batch."""

    nouns: ClassVar[tuple[str, ...]] = ("caption",)
    formats: ClassVar[frozenset[Format]] = frozenset({"json", "table", "shards"})

    def check_options(self, options: DataOptions) -> None:
        super().check_options(options)
        shards = [
            source.path
            for source in (*options.train, *options.eval)
            if format_of(source.path) == "shards"
        ]
        if shards and options.cache_features is not None:
            raise RecipeError(
                f"data.cache_features: features are kept by file, and the images of {shards[0]} "
                "are no files of their own; leave it out"
            )

    def check_columns(self, columns: Collection[str]) -> None:
        required = [tuple(_MEDIA)] + ([] if self.inference else [("caption", "captions")])
        for names in required:
            if not any(name in columns for name in names):
                raise DataError(
                    f"no column {' or '.join(map(repr, names))}; the table has "
                    f"{', '.join(columns)}. Name the column by `columns` of the source, such as "
                    f"columns: {{{names[0]}: {next(iter(columns))}}}"
                )

    def read(self, record: object, *, file: Path, index: int) -> Pair:
        if not isinstance(record, dict):
            raise DataError(
                f"expected an object with an image or volume and a caption, found "
                f"{type(record).__name__}"
            )
        return Pair(
            item=_media(record),
            captions=_captions(record, required=not self.inference),
            label=_label(record),
            source=_name(record, "source"),
            id=_name(record, "id"),
            task=_name(record, "task"),
            file=str(file),
            index=index,
            extra={key: value for key, value in record.items() if key not in _OWN_FIELDS},
        )

    def of_source(self, sample: Pair, source: SourceOptions) -> Pair:
        sample = super().of_source(sample, source)
        if not sample.captions:
            return sample
        try:
            choices = candidates(sample.captions, source.captions or "random")
        except DataError as error:
            raise error.at(field="caption") from None
        return replace(sample, captions=choices)

    def draw(self, sample: Pair, rng: np.random.Generator) -> Pair:
        if len(sample.captions) < 2 or self.inference:
            return sample
        return replace(sample, captions=(sample.captions[rng.integers(len(sample.captions))],))

    def media_field(self, record: object, number: int) -> str:
        return next((name for name in _MEDIA if isinstance(record, dict) and name in record), "")

    def counts(self, sample: Pair) -> Mapping[str, int]:
        return {"caption": len(sample.captions)}

    def make_example(self, sample: Pair, pixels: Mapping[str, list[np.ndarray]]) -> PairExample:
        source = sample.source or sample.task or str(sample.file)
        if not sample.captions:
            label = same_label("", sample.label, source=source)
            return PairExample([], [], label, dict(pixels))
        caption = sample.captions[0]
        encoded = self.processor.encode_text([caption])
        return PairExample(
            encoded["input_ids"][0].tolist(),
            encoded["attention_mask"][0].tolist(),
            same_label(caption, sample.label, source=source),
            dict(pixels),
        )

    def require_usable(self, example: PairExample) -> None:
        if not self.inference and not any(example.attention_mask):
            raise DataError("the caption has no tokens", field="caption")

    def length(self, example: PairExample) -> int:
        return max(sum(example.attention_mask), 1)

    def preview(self, example: PairExample) -> list[Segment]:
        ids = [
            token
            for token, seen in zip(example.input_ids, example.attention_mask, strict=True)
            if seen
        ]
        return [Segment(str(self.processor.tokenizer.decode(ids)), learned=True)]

    def training_collator(
        self, options: DataOptions, *, padding_free: bool = False
    ) -> Collate[PairExample]:
        return PairCollator(self.processor.pad_id, options.pad_to_multiple_of)

    def eval_collator(self) -> Collate[PairExample]:
        return PairCollator(self.processor.pad_id)


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Pads captions to the longest of them, and stacks images and volumes.

    Records that were left out come as None and make the batch smaller; where none is left, it has
    no rows.
    """

    pad_id: int
    pad_to_multiple_of: int | None = None
    """Lengths are rounded up to it."""

    def __call__(self, examples: Sequence[PairExample | None]) -> PairBatch:
        """Return a batch of one row an example."""
        import torch

        from medm.data.collator import padded, round_up, stack_media

        kept = [example for example in examples if example is not None]
        batch = PairBatch(
            pair_labels=torch.tensor([example.pair_label for example in kept], dtype=torch.int64)
        )
        if all(example.input_ids for example in kept):
            width = max((len(example.input_ids) for example in kept), default=1)
            width = round_up(width, self.pad_to_multiple_of)
            rows = [example.input_ids for example in kept]
            masks = [example.attention_mask for example in kept]
            batch["input_ids"] = padded(rows, width, self.pad_id, side="right")
            batch["attention_mask"] = padded(masks, width, 0, side="right")
        media = stack_media(kept)
        if "pixels" in media:
            batch["pixels"] = media["pixels"]
        if "features" in media:
            batch["features"] = media["features"]
        return batch


def _media(record: Mapping[str, Any]) -> Media:
    """Return the image or volume of a record, which has one. Raises `DataError`."""
    named = [name for name in _MEDIA if record.get(name) is not None]
    if len(named) != 1:
        raise DataError(
            f"expected one of 'image' and 'volume', found {' and '.join(named) or 'neither'}; the "
            f"record has {', '.join(map(str, record)) or 'no fields'}"
        )
    (name,) = named
    path = record[name]
    if isinstance(path, list):
        if len(path) != 1:
            raise DataError(f"expected one path, found {len(path)}: a pair has one", field=name)
        (path,) = path
    if not isinstance(path, str) or not path.strip():
        raise DataError(f"expected a path as text, found {_found(path)}", field=name)
    return Media(_MEDIA[name], path)


def _captions(record: Mapping[str, Any], *, required: bool) -> tuple[str, ...]:
    """Return the captions of a record as they are written, without spaces around. Raises
    `DataError`.
    """
    named = [name for name in ("caption", "captions") if record.get(name) is not None]
    if len(named) == 2:
        raise DataError("both 'caption' and 'captions' are set; keep one of them", field="captions")
    if not named:
        if not required:
            return ()
        raise DataError(
            "expected text in 'caption', or a list of texts in 'captions'; the record has "
            f"{', '.join(map(str, record))}"
        )
    (name,) = named
    value = record[name]
    if name == "captions" and isinstance(value, str) and value.lstrip().startswith("["):
        value = _list_in_a_cell(value)
    texts = value if name == "captions" and isinstance(value, list) else [value]
    if not texts:
        raise DataError("expected at least one caption, found an empty list", field=name)
    for position, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            place = f"{name}.{position}" if texts is value else name
            raise DataError(f"expected text, found {_found(text)}", field=place)
    return tuple(text.strip() for text in texts)


def _list_in_a_cell(text: str) -> object:
    """Return the list that a cell of a table holds as JSON. Raises `DataError`."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(
            f"expected a JSON list of texts in the cell ({error})", field="captions"
        ) from None


def _label(record: Mapping[str, Any]) -> str | int | None:
    value = record.get("label")
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and value.strip():
        return value
    raise DataError(f"expected text or a whole number, found {_found(value)}", field="label")


def _name(record: Mapping[str, Any], name: str) -> str | None:
    """Return the text of a field that a record may have. Raises `DataError`."""
    value = record.get(name)
    if value is None or isinstance(value, str):
        return value
    if name == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"expected text, found {_found(value)}", field=name)


def _found(value: object) -> str:
    if isinstance(value, str):
        return "blank text" if value else "empty text"
    return "nothing" if value is None else type(value).__name__
