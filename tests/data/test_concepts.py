"""Phrases of masks: counted by record, long and rare ones without their words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medm.data.check import check, merged
from medm.data.concepts import MAX_WORDS, MIN_RECORDS, ConceptCounts
from medm.types import MaskSource, Sample, Turn
from tests.data.test_check import source
from tests.data.tiny import conversations, record, write_image


def named(*phrases: str | None, absent: bool = False) -> Sample:
    masks = tuple(
        MaskSource(
            token=0, media=0, field="masks.0", path=None if absent else "m.png", phrase=phrase
        )
        for phrase in phrases
    )
    return Sample(turns=(Turn("user", ("?",)),), masks=masks)


def counted(*samples: Sample) -> ConceptCounts:
    counts = ConceptCounts()
    for sample in samples:
        counts.add(sample)
    return counts


def test_a_phrase_counts_once_a_record() -> None:
    counts = counted(*[named("Left lung.", "left  LUNG", "cyst")] * MIN_RECORDS, named())
    assert counts.records == MIN_RECORDS
    assert counts.as_json() == {
        "min_records": MIN_RECORDS,
        "records": MIN_RECORDS,
        "concepts": {
            "cyst": {"records": MIN_RECORDS, "absent": 0},
            "left lung": {"records": MIN_RECORDS, "absent": 0},
        },
        "other_phrases": 0,
        "other_records": 0,
        "unnamed_records": 0,
    }


def test_rare_and_long_phrases_keep_no_words() -> None:
    report = " ".join(["Mrs Example has a nodule"] * MAX_WORDS)
    counts = counted(
        *[named("liver")] * MIN_RECORDS,
        *[named("cyst of Mrs Example")] * (MIN_RECORDS - 1),
        *[named(report)] * MIN_RECORDS,
        named(None),
    )
    found = counts.as_json()
    assert list(found["concepts"]) == ["liver"]
    assert "Example" not in str(found) and "example" not in str(found)
    assert found["other_phrases"] == 1
    assert found["other_records"] == 2 * MIN_RECORDS - 1
    assert found["unnamed_records"] == 1


def test_absent_targets_are_told_apart() -> None:
    half = named("cyst", absent=True)
    counts = counted(*[named("cyst")] * MIN_RECORDS, half, half)
    assert counts.as_json()["concepts"] == {"cyst": {"records": MIN_RECORDS + 2, "absent": 2}}


def test_what_an_earlier_stage_named_stays() -> None:
    first = counted(*[named("liver")] * MIN_RECORDS).as_json()
    second = counted(named("liver"), *[named("spleen")] * 2 * MIN_RECORDS).as_json(earlier=first)
    assert list(second["concepts"].items()) == [
        ("spleen", {"records": 2 * MIN_RECORDS, "absent": 0}),
        ("liver", {"records": MIN_RECORDS + 1, "absent": 0}),
    ]
    assert second["records"] == 3 * MIN_RECORDS + 1


def test_a_check_counts_the_phrases_of_good_records_of_all_ranks(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")

    def masked(phrase: str, file: str = "a.png") -> dict[str, Any]:
        entry = {"file": file, "phrase": phrase}
        return record("<image>", "It is [SEG].", image="a.png", masks=[entry])

    rows = [masked("liver"), masked("liver"), masked("cyst", "gone.png"), record("hi", "hello")]
    files = [source(tmp_path, *rows)]
    whole = check(files, conversations()).concepts
    assert (whole.records, dict(whole.phrases)) == (2, {"liver": 2})
    parts = merged([check(files, conversations(), shard=(rank, 2)) for rank in range(2)])
    assert parts.concepts == whole
