"""Scoring that several benchmarks share.

Records in, results out; each function states the fields that it reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from medm.errors import DataError
from medm.metrics import m3d_bench, uni_med
from medm.metrics.base import (
    MetricResult,
    Resampling,
    is_blank,
    mean_result,
    ratio,
    result_of,
    with_note,
)
from medm.metrics.bleu import bleu, bleu_coco, bleu_nltk
from medm.metrics.boxes import CODECS, Box, box_accuracy, box_iou, scale
from medm.metrics.chest_labels import chest_label_f1
from medm.metrics.choice import choice_accuracy, closed_accuracy, parse_wording, parse_yes_no
from medm.metrics.cider import cider_d
from medm.metrics.classification import accuracy, auroc, balanced_accuracy, macro_f1, mean_defined
from medm.metrics.match import normalized_match, token_f1
from medm.metrics.meteor import meteor, meteor_exact_stem, wordnet_available
from medm.metrics.rouge import rouge
from medm.metrics.words import normalize_answer
from medm.tasks.base import FAILED, Record, scoped

Pair = tuple[list[str], list[str]]


def texts(records: Sequence[Record]) -> Pair:
    """Predictions and answers. What is said where the answer is in no published list of classes
    (`unlisted`) is no prediction, because its text is not known.
    """
    return ["" if record.get("unlisted") else record["prediction"] for record in records], [
        str(record["answer"]) for record in records
    ]


def require_field(record: Record, name: str) -> Any:
    """A field that scoring cannot do without."""
    if record.get(name) is None:
        raise DataError(
            f"record {record.get('id')!r} has no {name!r}, which its sample carries; keep the "
            "samples' fields"
        )
    return record[name]


def answer_types(records: Sequence[Record]) -> dict[str, list[int]]:
    """Return the positions of the records by `answer_type` ("open", "closed").

    A type without records is left out.
    """
    parts: dict[str, list[int]] = {"open": [], "closed": []}
    for index, record in enumerate(records):
        parts[
            "closed" if str(require_field(record, "answer_type")).lower() == "closed" else "open"
        ].append(index)
    return {name: part for name, part in parts.items() if part}


def vqa(records: Sequence[Record], resampling: Resampling) -> list[MetricResult]:
    """Short answers: all, open and closed. Reads `answer_type`."""
    results = normalized_match(*texts(records), resampling=resampling)
    results += token_f1(*texts(records), resampling=resampling)
    for name, part in answer_types(records).items():
        pair, drawn = texts([records[index] for index in part]), resampling.part(part)
        if name == "closed":
            results += scoped(name, closed_accuracy(*pair, resampling=drawn))
        else:
            for metric in (normalized_match, token_f1):
                results += scoped(name, metric(*pair, resampling=drawn))
            results += scoped(name, bleu_nltk(*pair, resampling=drawn)[:1])
    return results


def class_accuracy(records: Sequence[Record], resampling: Resampling) -> list[MetricResult]:
    """MOTOR's accuracy of all, open and closed questions: the score of the class that is chosen.

    A reply is a class when it is its text, letter by letter. Reads `answer_type`, and
    `answer_scores` where answers are published as classes; without them the answer scores 1. An
    answer that is in no published list can never be right.
    """
    results: list[MetricResult] = []
    for name, part in {"all": list(range(len(records))), **answer_types(records)}.items():
        rows = [records[index] for index in part]
        right = [row.get("answer_scores") or {str(row["answer"]): 1.0} for row in rows]
        hits = [
            float(scores.get(said, 0.0)) for scores, said in zip(right, texts(rows)[0], strict=True)
        ]
        unlisted = sum(bool(row.get("unlisted")) for row in rows)
        note = (
            f"{unlisted} of {len(rows)} answers are in no published list and count as wrong"
            if unlisted
            else None
        )
        result = mean_result("class-accuracy", hits, "motor|exact class", resampling.part(part))
        results += scoped(name, [with_note(result, note)])
    return results


def uni_med_vqa(records: Sequence[Record], resampling: Resampling) -> list[MetricResult]:
    """Uni-Med's table: BLEU-1 to 4 and token F1 of open, closed and all, accuracy of closed."""
    results: list[MetricResult] = []
    for name, part in {"all": list(range(len(records))), **answer_types(records)}.items():
        pair, drawn = texts([records[index] for index in part]), resampling.part(part)
        metrics = [uni_med.bleu, uni_med.token_f1]
        metrics += [uni_med.closed_accuracy] if name == "closed" else []
        for metric in metrics:
            results += scoped(name, metric(*pair, resampling=drawn))
    return results


def caption(
    records: Sequence[Record],
    resampling: Resampling,
    *,
    bertscore: str | None = None,
    chest: bool = False,
) -> list[MetricResult]:
    """Score reports and captions.

    METEOR uses WordNet if its files are present; otherwise the name of the metric says that it does
    not.
    """
    pair = texts(records)
    results = chest_label_f1(*pair, resampling=resampling) if chest else []
    results += bleu_coco(*pair, resampling=resampling)
    results += bleu(*pair, resampling=resampling)
    results += rouge(*pair, resampling=resampling)
    results += (meteor if wordnet_available() else meteor_exact_stem)(*pair, resampling=resampling)
    results += cider_d(*pair, resampling=resampling)
    results += token_f1(*pair, resampling=resampling)
    if bertscore is not None:
        from medm.metrics.bertscore import bertscore as score

        results += score(*pair, path=bertscore, resampling=resampling)
    return results


def uni_med_caption(records: Sequence[Record], resampling: Resampling) -> list[MetricResult]:
    """Score reports as in Uni-Med's table.

    References are cut to 50 words and empty pairs are left out; a note gives their number.
    """
    cut = [
        {
            **record,
            "prediction": uni_med.clean_prediction(record["prediction"]),
            "answer": uni_med.first_words(str(record["answer"])),
        }
        for record in records
    ]
    kept = [index for index, record in enumerate(cut) if record["prediction"] and record["answer"]]
    pair, resampling = texts([cut[index] for index in kept]), resampling.part(kept)
    results = bleu_coco(*pair, resampling=resampling)
    results += (meteor if wordnet_available() else meteor_exact_stem)(*pair, resampling=resampling)
    results += rouge(*pair, resampling=resampling)
    results += uni_med.token_f1(*pair, resampling=resampling)
    left_out = len(cut) - len(kept)
    note = (
        f"{left_out} of {len(cut)} items without a reply are left out, as published"
        if left_out
        else None
    )
    return scoped("uni-med-50-words", [with_note(result, note) for result in results])


MOTOR_WORDS = 90
"""Words of a report that MOTOR scores."""
_MOTOR_MARKS = re.compile(r"[.!\"()*#:;~]")


def motor_text(text: str) -> str:
    """Return a report as MOTOR scores it: lower case, without these marks, cut to 90 words."""
    return " ".join(_MOTOR_MARKS.sub(" ", text.lower()).split()[:MOTOR_WORDS])


def motor_report(records: Sequence[Record], resampling: Resampling) -> list[MetricResult]:
    """Score reports as in MOTOR's table: BLEU, METEOR, ROUGE-L and CIDEr of cleaned texts.

    References are cleaned and cut as replies are, which makes the numbers higher than those of
    whole reports, and not comparable with them.
    """
    cleaned = [
        {
            **record,
            "prediction": motor_text(record["prediction"]),
            "answer": motor_text(str(record["answer"])),
        }
        for record in records
    ]
    pair = texts(cleaned)
    results = bleu_coco(*pair, resampling=resampling)
    results += (meteor if wordnet_available() else meteor_exact_stem)(*pair, resampling=resampling)
    results += rouge(*pair, resampling=resampling)
    results += cider_d(*pair, resampling=resampling)
    cut = sum(len(str(record["answer"]).split()) > MOTOR_WORDS for record in records)
    note = f"{cut} of {len(records)} references are longer than 90 words and cut, as published"
    return scoped("motor-90-words", [with_note(one, note if cut else None) for one in results])


def m3d_texts(
    records: Sequence[Record], resampling: Resampling, bertscore: str | None = None
) -> list[MetricResult]:
    """M3D-Bench's table for texts: BLEU-1, ROUGE-1, METEOR and BERTScore.

    A metric whose files are missing is undefined, and its signature gives the reason.
    """
    pair = texts(records)
    results = m3d_bench.bleu(*pair, resampling=resampling) + m3d_bench.rouge(
        *pair, resampling=resampling
    )
    if wordnet_available():
        results += [
            replace(r, name="m3d-bench-meteor") for r in meteor(*pair, resampling=resampling)
        ]
    else:
        results.append(
            _not_available(
                "m3d-bench-meteor", len(records), "the WordNet files are not on this machine"
            )
        )
    if bertscore is not None:
        from medm.metrics.bertscore import bertscore as score

        found = score(*pair, path=bertscore, resampling=resampling)
        results += [
            replace(r, name="m3d-bench-bertscore-f1") for r in found if r.name == "bertscore-f1"
        ]
    else:
        results.append(
            _not_available(
                "m3d-bench-bertscore-f1", len(records), "no encoder is given as 'bertscore'"
            )
        )
    return results


def _not_available(name: str, n: int, reason: str) -> MetricResult:
    return MetricResult(name, math.nan, n, math.nan, math.nan, f"n/a: {reason}", note=reason)


def refer(
    records: Sequence[Record],
    resampling: Resampling,
    codec: str,
    *,
    corners: Literal["edges", "voxels"] = "edges",
) -> list[MetricResult]:
    """Score boxes that answer a name.

    Reads `box` (corners in pixels or voxels, the upper one exclusive) and `size` (the extent).

    With `corners="voxels"` texts name the first and the last voxel inside (M3D); else they name the
    edges. The ceiling is what a perfect text scores: writing a box on a grid loses precision.
    """
    guesses: list[Box | str | None] = []
    ceiling: list[Box | str | None] = []
    malformed, repaired = [], []
    for record in records:
        parsed = CODECS[codec].parse(record["prediction"])
        size = require_field(record, "size")
        guesses.append(_edges(parsed.first, size, corners))
        ceiling.append(_edges(CODECS[codec].parse(str(record["answer"])).first, size, corners))
        malformed.append(float(parsed.malformed > 0))
        repaired.append(float(parsed.repaired > 0))
    truths: list[Box | str] = [
        tuple(map(float, require_field(record, "box"))) for record in records
    ]
    best = box_iou(ceiling, truths, codec=codec, resampling=resampling)[0]
    return [
        *box_iou(guesses, truths, codec=codec, resampling=resampling),
        *box_accuracy(guesses, truths, codec=codec, resampling=resampling),
        mean_result("box-malformed", malformed, f"share of texts|codec:{codec}", resampling),
        mean_result("box-repaired", repaired, f"share of texts|codec:{codec}", resampling),
        replace(best, name="box-iou-ceiling"),
    ]


def _edges(fractions: Box | None, size: Sequence[float], corners: str) -> Box | None:
    """A parsed box in pixels or voxels, the upper corner outside."""
    if fractions is None:
        return None
    box = scale(fractions, size)
    if corners == "edges":
        return box
    axes = len(size)
    return (*(float(round(n)) for n in box[:axes]), *(float(round(n)) + 1 for n in box[axes:]))


def uni_med_refer(records: Sequence[Record], resampling: Resampling) -> list[MetricResult]:
    """Uni-Med's table for boxes, from the texts."""
    return uni_med.box_iou(
        [record["prediction"] for record in records],
        [tuple(map(float, require_field(record, "box"))) for record in records],
        extents=[require_field(record, "size") for record in records],
        resampling=resampling,
    )


def identify(records: Sequence[Record], resampling: Resampling) -> list[MetricResult]:
    """A box to a name."""
    pair = texts(records)
    results = normalized_match(*pair, resampling=resampling) + token_f1(
        *pair, resampling=resampling
    )
    return results + bleu_nltk(*pair, resampling=resampling)[:1]


def uni_med_identify(records: Sequence[Record], resampling: Resampling) -> list[MetricResult]:
    """Uni-Med's table for names of boxes."""
    pair = texts(records)
    metrics = (uni_med.match, uni_med.bleu, uni_med.token_f1)
    return [result for metric in metrics for result in metric(*pair, resampling=resampling)]


def classes(
    records: Sequence[Record], names: Sequence[str], resampling: Resampling
) -> list[MetricResult]:
    """One class in words: exactly one class name has to be read from the answer."""
    wordings = {name: name for name in names}
    guesses = [parse_wording(record["prediction"], wordings) for record in records]
    truths = [str(record["answer"]) for record in records]
    results = accuracy(guesses, truths, resampling=resampling)
    results += balanced_accuracy(guesses, truths, resampling=resampling)
    results += macro_f1(guesses, truths, resampling=resampling)
    unread = [float(guess is None) for guess in guesses]
    return [
        *results,
        mean_result("class-unparsed", unread, "class:one affirmed wording", resampling),
    ]


def class_areas(
    records: Sequence[Record], names: Sequence[str], resampling: Resampling
) -> list[MetricResult]:
    """AUROC of each class and their mean.

    Nothing is returned if no predictions file gives `scores`.

    Reads `scores`: a number for each class, as a map by class name or a list in the order of
    `names`. An item without a reply is ranked as wrong as can be.

    Raises:
        DataError: a record with a reply has no scores, or they are not one number for each class.
    """
    if not any(record.get("scores") is not None for record in records):
        return []
    keys = [normalize_answer(name) for name in names]
    labels = [keys.index(normalize_answer(str(record["answer"]))) for record in records]
    rows = []
    for record, label in zip(records, labels, strict=True):
        if _has_no_answer(record):
            rows.append([_worst_score(place == label) for place in range(len(keys))])
            continue
        given = require_field(record, "scores")
        if isinstance(given, Mapping):
            by_name = {normalize_answer(str(name)): value for name, value in given.items()}
            given = [by_name[key] for key in keys] if by_name.keys() == set(keys) else []
        if not isinstance(given, (list, tuple)) or len(given) != len(keys):
            raise DataError(
                f"record {record.get('id')!r}: expected 'scores' with one number for each of "
                f"{', '.join(names)}"
            )
        rows.append([float(value) for value in given])
    return auroc(rows, np.asarray(labels), class_names=names, resampling=resampling)


def _has_no_answer(record: Record) -> bool:
    """Return True for an item without reply and scores, or with an error in their place."""
    return record.get(FAILED) is not None or (
        record.get("scores") is None and is_blank(record.get("prediction"))
    )


def _worst_score(positive: bool) -> float:
    """Return the score that puts a positive item below all others and a negative one above."""
    return -math.inf if positive else math.inf


def binary_area(records: Sequence[Record], resampling: Resampling) -> list[MetricResult]:
    """AUROC of one score per item against answers that read yes or no, 1 or 0.

    Reads `scores`, a number.

    An item without a reply is ranked as wrong as can be.
    """
    truths = np.asarray(binary(records, "answer"))
    numbers = [
        _worst_score(truth == 1) if _has_no_answer(record) else require_field(record, "scores")
        for record, truth in zip(records, truths, strict=True)
    ]
    return auroc(np.asarray(numbers, dtype=float), truths, resampling=resampling)


def binary(records: Sequence[Record], field: str) -> list[int | None]:
    """1 and 0 from texts that say 1, 0, yes or no; None for a prediction that says neither.

    Raises:
        DataError: an answer is neither.
    """
    values: list[int | None] = []
    for record in records:
        text = str(record[field])
        decision = parse_yes_no(text)
        value = {"1": 1, "0": 0}.get(text.strip(), None if decision is None else int(decision))
        if value is None and field == "answer":
            raise DataError(
                f"record {record.get('id')!r}: expected the answer yes, no, 1 or 0, found {text!r}"
            )
        values.append(value)
    return values


def choices(records: Sequence[Record], resampling: Resampling) -> list[MetricResult]:
    """Score multiple choice.

    Reads `options` (letter -> wording) and `answer_choice` (the correct letter).
    """
    predictions = [record["prediction"] for record in records]
    letters = [str(require_field(record, "answer_choice")) for record in records]
    options: list[Mapping[str, str]] = [require_field(record, "options") for record in records]
    return choice_accuracy(predictions, letters, options=options, resampling=resampling)


def mean_over_groups(
    records: Sequence[Record], result: MetricResult, field: str, resampling: Resampling
) -> MetricResult:
    """Mean of a metric over the values of a field, each group with the same weight.

    For example "macro over question types".
    """
    values = sorted({str(record.get(field)) for record in records})
    member = np.array(
        [[str(record.get(field)) == value for value in values] for record in records], dtype=float
    )
    scores = np.asarray(result.per_item, dtype=float)

    def value(counts: Any) -> Any:
        return mean_defined(ratio(counts @ (member * scores[:, None]), counts @ member))

    return result_of(
        f"{result.name}-macro", value, len(records), f"{result.signature}|macro:{field}", resampling
    )
