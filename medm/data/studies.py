"""The data pipeline of studies: one or more images, a report, findings and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypedDict

from medm.data.answers import AnswerTarget, answer_target
from medm.data.base import Collate, Pipeline, Segment
from medm.data.captions import same_label
from medm.errors import DataError
from medm.types import (
    ANSWER_BRANCHES,
    IGNORE_INDEX,
    BaseSample,
    EncodedText,
    Media,
    Processor,
    Triplet,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from medm.data.options import DataOptions

_TEXTS = ("report", "question", "answer")
_NAMES = ("id", "task", "question_type", "answer_type")
_OWN_FIELDS = {*_TEXTS, *_NAMES, "image", "images", "labels", "triplets", "answer_scores"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Study(BaseSample):
    """One record, checked."""

    images: tuple[Media, ...]
    """Images of the study, one or more."""
    report: str | None = None
    labels: Mapping[str, int | None] | tuple[int | None, ...] | tuple[str, ...] | None = None
    """Findings by name, 1 present, 0 absent, None unknown; or such numbers in the order of the
    model's labels; or the names of those that are present, all others being absent."""
    triplets: tuple[Triplet, ...] = ()
    """Statements that were extracted from the report."""
    question: str | None = None
    answer: str | None = None
    """Reference answer of the question."""
    answer_scores: Mapping[str, float] | None = None
    """Right answers and their scores in (0, 1], where there are several; `answer` is one of them or
    the best one."""
    question_type: str | None = None
    answer_type: str | None = None

    @property
    def media(self) -> tuple[Media, ...]:
        return self.images

    @property
    def text(self) -> str | None:
        """The text that is learned: the answer of a question, or the report."""
        return self.report if self.question is None else self.answer


class StudyProcessor(Processor, Protocol):
    """Processor of a kind of model whose records are studies."""

    tokenizer: PreTrainedTokenizerBase
    labels: Sequence[str]
    """Names of the findings that the model knows; may be empty."""
    views: int
    """Images of a study that the model looks at, at most."""
    reads_text: bool
    """Whether the model learns from the texts of studies."""

    @property
    def pad_id(self) -> int:
        """Id that fills up short rows."""
        ...

    answers: Mapping[str, Sequence[str]]
    """By type of question (`ANSWER_BRANCHES`) the answers that the model chooses from; empty where
    it chooses none."""

    def encode_target(self, text: str, prompt: str | None = None) -> EncodedText:
        """Return a text that is learned.

        Args:
            text: a report or an answer.
            prompt: words before it that are given, as a question; None for the model's own prompt.
        """
        ...

    def encode_knowledge(self, triplets: Sequence[Triplet]) -> list[int]:
        """Return the tokens of a study's triplets, none where the model stores none."""
        ...


@dataclass(slots=True)
class StudyExample:
    """A study as the model takes it, before batching; a `MediaExample`."""

    input_ids: list[int]
    """Empty where the model reads no text, or in inference."""
    labels: list[int]
    """Same length; `IGNORE_INDEX` wherever nothing is learned."""
    label_targets: list[float]
    """One for each finding of the model, nan where it is unknown."""
    knowledge_ids: list[int]
    owner: int
    """Number of 63 bits that studies with equal texts share."""
    pixels: dict[str, list[np.ndarray]]
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    task_id: int = 0
    question_ids: list[int] = field(default_factory=list)
    """Empty where the model chooses no answers."""
    answer_branch: int = IGNORE_INDEX
    answer_targets: list[float] = field(default_factory=list)
    """See `medm.data.answers.AnswerTarget`."""


class StudyBatch(TypedDict, total=False):
    """A batch of B studies with N images. A batch without studies has no rows and no `pixels`."""

    pixels: dict[str, Tensor]
    """By view (N, C, *spatial) float32, the images of all studies in order."""
    features: dict[str, Tensor]
    """By branch (N, prefix + prod(grid), D), in place of the branch's pixels."""
    image_counts: Tensor
    """(B,) int64, images of each study."""
    input_ids: Tensor
    """(B, T) int64, padded on the right. Absent where the model reads no text."""
    attention_mask: Tensor
    """(B, T) int64, 0 at padding."""
    labels: Tensor
    """(B, T) int64, `IGNORE_INDEX` wherever nothing is learned."""
    label_targets: Tensor
    """(B, L) float32, 1 present, 0 absent, nan unknown. Absent for a model without findings."""
    knowledge_ids: Tensor
    """(B, K) int64, tokens of the triplets. Absent where no study of the batch has any."""
    knowledge_mask: Tensor
    """(B, K) int64, 0 at padding."""
    question_ids: Tensor
    """(B, Q) int64, the questions. Absent, as the next three, where the model chooses no answers.
    """
    question_mask: Tensor
    """(B, Q) int64, 0 at padding."""
    answer_branches: Tensor
    """(B,) int64, place of the type in `ANSWER_BRANCHES`, `IGNORE_INDEX` where it is unknown."""
    answer_targets: Tensor
    """(B, closed and open answers) float32, score of each answer of the lists in turn. Absent in
    inference."""
    owners: Tensor
    """(B,) int64: equal where the texts of two studies are equal, on any rank and in any batch."""


class Studies(Pipeline[Study, StudyExample, StudyProcessor]):
    """Studies with images, a report or a question, and findings; each is one row of a batch."""

    nouns: ClassVar[tuple[str, ...]] = ("report", "question", "label", "triplet")

    def read(self, record: object, *, file: Path, index: int) -> Study:
        if not isinstance(record, dict):
            raise DataError(
                f"expected an object with 'images' and a report, found {type(record).__name__}"
            )
        names = {name: _text(record, name) for name in (*_TEXTS, *_NAMES)}
        scores = _answer_scores(record.get("answer_scores"))
        if scores and names["answer"] is None:
            names["answer"] = max(scores, key=scores.__getitem__)
        study = Study(
            images=_images(record),
            report=names["report"],
            labels=_labels(record.get("labels")),
            triplets=_triplets(record.get("triplets")),
            question=names["question"],
            answer=names["answer"],
            answer_scores=scores,
            question_type=names["question_type"],
            answer_type=names["answer_type"],
            id=names["id"],
            task=names["task"],
            file=str(file),
            index=index,
            extra={key: value for key, value in record.items() if key not in _OWN_FIELDS},
        )
        if study.answer is not None and study.question is None:
            raise DataError("an answer without a question; give both", field="answer")
        if not self.inference and study.question is not None and study.answer is None:
            raise DataError("a question without an answer; give both", field="question")
        if not self.inference and study.text is None and study.labels is None:
            raise DataError(
                "nothing to learn: expected 'report', 'labels', or 'question' and 'answer'; the "
                f"record has {', '.join(map(str, record))}"
            )
        return study

    def draw(self, sample: Study, rng: np.random.Generator) -> Study:
        """Choose the images that are looked at, in their order: anew each epoch, and in inference
        the first ones.
        """
        if self._processor is None:
            return sample
        count = self.processor.views
        if len(sample.images) <= count:
            return sample
        if self.inference:
            return replace(sample, images=sample.images[:count])
        chosen = sorted(rng.choice(len(sample.images), count, replace=False).tolist())
        return replace(sample, images=tuple(sample.images[place] for place in chosen))

    def media_field(self, record: object, number: int) -> str:
        if isinstance(record, dict) and isinstance(record.get("images"), list):
            return f"images.{number}"
        return "image" if isinstance(record, dict) and "image" in record else "images"

    def counts(self, sample: Study) -> Mapping[str, int]:
        unlisted = {}
        learns = self.makes_examples and self.processor.answers and not self.inference
        if learns and sample.answer is not None:
            unlisted["unlisted answer"] = int(not self._answer_target(sample).listed)
        return unlisted | {
            "report": int(sample.report is not None),
            "question": int(sample.question is not None),
            "label": len(sample.labels or ()),
            "triplet": len(sample.triplets),
        }

    def make_example(self, sample: Study, pixels: Mapping[str, list[np.ndarray]]) -> StudyExample:
        processor, text = self.processor, sample.text
        asked, target = list[int](), AnswerTarget(IGNORE_INDEX, [], False)
        if processor.answers:
            asked = processor.encode_target(sample.question or "", "").input_ids
            if not self.inference:
                target = self._answer_target(sample)
        encoded = EncodedText([], [])
        if processor.reads_text and not self.inference and text is not None:
            encoded = processor.encode_target(text, sample.question)
        return StudyExample(
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            label_targets=_targets(None if self.inference else sample.labels, processor.labels),
            knowledge_ids=processor.encode_knowledge(sample.triplets),
            owner=same_label(
                f"{sample.question or ''}\0{text or sample.id or ''}", None, source=""
            ),
            # A check reads every image; the model looks at the first ones where none are drawn.
            pixels={view: items[: processor.views] for view, items in pixels.items()},
            question_ids=asked,
            answer_branch=target.branch,
            answer_targets=target.scores,
        )

    def _answer_target(self, sample: Study) -> AnswerTarget:
        """Return what the question of a record teaches. Raises `DataError` for its type."""
        known = {} if sample.answer is None else {sample.answer: 1.0}
        asked = sample.answer_type if sample.question is not None else None
        return answer_target(sample.answer_scores or known, asked, self.processor.answers)

    def require_usable(self, example: StudyExample) -> None:
        if self.inference:
            return
        if self.processor.reads_text and all(label == IGNORE_INDEX for label in example.labels):
            raise DataError(
                "the model learns from texts, and this record has none that is learned; expected "
                "a report, or a question and its answer that fit model.text.max_length"
            )
        if self.processor.reads_text:
            return
        if self.processor.answers and example.answer_branch == IGNORE_INDEX:
            raise DataError(
                "the model learns the answers of closed and open questions; expected question, "
                "answer and answer_type, closed or open",
                field="answer_type",
            )
        if not self.processor.answers and all(target != target for target in example.label_targets):
            raise DataError(
                "no finding is known; the model learns "
                f"{', '.join(self.processor.labels) or 'none'}",
                field="labels",
            )

    def length(self, example: StudyExample) -> int:
        return max(len(example.input_ids), len(example.question_ids), 1)

    def preview(self, example: StudyExample) -> list[Segment]:
        segments: list[Segment] = []
        decode = self.processor.tokenizer.decode
        given = [
            token
            for token, label in zip(example.input_ids, example.labels, strict=True)
            if label == IGNORE_INDEX
        ]
        learned = example.input_ids[len(given) :]
        if given:
            segments.append(Segment(str(decode(given)), learned=False))
        if learned:
            segments.append(Segment(str(decode(learned)), learned=True))
        words = {1.0: "present", 0.0: "absent"}
        known = [
            f"{name}: {words[target]}"
            for name, target in zip(self.processor.labels, example.label_targets, strict=True)
            if target in words
        ]
        if known:
            segments.append(Segment(f"\n{'; '.join(known)}", learned=True))
        if example.answer_branch != IGNORE_INDEX:
            name = ANSWER_BRANCHES[example.answer_branch]
            listed = [one for branch in ANSWER_BRANCHES for one in self.processor.answers[branch]]
            right = [
                f"{answer} ({score:g})"
                for answer, score in zip(listed, example.answer_targets, strict=True)
                if score
            ]
            start = "\n" if segments else ""
            segments.append(Segment(f"{start}{decode(example.question_ids)}", learned=False))
            segments.append(
                Segment(f"\n{name}: {', '.join(right) or 'none of the list'}", learned=True)
            )
        return segments

    def training_collator(
        self, options: DataOptions, *, padding_free: bool = False
    ) -> Collate[StudyExample]:
        return replace(self._collator(), pad_to_multiple_of=options.pad_to_multiple_of)

    def eval_collator(self) -> Collate[StudyExample]:
        return self._collator()

    def _collator(self) -> StudyCollator:
        processor = self.processor
        answers = sum(map(len, processor.answers.values()))
        return StudyCollator(processor.pad_id, len(processor.labels), num_answers=answers)


@dataclass(frozen=True, slots=True)
class StudyCollator:
    """Pads texts to the longest of them, and stacks the images of all studies.

    Records that were left out come as None and make the batch smaller; where none is left, it has
    no rows.
    """

    pad_id: int
    num_labels: int = 0
    """Findings of the model."""
    pad_to_multiple_of: int | None = None
    """Lengths are rounded up to it."""
    num_answers: int = 0
    """Answers of all lists of the model."""

    def __call__(self, examples: Sequence[StudyExample | None]) -> StudyBatch:
        """Return a batch of one row a study."""
        import torch

        from medm.data.collator import padded, round_up, stack_media

        kept = [example for example in examples if example is not None]
        media = stack_media(kept)
        counts = [len((item.pixels or item.features).get("image", ())) for item in kept]
        batch = StudyBatch(
            image_counts=torch.tensor(counts, dtype=torch.int64),
            owners=torch.tensor([example.owner for example in kept], dtype=torch.int64),
        )
        if all(example.input_ids for example in kept):
            rows = [example.input_ids for example in kept]
            width = round_up(max(map(len, rows), default=2), self.pad_to_multiple_of)
            batch["input_ids"] = padded(rows, width, self.pad_id, side="right")
            batch["attention_mask"] = padded(
                [[1] * len(row) for row in rows], width, 0, side="right"
            )
            batch["labels"] = padded(
                [example.labels for example in kept], width, IGNORE_INDEX, side="right"
            )
        if self.num_labels:
            targets = [example.label_targets for example in kept]
            batch["label_targets"] = torch.tensor(targets, dtype=torch.float32).reshape(
                len(kept), self.num_labels
            )
        if self.num_answers:
            asked = [example.question_ids for example in kept]
            width = round_up(max(map(len, asked), default=2), self.pad_to_multiple_of)
            batch["question_ids"] = padded(asked, width, self.pad_id, side="right")
            batch["question_mask"] = padded(
                [[1] * len(row) for row in asked], width, 0, side="right"
            )
            branches = [example.answer_branch for example in kept]
            batch["answer_branches"] = torch.tensor(branches, dtype=torch.int64)
        if self.num_answers and all(example.answer_targets for example in kept):
            right = [example.answer_targets for example in kept]
            batch["answer_targets"] = torch.tensor(right, dtype=torch.float32).reshape(
                len(kept), self.num_answers
            )
        if any(example.knowledge_ids for example in kept):
            known = [example.knowledge_ids for example in kept]
            width = round_up(max(map(len, known)), self.pad_to_multiple_of)
            batch["knowledge_ids"] = padded(known, width, self.pad_id, side="right")
            batch["knowledge_mask"] = padded(
                [[1] * len(row) for row in known], width, 0, side="right"
            )
        if "pixels" in media:
            batch["pixels"] = media["pixels"]
        if "features" in media:
            batch["features"] = media["features"]
        return batch


def _images(record: Mapping[str, Any]) -> tuple[Media, ...]:
    """Return the images of a record, one or more. Raises `DataError`."""
    named = [name for name in ("image", "images") if record.get(name) is not None]
    if len(named) != 1:
        raise DataError(
            f"expected 'images', a list of paths, found {' and '.join(named) or 'none'}; the "
            f"record has {', '.join(map(str, record)) or 'no fields'}"
        )
    (name,) = named
    value = record[name]
    paths = value if isinstance(value, list) else [value]
    if not paths:
        raise DataError("expected at least one path, found an empty list", field=name)
    for place, path in enumerate(paths):
        if not isinstance(path, str) or not path.strip():
            where = f"{name}.{place}" if paths is value else name
            raise DataError(f"expected a path as text, found {_found(path)}", field=where)
    return tuple(Media("image", path) for path in paths)


def _text(record: Mapping[str, Any], name: str) -> str | None:
    """Return a text that a record may have, without spaces around it. Raises `DataError`."""
    value = record.get(name)
    if name == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"expected text, found {_found(value)}", field=name)
    return value.strip()


def _answer_scores(value: object) -> Mapping[str, float] | None:
    """Return the right answers of a record and their scores. Raises `DataError`."""
    if value is None:
        return None
    if not isinstance(value, dict) or not value or not all(map(str.strip, value)):
        raise DataError(
            f"expected an object of answers and their scores, found {_found(value)}",
            field="answer_scores",
        )
    for answer, score in value.items():
        if not isinstance(score, (int, float)) or isinstance(score, bool) or not 0 < score <= 1:
            raise DataError(
                f"expected a score above 0 and at most 1, found {score!r:.20}",
                field=f"answer_scores.{answer}",
            )
    return {answer.strip(): float(score) for answer, score in value.items()}


def _labels(
    value: object,
) -> Mapping[str, int | None] | tuple[int | None, ...] | tuple[str, ...] | None:
    """Return the findings of a record. Raises `DataError`."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {str(name): _state(state, f"labels.{name}") for name, state in value.items()}
    if not isinstance(value, list):
        raise DataError(
            f"expected an object of names and 0, 1 or null, or a list, found {_found(value)}",
            field="labels",
        )
    if value and all(isinstance(name, str) and name.strip() for name in value):
        return tuple(name.strip() for name in value)
    return tuple(_state(state, f"labels.{place}") for place, state in enumerate(value))


def _state(value: object, place: str) -> int | None:
    """Return 1, 0 or None (unknown). Raises `DataError`."""
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value in (0, 1):
        return int(value)
    raise DataError(
        f"expected 1 (present), 0 (absent) or null (unknown), found {value!r:.20}", field=place
    )


def _triplets(value: object) -> tuple[Triplet, ...]:
    """Return the triplets of a record. Raises `DataError`."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"expected a list of triplets, found {_found(value)}", field="triplets")
    triplets: list[Triplet] = []
    for place, item in enumerate(value):
        if (
            not isinstance(item, list)
            or len(item) != 3
            or not all(isinstance(part, str) and part.strip() for part in item)
        ):
            raise DataError(
                "expected three texts, [subject, relation, object]", field=f"triplets.{place}"
            )
        subject, relation, target = (part.strip() for part in item)
        triplets.append((subject, relation, target))
    return tuple(triplets)


def _targets(
    labels: Mapping[str, int | None] | tuple[int | None, ...] | tuple[str, ...] | None,
    names: Sequence[str],
) -> list[float]:
    """Return one target for each finding of the model, nan where it is unknown.

    Raises:
        DataError: numbers without names, of another count; or a name in a list of those that are
            present which the model does not know.
    """
    if labels is None:
        return [float("nan")] * len(names)
    if not names:
        return []
    states: Mapping[str, int | None]
    if isinstance(labels, Mapping):
        states = labels
    elif any(isinstance(label, str) for label in labels):
        if unknown := [label for label in labels if label not in names]:
            raise DataError(
                f"{unknown[0]!r} is none of the model's labels: {', '.join(names)}", field="labels"
            )
        states = {name: int(name in labels) for name in names}
    elif len(labels) == len(names):
        states = {
            name: None if state is None else int(state)
            for name, state in zip(names, labels, strict=True)
        }
    else:
        raise DataError(
            f"{len(labels)} labels without names, and the model has {len(names)}: "
            f"{', '.join(names)}",
            field="labels",
        )
    return [float("nan") if (state := states.get(name)) is None else float(state) for name in names]


def _found(value: object) -> str:
    if isinstance(value, str):
        return "blank text" if value else "empty text"
    return "nothing" if value is None else type(value).__name__
