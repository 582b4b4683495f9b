"""A saved model of studies as a source of predictions: texts, label scores, vectors, matches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from medm.data.studies import StudyProcessor
from medm.errors import RecipeError
from medm.evaluation.model_predictor import SavedModelPredictor
from medm.evaluation.prediction_files import read_predictions
from medm.evaluation.predictors import Items, Predictions
from medm.files import atomic_write_text
from medm.inference.batch import InferSummary, Progress, infer, wait_for_ranks
from medm.inference.options import EmbedOptions, InferOptions, RunOptions
from medm.inference.predictions import encode, read_lines
from medm.inference.studies import CANDIDATES
from medm.launcher import launched_rank
from medm.metrics.retrieval import nearest
from medm.models import load_processor
from medm.tasks.base import question_of
from medm.tasks.study_labels import unknown_labels
from medm.types import JsonObject, Sample


class StudyPredictor(SavedModelPredictor):
    """Answers about studies by batch inference. A run that was stopped resumes.

    Questions, of items that are not reports, are the prompt of the text.
    """

    def check(self, items: Items) -> None:
        """Refuse what the model does not know or read, too: other labels, texts of classes,
        volumes.
        """
        super().check(items)
        if items.class_texts:
            raise RecipeError(
                f"{items.task}: scores texts of classes, and {self.source} scores its own labels; "
                "choose a task of labels (medm list tasks), or a dual encoder"
            )
        if lacking := unknown_labels(items.labels, self._processor().labels):
            raise RecipeError(
                f"{items.task}: scores {len(items.labels)} labels, and {self.source} does not "
                f"know {', '.join(lacking)}; choose others by --option labels=[...]"
            )
        other = {media.branch for sample in items.scored for media in sample.media} - {"image"}
        if other or not all(sample.media for sample in items.scored):
            raise RecipeError(
                f"{items.task}: asks about {' and '.join(sorted(other)) or 'text'}, and "
                f"{self.source} reads studies of images"
            )

    def predict(self, items: Items, *, progress: Progress | None = None) -> Predictions:
        output = items.folder / "predictions.jsonl"
        if "matches" in items.needs:
            self._match(items, output, progress)
        elif "embeddings" in items.needs:
            self._embed(items, output, progress)
        else:
            answers = "all" if {"text", "scores"} <= items.needs else next(iter(items.needs))
            records = _records(items, ask="text" in items.needs)
            self._infer(items, records, "items", output, answers, progress)
        if launched_rank() > 0:
            return {}
        return read_predictions(output, items.samples, limit=items.limit)

    def metadata(self) -> JsonObject:
        made = {
            "studies": self.options.studies.model_dump(),
            "views": self._processor().views,
        }
        return {**super().metadata(), **made}

    def _processor(self) -> StudyProcessor:
        return cast(StudyProcessor, load_processor(self.source))

    def _embed(self, items: Items, output: Path, progress: Progress | None) -> InferSummary | None:
        """Write the vectors of images and reports."""
        options = EmbedOptions(
            model=self.source,
            data=str(_written(items, "items", _records(items))),
            root=str(items.root),
            output=str(output),
            captions=True,
            studies=self.options.studies,
            **self._run(),
        )
        return infer(options, progress=progress)

    def _infer(
        self,
        items: Items,
        records: list[JsonObject],
        name: str,
        output: Path,
        answers: str,
        progress: Progress | None,
    ) -> InferSummary | None:
        asked = self.options.studies.model_copy(update={"answers": answers})
        options = InferOptions(
            model=self.source,
            data=str(_written(items, name, records)),
            root=str(items.root),
            output=str(output),
            studies=asked,
            generation=self.options.generation,
            **self._run(),
        )
        return infer(options, progress=progress)

    def _run(self) -> dict[str, Any]:
        return {name: getattr(self.options, name) for name in RunOptions.model_fields}

    def _match(self, items: Items, output: Path, progress: Progress | None) -> None:
        """Write vectors, and match the best candidates of each query, in both directions.

        The images of a study are encoded once, for all texts that they are matched with: the best
        of their own, and those which have them among their best.
        """
        vectors, matches = (items.folder / f"{name}.jsonl" for name in ("vectors", "matches"))
        self._embed(items, vectors, progress)
        if launched_rank() == 0:
            lines = {line["index"]: line for line in read_lines(vectors)}
            chosen = _candidates(items, lines)
        # The others read what rank 0 has finished.
        wait_for_ranks()
        if launched_rank() > 0:
            chosen = _candidates(items, {line["index"]: line for line in read_lines(vectors)})
        records = _records(items)
        for record in records:
            record[CANDIDATES] = chosen.get(str(record["id"]), [])
        self._infer(items, records, "candidates", matches, "matches", progress)
        if launched_rank() > 0:
            return
        found = {line["index"]: line for line in read_lines(matches)}
        text = "".join(
            encode({**line, **{k: v for k, v in found.get(index, {}).items() if k in _MATCHED}})
            for index, line in sorted(lines.items())
        )
        atomic_write_text(output, text)


_MATCHED = ("matches", "error")


def _candidates(items: Items, lines: Mapping[int, Any]) -> dict[str, list[str]]:
    """Return by item the items whose reports are matched with its images."""
    ids = [str(sample.id) for sample in items.scored]
    usable = [
        index
        for index in range(len(ids))
        if lines.get(index, {}).get("embedding") and lines[index].get("text_embeddings")
    ]
    if not usable:
        return {}
    images = np.asarray([lines[index]["embedding"] for index in usable])
    texts = np.asarray([lines[index]["text_embeddings"][0] for index in usable])
    chosen: dict[int, set[int]] = {place: set() for place in range(len(usable))}
    for place, best in enumerate(nearest(images, texts, items.matched)):
        chosen[place].update(best.tolist())
    for place, best in enumerate(nearest(texts, images, items.matched)):
        for image in best.tolist():
            chosen[image].add(place)
    return {
        ids[usable[place]]: [ids[usable[other]] for other in sorted(others)]
        for place, others in chosen.items()
    }


def _written(items: Items, name: str, records: list[JsonObject]) -> Path:
    file = items.folder / f"{name}.jsonl"
    atomic_write_text(file, "".join(encode(record) for record in records))
    return file


def _records(items: Items, *, ask: bool = False) -> list[JsonObject]:
    """Return the scored items as studies, with the question of those that are no reports."""
    return [_record(sample, ask=ask) for sample in items.scored]


def _record(sample: Sample, *, ask: bool) -> JsonObject:
    record: JsonObject = {"id": sample.id, "images": [media.path for media in sample.media]}
    if sample.extra.get("captions"):
        record["report"] = sample.extra["captions"][0]
    question = question_of(sample) if ask else None
    if question is not None:
        record["question"] = question
        if sample.extra.get("answer_type"):
            record["answer_type"] = sample.extra["answer_type"]  # read with `route: gold` alone
    return record
