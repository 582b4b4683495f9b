"""Three variants of BLEU that the literature uses under one name. All values are fractions.

Papineni et al. 2002; sacrebleu: Post 2018. The COCO and NLTK variants are written from their
formulas.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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
    summed_result,
    undefined,
    with_note,
)
from medm.metrics.ptb import PTB_SIGNATURE, ptb_tokens
from medm.metrics.words import ANSWER_SIGNATURE, answer_words, ngrams, unsegmented

ORDERS = 4

Statistics = np.ndarray
"""(2 * ORDERS + 2,): matches of order 1 to 4, candidates of order 1 to 4, length, reference
length."""


def bleu(
    predictions: Sequence[str],
    references: References,
    *,
    tokenize: str = "13a",
    resampling: Resampling = DEFAULT,
) -> list[MetricResult]:
    """Corpus BLEU-1 to 4 of sacrebleu (exponential smoothing), divided by 100.

    An order is undefined where no reference has as many words. So are all of them where the
    references are in a script without spaces and the tokenizer is none for it.
    """
    check_lengths(predictions, references)
    sacrebleu = optional("sacrebleu.metrics", package="sacrebleu", extra="text-metrics")
    scorer = sacrebleu.BLEU(effective_order=True, tokenize=tokenize)
    rows = []
    for prediction, texts in zip(predictions, as_references(references), strict=True):
        score = scorer.sentence_score(prediction, list(texts))
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    statistics = np.asarray(rows, dtype=np.float64).reshape(len(rows), 2 * ORDERS + 2)
    results = []
    for order in range(1, ORDERS + 1):
        corpus = sacrebleu.BLEU(max_ngram_order=order, tokenize=tokenize)
        if (
            predictions
        ):  # sacrebleu's signature knows its number of references only after a first score
            corpus.corpus_score(
                list(predictions[:1]), [[text] for text in as_references(references[:1])[0]]
            )
        name = f"bleu-{order}"
        signature = f"sacrebleu|{corpus.get_signature().format()}|order:{order}|scale:1"
        results.append(
            summed_result(name, statistics, _sacrebleu_value(scorer, order), signature, resampling)
        )
    if (
        tokenize in _OF_SPACES
        and (reason := unsegmented(references, "set 'tokenize: zh', or 'char'")) is not None
    ):
        return [undefined(result, reason) for result in results]
    words = [
        [scorer.tokenizer(text).split() for text in texts] for texts in as_references(references)
    ]
    return _long_enough(results, words)


_OF_SPACES = ("13a", "intl")
"""Tokenizers of sacrebleu that split at spaces and punctuation."""


def _long_enough(
    results: Sequence[MetricResult], references: Sequence[Sequence[Sequence[str]]]
) -> list[MetricResult]:
    """Drop the orders of corpus BLEU for which every reference is too short."""
    longest = max((len(words) for texts in references for words in texts), default=0)
    return [
        undefined(result, f"undefined: no reference has {order} {'words' if order > 1 else 'word'}")
        if references and longest < order
        else result
        for order, result in enumerate(results, 1)
    ]


def _sacrebleu_value(scorer: Any, order: int) -> Callable[[np.ndarray], np.ndarray]:
    def value(row: np.ndarray) -> float:
        counts, totals = (
            row[:order].astype(int).tolist(),
            row[ORDERS : ORDERS + order].astype(int).tolist(),
        )
        score = scorer.compute_bleu(
            counts, totals, int(row[-2]), int(row[-1]), smooth_method="exp", max_ngram_order=order
        )
        return score.score / 100

    return lambda sums: np.array([value(row) for row in sums])


def bleu_coco(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """Corpus BLEU-1 to BLEU-4 as in the COCO caption toolkit.

    PTB-like tokens, closest reference length, no smoothing.
    """
    check_lengths(predictions, references)
    targets = [[ptb_tokens(text) for text in texts] for texts in as_references(references)]
    rows = [
        overlap(ptb_tokens(prediction), texts)
        for prediction, texts in zip(predictions, targets, strict=True)
    ]
    statistics = np.asarray(rows, dtype=np.float64).reshape(len(rows), 2 * ORDERS + 2)
    results = [
        summed_result(
            f"bleu-coco-{order}",
            statistics,
            partial(coco_value, order=order),
            f"coco-caption|{PTB_SIGNATURE}|smooth:none|len:closest|order:{order}",
            resampling,
        )
        for order in range(1, ORDERS + 1)
    ]
    if (
        reason := unsegmented(references, "separate the words by blanks first, or use bleu")
    ) is not None:
        return [undefined(result, reason) for result in results]
    return _long_enough(results, targets)


def coco_value(sums: np.ndarray, order: int) -> np.ndarray:
    """Return BLEU of an order from sums (R, 2 * ORDERS + 2).

    The toolkit's guards against division by zero are included.
    """
    tiny, small = 1e-15, 1e-9
    precisions = (sums[:, :order] + tiny) / (sums[:, ORDERS : ORDERS + order] + small)
    length_ratio = (sums[:, -2] + tiny) / (sums[:, -1] + small)
    penalty = np.exp(np.minimum(0.0, 1 - 1 / length_ratio))
    return np.exp(np.log(precisions).mean(axis=1)) * penalty


def overlap(words: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return an item's row of statistics.

    Clipped matches, candidates, length, and length of the closest reference.
    """
    matches, candidates = [], []
    for size in range(1, ORDERS + 1):
        counts = ngrams(words, size)
        most = ngrams(references[0], size)
        for other in references[1:]:
            most |= ngrams(other, size)
        matches.append(float((counts & most).total()))
        candidates.append(float(max(0, len(words) - size + 1)))
    closest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    return [*matches, *candidates, float(len(words)), float(closest)]


def bleu_nltk(
    predictions: Sequence[str],
    references: References,
    *,
    resampling: Resampling = DEFAULT,
    smoothing: str = "epsilon",
) -> list[MetricResult]:
    """Mean over items of NLTK's sentence BLEU-1 to 4, on words of the normalized answers.

    An order is undefined where all references are shorter.
    """
    check_lengths(predictions, references)
    pairs = [
        (answer_words(prediction), [answer_words(text) for text in texts])
        for prediction, texts in zip(predictions, as_references(references), strict=True)
    ]
    signature = f"nltk-sentence-mean|{ANSWER_SIGNATURE}"
    results = nltk_results("bleu-nltk", pairs, signature, resampling, smoothing=smoothing)
    return _long_enough(results, [texts for _, texts in pairs])


def nltk_results(
    name: str,
    pairs: Sequence[tuple[list[str], list[list[str]]]],
    signature: str,
    resampling: Resampling,
    *,
    smoothing: str,
) -> list[MetricResult]:
    """Mean sentence BLEU-1 to BLEU-4 of tokenized pairs.

    A note gives the number of references that are shorter than the order.
    """
    results = []
    for order in range(1, ORDERS + 1):
        scores = [sentence_bleu(words, texts, order, smoothing=smoothing) for words, texts in pairs]
        result = mean_result(
            f"{name}-{order}", scores, f"{signature}|smooth:{smoothing}|order:{order}", resampling
        )
        short = sum(max(map(len, texts)) < order for _, texts in pairs)
        note = (
            f"{short} of {len(pairs)} references have fewer than {order} words: a right reply "
            "scores low there"
        )
        results.append(with_note(result, note if short and smoothing != "add-one" else None))
    return results


def sentence_bleu(
    words: Sequence[str],
    references: Sequence[Sequence[str]],
    order: int,
    *,
    smoothing: str = "none",
) -> float:
    """NLTK's `sentence_bleu` with equal weights up to `order`.

    Without smoothing an order without a match counts as the smallest positive float, so that the
    score is about 1e-308 ** (1 / order): a right one-word answer has BLEU-2 of 1.5e-154, not 1. 0
    without any matching word.
    """
    row = overlap(words, references)
    if row[0] == 0:
        return 0.0
    logarithms = []
    for size in range(order):
        matched, total = row[size], max(1.0, row[ORDERS + size])
        if smoothing == "add-one" and size > 0:
            matched, total = matched + 1, total + 1
        elif matched == 0:
            matched = 0.1 if smoothing == "epsilon" else sys.float_info.min * total
        logarithms.append(math.log(matched / total))
    length, closest = row[-2], row[-1]
    penalty = 1.0 if length > closest else math.exp(1 - closest / length)
    return penalty * math.exp(sum(logarithms) / order)
