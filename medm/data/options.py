"""What a recipe says about data. Torch-free; files are opened elsewhere."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from medm.config import Options, ResumeSafe
from medm.imaging.options import Augment


class SourceOptions(Options):
    """One annotation file."""

    path: str
    """A JSON array or JSONL file of records."""
    root: str | None = None
    """Folder that image and volume paths are relative to; nothing outside it is read. Default: the folder of `path`."""
    weight: float | None = Field(default=None, gt=0)
    """How often this source is drawn, relative to the others. Set for every source or for none; with none, every
    record is seen once an epoch."""
    task: str | None = None
    """Task of records that name none."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N records."""


class CacheOptions(Options):
    """Prepared volumes on disk: read and resampled once, then mapped into memory.

    Any number of runs may share a folder; an entry is found by the content of its file and by the preprocessing.
    """

    dir: str
    """Folder of the entries."""
    max_gb: float = Field(default=100.0, gt=0)
    """Most gigabytes (1e9 bytes) of entries; files beyond it are prepared anew each time. A volume of 32 x 256 x 256
    takes 8.4 MB."""
    branches: list[Literal["image", "volume"]] = Field(default=["volume"], min_length=1)
    """What is kept. A 2-D image is mostly faster to decode than its prepared numbers, a volume never is."""


class DataOptions(Options):
    """The `data` section of a recipe."""

    train: list[SourceOptions] = []
    """What is trained on."""
    eval: list[SourceOptions] = []
    """Held-out data for the loss during training."""
    max_length: int | None = Field(default=2048, ge=1)
    """Longest sample in tokens, vision tokens included; null for no limit."""
    too_long: Literal["error", "truncate_text", "skip"] = "error"
    """What happens to a longer one: stop; cut text at the end (never an image); or leave it out and count it."""
    bad_records: Literal["stop", "skip"] = "stop"
    """What happens to a record that cannot be used: stop, or leave it out, count it and report it."""
    bad_records_limit: ResumeSafe[float | None] = Field(default=0.1, ge=0)
    """With `skip`: stop all the same when more records than this are bad. A number below 1 is a fraction of the
    records, any other a count; each record counts once a run; null for no limit."""
    augment: dict[str, Augment] | None = None
    """Random changes by branch, in training only."""
    cache_features: str | None = None
    """Folder in which the outputs of frozen encoders are kept, so that an encoder runs once a file and not once an
    epoch. The folder may serve any number of runs; delete it when it is no longer needed."""
    cache: ResumeSafe[CacheOptions | None] = None
    """Keep prepared volumes on disk; null prepares them anew each time. `medm data cache` fills it before training."""
    order: Literal["shuffle", "length"] = "shuffle"
    """Order of an epoch: shuffled, or shuffled in batches of similar length, which saves padding."""
    packing: bool = False
    """Put several samples in one row of `max_length` tokens, each attending to itself alone, instead of padding. With
    weights, a record of a small source may then come twice in a step."""
    pad_to_multiple_of: int | None = Field(default=None, ge=2)
    """Lengths of batches are rounded up to it: few shapes for compiled layers."""
    balance_ranks: bool = False
    """Distribute the samples of a step to the ranks so that each has about the same number of tokens."""
    draws: int | None = Field(default=None, ge=1)
    """With weights: samples drawn an epoch. Default: as many as all sources hold together."""

    @field_validator("bad_records_limit")
    @classmethod
    def _fraction_or_count(cls, limit: float | None) -> float | None:
        if limit is not None and limit >= 1 and limit != int(limit):
            raise ValueError(f"expected a fraction below 1 or a whole number of records, found {limit:g}")
        return limit

    @model_validator(mode="after")
    def _consistent(self) -> DataOptions:
        weighted = [source.path for source in self.train if source.weight is not None]
        if weighted and len(weighted) != len(self.train):
            missing = [source.path for source in self.train if source.weight is None]
            raise ValueError(f"train: weights are set for {weighted} but not for {missing}; set all or none")
        if self.cache_features is not None and self.augment:
            raise ValueError("cache_features: what is kept cannot be augmented; leave out cache_features or augment")
        if self.draws is not None and not weighted:
            raise ValueError(
                "draws: needs a weight for every source in train; without them an epoch is every record once"
            )
        if self.packing and self.max_length is None:
            raise ValueError("packing: needs max_length, the capacity of a row")
        if self.packing and self.order == "length":
            raise ValueError("order: length saves padding, of which packing has none; use order: shuffle with packing")
        return self
