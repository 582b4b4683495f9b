"""Limits of the length of an example and of the number of bad records, for check and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from medm.data.base import E, Pipeline
from medm.errors import DataError


class TooLongError(DataError):
    """A record is longer than `max_length`, and the policy for long ones is to stop."""


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """Maximum length of an example, and the policy for longer ones."""

    max_length: int | None = None
    """As the pipeline measures it (`Pipeline.length`); None for no limit."""
    too_long: Literal["error", "truncate_text", "skip"] = "error"
    """Stop; shorten it (`Pipeline.shorten`); or leave the record out."""

    def apply(self, example: E, pipeline: Pipeline[Any, E, Any]) -> E | None:
        """Return the example itself, or shortened; None if it is to be left out.

        Raises:
            TooLongError: it is too long and the policy is "error".
            DataError: it cannot be shortened.
        """
        length = pipeline.length(example)
        if self.max_length is None or length <= self.max_length:
            return example
        if self.too_long == "skip":
            return None
        if self.too_long == "truncate_text":
            return pipeline.shorten(example, self.max_length)
        raise TooLongError(
            f"{length} {pipeline.unit}, but data.max_length is {self.max_length}; raise it, or set "
            "data.too_long to truncate_text or skip"
        )


@dataclass(frozen=True, slots=True)
class BadRecordsLimit:
    """The number of bad records in a data source above which a run stops.

    It applies where bad records are skipped.
    """

    setting: float | None
    """`data.bad_records_limit`: a fraction of the records below 1, else a count; None for no
    limit."""
    records: int
    """Records in all."""
    before: int = 0
    """Bad records that were found before, by a check; those found since are added."""

    def exceeded(self, bad: int) -> bool:
        """Return whether `bad` further bad records exceed the limit."""
        if self.setting is None:
            return False
        most = self.setting * self.records if self.setting < 1 else self.setting
        return self.before + bad > most

    def error(self, bad: int, example: str, *, what: str = "training") -> DataError:
        """Return the error of too many bad records.

        Args:
            bad: further bad records.
            example: one of them, with its place.
            what: name of the data.
        """
        total = self.before + bad
        return DataError(
            f"{total} of {self.records} {what} records are bad "
            f"({total / max(self.records, 1):.1%}), more than data.bad_records_limit = "
            f"{self.setting:g}; for example {example}. Fix them, or raise the limit"
        )
