"""A row of any source, and the record that it becomes for a data pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from medm.data.pipelines import PIPELINES
from medm.data.writing import record_of
from medm.errors import DataError, RecipeError
from medm.types import KIND_OF_PLACEHOLDER, JsonObject, Kind, Media, Sample, Turn, TurnPart

Form: TypeAlias = Literal["conversations", "pairs", "studies"]
"""Data pipeline that the records are for."""

DEFAULT_PROMPTS: Mapping[Kind, str] = {
    "image": "Describe what this medical image shows.",
    "volume": "Describe the findings of this scan.",
}
_CLASSES = "{classes}"
"""Text of a prompt in whose place the names of all classes are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Files and texts of one record, before it has the form of a pipeline."""

    media: Sequence[Media]
    text: str | None = None
    """What is learned: a report, an answer, a caption. None asks a question without a reply."""
    question: str | None = None
    """In place of a prompt of the pool."""
    labels: Mapping[str, int | None] | None = None
    """Findings by name, for studies."""
    label: str | None = None
    """Class, for pairs."""
    id: str | None = None
    extra: JsonObject = field(default_factory=dict)
    """Further fields of the record, such as `patient`."""


class PromptPool:
    """The questions that are asked where a row has none.

    Args:
        prompts: at least one; None for one that suits the file.
        seed: draws one for each row, the same for the same row; without it the first is taken.
        classes: names that stand in place of `{classes}`.
    """

    def __init__(
        self,
        prompts: Sequence[str] | None = None,
        *,
        seed: int | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        if prompts is not None and not (prompts and all(prompt.strip() for prompt in prompts)):
            raise RecipeError("the pool of prompts is empty, or a prompt of it is; write one")
        if any(name in prompt for prompt in prompts or () for name in KIND_OF_PLACEHOLDER):
            raise RecipeError("a prompt holds a placeholder; files stand before it by themselves")
        self._prompts, self._seed, self._classes = prompts, seed, ", ".join(classes)

    def pick(self, index: int, kind: Kind) -> str:
        """Return the prompt of row `index`, about a file of a kind."""
        pool = self._prompts if self._prompts is not None else (DEFAULT_PROMPTS[kind],)
        place = 0
        if self._seed is not None:
            place = int(np.random.default_rng([self._seed, index]).integers(len(pool)))
        return pool[place].strip().replace(_CLASSES, self._classes)


def read_prompts(given: Sequence[str], file: Path | None) -> list[str] | None:
    """Return prompts from the command line and a file of one prompt a line; None for none.

    Raises:
        RecipeError: the file cannot be read, or holds none.
    """
    prompts = list(given)
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file}: cannot be read as UTF-8 text ({error})") from None
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
        if not prompts:
            raise RecipeError(f"{file}: holds no prompt; expected one a line")
    return prompts or None


class RecordMaker:
    """Makes the records of one form, each as its pipeline reads it.

    Args:
        form: the pipeline.
        prompts: of conversations.
    """

    def __init__(self, form: Form, prompts: PromptPool) -> None:
        self.form, self._prompts = form, prompts
        self._readers = {
            inference: PIPELINES.get(form)(inference=inference) for inference in (False, True)
        }

    def make(self, row: Row, *, file: Path, index: int) -> JsonObject:
        """Return the record of a row.

        Args:
            row: its media are not empty.
            file: source of the row, for messages.
            index: of the row in it, which draws the prompt.

        Raises:
            DataError: the form holds no such row, or the pipeline refuses it.
        """
        makers = {"conversations": self._conversation, "pairs": _pair, "studies": _study}
        try:
            made = makers[self.form](row, index)
        except DataError as error:
            raise error.at(file=file, index=index) from None
        self._readers[row.text is None].read(made, file=file, index=index)
        return made

    def _conversation(self, row: Row, index: int) -> JsonObject:
        if row.labels is not None:
            raise DataError(
                "findings beside a conversation are not learned; write the answer as text, or "
                "choose the form studies"
            )
        question = row.question
        if question is None:
            question = self._prompts.pick(index, _kind(row.media[-1]))
        content: list[TurnPart] = []
        for media in row.media:
            content += [media, "\n"]
        sample = Sample(
            turns=(Turn("user", (*content, question)),),
            id=row.id,
            answer=row.text,
            extra=dict(row.extra),
        )
        return record_of(sample)


def _kind(media: Media) -> Kind:
    return "volume" if media.branch == "volume" else "image"


def _named(row: Row) -> JsonObject:
    return {} if row.id is None else {"id": row.id}


def _pair(row: Row, _index: int) -> JsonObject:
    if len(row.media) != 1:
        raise DataError(f"a pair has one file, found {len(row.media)}; choose conversations")
    if row.text is None:
        raise DataError("a pair needs a text: a caption or a report")
    if row.question is not None or row.labels is not None:
        raise DataError("a pair has no question and one label at most; choose another form")
    (media,) = row.media
    record = {**_named(row), media.branch: media.path, "caption": row.text}
    return record | ({} if row.label is None else {"label": row.label}) | dict(row.extra)


def _study(row: Row, _index: int) -> JsonObject:
    if any(media.branch != "image" for media in row.media):
        raise DataError("a study holds images, found a volume; choose conversations or pairs")
    record: JsonObject = {**_named(row), "images": [media.path for media in row.media]}
    if row.question is not None:
        record["question"] = row.question
    if row.text is not None:
        record["report" if row.question is None else "answer"] = row.text
    if row.labels is not None:
        record["labels"] = dict(row.labels)
    return record | dict(row.extra)
