"""Zero-shot classification: the class whose texts are nearest to the image.

A card says what the classes are and which texts describe them (`medm.tasks.class_cards`). A model
gives a score for each class of an item; a model that answers in text is asked the card's question.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medm.errors import DataError, RecipeError
from medm.metrics.base import MetricResult, Resampling, with_note
from medm.metrics.classification import (
    accuracy,
    auroc,
    balanced_accuracy,
    macro_f1,
    sensitivity_specificity,
)
from medm.metrics.words import normalize_answer
from medm.tasks import prompts, scoring
from medm.tasks.base import Prediction, Record, Scores, Task, make_sample, pick_template
from medm.tasks.class_cards import Card, Labelled, class_names, labelled_files, read_cards
from medm.types import JsonObject, Media, PredictionField, Sample

_SEPARATOR = "|"
"""Between the classes of a multi-label answer."""
NO_CLASS = "none"
"""Answer of a multi-label item without any class."""


class ClassTask(Task):
    """A task on the files and classes of cards.

    Args:
        options: see `medm.tasks.ClassTaskOptions`.
    """

    tag = "cls"
    splits = ("train", "val", "test")

    def __init__(
        self,
        *,
        card: str,
        only: Sequence[str] = (),
        rounds: int = 1000,
        seed: int = 0,
        cluster_by: str | None = None,
    ) -> None:
        super().__init__(rounds=rounds, seed=seed, cluster_by=cluster_by)
        self.cards = read_cards(card)
        self.size = len(self.cards)
        self.suite = self.size > 1
        if only:
            unknown = sorted(set(only) - set(self.cards))
            if unknown:
                raise RecipeError(
                    f"only: {', '.join(unknown)} is none of {card}; expected some of "
                    f"{', '.join(self.cards)}"
                )
            self.cards = {name: card for name, card in self.cards.items() if name in only}
        self._classes: dict[str, list[str]] = {}
        if cluster_by is None and any(one.patient for one in self.cards.values()):
            self.cluster_by = "patient"
        self.layout = f"the files of {next(iter(self.cards.values())).title}"
        if self.suite:
            self.layout = f"a folder for each of {', '.join(self.cards)}"

    def samples(
        self, folder: Path, split: str = "test", *, rng: random.Random | None = None
    ) -> Iterator[Sample]:
        folder, split = Path(folder), self._known_split(split)
        if self.suite:
            missing = [name for name in self.cards if not (folder / name).is_dir()]
            if missing:
                there = [name for name in self.cards if name not in missing]
                raise DataError(
                    f"{', '.join(missing)} is missing in {folder}; expected {self.layout}. To "
                    f"score the others alone: only=[{','.join(there)}]",
                    file=folder / missing[0],
                )
        for name, card in self.cards.items():
            yield from self._of_card(name, card, folder, split, rng)

    def _of_card(
        self, name: str, card: Card, folder: Path, split: str, rng: random.Random | None
    ) -> Iterator[Sample]:
        place = f"{name}/" if self.suite else ""
        root = folder / name if self.suite else folder
        classes = self._classes[name] = class_names(card, root, split)
        for item in labelled_files(card, root, split):
            yield make_sample(
                pick_template(prompts.CLASSIFY, rng).format(
                    question=card.question, classes=", ".join(classes)
                ),
                id=f"{name}:{split}:{item.path}",
                tag=self.tag,
                answer=_SEPARATOR.join(item.classes) or NO_CLASS,
                media=[Media(card.media, place + item.path)],
                set=name,
                modality=card.modality,
                split=split,
                **({} if self.cluster_by is None else {"patient": self._patient(name, item)}),
            )

    def _patient(self, name: str, item: Labelled) -> str:
        """A name of the patient; that of the file where nothing says which belong together."""
        return f"{name}:{item.path if item.patient is None else item.patient}"

    def classes_of(self, name: str, records: Sequence[Record] = ()) -> list[str]:
        """The classes of a set, in the order of its scores."""
        found = self._classes.get(name) or list(self.cards[name].classes)
        return found or sorted({str(record["answer"]) for record in records})


class ZeroShot(ClassTask):
    """Scores of classes by the texts of a card.

    Args:
        options: see `medm.tasks.ZeroShotOptions`.
    """

    needs: frozenset[PredictionField] = frozenset({"scores"})

    def __init__(
        self,
        *,
        card: str,
        only: Sequence[str] = (),
        probabilities: bool = False,
        rounds: int = 1000,
        seed: int = 0,
        cluster_by: str | None = None,
    ) -> None:
        super().__init__(card=card, only=only, rounds=rounds, seed=seed, cluster_by=cluster_by)
        self.probabilities = probabilities
        self.group_by = ("modality", "set") if self.suite else ()

    def class_texts(self) -> dict[str, dict[str, list[str]]]:
        """By set and class the texts that describe it; the negative ones of class C are those of
        `no C`.
        """
        texts = {}
        for name, card in self.cards.items():
            texts[name] = {one: card.texts_of(one) for one in self.classes_of(name)}
            texts[name] |= {
                _absent(one): list(entry.negative)
                for one, entry in card.classes.items()
                if entry.negative
            }
        return texts

    def _score_names(self, name: str) -> list[str]:
        """Return the names that the scores of a set belong to, in their order."""
        entries = self.cards[name].classes.items()
        return [*self.classes_of(name), *(_absent(one) for one, entry in entries if entry.negative)]

    def measure_item(
        self, record: JsonObject, prediction: Prediction | None, folder: Path
    ) -> JsonObject:
        """Add the class of the highest score, where the prediction has scores and no text."""
        if record.get("scores") is None or str(record.get("prediction") or "").strip():
            return record
        return {**record, "prediction": self._decide(record)}

    def _decide(self, record: Record) -> str:
        name = str(record["set"])
        scores = _by_class(record, self._score_names(name), self.classes_of(name))
        if self.cards[name].labels == "single":
            return max(scores, key=scores.__getitem__)
        found = [
            one
            for one in self.classes_of(name)
            if _absent(one) in scores and scores[one] > scores[_absent(one)]
        ]
        return _SEPARATOR.join(found) or NO_CLASS

    def measure(self, records: Sequence[Record]) -> list[MetricResult]:
        resampling = self.resampling_of(records)
        names = list(dict.fromkeys(str(record["set"]) for record in records))
        if len(names) < 2:
            return self._measure_set(names[0], records, resampling) if names else []
        hits = accuracy(*_labels(records), resampling=resampling)[0]
        mean = scoring.mean_over_groups(records, hits, "set", resampling)
        return [replace(mean, name=f"accuracy-mean-of-{len(names)}-sets"), hits]

    def _scores(self, rows: Sequence[JsonObject]) -> Scores:
        scores = super()._scores(rows)
        present = [name for name in self.cards if any(row["set"] == name for row in rows)]
        if self.suite and len(present) < self.size:
            note = (
                f"{len(present)} of the {self.size} sets of the suite were scored: there is no "
                f"mean of {self.size} sets"
            )
            scores.notes.insert(0, note)
            head = scores.results[0]
            if head.name.startswith("accuracy-mean"):
                scores.results[0] = with_note(head, note)
        for name in present:
            card = self.cards[name]
            if card.leak.flag != "none-known":
                scores.notes.append(f"leak ({card.leak.flag}), {name}: {card.leak.reason}")
            scores.notes += [f"{name}: {note}" for note in card.notes]
        return scores

    def _measure_set(
        self, name: str, records: Sequence[Record], resampling: Resampling
    ) -> list[MetricResult]:
        card, classes = self.cards[name], self.classes_of(name, records)
        if card.labels == "multi":
            return self._measure_multi(name, records, resampling)
        return class_results(card, classes, records, resampling, probabilities=self.probabilities)

    def _measure_multi(
        self, name: str, records: Sequence[Record], resampling: Resampling
    ) -> list[MetricResult]:
        card, classes = self.cards[name], self.classes_of(name, records)
        every = self._score_names(name)
        present = [set(str(record["answer"]).split(_SEPARATOR)) for record in records]
        truths = np.array([[int(one in found) for one in classes] for found in present])
        rows = []
        for record, truth in zip(records, truths, strict=True):
            if record.get("scores") is None:  # ranked as wrong as can be
                rows.append([-math.inf if positive else math.inf for positive in truth])
                continue
            scores = _by_class(record, every, classes)
            rows.append([scores[one] - scores.get(_absent(one), 0.0) for one in classes])
        table = np.asarray(rows, dtype=np.float64).reshape(len(records), len(classes))
        results = auroc(table, truths, class_names=classes, resampling=resampling)
        if all(entry.negative for entry in card.classes.values()):
            decided = (table > 0).astype(int)
            for place, one in enumerate(classes):
                results += [
                    replace(result, name=f"{result.name}[{one}]")
                    for result in sensitivity_specificity(
                        decided[:, place].tolist(),
                        truths[:, place].tolist(),
                        resampling=resampling,
                    )
                ]
        return results


def class_results(
    card: Card,
    classes: Sequence[str],
    records: Sequence[Record],
    resampling: Resampling,
    *,
    probabilities: bool = False,
) -> list[MetricResult]:
    """Accuracy, balanced accuracy, macro-F1 and AUROC of a set with one class a file.

    Args:
        card: of the set.
        classes: in the order of the scores.
        records: with `prediction`, and `scores` where there are such.
        resampling: how intervals are drawn.
        probabilities: the scores are probabilities and not logits.
    """
    guesses, truths = _labels(records)
    results = accuracy(guesses, truths, resampling=resampling)
    results += balanced_accuracy(guesses, truths, resampling=resampling)
    results += macro_f1(guesses, truths, resampling=resampling)
    if card.positive is not None:
        positive = normalize_answer(card.positive)
        # No class at all is a miss on both sides.
        decided = [
            int(guess == positive if guess else truth != positive)
            for guess, truth in zip(guesses, truths, strict=True)
        ]
        results += sensitivity_specificity(
            decided, [int(truth == positive) for truth in truths], resampling=resampling
        )
    rows = records if probabilities else [_with_odds(record, classes) for record in records]
    return results + scoring.class_areas(rows, classes, resampling)


def _with_odds(record: Record, classes: Sequence[str]) -> Record:
    """The record with log odds of each class against the others in place of its scores.

    Logits of one item are shifted against those of another, so that they are not ranked as they
    are. Log odds rank as the softmax does, and do not saturate.
    """
    if record.get("scores") is None:
        return record
    scores = _by_class(record, classes, classes)
    values = np.array([scores[one] for one in classes], dtype=np.float64)
    odds = [
        float(values[i] - np.logaddexp.reduce(np.delete(values, i))) for i in range(len(values))
    ]
    return {**record, "scores": dict(zip(classes, odds, strict=True))}


def _absent(name: str) -> str:
    """Name of the texts that say that a class is absent."""
    return f"no {name}"


def _labels(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """Classes that were predicted and that are right, in the form in which they are compared."""
    return [normalize_answer(str(record.get("prediction") or "")) for record in records], [
        normalize_answer(str(record["answer"])) for record in records
    ]


def _by_class(record: Record, given: Sequence[str], needed: Sequence[str]) -> dict[str, float]:
    """The scores of a record by class.

    Args:
        record: with `scores`, by class or in the order of `given`.
        given: the classes of a list.
        needed: the classes that have to be there.

    Raises:
        DataError: one is missing, or is no finite number.
    """
    scores = record["scores"]
    if not isinstance(scores, Mapping):
        values = list(scores) if isinstance(scores, (list, tuple)) else []
        scores = dict(zip(given, values, strict=False)) if len(values) == len(given) else {}
    found = {str(name): float(value) for name, value in scores.items()}
    lacking = [one for one in needed if not math.isfinite(found.get(one, math.nan))]
    if lacking:
        raise DataError(
            f"record {record.get('id')!r}: expected 'scores' with a number for each of "
            f"{', '.join(needed)}; {lacking[0]!r} has none"
        )
    return found
