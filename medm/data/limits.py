"""What makes an encoded example unusable (nothing to learn, too many tokens), and how many bad records are too many.

The check and training share it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from medm.errors import DataError
from medm.types import IGNORE_INDEX, Example


class TooLongError(DataError):
    """A record is longer than `max_length`, and the policy for long ones is to stop."""


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """The longest example, and what happens to a longer one."""

    max_length: int | None = None
    """In tokens, vision tokens included; None for no limit."""
    too_long: Literal["error", "truncate_text", "skip"] = "error"
    """Stop; cut text at the end, but never a placeholder or the last label; or leave the record out."""
    placeholder_ids: Collection[int] = frozenset()
    """Token ids that stand for vision tokens."""

    def apply(self, example: Example) -> Example | None:
        """The example itself, or shortened; None where it is to be left out.

        Raises:
            TooLongError: it is too long and the policy is "error".
            DataError: it cannot be shortened.
        """
        length = len(example.input_ids)
        if self.max_length is None or length <= self.max_length:
            return example
        if self.too_long == "skip":
            return None
        if self.too_long == "truncate_text":
            return truncate_text(example, self.max_length, self.placeholder_ids)
        raise TooLongError(
            f"{length} tokens, vision tokens included, but data.max_length is {self.max_length}; raise it, or set "
            "data.too_long to truncate_text or skip"
        )


@dataclass(frozen=True, slots=True)
class BadRecordsLimit:
    """The number of bad records of a source of data above which a run stops, though bad records are skipped."""

    setting: float | None
    """`data.bad_records_limit`: a fraction of the records below 1, else a count; None for no limit."""
    records: int
    """Records in all."""
    before: int = 0
    """Bad records that were found before, by a check; those found since come on top."""

    def exceeded(self, bad: int) -> bool:
        """Whether so many further bad records are too many."""
        if self.setting is None:
            return False
        most = self.setting * self.records if self.setting < 1 else self.setting
        return self.before + bad > most

    def error(self, bad: int, example: str, *, what: str = "training") -> DataError:
        """Return the error that says so.

        Args:
            bad: further bad records.
            example: one of them, with its place.
            what: name of the data.
        """
        total = self.before + bad
        return DataError(
            f"{total} of {self.records} {what} records are bad ({total / max(self.records, 1):.1%}), more than "
            f"data.bad_records_limit = {self.setting:g}; for example {example}. Fix them, or raise the limit"
        )


def truncate_text(example: Example, max_length: int, placeholder_ids: Collection[int]) -> Example:
    """The first `max_length` tokens. Raises `DataError` where that would cut a placeholder or leave no label."""
    length = len(example.input_ids)
    cut = sum(token in placeholder_ids for token in example.input_ids[max_length:])
    if cut:
        raise DataError(
            f"{length} tokens cannot be cut to data.max_length = {max_length}: {cut} vision tokens stand beyond it, "
            "and images are never cut; raise max_length, or shorten the text before the image"
        )
    labels = example.labels[:max_length]
    if not has_label(labels) and has_label(example.labels):
        raise DataError(
            f"{length} tokens cut to data.max_length = {max_length} leave nothing of the reply to learn; raise it, or "
            "shorten the question"
        )
    return replace(example, input_ids=example.input_ids[:max_length], labels=labels)


def has_label(labels: list[int]) -> bool:
    """Whether any position is learned."""
    return any(label != IGNORE_INDEX for label in labels)


def require_label(example: Example) -> None:
    """Raises `DataError` where a training example teaches nothing."""
    if not has_label(example.labels):
        raise DataError("no token of this record is learned: the replies are empty once they are encoded")
