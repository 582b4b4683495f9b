"""Predictions of any program, read from a file and joined to the items that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeGuard

from medm.data.record_files import RecordFile, parse_json
from medm.errors import DataError
from medm.evaluation.options import EvalOptions
from medm.evaluation.predictors import FIELDS, Items, Predictions, Predictor
from medm.tasks.base import FAILED, PredictedMask, Prediction, join_predictions
from medm.types import JsonObject, PredictionField, Sample

if TYPE_CHECKING:
    from medm.inference.batch import Progress

_TEXT_FIELDS = ("reply", "prediction", "response", "output", "generated", "text", "answer")
"""Fields in which programs write an answer, the most reliable first.

`answer` comes last: it is often the reference."""
_ID_FIELDS = ("id", "question_id", "qid")
_MEASURED_MASK = "dice"
"""Number in place of a mask that the other program has measured."""


class PredictionsFile(Predictor):
    """Predictions that another program wrote."""

    what: ClassVar[str] = "predictions"
    beyond_limit: ClassVar[bool] = True

    def __init__(self, source: str, options: EvalOptions) -> None:
        super().__init__(source, options)
        self._gives = fields_given(Path(source))

    @property
    def gives(self) -> frozenset[PredictionField]:
        return self._gives

    def check(self, items: Items) -> None:
        """Refuse a file that cannot be read, or holds predictions of other items."""
        join(items.samples, self.available(items))

    def available(self, items: Items) -> Predictions:
        return read_predictions(Path(self.source), items.samples, limit=items.limit)

    def predict(self, items: Items, *, progress: Progress | None = None) -> Predictions:
        return self.available(items)


def fields_given(path: Path) -> frozenset[PredictionField]:
    """Return the fields that at least one prediction of a file has.

    A file of errors alone, without any prediction, has all fields: its items are scored as not
    answered.

    Raises:
        DataError: a prediction cannot be read.
    """
    if _mapping(path, ()):
        return frozenset({"text"})
    found: set[PredictionField] = set()
    for index, item in enumerate(RecordFile(path)):
        try:
            prediction = _prediction(item)
        except DataError as error:
            raise error.at(file=path, index=index) from None
        found |= _fields(prediction)
    return frozenset(found or FIELDS)


def _fields(prediction: Prediction) -> set[PredictionField]:
    if prediction.error is not None:
        return set()
    found: set[PredictionField] = set()
    if prediction.masks or _MEASURED_MASK in prediction.numbers:
        found.add("masks")
    if prediction.scores is not None or "scores" in prediction.numbers:
        found.add("scores")
    if prediction.embedding is not None:
        found.add("embeddings")
    if prediction.matches is not None:
        found.add("matches")
    if prediction.text or not found:  # an empty reply is a reply
        found.add("text")
    return found


def read_predictions(
    path: Path, samples: Sequence[Sample], *, limit: int | None = None
) -> dict[str, Prediction]:
    """Return answers by item id.

    The file holds lines of `medm infer`, objects with an id and a text, MedM-VL's records with the
    reply as last turn, an object of id to text, or a bare list of texts in the order of the items.

    Args:
        path: the file.
        samples: every item of the split.
        limit: only this many of them are scored; answers without ids may be to these alone.

    Raises:
        DataError: none of these forms, an id twice, or a list of another length than the items.
    """
    counts = {len(samples), len(samples[:limit])}
    if mapping := _mapping(path, samples):
        return {key: Prediction(text) for key, text in mapping.items()}
    answers: dict[str, Prediction] = {}
    file = RecordFile(path)
    for index, item in enumerate(file):
        try:
            name = _identifier(item, index, samples, len(file) in counts, len(file))
            if name in answers:
                raise DataError(f"a second answer to item {name!r}; keep one")
            answers[name] = replace(_prediction(item), folder=path.parent)
        except DataError as error:
            raise error.at(file=path, index=index) from None
    return answers


def _mapping(path: Path, samples: Sequence[Sample]) -> dict[str, str] | None:
    """Return the file as one object of id to text, or None for another form."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", file=path) from None
    if not content.lstrip().startswith(b"{") or b"\n{" in content.strip():
        return None
    try:
        value = parse_json(content)
    except DataError as error:
        raise error.at(file=path) from None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        return None
    ids = {sample.id for sample in samples}
    if any(key in value and key not in ids for key in (*_TEXT_FIELDS, "error", "mask")):
        return None  # one line of JSONL
    return dict(value)


def _identifier(
    item: object, index: int, samples: Sequence[Sample], complete: bool, count: int
) -> str:
    if isinstance(item, dict):
        for key in _ID_FIELDS:
            if item.get(key) is not None:
                return str(item[key])
    position = item.get("index", index) if isinstance(item, dict) else index
    by_place = isinstance(item, dict) and "index" in item
    if not by_place and not complete:
        raise DataError(
            f"{count} answers without ids for {len(samples)} items: their items are not "
            "known; give each answer an id"
        )
    if not isinstance(position, int) or not 0 <= position < len(samples):
        raise DataError(f"an answer to item {position!r} of {len(samples)}")
    return samples[position].id or ""


def _prediction(item: object) -> Prediction:
    if isinstance(item, str):
        return Prediction(item)
    if not isinstance(item, dict):
        raise DataError(f"expected an answer, an object or a text, found {type(item).__name__}")
    numbers = {key: float(value) for key, value in item.items() if _is_number(value)}
    if item.get("error") is not None:
        return Prediction("", numbers, error=str(item["error"]))
    scores = _scores(item.get("scores"))
    masks, matches = _masks(item), item.get("matches")
    if matches is not None and not (
        isinstance(matches, dict) and all(map(_is_number, matches.values()))
    ):
        raise DataError("expected an object of item id to number", field="matches")
    made = partial(
        Prediction, numbers=numbers, scores=scores, masks=masks, matches=matches, **_vectors(item)
    )
    turns = item.get("conversations") or item.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        last = turns[-1]
        if last.get("from", last.get("role")) in ("gpt", "assistant"):
            return made(text=str(last.get("value", last.get("content", ""))))
    for key in _TEXT_FIELDS:
        if isinstance(item.get(key), str):
            return made(text=item[key])
    parts = (scores, matches, item.get("embedding"))
    if masks or any(part is not None for part in parts):
        return made(text="")
    raise DataError(
        f"no answer in it; expected one of {', '.join(_TEXT_FIELDS)}, or a last turn of the "
        "assistant"
    )


def _scores(value: object) -> Mapping[str, float] | Sequence[float] | None:
    """Return the scores of classes; None for no score or a single number."""
    if value is None or _is_number(value):
        return None
    items = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(items, list) or not items or not all(map(_is_number, items)):
        raise DataError(
            "expected a number, a list of numbers or an object of class to number", field="scores"
        )
    return (
        {str(key): float(score) for key, score in value.items()}
        if isinstance(value, dict)
        else list(map(float, items))
    )


def _masks(item: JsonObject) -> tuple[PredictedMask, ...]:
    """Return the masks of `mask`, one or a list, or else of `spans`, as `medm infer` writes them.

    A span without a mask names something that is not there, and adds none.
    """
    value = item.get("mask")
    if value is not None:
        entries = value if isinstance(value, list) else [value]
        return tuple(_mask(entry, "mask") for entry in entries)
    found = []
    spans = item.get("spans")
    for number, span in enumerate(spans if isinstance(spans, list) else []):
        field = f"spans.{number}"
        if not isinstance(span, dict):
            raise DataError(f"expected an object, found {type(span).__name__}", field=field)
        entry = span.get("rle") if span.get("mask") is None else span["mask"]
        if entry is not None:
            place = span.get("image", 0)
            known = isinstance(place, int) and not isinstance(place, bool)
            found.append(replace(_mask(entry, field), media=place if known else 0))
    return tuple(found)


def _mask(entry: object, field: str) -> PredictedMask:
    """Return one mask, written as a file, an object of a file or a code, or a code alone."""
    if isinstance(entry, str):
        return PredictedMask(entry)
    if isinstance(entry, dict):
        media, value = entry.get("image", 0), entry.get("value")
        code = entry if "counts" in entry else entry.get("rle")
        whole = all(
            isinstance(one, int) and not isinstance(one, bool) for one in (media, value or 0)
        )
        if whole and isinstance(entry.get("file"), str):
            return PredictedMask(entry["file"], value, media=media)
        if whole and isinstance(code, dict):
            return PredictedMask(rle=code, media=media)
    raise DataError(
        'expected a file, {"file": ..., "value": ...}, or {"rle": {"size": ..., "counts": ...}}',
        field=field,
    )


def _vectors(item: JsonObject) -> JsonObject:
    """The vectors of a file and of its captions; None where there are none."""
    own, texts = item.get("embedding"), item.get("text_embeddings")
    vectors = ([own] if own is not None else []) + (texts if isinstance(texts, list) else [])
    numbers = [
        isinstance(vector, list) and vector and all(map(_is_number, vector)) for vector in vectors
    ]
    lists = texts is None or isinstance(texts, list)
    if not lists or not all(numbers) or len({len(vector) for vector in vectors}) > 1:
        field = "text_embeddings" if own is None or numbers[0] else "embedding"
        raise DataError("expected lists of numbers of one length", field=field)
    return {"embedding": own, "text_embeddings": texts}


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def join(samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[JsonObject]:
    """Return scoring records in the order of the items.

    See `medm.tasks.base.join_predictions`.
    """
    records = join_predictions(
        samples, {name: prediction.text for name, prediction in predictions.items()}
    )
    for record in records:
        found = predictions.get(str(record["id"]))
        if found is None:
            continue
        if found.error is not None:
            record[FAILED] = found.error
            continue  # numbers beside an error do not belong to an answer
        for key, value in found.numbers.items():
            record.setdefault(key, value)
        if found.scores is not None:
            record["scores"] = found.scores
        for name in ("embedding", "text_embeddings", "matches"):
            if getattr(found, name) is not None:
                record[name] = getattr(found, name)
    return records
