"""Words that records name masks by: what a grounded model is trained to name.

Only the phrases of masks are counted, never the text of a report. A phrase of many words, or of few
records, may tell of a patient: it is counted without its words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medm.types import BaseSample, JsonObject

MIN_RECORDS = 5
"""Fewest records of a phrase whose words are kept."""
MAX_WORDS = 12
"""Most words of a phrase that is kept; longer ones are sentences of reports."""


@dataclass(slots=True)
class ConceptCounts:
    """Phrases of the masks of records."""

    records: int = 0
    """Records with masks."""
    phrases: Counter[str] = field(default_factory=Counter)
    """Records by phrase; one that names it twice counts once."""
    absent: Counter[str] = field(default_factory=Counter)
    """Of those: records that say that it is not in the image."""
    long: int = 0
    """Records with a phrase of too many words."""
    unnamed: int = 0
    """Records with a mask that no phrase belongs to."""

    def add(self, sample: BaseSample) -> None:
        """Count the masks of a record."""
        if not sample.masks:
            return
        named: dict[str, bool] = {}
        for mask in sample.masks:
            phrase = _normalized(mask.phrase)
            named[phrase] = mask.absent and named.get(phrase, True)
        self.records += 1
        self.unnamed += "" in named
        self.long += any(len(phrase.split()) > MAX_WORDS for phrase in named)
        for phrase, absent in named.items():
            if 0 < len(phrase.split()) <= MAX_WORDS:
                self.phrases[phrase] += 1
                self.absent[phrase] += absent

    def merge(self, other: ConceptCounts) -> None:
        """Add the counts of other records."""
        self.records += other.records
        self.phrases.update(other.phrases)
        self.absent.update(other.absent)
        self.long += other.long
        self.unnamed += other.unnamed

    def as_json(self, *, earlier: Mapping[str, Any] | None = None) -> JsonObject:
        """Return what a model folder keeps.

        Args:
            earlier: of the model that the training started from; its counts are added.
        """
        before = dict(earlier or {})
        known: dict[str, dict[str, int]] = {
            phrase: dict(counts) for phrase, counts in before.get("concepts", {}).items()
        }
        for phrase, count in self.phrases.items():
            if count >= MIN_RECORDS or phrase in known:
                entry = known.setdefault(phrase, {"records": 0, "absent": 0})
                entry["records"] += count
                entry["absent"] += self.absent[phrase]
        rare = [count for phrase, count in self.phrases.items() if phrase not in known]
        ordered = sorted(known.items(), key=lambda item: (-item[1]["records"], item[0]))
        return {
            "min_records": MIN_RECORDS,
            "records": before.get("records", 0) + self.records,
            "concepts": dict(ordered),
            "other_phrases": before.get("other_phrases", 0) + len(rare),
            "other_records": before.get("other_records", 0) + sum(rare) + self.long,
            "unnamed_records": before.get("unnamed_records", 0) + self.unnamed,
        }


def _normalized(phrase: str | None) -> str:
    return " ".join((phrase or "").casefold().split()).strip(" .,:;")
