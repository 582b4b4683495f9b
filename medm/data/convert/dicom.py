"""Series of DICOM studies as rows, joined to a table of reports.

Of the headers, identifiers are used to join and are written as pseudonyms; other elements are
written only where they are asked for by keyword. Messages name folders, files and rows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from medm.data.convert.rows import Row
from medm.data.left_out import LeftOut
from medm.data.tables import TableFile
from medm.errors import DataError, RecipeError, suggest
from medm.files import atomic_file
from medm.imaging.dicom import load_pydicom
from medm.imaging.dicom_index import DicomIndex, DicomSeries
from medm.imaging.pseudonyms import Pseudonyms
from medm.types import JsonObject, Media

Per: TypeAlias = Literal["series", "study", "largest"]
"""A record for each series, for each study with all its series, or for the series of a study with
the most slices."""

JOINS = ("AccessionNumber", "StudyInstanceUID", "SeriesInstanceUID")
"""Elements that tables are joined by where none is named: the first that is a column."""
_SERIES_COLUMNS = (
    "place", "modality", "body_part", "kind", "files", "slices", "rows", "columns", "spacing_mm",
    "usable", "reason",
)  # fmt: skip


@dataclass(slots=True)
class Reports:
    """A table of reports, found by the value of an element.

    Args:
        table: the table.
        text: column of the reports.
        element: DICOM keyword of the element.
        column: column that holds its value.

    Raises:
        DataError: a column is missing, or no column to join by is known.
    """

    table: TableFile
    text: str
    element: str
    column: str
    by_value: dict[str, list[int]] = field(init=False)
    used: set[int] = field(init=False, default_factory=set)
    """Rows that a series was joined to."""

    def __post_init__(self) -> None:
        for name in (self.text, self.column):
            if name not in self.table.fields:
                raise DataError(
                    f"no column {name!r}{suggest(name, self.table.fields)}", file=self.table.path
                )
        self.by_value = {}
        for index in range(len(self.table)):
            value = self._cell(index, self.column)
            if value:
                self.by_value.setdefault(value, []).append(index)

    def _cell(self, index: int, column: str) -> str:
        row = self.table[index]
        assert isinstance(row, dict)
        return str(row.get(column, "")).strip()

    def of(self, value: str) -> str:
        """Return the report of an element's value. Raises `DataError` without one, or with two."""
        rows = self.by_value.get(value, [])
        if not value:
            raise DataError(f"{self.element} is empty in its header")
        if not rows:
            raise DataError(f"no row of {self.table.path} has its {self.element}")
        self.used.update(rows)
        texts = {self._cell(index, self.text) for index in rows}
        if len(texts) > 1:
            raise DataError(
                f"rows {', '.join(map(str, rows[:5]))} of {self.table.path} have the same "
                f"{self.column} and different texts"
            )
        (text,) = texts
        if not text:
            raise DataError(f"row {rows[0]} of {self.table.path}: column {self.text!r} is blank")
        return text


def open_reports(
    file: Path, *, text: str, element: str | None = None, column: str | None = None
) -> Reports:
    """Open a table of reports.

    Args:
        file: CSV or TSV.
        text: column of the reports.
        element: DICOM keyword to join by; None for the first of `JOINS` that is a column.
        column: column with its values; None for the one that is named as the element.

    Raises:
        RecipeError: `element` is no keyword, or none is known.
        DataError: the table cannot be read, or lacks a column.
    """
    table = TableFile(file)
    if element is None:
        element = next((name for name in JOINS if name in table.fields), None)
        if element is None:
            raise RecipeError(
                f"{file}: none of the columns {', '.join(JOINS)}; name the element to join by, and "
                f"its column. The table has {', '.join(table.fields)}"
            )
    check_keywords([element])
    return Reports(table, text, element, column or element)


def check_keywords(keywords: Sequence[str]) -> None:
    """Refuse names that are no DICOM keyword, and sequences. Raises `RecipeError`."""
    load_pydicom()
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    for keyword in keywords:
        if tag_for_keyword(keyword) is None:
            raise RecipeError(f"{keyword!r} is no keyword of DICOM, such as PatientAge")
        if dictionary_VR(keyword).startswith(("SQ", "O", "UN")):
            raise RecipeError(f"{keyword}: holds no single value; name an element of text")


def study_rows(
    index: DicomIndex,
    *,
    per: Per,
    reports: Reports | None,
    keep: Sequence[str],
    pseudonyms: Pseudonyms,
    left_out: LeftOut,
) -> Iterator[tuple[int, Row]]:
    """Yield the usable series of a folder as rows with their positions.

    Args:
        index: of the folder.
        per: what a record is.
        reports: texts; None asks a question about each.
        keep: DICOM keywords whose values are written, under `dicom`.
        pseudonyms: name patients and studies.
        left_out: takes the studies without a report of their own, and those of several patients.
    """
    patients = {} if reports is None else _patients(index.series, reports.element)
    for number, (study, group) in enumerate(_groups(index.usable, per, pseudonyms, left_out)):
        first = group[0]
        text = None
        if reports is not None:
            text = _report(group, reports, patients, left_out)
            if text is None:
                continue
        extra: JsonObject = {}
        patient = first.headers[0].patient_id
        if patient:
            extra["patient"] = pseudonyms.name(patient, "patient")
        extra["study"] = study
        if keep:
            elements = first.read(keep)
            values = {keyword: _value(elements.get(keyword)) for keyword in keep}
            extra["dicom"] = {key: value for key, value in values.items() if value is not None}
        uid = first.headers[0].series_uid.strip() or first.paths[0]
        name = pseudonyms.name(uid, "series") if per == "series" else study
        media = [Media(series.kind, path) for series in group for path in series.paths]
        yield number, Row(media=media, text=text, id=name, extra=extra)


def _patients(all_series: Sequence[DicomSeries], element: str) -> dict[str, set[str]]:
    """Return the patients of each value of an element that a table is joined by.

    An AccessionNumber is unique in one hospital only, and UIDs are copied by mistake. Other
    elements, such as PatientID, are joined by as they are: none are returned.
    """
    found: dict[str, set[str]] = {}
    if element in JOINS:
        for series in all_series:
            if series.headers:
                value = _text(series.read([element]).get(element))
                found.setdefault(value, set()).update(one.patient_id for one in series.headers)
    return found


def _report(
    group: Sequence[DicomSeries],
    reports: Reports,
    patients: Mapping[str, set[str]],
    left_out: LeftOut,
) -> str | None:
    """Return the report of the series of a record; None where they are left out.

    A series without a row takes the report of the others.
    """
    place = group[0].folder / group[0].place
    element = reports.element
    values = list(dict.fromkeys(_text(series.read([element]).get(element)) for series in group))
    values = [value for value in values if value in reports.by_value] or values[:1]
    if any(len(patients.get(value, ())) > 1 for value in values if value):
        for value in values:
            reports.used.update(reports.by_value.get(value, ()))
        reason = f"several patients have its {element}"
        left_out.add(reason, DataError("the report may be of another patient", file=place))
        return None
    try:
        texts = {reports.of(value) for value in values}
    except DataError as error:
        left_out.add("no report", DataError(error.reason, file=place))
        return None
    if len(texts) > 1:
        fault = DataError(f"{len(texts)} different texts by {element}", file=place)
        left_out.add("its series have several reports", fault)
        return None
    return texts.pop()


def _groups(
    usable: Sequence[DicomSeries], per: Per, pseudonyms: Pseudonyms, left_out: LeftOut
) -> Iterator[tuple[str, list[DicomSeries]]]:
    """Yield the series of each record, with the pseudonym of their study."""
    studies: dict[str, list[DicomSeries]] = {}
    for series in usable:
        key = pseudonyms.name(series.headers[0].study_uid or series.place, "study")
        studies.setdefault(key, []).append(series)
    for key, group in studies.items():
        if per == "series":
            yield from ((key, [series]) for series in group)
        elif len({series.headers[0].patient_id for series in group}) > 1:
            fault = DataError(
                f"{len(group)} series with one StudyInstanceUID and several PatientIDs",
                file=group[0].folder / group[0].place,
            )
            left_out.add("several patients in one study", fault)
        else:
            yield key, group if per == "study" else [max(group, key=lambda one: one.slices)]


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()


def _value(value: object) -> str | list[str] | None:
    """Return the value of an element for a record; None where it is empty."""
    if value is None or value == "":
        return None
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        return [str(one) for one in value]  # type: ignore[attr-defined]
    return str(value)


def write_series_list(file: Path, index: DicomIndex) -> None:
    """Write a table with a row for each series: place, description, and why it is not used."""
    with atomic_file(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(_SERIES_COLUMNS)
        for series in index.series:
            first = series.headers[0] if series.headers else None
            writer.writerow(
                [
                    series.paths[0] if len(series.paths) == 1 else series.place,
                    series.modality,
                    series.body_part,
                    series.kind,
                    len(series.headers),
                    series.slices,
                    "" if first is None else first.rows,
                    "" if first is None else first.columns,
                    "" if series.spacing is None else " x ".join(map(str, series.spacing)),
                    "yes" if series.problem is None else "no",
                    series.problem or "",
                ]
            )
