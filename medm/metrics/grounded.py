"""Metrics of findings that are named and segmented: presence, hits, instances and phrases.

Items are given as numbers of single masks (`medm.metrics.masks.dice_of`), so that a run keeps no
volumes. A target is *absent* where its reference mask is empty: overlap has no meaning there, and
the question is whether the model drew something.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    References,
    Resampling,
    as_references,
    check_lengths,
    mean_result,
    optional,
    ratio,
    summed_result,
    undefined,
)
from medm.metrics.masks import dice_of
from medm.metrics.match import best_of
from medm.metrics.words import ANSWER_SIGNATURE, normalize_answer, same_answer

HIT, INSTANCE = 0.1, 0.2
"""Least Dice of a finding that is hit, and of an instance that is found, in ReXGroundingCT (arXiv
2507.22030, https://rexrank.ai/ReXGroundingCT)."""

_MARKS = re.compile(r"\[SEG\]|</?p>|</?vp>")
"""Control tokens in a reply."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
"""Between two sentences."""


def absent_rates(
    drawn: Sequence[bool], present: Sequence[bool], resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Return what a model draws where there is nothing, and misses where there is something.

    `false-positive-rate` is the fraction of absent targets with a mask of at least one voxel,
    `true-absent-rate` the rest, `missed-rate` the fraction of present targets without any voxel.

    Args:
        drawn: of each item, whether its predicted mask holds a voxel. An item without any reply is
            neither right nor wrong by its mask: give the worse value, `not present`.
        present: of each item, whether its reference holds one.
        resampling: of all items.
    """
    check_lengths(drawn, present)
    results = []
    for name, of_present, hit in (
        ("false-positive-rate", False, True),
        ("true-absent-rate", False, False),
        ("missed-rate", True, False),
    ):
        part = [index for index, there in enumerate(present) if bool(there) == of_present]
        result = mean_result(
            name,
            [float(bool(drawn[index]) == hit) for index in part],
            f"any-voxel|of:{'present' if of_present else 'absent'}|mean",
            resampling.part(part),
        )
        if not part:
            what = "present" if of_present else "absent"
            result = undefined(result, f"no target of these items is {what}")
        results.append(result)
    return results


def false_positive_rate(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    *,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Return `absent_rates` of masks."""
    return absent_rates(
        [bool(np.any(mask)) for mask in predictions],
        [bool(np.any(mask)) for mask in references],
        resampling,
    )


def hit_results(
    dice: Sequence[float], resampling: Resampling = DEFAULT, threshold: float = HIT
) -> list[MetricResult]:
    """Return the fraction of findings with a Dice of at least `threshold`.

    Args:
        dice: of each finding; its target is present.
        resampling: of these findings.
        threshold: least Dice of a hit.
    """
    hits = [float(value >= threshold) for value in dice]
    result = mean_result(f"hit-rate@{threshold:g}", hits, f"dice>={threshold:g}|mean", resampling)
    return [result if hits else undefined(result, "no target of these items is present")]


def hit_rate(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    *,
    threshold: float = HIT,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Fraction of masks with a Dice of at least `threshold`; absent targets are left out."""
    check_lengths(predictions, references)
    part = [index for index, mask in enumerate(references) if np.any(mask)]
    scores = [dice_of(predictions[index], references[index]) for index in part]
    return hit_results(scores, resampling.part(part), threshold)


def instances_of(mask: np.ndarray) -> np.ndarray:
    """Return a mask with a number for each of its parts, from 1; 0 is the background.

    A mask of 0 and 1 is split into the parts that touch, corners included. Other whole numbers name
    the instances already.

    Raises:
        ValueError: the values are no whole numbers.
    """
    values = np.asarray(mask)
    if values.dtype != bool and (values != np.floor(values)).any():
        raise ValueError("expected a mask, or a whole number for each instance")
    if values.size and values.max() > 1:
        return values.astype(np.int64)
    ndimage = optional("scipy.ndimage", package="scipy", extra="surface-metrics")
    parts, _ = ndimage.label(values.astype(bool), structure=np.ones([3] * values.ndim))
    return parts.astype(np.int64)


def instance_counts(
    prediction: np.ndarray, reference: np.ndarray, threshold: float = INSTANCE
) -> tuple[int, int, int]:
    """Return the instances that are found, invented and missed: TP, FP, FN.

    Predicted and true instances are paired one to one, so that as many pairs as possible have a
    Dice of at least `threshold`; each of these is a true positive.

    Args:
        prediction: (*grid), see `instances_of`.
        reference: (*grid), likewise.
        threshold: least Dice of a pair.

    Raises:
        ValueError: the grids differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction is {prediction.shape}, reference is {reference.shape}")
    mine, theirs = instances_of(prediction), instances_of(reference)
    mine_names, mine_sizes = np.unique(mine[mine > 0], return_counts=True)
    their_names, their_sizes = np.unique(theirs[theirs > 0], return_counts=True)
    if not len(mine_names) or not len(their_names):
        return 0, len(mine_names), len(their_names)
    both = (mine > 0) & (theirs > 0)
    shared = np.zeros((len(mine_names), len(their_names)))
    rows = np.searchsorted(mine_names, mine[both])
    columns = np.searchsorted(their_names, theirs[both])
    np.add.at(shared, (rows, columns), 1)
    dice = 2 * shared / (mine_sizes[:, None] + their_sizes)
    optimize = optional("scipy.optimize", package="scipy", extra="surface-metrics")
    matched = dice >= threshold
    # The number of pairs comes first, their Dice decides among equals.
    pairs = optimize.linear_sum_assignment(matched + 1e-6 * dice, maximize=True)
    found = int(matched[pairs].sum())
    return found, len(mine_names) - found, len(their_names) - found


def instance_results(
    counts: Sequence[tuple[int, int, int]],
    resampling: Resampling = DEFAULT,
    threshold: float = INSTANCE,
) -> list[MetricResult]:
    """Return precision, recall and F1 of the instances of all items together.

    Args:
        counts: of each item (TP, FP, FN), see `instance_counts`.
        resampling: of the items.
        threshold: least Dice of a true positive, for the signature.
    """
    table = np.asarray(counts, dtype=np.float64).reshape(-1, 3)
    signature = f"one-to-one|dice>={threshold:g}|sum over items|none predicted:0"

    def precision(sums: np.ndarray) -> np.ndarray:
        value = ratio(sums[:, 0], sums[:, 0] + sums[:, 1])
        return np.where((sums[:, :2].sum(axis=1) == 0) & (sums[:, 2] > 0), 0.0, value)

    def recall(sums: np.ndarray) -> np.ndarray:
        return ratio(sums[:, 0], sums[:, 0] + sums[:, 2])

    def f1(sums: np.ndarray) -> np.ndarray:
        return ratio(2 * sums[:, 0], 2 * sums[:, 0] + sums[:, 1] + sums[:, 2])

    results = []
    for name, finish in (("precision", precision), ("recall", recall), ("f1", f1)):
        result = summed_result(
            f"instance-{name}@{threshold:g}", table, finish, signature, resampling
        )
        if math.isnan(result.value):
            result = undefined(result, "these items hold no instance")
        results.append(result)
    return results


def instance_f1(
    predictions: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    *,
    threshold: float = INSTANCE,
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Return `instance_results` of masks."""
    check_lengths(predictions, references)
    counts = [
        instance_counts(np.asarray(a), np.asarray(b), threshold)
        for a, b in zip(predictions, references, strict=True)
    ]
    return instance_results(counts, resampling, threshold)


def paired_dice_of(predictions: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float:
    """Return the mean Dice of masks paired one to one; a mask without partner counts 0.

    Pairs are chosen for the largest sum. Empty masks are no masks: with none on both sides the
    value is 1, with some on one side alone 0.
    """
    mine = [mask for mask in predictions if np.any(mask)]
    theirs = [mask for mask in references if np.any(mask)]
    if not mine or not theirs:
        return float(len(mine) == len(theirs))
    table = np.array([[dice_of(a, b) for b in theirs] for a in mine])
    optimize = optional("scipy.optimize", package="scipy", extra="surface-metrics")
    return float(
        table[optimize.linear_sum_assignment(table, maximize=True)].sum()
        / max(len(mine), len(theirs))
    )


def without_marks(reply: str) -> str:
    """Return the words of a grounded reply, without control tokens."""
    return " ".join(_MARKS.sub(" ", reply).split())


def statement_of(reply: str) -> str:
    """Return the phrase that a grounded reply ends with, without control tokens.

    Where words follow the last `[SEG]`, these are the statement, as in "It is [SEG]. Liver tumor.".
    Otherwise it is the last sentence: replies of `medm infer` have lost their `[SEG]`.
    """
    last = reply.rpartition("[SEG]")[2]
    words = without_marks(last if re.search(r"\w", last) else reply).strip(" .,:;")
    return _SENTENCE.split(words)[-1].strip(" .,:;")


def phrase_match(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Phrases "<target> in <site> <modality>": equal as a whole, and by their parts.

    `phrase-match` compares the whole phrase, `target-match` the words before the first " in ",
    `place-match` those after it. Sides count: a left kidney is no right kidney. The place has no
    value where no reference names one. Of several references the best one counts.
    """
    check_lengths(predictions, references)
    stated = [statement_of(text or "") for text in predictions]
    truths = [[statement_of(text) for text in texts] for texts in as_references(references)]
    signature = f"exact|statement|{ANSWER_SIGNATURE}"

    def part(side: int) -> list[float]:
        return best_of(
            stated,
            truths,
            lambda a, b: float(same_answer(split_phrase(a)[side], split_phrase(b)[side])),
        )

    whole = best_of(stated, truths, lambda a, b: float(same_answer(a, b)))
    results = [
        mean_result("phrase-match", whole, signature, resampling),
        mean_result("target-match", part(0), f"{signature}|target", resampling),
    ]
    placed = [
        index for index, texts in enumerate(truths) if any(split_phrase(text)[1] for text in texts)
    ]
    places = part(1)
    place = mean_result(
        "place-match",
        [places[index] for index in placed],
        f"{signature}|place",
        resampling.part(placed),
    )
    if not placed:
        place = undefined(place, "no phrase of these items names a place")
    return [*results, place]


def split_phrase(phrase: str) -> tuple[str, str]:
    """Return target and place of "<target> in <site> <modality>", normalized."""
    target, _, place = phrase.partition(" in ")
    return normalize_answer(target), normalize_answer(place)
