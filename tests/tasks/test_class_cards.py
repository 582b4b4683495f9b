"""Every card that comes with medm, and what a card of one's own may and may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medm.errors import DataError, RecipeError
from medm.tasks.class_cards import (
    CARDS,
    Card,
    Columns,
    FileNames,
    Folders,
    Table,
    class_names,
    labelled_files,
    read_card,
    read_cards,
    shipped,
)
from tests.tasks.layouts import put_csv, put_image
from tests.tasks.test_zero_shot import write_card

SUITES = [
    name for name in shipped() if "cards" in yaml.safe_load((CARDS / f"{name}.yaml").read_text())
]
NAMES = [name for name in shipped() if name not in SUITES]


def build(card: Card, root: Path, split: str) -> list[tuple[str, ...]]:
    """A tiny copy of a split in the layout of a card; the classes in the order of its files."""
    layout = card.splits[split]
    classes = list(card.classes)
    labels = [(entry.labels or [name])[0] for name, entry in card.classes.items()]
    made: list[tuple[str, ...]] = []
    if isinstance(layout, Folders) and layout.discover:
        for name in ("CT/abd/normal", "MR/knee/acl_pathology"):
            put_image(root / layout.root / name / "0.png", (4, 4))
            made.append((name,))
    elif isinstance(layout, Folders):
        for name, label in zip(classes, labels, strict=True):
            put_image(root / layout.root / label / "0.png", (4, 4))
            made.append((name,))
    elif isinstance(layout, FileNames):
        for name, label in zip(classes, labels, strict=True):
            put_image(root / layout.root / f"tile0_{label}.png", (4, 4))
            made.append((name,))
    else:
        rows: list[dict[str, Any]] = []
        for number, (name, label) in enumerate(zip(classes, labels, strict=True)):
            row = {layout.image[0]: f"{number}.png", **layout.where}
            if card.patient is not None:
                row[card.patient] = str(number)
            if isinstance(layout, Table):
                row[layout.label[0]] = label
            else:
                row |= {other: str(int(other == label)) for other in labels}
            rows.append(row)
            made.append((name,))
            put_image(root / layout.path.format(f"{number}.png"), (4, 4))
        put_csv(root / layout.file, rows)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_every_card_reads_its_layout(name: str, tmp_path: Path) -> None:
    card = read_card(name)
    assert "test" in card.splits
    for split in card.splits:
        root = tmp_path / split
        root.mkdir()
        made = build(card, root, split)
        found = list(labelled_files(card, root, split))
        assert sorted(item.classes for item in found) == sorted(made)
        for item in found:
            assert (root / item.path).is_file()
        assert class_names(card, root, split) == (list(card.classes) or [one[0] for one in made])


@pytest.mark.parametrize("name", NAMES)
def test_every_card_describes_its_classes_differently(name: str) -> None:
    card = read_card(name)
    texts = {one: card.texts_of(one) for one in card.classes or ("CT/abd/x", "MR/knee/y")}
    assert all(len(own) >= 3 for own in texts.values())
    seen = [text for own in texts.values() for text in own]
    assert len(set(seen)) == len(seen), [text for text in seen if seen.count(text) > 1]
    assert not [text for text in seen if "{" in text or "  " in text]
    assert max(len(text.split()) for text in seen) < 60  # within the 256 tokens of the text tower


def test_the_suite_holds_the_21_published_sets_by_modality() -> None:
    cards = read_cards("unimed-clip-21")
    counts: dict[str, int] = {}
    for card in cards.values():
        counts[card.modality] = counts.get(card.modality, 0) + 1
    assert counts == {
        "x-ray": 2, "fundus": 4, "ct": 3, "mri": 2, "ultrasound": 2, "pathology": 8,
    }  # fmt: skip
    assert {"radimagenet", "sicapv2"} <= set(NAMES) - set(cards)


def test_sets_that_are_not_clean_are_flagged() -> None:
    flags = {name: read_card(name).leak.flag for name in NAMES}
    assert {name for name, flag in flags.items() if flag != "none-known"} >= {
        "chexpert-5x200", "odir-200x3", "refuge", "fives", "radimagenet",
    }  # fmt: skip


def test_a_card_takes_what_it_does_not_say_from_its_base(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(
        "base: breast-us\n"
        "splits: {test: {kind: table, file: fold1.csv, image: [path], label: [class]}}\n"
    )
    card = read_card(str(own))
    assert card.classes == read_card("breast-us").classes
    put_csv(tmp_path / "fold1.csv", [{"path": "a.png", "class": "1"}])
    assert [item.classes for item in labelled_files(card, tmp_path, "test")] == [("malignant",)]
    own.write_text("base: mine.yaml\n")
    with pytest.raises(RecipeError, match="leads back to itself"):
        read_card(str(own))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": "xray"}, "modality"),
        ({"classes": {"liver": {}}}, "two or more"),
        ({"templates": ["a CT"]}, "each needs {}"),
        ({"templates": []}, "no text describes it"),
        ({"positive": "liver"}, "is none of two classes"),
        ({"classes": {"a": {"labels": ["1"]}, "b": {"labels": ["1"]}}}, "belongs to 'a' and 'b'"),
        ({"splits": {"tset": {"kind": "table", "file": "a.csv"}}}, "tset is none"),
        ({"splits": {"test": {"kind": "file-names", "pattern": "(a"}}}, "no regular expression"),
        ({"splits": {"test": {"kind": "file-names", "pattern": "a"}}}, r"\(\?P<label>"),
        ({"leak": {"flag": "no", "reason": "it is clean"}}, "leak"),
        ({"lables": "multi"}, "labels"),
    ],
)
def test_a_wrong_card_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        read_card(write_card(tmp_path / "wrong.yaml", **changes))


def test_a_card_that_is_not_there_is_named_with_a_near_one() -> None:
    with pytest.raises(RecipeError, match="breast-us"):
        read_card("breast_us")
    with pytest.raises(RecipeError, match="no such file"):
        read_card("/nowhere/card.yaml")


def test_labels_and_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    card = read_card(write_card(tmp_path / "c.yaml"))
    put_csv(tmp_path / "test.csv", [{"image": "a.png", "label": "lung"}])
    with pytest.raises(DataError, match="'lung' is none of the classes of Organs; expected one of"):
        list(labelled_files(card, tmp_path, "test"))
    put_csv(tmp_path / "test.csv", [{"file": "a.png", "label": "liver"}])
    with pytest.raises(DataError, match="expected a column 'image', found file, label"):
        list(labelled_files(card, tmp_path, "test"))
    columns = Columns(file="test.csv")
    card = card.model_copy(update={"splits": {"test": columns}})
    put_csv(tmp_path / "test.csv", [{"image": "a", "liver": 1, "spleen": 1, "kidney": 0}])
    with pytest.raises(DataError, match="expected one class with 1, found 2"):
        list(labelled_files(card, tmp_path, "test"))
