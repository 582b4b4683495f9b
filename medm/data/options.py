"""Options of the `data` section of a recipe. Torch-free; other modules open the files."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from medm.config import Options, ResumeSafe
from medm.imaging.options import Augment

Format: TypeAlias = Literal["json", "table", "shards"]
"""Form of an annotation file: JSON or JSONL; a table of text; or tar shards."""
CaptionRule: TypeAlias = Literal["random", "first", "concat", "sentinel"]


class SourceOptions(Options):
    """One annotation file."""

    path: str
    """A JSON array or JSONL file of records; for pairs also a table (.csv, .tsv),
    a manifest of tar shards (.shards.json) or one shard (.tar)."""
    root: str | None = None
    """Folder that image and volume paths are relative to; nothing outside it is read. Default: the
    folder of `path`."""
    weight: float | None = Field(default=None, gt=0)
    """Weight of this source in the sampling, relative to the others. Set it for every source or for
    none; with none, every record is seen once per epoch."""
    task: str | None = None
    """Task of records that name none."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N records."""
    captions: CaptionRule | None = None
    """Pairs: which caption of a record with several is learned. `random` draws one each epoch, from
    seed, epoch and record alone (the default); `first` takes the first; `concat` joins them;
    `sentinel` splits UniMed-CLIP's captions at their marks and follows the rule of each mark."""
    columns: dict[str, str] | None = None
    """Tables: the column that stands for a field, such as {image: filepath, caption: title}. Other
    columns go by their own names."""

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out the fields of pairs where they are not set, so that other recipes resolve as
        before.
        """
        values: dict[str, object] = serialize(self)
        unused = [key for key in ("captions", "columns") if values.get(key) is None]
        return {key: value for key, value in values.items() if key not in unused}


class CacheOptions(Options):
    """Cache of prepared volumes on disk: read and resampled once, then memory-mapped.

    Any number of runs may use one folder; an entry is found by the content of its file and by the
    preprocessing.
    """

    dir: str
    """Folder of the entries."""
    max_gb: float = Field(default=100.0, gt=0)
    """Maximum gigabytes (1e9 bytes) of entries; further files are prepared each time. A volume of
    32 x 256 x 256 takes 8.4 MB."""
    branches: list[Literal["image", "volume"]] = Field(default=["volume"], min_length=1)
    """Branches in the cache. Decoding is mostly faster than the cache for a 2-D image, never for a
    volume."""


def format_of(path: str) -> Format:
    """Return the form of an annotation file, by its name."""
    name = path.lower()
    if name.endswith((".shards.json", ".tar")):
        return "shards"
    return "table" if name.endswith((".csv", ".tsv")) else "json"


class DataOptions(Options):
    """The `data` section of a recipe."""

    train: list[SourceOptions] = []
    """Training data."""
    eval: list[SourceOptions] = []
    """Held-out data for the loss during training."""
    max_length: int | None = Field(default=2048, ge=1)
    """Longest sample in tokens, vision tokens included; null for no limit."""
    too_long: Literal["error", "truncate_text", "skip"] = "error"
    """Handling of a longer sample: stop; truncate text at the end (never an image); or skip and
    count it."""
    bad_records: Literal["stop", "skip"] = "stop"
    """Handling of an unusable record: stop, or skip, count and report it."""
    bad_records_limit: ResumeSafe[float | None] = Field(default=0.1, ge=0)
    """With `skip`: stop when more records than this are bad. A number below 1 is a fraction of the
    records, any other a count; each record counts once per run; null for no limit."""
    augment: dict[str, Augment] | None = None
    """Random changes by view, in training only. The view of a mask head and its masks move as
    `image` or `volume` does."""
    cache_features: str | None = None
    """Folder of the feature cache: a frozen encoder runs once per file instead of once per epoch.
    Any number of runs may use one folder; delete it when it is no longer needed."""
    cache: ResumeSafe[CacheOptions | None] = None
    """Cache of prepared volumes on disk; null prepares them each time. `medm data cache` fills it
    before training."""
    order: Literal["shuffle", "length"] = "shuffle"
    """Order of an epoch: shuffled, or shuffled in batches of similar length, which saves
    padding."""
    packing: bool = False
    """Pack several samples into one row of `max_length` tokens, each attending only to itself,
    instead of padding. With weights, a record of a small source may then occur twice in a step."""
    pad_to_multiple_of: int | None = Field(default=None, ge=2)
    """Round the lengths of batches up to a multiple of it: few shapes for compiled layers."""
    balance_ranks: bool = False
    """Distribute the samples of a step to the ranks so that each has about the same number of
    tokens."""
    draws: int | None = Field(default=None, ge=1)
    """With weights: samples drawn per epoch. Default: the number of all records."""

    @field_validator("bad_records_limit")
    @classmethod
    def _fraction_or_count(cls, limit: float | None) -> float | None:
        if limit is not None and limit >= 1 and limit != int(limit):
            raise ValueError(
                f"expected a fraction below 1 or a whole number of records, found {limit:g}"
            )
        return limit

    @model_validator(mode="after")
    def _consistent(self) -> DataOptions:
        weighted = [source.path for source in self.train if source.weight is not None]
        if weighted and len(weighted) != len(self.train):
            missing = [source.path for source in self.train if source.weight is None]
            raise ValueError(
                f"train: weights are set for {weighted} but not for {missing}; set all or none"
            )
        if self.cache_features is not None and self.augment:
            raise ValueError(
                "cache_features: cached features cannot be augmented; leave out cache_features or "
                "augment"
            )
        if self.draws is not None and not weighted:
            raise ValueError(
                "draws: needs a weight for every source in train; without them an epoch is every "
                "record once"
            )
        if self.packing and self.max_length is None:
            raise ValueError("packing: needs max_length, the capacity of a row")
        if self.packing and self.order == "length":
            raise ValueError(
                "order: length saves padding, of which packing has none; use order: shuffle with "
                "packing"
            )
        return self
