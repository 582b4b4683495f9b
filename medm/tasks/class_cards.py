"""Cards of class-labelled sets: classes, texts that describe them, files, and what is known of
leaks.

A card is a YAML file. Those in `medm/tasks/cards/` go by their name, one's own by its path. A suite
names several cards that are scored together. Nothing here knows a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from medm.config import Options, read_yaml, validate
from medm.errors import DataError, RecipeError, suggest
from medm.imaging.paths import files_below
from medm.tasks.benchmark_files import read_csv, require
from medm.types import JsonObject, Kind

CARDS = Path(__file__).with_name("cards")
"""Folder of the cards that come with medm."""

Modality = Literal[
    "x-ray", "fundus", "ct", "mri", "ultrasound", "pathology", "dermatoscopy", "endoscopy",
    "oct", "pet", "mixed", "other",
]  # fmt: skip

SPLITS = ("train", "val", "test")


class Folders(Options):
    """One folder for each class."""

    kind: Literal["folders"] = "folders"
    root: str = "."
    """Folder that holds them."""
    discover: bool = False
    """The classes are the folders that hold files, whatever their number. A class is then named by
    its path, and templates may hold {0}, {1} ... for the parts of the path."""


class Table(Options):
    """A CSV with one row a file."""

    kind: Literal["table"] = "table"
    file: str
    """The CSV."""
    image: list[str] = Field(default=["image"], min_length=1)
    """Column of the file's path; the first of these that the CSV has."""
    path: str = "{}"
    """The path under the folder of the set, with {} for what stands in the column."""
    label: list[str] = Field(default=["label"], min_length=1)
    """Column of the class; the first of these that the CSV has. For a multi-label set the labels
    are separated by | in it."""
    where: dict[str, str] = {}
    """Only rows with these values in these columns."""


class Columns(Options):
    """A CSV with a column of 0 and 1 for each class, which has the name of a label."""

    kind: Literal["columns"] = "columns"
    file: str
    """The CSV."""
    image: list[str] = Field(default=["image"], min_length=1)
    """As in a table."""
    path: str = "{}"
    """As in a table."""
    where: dict[str, str] = {}
    """As in a table."""


class FileNames(Options):
    """Files whose names say the class."""

    kind: Literal["file-names"] = "file-names"
    root: str = "."
    """Folder that holds them, at any depth."""
    pattern: str
    """Regular expression that is found in the name, with a group `label`."""

    @model_validator(mode="after")
    def _has_the_group(self) -> FileNames:
        try:
            groups = re.compile(self.pattern).groupindex
        except re.error as error:
            raise ValueError(f"pattern: no regular expression ({error})") from None
        if "label" not in groups:
            raise ValueError("pattern: expected a group (?P<label>...)")
        return self


Layout = Annotated[Folders | Table | Columns | FileNames, Field(discriminator="kind")]


class ClassEntry(Options):
    """One class."""

    labels: list[str] = []
    """How the files write it. Default: its name."""
    names: list[str] = []
    """Words for it in templates. Default: its name."""
    prompts: list[str] = []
    """Sentences of its own, beside those of the templates."""
    negative: list[str] = []
    """In a multi-label set: sentences that say that it is absent. The score is then the difference,
    and a decision is taken at 0."""


class Leak(Options):
    """Presence of the test files in the pretraining data of UniMed-CLIP."""

    flag: Literal["yes", "possible", "none-known"]
    reason: str = Field(min_length=10)
    """Why."""


class Card(Options):
    """A class-labelled set."""

    title: str
    """Name of the set."""
    modality: Modality
    source: str
    """Where the files come from, and what has to be accepted to get them."""
    media: Kind = "image"
    """Kind of file."""
    labels: Literal["single", "multi"] = "single"
    """One class a file, or any number."""
    question: str
    """The question to a model that answers in text."""
    classes: dict[str, ClassEntry] = {}
    """By name, in the order in which scores are listed."""
    templates: list[str] = []
    """Sentences with {} for the words of a class."""
    positive: str | None = None
    """In a set of two classes: the one whose sensitivity is reported."""
    splits: dict[str, Layout] = Field(min_length=1)
    """Files of each split: test, and train for probes."""
    leak: Leak
    patient: str | None = None
    """Column of the CSV that says which files belong together, for intervals."""
    notes: list[str] = []
    """What a reader of the scores has to know."""

    @model_validator(mode="after")
    def _consistent(self) -> Card:
        discovered = [
            isinstance(layout, Folders) and layout.discover for layout in self.splits.values()
        ]
        if unknown := sorted(set(self.splits) - set(SPLITS)):
            raise ValueError(
                f"splits: {', '.join(unknown)} is none; expected some of {', '.join(SPLITS)}"
            )
        if any(discovered):
            if self.classes or not all(discovered):
                raise ValueError("classes: folders with discover name them; leave classes out")
        elif len(self.classes) < 2 and self.labels == "single":
            raise ValueError("classes: expected two or more")
        elif not self.classes:
            raise ValueError("classes: expected one or more")
        if any("{" not in template for template in self.templates):
            raise ValueError("templates: each needs {} where the words of a class stand")
        written: dict[str, str] = {}
        for name, entry in self.classes.items():
            for label in entry.labels or [name]:
                other = written.setdefault(label.casefold(), name)
                if other != name:
                    raise ValueError(f"classes: label {label!r} belongs to {other!r} and {name!r}")
            if not self.texts_of(name):
                raise ValueError(f"classes.{name}: no text describes it; give templates or prompts")
            if entry.negative and self.labels == "single":
                raise ValueError(f"classes.{name}.negative: for multi-label sets alone")
        if self.positive is not None and (
            self.positive not in self.classes or len(self.classes) != 2
        ):
            raise ValueError(f"positive: {self.positive!r} is none of two classes")
        return self

    def texts_of(self, name: str) -> list[str]:
        """Every text that describes a class, each once."""
        entry = self.classes.get(name, ClassEntry())
        parts = name.split("/")
        words = entry.names or [name]
        if name not in self.classes:  # a discovered class: the parts of its path in words
            words, parts = [_words(name)], [_words(part) for part in parts]
        made = [t.format(word, *parts[1:]) if "{}" in t else t.format(*parts) for t in
                self.templates for word in words]  # fmt: skip
        return list(dict.fromkeys([*made, *entry.prompts]))


class Suite(Options):
    """Cards that are scored together."""

    title: str
    cards: list[str] = Field(min_length=2)
    """Names, or paths relative to the suite."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """One file of a set."""

    path: str
    """Relative to the folder of the set."""
    classes: tuple[str, ...]
    """One class, or those of a multi-label set that are present."""
    patient: str | None = None


def _words(name: str) -> str:
    return " ".join(re.split(r"[\s_/]+", name.strip("_/ "))).lower()


def shipped() -> list[str]:
    """Names of the cards and suites that come with medm."""
    return sorted(path.stem for path in CARDS.glob("*.yaml"))


def card_path(name: str, *, beside: Path | None = None) -> Path:
    """The file of a card or suite: one that comes with medm by its name, one's own by its path.

    Raises:
        RecipeError: there is none.
    """
    own = (beside or Path()) / Path(name).expanduser()
    path = own if name.endswith((".yaml", ".yml")) else CARDS / f"{name}.yaml"
    if not path.is_file():
        if path == own:
            raise RecipeError(f"card {name!r}: no such file")
        raise RecipeError(
            f"card {name!r}: none of this name comes with medm{suggest(name, shipped())}; "
            f"expected one of {', '.join(shipped())}, or the path of a YAML file"
        )
    return path


def read_card(name: str, *, beside: Path | None = None) -> Card:
    """A card, checked. A key `base` names a card whose other keys it takes.

    Raises:
        RecipeError: there is no such card, or something in it is wrong.
    """
    path = card_path(name, beside=beside)
    return validate(Card, _with_base(path, ()), source=str(path))


def _with_base(path: Path, seen: tuple[Path, ...]) -> JsonObject:
    if path in seen:
        raise RecipeError(f"{path}: its base leads back to itself")
    content = read_yaml(path)
    base = content.pop("base", None)
    if base is None:
        return content
    other = _with_base(card_path(str(base), beside=path.parent), (*seen, path))
    return {**other, **content}


def read_cards(name: str) -> dict[str, Card]:
    """The cards that a name stands for, by their own names: one card, or those of a suite.

    Raises:
        RecipeError: as `read_card`; or two cards of a suite have one name.
    """
    path = card_path(name)
    if "cards" not in read_yaml(path):
        return {path.stem: read_card(name)}
    suite = validate(Suite, read_yaml(path), source=str(path))
    cards = {Path(item).stem: read_card(item, beside=path.parent) for item in suite.cards}
    if len(cards) != len(suite.cards):
        raise RecipeError(f"{path}: two cards have one name")
    multi = [item for item, card in cards.items() if card.labels == "multi"]
    if multi:
        raise RecipeError(
            f"{path}: {', '.join(multi)} has several labels a file; a suite is a mean of "
            "accuracies, so score it by itself"
        )
    return cards


def labelled_files(card: Card, folder: Path, split: str) -> Iterator[Labelled]:
    """The files of a split in a fixed order, each with its classes.

    Raises:
        DataError: the card has no such split, a file is missing, or a label is none of the
            classes.
    """
    layout = card.splits.get(split)
    if layout is None:
        raise DataError(
            f"there is no split {split!r} in the card of {card.title}; it has "
            f"{', '.join(card.splits)}"
        )
    if isinstance(layout, Folders):
        yield from _in_folders(card, layout, folder)
    elif isinstance(layout, FileNames):
        yield from _by_name(card, layout, folder)
    else:
        yield from _in_table(card, layout, folder)


def class_names(card: Card, folder: Path, split: str) -> list[str]:
    """The classes of a card; where it discovers them, those of a folder."""
    layout = card.splits.get(split)
    if isinstance(layout, Folders) and layout.discover:
        return sorted({item.classes[0] for item in _in_folders(card, layout, folder)})
    return list(card.classes)


def _by_label(card: Card) -> dict[str, str]:
    return {
        label.casefold(): name
        for name, entry in card.classes.items()
        for label in entry.labels or [name]
    }


def _in_folders(card: Card, layout: Folders, folder: Path) -> Iterator[Labelled]:
    what = f"the files of {card.title}: a folder for each class"
    root = require(folder, layout.root, layout=what)
    if layout.discover:
        files = files_below(root, card.media)
        if not files:
            raise DataError(f"no {card.media}s are missing in {root}; expected {what}", file=root)
        for path in files:
            yield Labelled(
                path.relative_to(folder).as_posix(), (path.parent.relative_to(root).as_posix(),)
            )
        return
    for name, entry in card.classes.items():
        place = require(root, *(entry.labels or [name]), layout=what)
        files = files_below(place, card.media)
        if not files:
            raise DataError(f"expected {card.media}s of class {name!r}, found none", file=place)
        for path in files:
            yield Labelled(path.relative_to(folder).as_posix(), (name,))


def _by_name(card: Card, layout: FileNames, folder: Path) -> Iterator[Labelled]:
    what = f"the files of {card.title}, whose names say the class"
    root = require(folder, layout.root, layout=what)
    known, pattern = _by_label(card), re.compile(layout.pattern)
    files = files_below(root, card.media)
    if not files:
        raise DataError(f"every {card.media} is missing in {root}; expected {what}", file=root)
    for path in files:
        found = pattern.search(path.name)
        if found is None or found["label"].casefold() not in known:
            raise DataError(
                f"the name says no class: pattern {layout.pattern!r} gives "
                f"{None if found is None else found['label']!r}, expected one of "
                f"{', '.join(sorted(known))}",
                file=path,
            )
        yield Labelled(path.relative_to(folder).as_posix(), (known[found["label"].casefold()],))


def _in_table(card: Card, layout: Table | Columns, folder: Path) -> Iterator[Labelled]:
    what = f"the CSV of {card.title}"
    file = require(folder, layout.file, layout=what)
    known = _by_label(card)
    number = 0
    for index, row in enumerate(read_csv(file, tuple(layout.where))):
        if any(row[key].casefold() != value.casefold() for key, value in layout.where.items()):
            continue
        number += 1
        image = row[_column(row, layout.image, file)]
        if isinstance(layout, Columns):
            classes = _marked(card, row, file, index)
        else:
            text = row[_column(row, layout.label, file)]
            parts = text.split("|") if card.labels == "multi" else [text]
            classes = []
            for part in parts:
                if card.labels == "multi" and not part.strip():
                    continue
                if part.strip().casefold() not in known:
                    raise DataError(
                        f"{part.strip()!r} is none of the classes of {card.title}; expected one "
                        f"of {', '.join(sorted(known))}",
                        file=file,
                        index=index,
                    )
                classes.append(known[part.strip().casefold()])
        if card.patient is not None and not row.get(card.patient):
            raise DataError("no patient in the row", file=file, index=index, field=card.patient)
        patient = None if card.patient is None else row[card.patient]
        yield Labelled(layout.path.format(image), tuple(classes), patient)
    if not number:
        raise DataError(f"no row with {layout.where or 'a file'}; expected {what}", file=file)


def _column(row: Mapping[str, str], names: list[str], file: Path) -> str:
    for name in names:
        if name in row:
            return name
    raise DataError(
        f"expected a column {' or '.join(map(repr, names))}, found {', '.join(row)}; name the "
        "column in a card of your own (base: ...)",
        file=file,
    )


def _marked(card: Card, row: Mapping[str, str], file: Path, index: int) -> list[str]:
    """The classes whose column holds the highest number of a single-label set, or 1."""
    values = {}
    for name, entry in card.classes.items():
        text = row[_column(row, entry.labels or [name], file)]
        try:
            values[name] = float(text or 0)
        except ValueError:
            raise DataError(f"expected 0 or 1, found {text!r}", file=file, index=index) from None
    marked = [name for name, value in values.items() if value == 1]
    if card.labels == "single" and len(marked) != 1:
        raise DataError(
            f"expected one class with 1, found {len(marked)} ({', '.join(marked) or 'none'})",
            file=file,
            index=index,
        )
    return marked
