"""CIDEr-D (Vedantam et al. 2015), as the COCO caption toolkit computes it, without Java."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    References,
    Resampling,
    as_references,
    check_lengths,
    mean_result,
    undefined,
    with_note,
)
from medm.metrics.ptb import PTB_SIGNATURE, ptb_tokens
from medm.metrics.words import ngrams, unsegmented

ORDERS = 4
SIGMA = 6.0
"""Width of the Gaussian length penalty, in words."""

Vector = dict[tuple[str, ...], float]


def cider_d(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Mean CIDEr-D, 0 to 10.

    Document frequencies come from these references: words that all of them hold weigh nothing.
    Where no word weighs anything (a single item, or the same report for all) the metric is
    undefined.
    """
    n = check_lengths(predictions, references)
    targets = [[ptb_tokens(text) for text in texts] for texts in as_references(references)]
    scores = cider_d_scores([ptb_tokens(text) for text in predictions], targets)
    signature = f"cider-d|{PTB_SIGNATURE}|n:4|sigma:6|df:references|scale:10|mean"
    result = mean_result("cider-d", scores, signature, resampling)
    if n == 1:
        return [
            undefined(
                result,
                "undefined for one item: words are weighted by the number of items without them",
            )
        ]
    reason = unsegmented(references, "separate the words by blanks first")
    if reason is not None:
        return [undefined(result, reason)]
    # An item whose own reference would score 0 carries no information about its prediction.
    best = cider_d_scores([texts[0] for texts in targets], targets)
    silent = sum(score == 0 for score in best)
    if n and silent == n:
        return [
            undefined(
                result,
                "undefined: every word of the references is in all of them and weighs nothing",
            )
        ]
    return [
        with_note(
            result,
            f"{silent} of {n} items score 0 whatever the reply: all words of their references are "
            "in every reference"
            if silent
            else None,
        )
    ]


def cider_d_scores(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> list[float]:
    """CIDEr-D of each tokenized item."""
    document_frequency: Counter[tuple[str, ...]] = Counter()
    for texts in references:
        document_frequency.update({gram for text in texts for gram in _all_ngrams(text)})
    documents = math.log(len(references)) if references else 0.0

    def vectors(words: Sequence[str]) -> tuple[list[Vector], list[float]]:
        """tf-idf vector of each order, and their lengths."""
        by_order: list[Vector] = [{} for _ in range(ORDERS)]
        for gram, count in _all_ngrams(words).items():
            by_order[len(gram) - 1][gram] = count * (
                documents - math.log(max(1, document_frequency[gram]))
            )
        return by_order, [
            math.sqrt(sum(weight * weight for weight in vector.values())) for vector in by_order
        ]

    scores = []
    for words, texts in zip(predictions, references, strict=True):
        mine, my_norms = vectors(words)
        total = 0.0
        for text in texts:
            theirs, their_norms = vectors(text)
            # The toolkit measures length in bigrams, which leaves the difference as it is in all
            # but empty texts.
            gap = max(0, len(words) - 1) - max(0, len(text) - 1)
            penalty = math.exp(-(gap**2) / (2 * SIGMA**2))
            total += penalty * sum(map(_clipped_cosine, mine, theirs, my_norms, their_norms))
        scores.append(10 * total / (ORDERS * len(texts)))
    return scores


def _all_ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    counts: Counter[tuple[str, ...]] = Counter()
    for size in range(1, ORDERS + 1):
        counts.update(ngrams(words, size))
    return counts


def _clipped_cosine(mine: Vector, theirs: Vector, my_norm: float, their_norm: float) -> float:
    """Cosine with weights clipped to those of the reference.

    Repeating a word gains nothing.
    """
    dot = sum(
        min(weight, theirs[gram]) * theirs[gram] for gram, weight in mine.items() if gram in theirs
    )
    return dot / (my_norm * their_norm) if my_norm and their_norm else dot
