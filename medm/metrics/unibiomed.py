"""Original scoring of UniBiomed (arXiv 2504.21336, public code), with its quirks.

For comparison with published numbers. The corrected metrics are in `medm.metrics.grounded` and
`medm.metrics.masks`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    Resampling,
    check_lengths,
    is_blank,
    mean_result,
    optional,
    ratio,
    result_of,
    undefined,
    with_note,
)
from medm.metrics.masks import dice_of

FIRST = 300
"""Annotations of a set that the published script of 2-D segmentation scores."""
_SIDE = 512
"""Rows and columns of the slices that distances are measured on."""
_LITTLE = 1e-6
"""Added to the number of classes and of samples."""


def class_means(
    scores: Mapping[str, Sequence[float]],
    phrases: Sequence[str],
    resampling: Resampling = DEFAULT,
    *,
    scored: str = f"first:{FIRST} of a set",
) -> list[MetricResult]:
    """Means over classes and over samples of Dice and IoU.

    Sums are divided by the number plus 1e-6, as published.

    Args:
        scores: by name of the metric, a number for each annotation that is scored.
        phrases: class of each annotation.
        resampling: of these annotations.
        scored: what is scored of a set, for the signature.
    """
    names = sorted(set(phrases))
    member = np.array([[phrase == name for name in names] for phrase in phrases], dtype=float)
    member = member.reshape(len(phrases), len(names))
    results = []
    for name, values in scores.items():
        numbers = np.asarray(values, dtype=np.float64)

        def of_classes(counts: np.ndarray, numbers: np.ndarray = numbers) -> np.ndarray:
            sums, sizes = counts @ (member * numbers[:, None]), counts @ member
            means = np.where(sizes > 0, sums / (sizes + _LITTLE), 0.0)
            return means.sum(axis=1) / ((sizes > 0).sum(axis=1) + _LITTLE)

        def of_samples(counts: np.ndarray, numbers: np.ndarray = numbers) -> np.ndarray:
            return counts @ numbers / (counts.sum(axis=1) + _LITTLE)

        for kind, mean in (("class", of_classes), ("sample", of_samples)):
            result = result_of(
                f"unibiomed-{name}-{kind}-mean",
                mean,
                len(numbers),
                f"unibiomed|{scored}|empty truth:skipped|{kind} mean|+1e-6",
                resampling,
            )
            if not len(numbers):
                result = undefined(result, "every truth that the original scores is empty")
            results.append(result)
    return results


def matched_dice_of(predictions: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float:
    """Return the mean Dice of pairs with a common pixel, matched greedily one to one.

    Pairs are taken in the order of their Dice; two empty masks have Dice 1. Known flaw: masks
    without partner are left out, so that a finding more or less costs nothing. 0 without any pair.

    Corrected: `medm.metrics.grounded.paired_dice_of`.
    """
    table = np.array([[dice_of(a, b) for b in references] for a in predictions])
    table = table.reshape(len(predictions), len(references))
    taken: list[float] = []
    while table.size and table.max() > 0:
        row, column = np.unravel_index(int(table.argmax()), table.shape)
        taken.append(float(table[row, column]))
        table = np.delete(np.delete(table, row, axis=0), column, axis=1)
    return float(np.mean(taken)) if taken else 0.0


def phrase(
    predictions: Sequence[str], references: Sequence[str], *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Fraction of replies that contain the phrase in lower case and a full stop.

    Known flaws: "no pneumonia in chest x-ray." contains "pneumonia in chest x-ray.", and a reply
    that lists every phrase is always right.

    Corrected: `phrase-match`.
    """
    check_lengths(predictions, references)
    scores = [
        float(not is_blank(reply) and f"{truth.strip().rstrip('.').lower()}." in reply)
        for reply, truth in zip(predictions, references, strict=True)
    ]
    return [mean_result("unibiomed-phrase", scores, "unibiomed|substring:phrase+stop", resampling)]


def region(
    predictions: Sequence[str], references: Sequence[str], *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Fraction of phrases with the right target, whose modality occurs anywhere in the reply.

    The target are the words before " in ", the modality is the last word. Known flaws: sides are
    removed, so that a left kidney is a right one, and the site is not compared.

    Corrected: `phrase-match`.
    """
    check_lengths(predictions, references)
    scores = []
    for reply, truth in zip(predictions, references, strict=True):
        mine, theirs = _without_sides(reply or ""), _without_sides(truth)
        modality = theirs.split()[-1] if theirs.split() else ""
        scores.append(
            float(
                bool(modality)
                and mine.split(" in ")[0] == theirs.split(" in ")[0]
                and modality in mine
            )
        )
    return [
        mean_result(
            "unibiomed-region",
            scores,
            "unibiomed|sides:removed|target:equal|modality:contained",
            resampling,
        )
    ]


def _without_sides(text: str) -> str:
    words = re.sub(r"\b(left|right)\b", " ", text.lower())
    return " ".join(words.split()).rstrip(".")


def surfaces_of(prediction: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Return HD95 and NSD at 2 as published, in voxels of slices resized to 512 x 512.

    HD95 is a percentile over the voxels in which the masks differ, by their distance to the other
    mask, not over surfaces; nan where a mask is empty or both are equal. Spacing is ignored.

    Args:
        prediction: (slices, rows, columns) of 0 and 1.
        reference: likewise.

    Corrected: `hd95`, `nsd`.
    """
    ndimage = optional("scipy.ndimage", package="scipy", extra="surface-metrics")
    mine, theirs = (_resized(np.asarray(mask)) for mask in (prediction, reference))
    if not mine.any() or not theirs.any():
        return {"hd95": math.nan, "nsd": 0.0}
    to_mine, to_theirs = (ndimage.distance_transform_edt(~mask) for mask in (mine, theirs))
    apart = np.concatenate([to_theirs[mine & ~theirs], to_mine[theirs & ~mine]])
    skins = [mask & ~ndimage.binary_erosion(mask) for mask in (mine, theirs)]
    near = int((to_theirs[skins[0]] <= 2).sum()) + int((to_mine[skins[1]] <= 2).sum())
    total = int(skins[0].sum()) + int(skins[1].sum())
    return {
        "hd95": float(np.percentile(apart, 95)) if apart.size else math.nan,
        "nsd": float(near / (total + 1e-8)),
    }


def _resized(mask: np.ndarray) -> np.ndarray:
    """Slices at 512 x 512 as Pillow resizes gray images; every trace of the mask is inside."""
    if mask.shape[1:] == (_SIDE, _SIDE):
        return mask.astype(bool)
    from PIL import Image

    return np.stack(
        [
            np.asarray(Image.fromarray(plane.astype(np.uint8) * 255).resize((_SIDE, _SIDE))) > 0
            for plane in mask
        ]
    )


def defined_mean(
    name: str, values: Sequence[float], signature: str, resampling: Resampling
) -> MetricResult:
    """Return the mean of the distances that are defined; a note counts the others."""
    numbers = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(numbers)
    filled = np.where(known, numbers, 0.0)
    result = result_of(
        name,
        lambda counts: ratio(counts @ filled, counts @ known),
        len(numbers),
        signature,
        resampling,
    )
    left_out = int((~known).sum())
    if left_out == len(numbers):
        return undefined(result, "no item has a distance: a mask is empty, or both are equal")
    note = f"{left_out} of {len(numbers)} items with an empty mask, or equal ones, are left out"
    return with_note(result, note if left_out else None)
