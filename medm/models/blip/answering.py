"""What a model of studies gives for a batch of them: texts, scores of labels, vectors and matches.

Knows nothing of files of records, processes or training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from medm.errors import DataError
from medm.models.blip.answers import branch_or_unknown
from medm.models.blip.modeling import BEAMS, MedmBlip, StudyImages
from medm.models.blip.processing import MedmBlipProcessor
from medm.models.text_inputs import pad_texts
from medm.types import ANSWER_BRANCHES, AnswerItem, JsonObject, PredictionField

_TEXTS_PER_STUDY = 8
"""Texts that are matched at once, for each study of a batch."""


@dataclass(slots=True)
class StudyFiles:
    """B studies of several records, with N images."""

    pixels: dict[str, Tensor]
    """"image" to (N, C, height, width), the studies in order."""
    counts: list[int]
    """Images of each study."""
    questions: list[str | None]
    """Words before the text of each study; None for the model's own prompt."""
    answer_types: list[str | None]
    """Types of the questions, for models that are told them."""
    reports: list[str | None]
    candidates: list[tuple[str, ...]]
    """Of each study the ids of the reports that are matched with it."""


@dataclass(frozen=True, slots=True)
class StudyAnswer:
    """What a model gives for one study."""

    reply: str | None = None
    tokens: int = 0
    """Tokens of the reply, the end token included."""
    finished: bool = True
    """False for a reply that was cut at the longest length."""
    answer_type: str | None = None
    """Type of the question that the model took its answer for, where it chooses from lists."""
    answer_score: float | None = None
    """Sigmoid of the logit of the chosen answer."""
    scores: Mapping[str, float] | None = None
    """Logit of each label."""
    vector: Sequence[float] | None = None
    """Of the images, of length 1."""
    text_vectors: Sequence[Sequence[float]] | None = None
    """Of the report, where the record has one."""
    matches: Mapping[str, float] | None = None
    """By candidate the logit of a match."""

    def line(self) -> JsonObject:
        """Return its fields of the output line."""
        line: JsonObject = {}
        if self.reply is not None:
            line |= {"reply": self.reply, "tokens": self.tokens, "finished": self.finished}
        if self.answer_type is not None:
            line |= {"answer_type": self.answer_type, "answer_score": self.answer_score}
        if self.scores is not None:
            line["scores"] = dict(self.scores)
            line["probabilities"] = {
                name: round(float(torch.tensor(logit).sigmoid()), 4)
                for name, logit in self.scores.items()
            }
        if self.vector is not None:
            line["embedding"] = list(self.vector)
        if self.text_vectors is not None:
            line["text_embeddings"] = [list(vector) for vector in self.text_vectors]
        if self.matches is not None:
            line["matches"] = dict(self.matches)
        return line


class StudyAnswerer:
    """Answers to batches of studies.

    Args:
        model: on its device, in eval mode.
        processor: of the model.
        wanted: what is given of each study.
        batch_size: studies that are encoded at once.
        beams: texts that beam search keeps open.
        max_length: longest text in tokens, prompt and end included; default that of the training.
        min_length: tokens of a text below which it does not end.
        with_reports: also give the vectors of reports, with those of images.
        reports: by id the reports that candidates name.
    """

    def __init__(
        self,
        model: MedmBlip,
        processor: MedmBlipProcessor,
        wanted: frozenset[PredictionField],
        *,
        batch_size: int = 8,
        beams: int = BEAMS,
        max_length: int | None = None,
        min_length: int = 5,
        with_reports: bool = False,
        reports: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.processor, self.wanted = model, processor, wanted
        self.batch_size, self.beams = batch_size, beams
        self.max_length, self.min_length = max_length or processor.max_length, min_length
        self.with_reports, self._reports = with_reports, reports or {}
        self._encoded: dict[str, list[int]] = {}
        """Tokens of candidates that were matched before."""

    @torch.no_grad()
    def generate(self, batch: StudyFiles) -> list[StudyAnswer]:
        """Return what is asked for of each study, in order.

        Raises:
            DataError: a candidate that no record has a report of.
        """
        answers: list[StudyAnswer] = []
        ends = np.cumsum(batch.counts).tolist()
        for start in range(0, len(batch.counts), self.batch_size):
            stop = min(start + self.batch_size, len(batch.counts))
            first = ends[start] - batch.counts[start]
            pixels = batch.pixels["image"][first : ends[stop - 1]]
            counts = torch.tensor(batch.counts[start:stop], device=self.model.device)
            seen = self.model.encode_images(
                pixels.to(**self.model.image.encoder.device_and_dtype), counts
            )
            answers += self._answers(seen, batch, slice(start, stop))
        return answers

    @property
    def max_files(self) -> int:
        """Images of a study that are read, at most."""
        return self.processor.views

    def answer(self, items: Sequence[AnswerItem]) -> list[JsonObject]:
        """Return what is asked for of items of a benchmark, as fields of a line of predictions."""
        texts = [item.sample.extra.get("captions", ()) for item in items]
        pixels = np.stack([array for item in items for array in item.pixels])
        batch = StudyFiles(
            pixels={"image": torch.from_numpy(pixels)},
            counts=[len(item.pixels) for item in items],
            questions=[item.question for item in items],
            answer_types=[item.sample.extra.get("answer_type") for item in items],
            reports=[one[0] if one else None for one in texts],
            candidates=[() for _ in items],
        )
        return [answer.line() for answer in self.generate(batch)]

    def _answers(self, seen: StudyImages, batch: StudyFiles, rows: slice) -> list[StudyAnswer]:
        count = rows.stop - rows.start
        found: list[dict[str, Any]] = [{} for _ in range(count)]
        if "text" in self.wanted:
            # A model of classes and of texts chooses: that is what its questions were learned for.
            replies = (
                self._texts(seen, batch.questions[rows])
                if self.model.answers is None
                else self._classes(seen, batch.questions[rows], batch.answer_types[rows])
            )
            for answer, fields in zip(found, replies, strict=True):
                answer |= fields
        if "scores" in self.wanted:
            logits = self.model.label_scores(seen.label_vector).float().tolist()
            for answer, row in zip(found, logits, strict=True):
                answer["scores"] = dict(zip(self.processor.labels, row, strict=True))
        if "embeddings" in self.wanted:
            vectors = normalize(self.model.image_vectors(seen).float(), dim=-1).tolist()
            for answer, row in zip(found, vectors, strict=True):
                answer["vector"] = row
            if self.with_reports:
                texts = self._text_vectors(batch.reports[rows])
                for answer, of_text in zip(found, texts, strict=True):
                    answer["text_vectors"] = of_text
        if "matches" in self.wanted:
            for row, (answer, ids) in enumerate(zip(found, batch.candidates[rows], strict=True)):
                answer["matches"] = self._matches(seen, row, ids)
        return [StudyAnswer(**fields) for fields in found]

    def _texts(self, seen: StudyImages, questions: Sequence[str | None]) -> list[dict[str, Any]]:
        """Return reply, tokens and finished of each study: a report, or the answer to its
        question.
        """
        prompts = self.processor.encode_prompts(questions)
        ids = self.model.write(
            seen,
            prompts["input_ids"].to(self.model.device),
            prompts["attention_mask"].to(self.model.device),
            num_beams=self.beams,
            max_length=self.max_length,
            min_length=self.min_length,
        )
        found: list[dict[str, Any]] = []
        end = self.processor.tokenizer.sep_token_id
        given = prompts["attention_mask"].sum(dim=1).tolist()
        for length, row in zip(given, ids.tolist(), strict=True):
            text = row[length:]
            finished = end in text
            words = text[: text.index(end)] if finished else text
            fields = {"reply": self.processor.decode(words), "tokens": len(words) + finished}
            found.append({**fields, "finished": finished})
        return found

    def _classes(
        self, seen: StudyImages, questions: Sequence[str | None], types: Sequence[str | None]
    ) -> list[dict[str, Any]]:
        """Return reply, type and score of each question: one of the answers that the model knows.

        Raises:
            DataError: a study without a question.
            RecipeError: an unknown type where the model is told it.
        """
        if any(question is None for question in questions):
            raise DataError(
                "the model chooses answers to questions; expected a question", field="question"
            )
        asked = self.processor.encode_text([str(question) for question in questions])
        answers = self.model.choose_answers(
            seen,
            asked["input_ids"].to(self.model.device),
            asked["attention_mask"].to(self.model.device),
            torch.tensor([branch_or_unknown(one) for one in types], device=self.model.device),
        )
        chosen = zip(
            self.processor.decode_answers(answers),
            answers.branches.tolist(),
            answers.scores.tolist(),
            strict=True,
        )
        return [
            {"reply": reply, "answer_type": ANSWER_BRANCHES[branch], "answer_score": score}
            for reply, branch, score in chosen
        ]

    def _text_vectors(self, reports: Sequence[str | None]) -> list[list[list[float]]]:
        """Return the vector of each study's report, none where it has none."""
        given = [report for report in reports if report is not None]
        if not given:
            return [[] for _ in reports]
        encoded = self.processor.encode_text(given)
        vectors = self.model.get_text_features(
            *(encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        )
        rows = iter(normalize(vectors.float(), dim=-1).tolist())
        return [[] if report is None else [next(rows)] for report in reports]

    def _matches(self, seen: StudyImages, row: int, ids: Sequence[str]) -> dict[str, float]:
        """Return the logit of a match of one study with each candidate."""
        size = self.batch_size * _TEXTS_PER_STUDY
        found: dict[str, float] = {}
        for start in range(0, len(ids), size):
            some = ids[start : start + size]
            encoded = pad_texts([self._candidate(one) for one in some], self.processor.pad_id)
            logits = self.model.match(
                seen.rows([row] * len(some)),
                encoded["input_ids"].to(self.model.device),
                encoded["attention_mask"].to(self.model.device),
            )
            found |= dict(zip(some, logits[:, 1].float().tolist(), strict=True))
        return found

    def _candidate(self, name: str) -> list[int]:
        if name not in self._encoded:
            report = self._reports.get(name)
            if report is None:
                raise DataError(
                    f"candidate {name!r}: no record of the file has this id and a report; "
                    "candidates are ids of records of the same file",
                    field="candidates",
                )
            self._encoded[name] = self.processor.encode_target(report, "").input_ids
        return self._encoded[name]
