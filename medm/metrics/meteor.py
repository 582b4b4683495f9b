"""METEOR (Banerjee and Lavie 2005); the name of the result says which program computed it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from medm.errors import DeviceError
from medm.metrics.base import (
    DEFAULT,
    MetricResult,
    References,
    Resampling,
    as_references,
    check_lengths,
    mean_result,
    optional,
    undefined,
)
from medm.metrics.ptb import PTB_SIGNATURE, ptb_tokens
from medm.metrics.words import fraction_outside_latin, unsegmented


class _NoSynonyms:
    """WordNet without synonyms for NLTK: exact and stem matches remain."""

    @staticmethod
    def synsets(word: str) -> list[Any]:
        return []


def wordnet_available() -> bool:
    """Return True if NLTK is installed and finds the WordNet files."""
    try:
        _wordnet()
    except DeviceError:
        return False
    return True


def meteor(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """NLTK's METEOR with exact, stem and WordNet synonym matches.

    NLTK looks words up by their stems ("larg" for "large"), so it finds fewer synonyms than
    METEOR's own program.

    Raises:
        DeviceError: NLTK or the WordNet files are missing. Nothing is downloaded, and no weaker
            variant takes its name.
    """
    return _nltk_meteor(
        "meteor", "exact+stem+wordnet", _wordnet(), predictions, references, resampling
    )


def meteor_exact_stem(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """NLTK's METEOR with exact and stem matches only.

    It is lower than METEOR wherever synonyms would match.
    """
    return _nltk_meteor(
        "meteor-exact-stem", "exact+stem", _NoSynonyms(), predictions, references, resampling
    )


def meteor_java(
    predictions: Sequence[str], references: References, *, resampling: Resampling = DEFAULT
) -> list[MetricResult]:
    """METEOR 1.5 of the COCO caption toolkit (mean of its segment scores) on PTB-like tokens.

    Raises:
        DeviceError: pycocoevalcap or Java is missing.
    """
    check_lengths(predictions, references)
    module = optional("pycocoevalcap.meteor.meteor", package="pycocoevalcap", extra="text-metrics")
    if shutil.which("java") is None:
        raise DeviceError(
            "meteor-java needs a Java runtime (java on PATH); meteor and meteor-exact-stem need "
            "none"
        )
    scores: list[float] = []
    if predictions:
        # The Java side reads line by line and waits forever on a text with a line break: only
        # tokens go in.
        texts = {index: [" ".join(ptb_tokens(text))] for index, text in enumerate(predictions)}
        targets = {
            index: [" ".join(ptb_tokens(text)) for text in item]
            for index, item in enumerate(as_references(references))
        }
        _, scores = module.Meteor().compute_score(targets, texts)
    result = mean_result(
        "meteor-java", scores, f"meteor-1.5|coco-caption|{PTB_SIGNATURE}|segment-mean", resampling
    )
    return _in_english(result, references)


def _wordnet() -> Any:
    """NLTK's WordNet reader, or a `DeviceError` that names what is missing."""
    optional("nltk", package="nltk", extra="text-metrics")
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise DeviceError(
            "meteor needs the WordNet files, which NLTK does not find. Put them under "
            "<folder>/corpora/wordnet and set NLTK_DATA=<folder> (docs/benchmarks.md says how), "
            "or use meteor-exact-stem, which needs none"
        ) from None
    return wordnet


def _nltk_meteor(
    name: str,
    stages: str,
    wordnet: Any,
    predictions: Sequence[str],
    references: References,
    resampling: Resampling,
) -> list[MetricResult]:
    check_lengths(predictions, references)
    module = optional("nltk.translate.meteor_score", package="nltk", extra="text-metrics")
    scores = []
    for prediction, texts in zip(predictions, as_references(references), strict=True):
        words, targets = ptb_tokens(prediction), [ptb_tokens(text) for text in texts]
        scores.append(float(module.meteor_score(targets, words, wordnet=wordnet)) if words else 0.0)
    signature = f"nltk:{version('nltk')}|{stages}|alpha:0.9|beta:3|gamma:0.5|{PTB_SIGNATURE}|mean"
    return _in_english(mean_result(name, scores, signature, resampling), references)


def _in_english(result: MetricResult, references: References) -> list[MetricResult]:
    """Return the result, without its number if the references are in another alphabet.

    METEOR's stems and synonyms are English.
    """
    reason = unsegmented(references, "separate the words by blanks and use bleu or rouge")
    foreign = fraction_outside_latin(references)
    if reason is None and foreign > 0.5:
        reason = (
            f"{foreign:.0%} of the letters of the references are not Latin, and its stems and "
            "synonyms are English"
        )
    return [result if reason is None else undefined(result, reason)]
