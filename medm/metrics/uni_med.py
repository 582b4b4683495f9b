"""Original scoring of Uni-Med (arXiv 2409.17508, code of 2025-11), with its quirks.

For comparison with published numbers.

Not for anything else: each function says what is wrong with it and which metric is the corrected
one. They differ from the published code in one point: a blank reply never scores, even where the
reference consists of articles or punctuation alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    References,
    Resampling,
    as_references,
    check_lengths,
    is_blank,
    mean_result,
    undefined,
)
from medm.metrics.bleu import nltk_results
from medm.metrics.boxes import Box, iou
from medm.metrics.match import best_of
from medm.metrics.words import unsegmented

SIGNATURE = "uni-med|norm:vqa-v2-as-published"

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(
    r"\.(?!\d)"
)  # the published look-behind is written as a look-ahead that is always true
_FULL_STOPS_REMOVED = (
    32  # re.UNICODE, handed over where the greatest number of substitutions belongs
)
_NUMBERS = dict(
    zip(
        [
            "none",
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
        ],
        ["0", *map(str, range(11))],
        strict=True,
    )
)
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def _short_forms() -> dict[str, str]:
    """Return every spelling that lacks one apostrophe -> the full one.

    The oddities of the published table are kept.
    """
    forms = {}
    for full in _CONTRACTIONS.split():
        pieces = full.split("'")
        for left_out in range(1, len(pieces)):
            forms["'".join(pieces[:left_out]) + "'".join(pieces[left_out:])] = full
    return forms | {
        "somebody'd": "somebodyd",
        "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at",
    }


_SHORT_FORMS = _short_forms()


def normalise(text: str) -> str:
    """Apply the VQA-v2 normalizer as Uni-Med runs it.

    Known flaws: "none" becomes "0"; whether a mark is deleted or becomes a blank depends on the
    rest of the text ("t2-w" and "t2 - w" differ from "t2-w, flair"); at most 32 full stops go.
    Corrected: `medm.metrics.words.normalize_answer`.
    """
    groups_digits = _DIGIT_COMMA.search(text) is not None
    result = text
    for mark in _MARKS:
        touches_blank = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if touches_blank or groups_digits else " ")
    result = _FULL_STOP.sub("", result, count=_FULL_STOPS_REMOVED)
    words = [_NUMBERS.get(word, word) for word in result.lower().split()]
    words = [_SHORT_FORMS.get(word, word) for word in words if word not in ("a", "an", "the")]
    return " ".join(words)


def clean_prediction(text: str) -> str:
    """Clean a generated text as the published scripts do before scoring."""
    return text.lower().replace("<unk>", "").strip()


def _normalized(prediction: str) -> str | None:
    """Return the normalized prediction, or None if it is empty, which equals no reference."""
    text = clean_prediction(prediction)
    return None if is_blank(text) else normalise(text)


def match(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Exact match after `normalise`. Corrected: `normalised-match`."""
    scores = best_of(predictions, references, lambda a, b: float(_normalized(a) == normalise(b)))
    return [mean_result("uni-med-match", scores, SIGNATURE, resampling)]


def bleu(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Mean unsmoothed sentence BLEU-1 to BLEU-4.

    Known flaw: a correct one-word answer has a BLEU-4 of 1e-231. Corrected: `bleu`.
    """
    check_lengths(predictions, references)
    pairs = [
        (
            normalise(clean_prediction(prediction)).split(),
            [normalise(text).split() for text in texts],
        )
        for prediction, texts in zip(predictions, as_references(references), strict=True)
    ]
    results = nltk_results("uni-med-bleu", pairs, SIGNATURE, resampling, smoothing="none")
    reason = unsegmented(references, "use bleu-nltk, which counts characters")
    return results if reason is None else [undefined(result, reason) for result in results]


def token_f1(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Token F1 in which every repetition of a shared word is a hit.

    Known flaw: "lung lung lung" for "lung" is 1. Corrected: `token-f1`.
    """
    scores = best_of(predictions, references, _repeating_f1)
    result = mean_result("uni-med-token-f1", scores, SIGNATURE, resampling)
    reason = unsegmented(references, "use token-f1, which counts characters")
    return [result if reason is None else undefined(result, reason)]


def _repeating_f1(prediction: str, reference: str) -> float:
    mine = Counter(normalise(clean_prediction(prediction)).split())
    theirs = Counter(normalise(reference).split())
    hits = sum(count for word, count in mine.items() if word in theirs)
    missed = sum(count for word, count in theirs.items() if word not in mine)
    if not hits:
        return 0.0
    precision, recall = hits / mine.total(), hits / (hits + missed)
    return 2 * precision * recall / (precision + recall)


def closed_accuracy(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Fraction of predictions that contain the reference anywhere.

    Known flaw: "no" is in "abnormal". Corrected: `closed-accuracy`.
    """
    scores = best_of(
        predictions,
        references,
        lambda a, b: float((text := _normalized(a)) is not None and normalise(b) in text),
    )
    return [mean_result("uni-med-closed-accuracy", scores, f"{SIGNATURE}|substring", resampling)]


_BOX = re.compile(r"\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}")


def parse_box(text: str, extent: Sequence[float]) -> Box | None:
    """Return the box at the very start of a text, in pixels, or None.

    It is neither clipped nor put in order.
    """
    found = _BOX.match(clean_prediction(text).replace(" ", ""))
    if not found:
        return None
    return tuple(
        int(n) / 100 * size for n, size in zip(found.groups(), [*extent, *extent], strict=True)
    )


def box_iou(
    predictions: Sequence[Box | str | None],
    references: Sequence[Box | str],
    *,
    extents: Sequence[Sequence[float]] | None = None,
    codec: str = "uni-med",
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Mean IoU and accuracy above 0.5, with 1 added to every side.

    Corrected: `box-iou`, `box-accuracy`.

    Known flaws: one pixel is added to coordinates that are not pixel numbers, which favors small
    boxes; swapped corners are scored as they stand; a box anywhere but at the start is not seen.

    `extents` are (width, height) of each image; without them coordinates are those of the 0..100
    grid.
    """
    n = check_lengths(predictions, references)
    if codec != "uni-med":
        raise ValueError(f"uni-med-box-iou scores boxes of the codec 'uni-med', found {codec!r}")
    sizes = extents if extents is not None else [(100.0, 100.0)] * n
    scores = []
    for guess, truth, extent in zip(predictions, references, sizes, strict=True):
        guessed = parse_box(guess, extent) if isinstance(guess, str) else guess
        true = parse_box(truth, extent) if isinstance(truth, str) else truth
        if true is None:
            raise ValueError(f"no box can be read from the reference {truth!r}")
        scores.append(0.0 if guessed is None else _published_iou(guessed, true))
    return [
        mean_result("uni-med-box-iou", scores, "uni-med|inclusive:+1|anchored", resampling),
        mean_result(
            "uni-med-box-accuracy",
            [float(s > 0.5) for s in scores],
            "uni-med|inclusive:+1|iou>0.5",
            resampling,
        ),
    ]


def _published_iou(guess: Box, truth: Box) -> float:
    """IoU as `iou(inclusive=1)`, except that swapped corners give negative sides.

    Areas can therefore have either sign.
    """
    if guess[2] >= guess[0] and guess[3] >= guess[1]:
        return iou(guess, truth, inclusive=1.0)
    shared = 1.0
    for axis in (0, 1):
        shared *= max(
            0.0, min(guess[axis + 2], truth[axis + 2]) - max(guess[axis], truth[axis]) + 1
        )
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (guess, truth)]
    union = sum(areas) - shared
    return shared / union if union else 0.0


def first_words(text: str, limit: int = 50) -> str:
    """Collapse blanks and cut to 50 words, as Uni-Med does with every text.

    This includes the references of the test split.

    Known flaw: reports scored against their first 50 words are not comparable with the literature.
    """
    return " ".join(text.split()[:limit])
