"""The 13 sources of UniMed (Khattak et al. 2024), from the annotation files as published.

Readers take the columns that the published converters take: CSV files with lists written as Python
literals (by position: paths, labels, captions, reports), CSV files of one caption a row, JSON.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medm.data.record_files import RecordFile
from medm.errors import DataError
from medm.tasks.benchmark_files import read_csv, read_json_map, require
from medm.tasks.pair_sources.base import Pair, PairSource, is_empty, read_list

MAX_CAPTIONS = 10
"""UniMed draws from the first ten captions of an image that was captioned by its class."""
_MAX_FIELD = 2**24


@dataclass(frozen=True, kw_only=True)
class ListColumns(PairSource):
    """CSV of an image a row: list of one path, list of labels, list of captions, and a report."""

    files: tuple[str, ...]
    """The annotation file, at the places where it may lie."""
    report: bool = False
    """A fourth column holds a report. Where there is one, it is the only caption."""

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        file = require(folder, *self.files, layout=self.layout)
        columns = 4 if self.report else 3
        for index, row in enumerate(_rows(file, columns)):
            pair = Pair(file, index)
            try:
                paths, labels = read_list(row[0]), read_list(row[1])
                report = row[3].strip() if self.report else ""
                has_report = not is_empty(report)
                pair.captions = [report] if has_report else read_list(row[2])[:MAX_CAPTIONS]
                if not paths:
                    raise ValueError("the list of paths is empty")
            except ValueError as error:
                pair.problem = str(error)
            else:
                pair.image = paths[0]
                # A report is a text of its own, whatever the classes of the image are.
                pair.label = ", ".join(sorted(labels)) if labels and not has_report else None
            yield pair


@dataclass(frozen=True, kw_only=True)
class CaptionColumns(PairSource):
    """CSV of a caption a row."""

    files: tuple[str, ...]
    """The annotation file, at the places where it may lie."""
    image: str
    """Column of the paths."""
    caption: str
    """Column of the captions."""

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        file = require(folder, *self.files, layout=self.layout)
        for index, row in enumerate(read_csv(file, (self.image, self.caption))):
            yield Pair(file, index, row[self.image], [row[self.caption]])


@dataclass(frozen=True, kw_only=True)
class CaptionLines(PairSource):
    """JSONL of a caption a line."""

    file: str

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        for pair, row in _entries(require(folder, self.file, layout=self.layout)):
            texts = _texts(row, "image", "caption")
            if texts is not None:
                pair.image, *pair.captions = texts
            else:
                pair.problem = pair.problem or "expected texts in 'image' and 'caption'"
            yield pair


@dataclass(frozen=True, kw_only=True)
class Conversations(PairSource):
    """LLaVA's JSON of conversations: the first reply is the caption."""

    file: str

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        for pair, row in _entries(require(folder, self.file, layout=self.layout)):
            turns = row.get("conversations") if isinstance(row, dict) else None
            reply = turns[1] if isinstance(turns, list) and len(turns) > 1 else None
            image, caption = _texts(row, "image"), _texts(reply, "value")
            if image is not None and caption is not None:
                pair.image, pair.captions = image[0], caption
            else:
                pair.problem = pair.problem or "expected 'image' and a reply in 'conversations'"
            yield pair


@dataclass(frozen=True, kw_only=True)
class Figures(PairSource):
    """LLaVA-Med's figures: lists of objects with a caption, and the text that mentions the figure.

    Both describe the image in their own way, so each is a pair.
    """

    file: str

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        file = require(folder, self.file, layout=self.layout)
        index = -1
        for key, entries in read_json_map(file).items():
            if not isinstance(entries, list):
                raise DataError("expected a list of figures", file=file, field=key)
            for entry in entries:
                index += 1
                name = _texts(entry, "pair_id")
                if name is None:
                    yield Pair(file, index, problem="expected a text in 'pair_id'")
                    continue
                yield Pair(file, index, name[0], _texts(entry, "fig_caption") or (), part="caption")
                mentions = entry.get("in_text_mention")
                if isinstance(mentions, list) and mentions:
                    yield Pair(
                        file, index, name[0], _texts(mentions[0], "tokens") or (), part="mention"
                    )


@dataclass(frozen=True, kw_only=True)
class OpenI(PairSource):
    """Two JSON files in the same order: a caption of each image, and lists of its variants.

    The original caption stands first. UniMed trains on that one alone, which the sampling rule
    `first` of a recipe does.
    """

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        file = require(folder, "filter_cap.json", layout=self.layout)
        other = require(folder, "openai_refined_concepts.json", layout=self.layout)
        rows = _list_of(read_json_map(file), "annotations", file)
        variants = _list_of(read_json_map(other), "refined_captions", other)
        if len(rows) != len(variants):
            raise DataError(
                f"{len(rows)} annotations, but {other.name} has {len(variants)} lists of variants",
                file=file,
            )
        for index, (row, more) in enumerate(zip(rows, variants, strict=True)):
            texts = _texts(row, "image_id", "caption")
            if texts is None or not _is_texts(more):
                yield Pair(
                    file,
                    index,
                    problem="expected 'image_id', 'caption' and a list of variants",
                )
            else:
                yield Pair(file, index, texts[0], [texts[1], *more])


RETINA_FOLDER = "Retina-Annotations"
"""Folder of the CSV files of all fundus sets, one a set."""


@dataclass(frozen=True, kw_only=True)
class RetinaCaptions(PairSource):
    """A folder of CSV files, one a fundus set: file name, list of captions, a longer caption.

    The longer caption is not used, as published.
    """

    skip: tuple[str, ...]
    """Files that are no part of it."""

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        place = require(folder, RETINA_FOLDER, layout=self.layout)
        for file in csv_files(place, self.skip, layout=self.layout):
            for index, row in enumerate(read_csv(file, ("filename", "captions"))):
                pair = Pair(file, index, row["filename"])
                try:
                    pair.captions = read_list(row["captions"])[:MAX_CAPTIONS]
                except ValueError as error:
                    pair.problem = str(error)
                yield pair


@dataclass(frozen=True, kw_only=True)
class RetinaKeywords(PairSource):
    """DEN's CSV: keywords and sentences of a clinical description, each of which is a caption.

    Terms that say the age of the patient or hold a date are left out, as published. Where no other
    term is there, they stay.
    """

    file: str
    template: str
    """Sentence around a term, at "{term}"."""

    def pairs(self, folder: Path, split: str) -> Iterator[Pair]:
        file = require(folder, self.file, layout=self.layout)
        for index, row in enumerate(read_csv(file, ("image", "categories"))):
            pair = Pair(file, index, row["image"])
            try:
                terms = [term for term in read_list(row["categories"]) if not is_empty(term)]
            except ValueError as error:
                pair.problem = str(error)
            else:
                usable = [term for term in terms if "year" not in term and "//" not in term]
                pair.captions = [
                    self.template.format(term=term.strip(" .")) for term in usable or terms
                ]
            yield pair


def csv_files(folder: Path, skip: tuple[str, ...], *, layout: str) -> list[Path]:
    """The CSV files of a folder by name, but for some. Raises `DataError` if there are none."""
    files = sorted(file for file in folder.glob("*.csv") if file.name not in skip)
    if not files:
        raise DataError(f"there is no CSV file; expected {layout}", file=folder)
    return files


def _rows(file: Path, columns: int) -> Iterator[list[str]]:
    """The rows of a CSV by position, below its header. Short rows are filled up with empty fields.

    Raises:
        DataError: the header has fewer columns, or the file cannot be read.
    """
    csv.field_size_limit(_MAX_FIELD)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            header = next(reader, [])
            if len(header) < columns:
                raise DataError(
                    f"expected at least {columns} columns (paths, labels, captions"
                    f"{', report' if columns > 3 else ''}), found {header}",
                    file=file,
                )
            for row in reader:
                if row:
                    yield row + [""] * (columns - len(row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot be read as CSV in UTF-8 ({error})", file=file) from None


def _entries(file: Path) -> Iterator[tuple[Pair, Any]]:
    """The records of a JSON array or JSONL, each with its row; one that is no JSON is a problem."""
    records = RecordFile(file)
    for index in range(len(records)):
        pair, value = Pair(file, index), None
        try:
            value = records[index]
        except DataError as error:
            pair.problem = error.reason
        yield pair, value


def _texts(row: object, *names: str) -> list[str] | None:
    """The texts of some fields; None where one of them is missing or no text."""
    if not isinstance(row, dict):
        return None
    values = [value for name in names if isinstance(value := row.get(name), str)]
    return values if len(values) == len(names) else None


def _is_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _list_of(value: dict[str, Any], name: str, file: Path) -> list[Any]:
    if not isinstance(value.get(name), list):
        raise DataError(f"expected a list, found {sorted(value)}", file=file, field=name)
    return value[name]


CHEXPERT = ListColumns(
    source="chexpert",
    layout="chexpert_with_captions_only_frontal_view.csv beside train/ of CheXpert-v1.0-small",
    files=("chexpert_with_captions_only_frontal_view.csv",),
    top="CheXpert-v1.0-small",
)
MIMIC_CXR = ListColumns(
    source="mimic-cxr",
    layout="mimic_cxr_with_captions_and_reports_only_frontal_view.csv in 2.0.0/files of "
    "mimic-cxr-jpg, beside p10 to p19",
    files=tuple(
        f"{place}mimic_cxr_with_captions_and_reports_only_frontal_view.csv"
        for place in ("2.0.0/files/", "2.1.0/files/", "files/", "")
    ),
    images=("", "2.0.0", "2.0.0/files", "2.1.0", "2.1.0/files", "files"),
    report=True,
)
OPENI = OpenI(
    source="openi",
    layout="filter_cap.json, openai_refined_concepts.json and image/",
    images=("image", "images"),
    suffix=".png",
)
CHEST_XRAY8 = ListColumns(
    source="chest-xray8",
    layout="Chest-Xray8_with_captions.csv beside images/",
    files=("Chest-Xray8_with_captions.csv",),
    images=("images", ""),
)
RADIMAGENET = ListColumns(
    source="radimagenet",
    layout="radiology_ai/radimagenet_with_captions_training_set.csv beside CT, MR and US",
    files=tuple(
        f"{place}radimagenet_with_captions_training_set.csv" for place in ("radiology_ai/", "")
    ),
    images=("", "radiology_ai"),
)
RETINA_PART1 = RetinaCaptions(
    source="retina-part1",
    layout=f"{RETINA_FOLDER}/ (a CSV a set) beside the folders of the sets (03_IDRiD, ...)",
    # Part 2 and part 3, and sets whose images UniMed does not use.
    skip=(
        "06_DEN.csv",
        "39_MM_Retinal_dataset.csv",
        "28_OIA-DDR_revised.csv",
        "07_LAG_revised.csv",
        "01_EYEPACS_revised.csv",
    ),
)
RETINA_PART2 = RetinaKeywords(
    source="retina-part2",
    layout=f"{RETINA_FOLDER}/06_DEN.csv beside 06_DEN/",
    file=f"{RETINA_FOLDER}/06_DEN.csv",
    template="Retinal fundus photograph; findings: {term}.",
)
RETINA_PART3 = CaptionColumns(
    source="retina-part3",
    layout=f"{RETINA_FOLDER}/39_MM_Retinal_dataset.csv beside 39_MM_Retinal_dataset/",
    files=(f"{RETINA_FOLDER}/39_MM_Retinal_dataset.csv",),
    image="image",
    caption="caption",
)
QUILT_1M = CaptionColumns(
    source="quilt-1m",
    layout="quilt_1M_lookup.csv beside quilt_1m/",
    files=("quilt_1M_lookup.csv",),
    image="image_path",
    caption="caption",
    images=("quilt_1m", ""),
)
PMC_OA = CaptionLines(
    source="pmc-oa",
    layout="pmc_oa.jsonl beside caption_T060_filtered_top4_sep_v0_subfigures/",
    file="pmc_oa.jsonl",
    images=("caption_T060_filtered_top4_sep_v0_subfigures", ""),
)
ROCOV2 = CaptionColumns(
    source="rocov2",
    layout="train_captions.csv beside train/",
    files=("train_captions.csv",),
    image="ID",
    caption="Caption",
    images=("train",),
    suffix=".jpg",
)
LLAVA_MED_ALIGNMENT = Conversations(
    source="llava-med-alignment",
    layout="llava_med_alignment_500k_filtered.json beside images/",
    file="llava_med_alignment_500k_filtered.json",
    images=("images",),
)
LLAVA_MED_INSTRUCT = Figures(
    source="llava-med-instruct",
    layout="llava_med_instruct_fig_captions.json beside images/",
    file="llava_med_instruct_fig_captions.json",
    images=("images",),
    suffix=".jpg",
)
