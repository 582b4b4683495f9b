"""Rules that choose a caption, the marks of UniMed-CLIP, and which pairs count as equal."""

from __future__ import annotations

import subprocess
import sys

import pytest

from medm.data.captions import candidates, same_label
from medm.errors import DataError


def marked(source: str, *captions: str) -> str:
    """Captions as the published shards hold them: each with its mark behind it."""
    return "".join(f"{caption}._{source}_" for caption in captions)


TEN = [f"caption {number}" for number in range(10)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("random", ("a", "b", "c")),
        ("first", ("a",)),
        ("concat", ("a b c",)),
        ("sentinel", ("a", "b", "c")),
    ],
)
def test_each_rule_leaves_what_may_be_drawn(rule: str, expected: tuple[str, ...]) -> None:
    assert candidates(["a", "b", "c"], rule) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (marked("radimagenet", *TEN), [f"{one}." for one in TEN]),
        (marked("chexpert", *TEN), [f"{one}." for one in TEN]),
        (marked("chestxray8", *TEN[:3]), [f"{one}." for one in TEN[:3]]),
        (marked("all_retina_merged", *TEN, "all labels at once"), [f"{one}." for one in TEN]),
        (marked("openi", "original", "rewritten", "rewritten twice"), ["original."]),
        (marked("mimiccxr", *TEN) + "_mimiccxr_The lungs are clear.", ["The lungs are clear."]),
        (marked("mimiccxr", *TEN) + "_mimiccxr_noreportpresent", [f"{one}." for one in TEN]),
        ("a caption of PMC-OA, with no mark", ["a caption of PMC-OA, with no mark"]),
    ],
)
def test_the_mark_of_a_published_text_says_how_one_is_chosen(
    text: str, expected: list[str]
) -> None:
    assert candidates([text], "sentinel") == tuple(expected)


@pytest.mark.parametrize("rule", ["random", "first", "concat"])
@pytest.mark.parametrize("source", ["radimagenet", "openi", "dr"])
def test_marks_are_never_learned_as_words(rule: str, source: str) -> None:
    with pytest.raises(DataError, match=f"mark '_{source}_' .* set captions: sentinel"):
        candidates(["fine", marked(source, "a", "b")], rule)  # type: ignore[arg-type]


def test_texts_whose_marks_leave_nothing_or_disagree_are_bad() -> None:
    with pytest.raises(DataError, match="no caption stands between the marks '_openi_'"):
        candidates(["._openi_._openi_"], "sentinel")
    with pytest.raises(DataError, match="marks of two sources"):
        candidates([marked("openi", "a") + marked("chexpert", "b")], "sentinel")


def test_equal_captions_and_labels_share_a_number() -> None:
    number = same_label("A normal  chest.", None, source="a")
    assert number == same_label("a Normal chest", None, source="b")
    assert 0 <= number < 2**63
    assert number != same_label("a normal chest CT", None, source="a")
    by_label = same_label("one", "Pneumonia", source="a")
    assert by_label == same_label("another", "pneumonia ", source="b")
    assert by_label != same_label("Pneumonia", None, source="a")


def test_numbers_are_labels_of_their_source_alone() -> None:
    assert same_label("x", 1, source="a") == same_label("y", "1", source="a")
    assert same_label("x", 1, source="a") != same_label("y", 1, source="b")
    assert same_label("x", 1, source="a") != same_label("x", 2, source="a")


def test_the_number_is_the_same_in_every_process() -> None:
    """Python's own hash is not: ranks would disagree about which pairs are equal."""
    command = (
        "from medm.data.captions import same_label; print(same_label('Normal', None, source=''))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", command],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {str(same_label("normal", None, source="elsewhere"))}
