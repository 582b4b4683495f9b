"""What makes an encoded example unusable: nothing to learn, or too many tokens. The check and training share it."""

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
