"""A saved model of studies over batches of records: texts, scores of labels, vectors and matches.

Knows nothing of annotation files, output files or processes; `medm.inference.batch` runs it over
many records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from medm.data.answers import branch_of
from medm.errors import DataError, RecipeError
from medm.inference.loading import load_model
from medm.inference.options import EmbedOptions, InferOptions
from medm.types import (
    ANSWER_BRANCHES,
    IGNORE_INDEX,
    BaseSample,
    JsonObject,
    PredictionField,
)

if TYPE_CHECKING:
    from medm.data.studies import StudyExample
    from medm.models.blip.modeling import MedmBlip, StudyImages
    from medm.models.blip.processing import MedmBlipProcessor

CANDIDATES = "candidates"
"""Field of a record that lists the ids of records whose reports are matched with its images."""
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


def make_studies(examples: Sequence[Any], samples: Sequence[BaseSample]) -> StudyFiles:
    """Return the studies of examples as one batch."""
    items = [cast("StudyExample", example).pixels["image"] for example in examples]
    stacked = np.stack([image for images in items for image in images])
    return StudyFiles(
        pixels={"image": torch.from_numpy(stacked.astype(np.float32, copy=False))},
        counts=[len(images) for images in items],
        questions=[getattr(sample, "question", None) for sample in samples],
        answer_types=[getattr(sample, "answer_type", None) for sample in samples],
        reports=[getattr(sample, "report", None) for sample in samples],
        candidates=[
            tuple(map(str, getattr(sample, "extra", {}).get(CANDIDATES, ()))) for sample in samples
        ],
    )


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


def study_outputs(
    options: InferOptions | EmbedOptions, gives: frozenset[PredictionField]
) -> frozenset[PredictionField]:
    """Return what a run writes of each study.

    Args:
        options: of the run.
        gives: what the model gives.

    Raises:
        RecipeError: the model does not give what is asked for, or options of another kind of model
            are set.
    """
    if isinstance(options, EmbedOptions):
        return frozenset({"embeddings"})
    if named := sorted(options.generation.model_fields_set):
        raise RecipeError(
            f"generation: {', '.join(named)}: for language models; model {options.model} writes by "
            "beam search. Set beams, max_length and min_length of studies"
        )
    answers = options.studies.answers
    both: frozenset[PredictionField] = frozenset({"text", "scores"})
    wanted = both & gives if answers == "all" else frozenset({answers})
    if not wanted or not wanted <= gives:
        asked = "text or scores" if answers == "all" else answers
        raise RecipeError(
            f"medm infer writes {asked} of studies; model {options.model} gives "
            f"{' and '.join(sorted(gives)) or 'nothing'}"
            + ("; medm embed writes its vectors" if "embeddings" in gives else "")
        )
    return wanted


def load_studies(
    options: InferOptions | EmbedOptions,
    wanted: frozenset[PredictionField],
    reports: Mapping[str, str],
    *,
    device: torch.device,
) -> StudyEngine:
    """Return the model of a folder on a device, ready for studies.

    Args:
        options: of the run.
        wanted: what is written of each study.
        reports: by id the reports that candidates name.
        device: of the weights.

    Raises:
        CheckpointError: see `medm.models.load`.
        RecipeError: knowledge is switched off in a model without any.
    """
    from medm.models.blip.modeling import MedmBlip
    from medm.models.blip.processing import MedmBlipProcessor

    model, processor = load_model(
        options.model,
        MedmBlip,
        refusal="reads no studies; expected a model of kind blip",
        device=device,
        dtype=options.dtype,
    )
    assert isinstance(processor, MedmBlipProcessor)
    if options.studies.knowledge == "off":
        if model.knowledge is None:
            raise RecipeError(
                f"knowledge off: model {options.model} has no model.knowledge; leave it out"
            )
        model.knowledge = None
    return StudyEngine(model, processor, options, wanted, reports)


class StudyEngine:
    """Answers to batches of studies.

    Args:
        model: on its device, in eval mode.
        processor: of the model.
        options: of the run.
        wanted: what is given of each study.
        reports: by id the reports that candidates name.
    """

    def __init__(
        self,
        model: MedmBlip,
        processor: MedmBlipProcessor,
        options: InferOptions | EmbedOptions,
        wanted: frozenset[PredictionField],
        reports: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.processor, self.wanted = model, processor, wanted
        self.options, self.batch_size = options.studies, options.batch_size
        self.with_reports = isinstance(options, EmbedOptions) and options.captions
        self._reports = reports or {}
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

    def _answers(self, seen: StudyImages, batch: StudyFiles, rows: slice) -> list[StudyAnswer]:
        count = rows.stop - rows.start
        found: list[dict[str, Any]] = [{} for _ in range(count)]
        if "text" in self.wanted:
            questions = batch.questions[rows]
            # A model of classes and of texts chooses: that is what its questions were learned for.
            texts = (
                self._texts(seen, questions)
                if self.model.answers is None
                else self._classes(seen, questions, batch.answer_types[rows])
            )
            for answer, fields in zip(found, texts, strict=True):
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
                vectors_of = self._text_vectors(batch.reports[rows])
                for answer, of_text in zip(found, vectors_of, strict=True):
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
            *(prompts[name].to(self.model.device) for name in ("input_ids", "attention_mask")),
            num_beams=self.options.beams,
            max_length=self.options.max_length or self.processor.max_length,
            min_length=self.options.min_length,
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
            DataError: a study without a question, or an unknown type where the model is told it.
        """
        if any(question is None for question in questions):
            raise DataError(
                "the model chooses answers to questions; expected a question", field="question"
            )
        branches = None
        if self.model.config.answers["route"] == "gold":
            known = [IGNORE_INDEX if one is None else branch_of(one) for one in types]
            branches = torch.tensor(known, device=self.model.device)
        asked = self.processor.encode_text([str(question) for question in questions])
        answers = self.model.choose_answers(
            seen,
            asked["input_ids"].to(self.model.device),
            asked["attention_mask"].to(self.model.device),
            branches,
        )
        return [
            {"reply": reply, "answer_type": ANSWER_BRANCHES[branch], "answer_score": score}
            for reply, branch, score in zip(
                self.processor.decode_answers(answers),
                answers.branches.tolist(),
                answers.scores.tolist(),
                strict=True,
            )
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
        from medm.models.text_inputs import pad_texts

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
                    field=CANDIDATES,
                )
            self._encoded[name] = self.processor.encode_target(report, "").input_ids
        return self._encoded[name]
