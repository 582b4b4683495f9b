"""Series of a folder of DICOM files: found at any depth, described, and checked by their headers.

A description holds numbers and terms of the standard alone. Identifiers are kept apart
(`DicomSeries.read`) and are read from the files when they are asked for; none of them is quoted in
a message.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from medm.errors import MediaError
from medm.imaging.damage import DECODE_ERRORS
from medm.imaging.dicom import (
    MAX_FRAMES,
    Header,
    is_dicom,
    load_pydicom,
    quiet,
    read_elements,
    read_header,
)
from medm.imaging.dicom_series import arrange_series
from medm.imaging.folders import refuse_lost_slice, regular_files
from medm.types import Kind

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MIN_SLICES = 8
"""Fewest slices of a volume; shorter series are mostly localizers and bolus monitoring."""
_VOLUME_MODALITIES = {"CT", "MR", "PT", "NM"}
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_BODY_PARTS = {
    "ABDOMEN", "ABDOMENPELVIS", "ADRENAL", "ANKLE", "AORTA", "ARM", "AXILLA", "BACK", "BLADDER",
    "BRAIN", "BREAST", "BRONCHUS", "CALCANEUS", "CALF", "CAROTID", "CEREBELLUM", "CERVIX", "CHEEK",
    "CHEST", "CHESTABDOMEN", "CHESTABDPELVIS", "CIRCLEOFWILLIS", "CLAVICLE", "COCCYX", "COLON",
    "CORNEA", "CORONARYARTERY", "CSPINE", "CTSPINE", "DUODENUM", "EAR", "ELBOW", "ESOPHAGUS",
    "EXTREMITY", "EYE", "FACE", "FEMUR", "FINGER", "FOOT", "FOREARM", "GALLBLADDER", "HAND", "HEAD",
    "HEADNECK", "HEART", "HIP", "HUMERUS", "IAC", "ILEUM", "ILIUM", "JAW", "KIDNEY", "KNEE",
    "LARYNX", "LEG", "LIVER", "LSPINE", "LSSPINE", "LUNG", "MAXILLA", "MEDIASTINUM", "MOUTH",
    "NECK", "NECKCHEST", "NECKCHESTABDOMEN", "NECKCHESTABDPELV", "NOSE", "ORBIT", "OVARY",
    "PANCREAS", "PAROTID", "PATELLA", "PELVIS", "PENIS", "PHARYNX", "PROSTATE", "RADIUS", "RECTUM",
    "RIB", "SCALP", "SCAPULA", "SCLERA", "SCROTUM", "SHOULDER", "SINUS", "SKULL", "SPINE", "SPLEEN",
    "SSPINE", "STERNUM", "STOMACH", "TESTIS", "THIGH", "THUMB", "THYMUS", "THYROID", "TIBIA",
    "TLSPINE", "TMJ", "TOE", "TRACHEA", "TSPINE", "ULNA", "UTERUS", "VAGINA", "WHOLEBODY", "WRIST",
}  # fmt: skip
"""Terms of Body Part Examined (PS3.16, annex L). Other values may be free text."""


@dataclass(slots=True)
class DicomSeries:
    """One series of a folder."""

    folder: Path
    """The folder that was searched."""
    headers: list[Header] = field(default_factory=list)
    """Of the files that could be read."""
    place: str = ""
    """Folder of its files, relative to `folder`; for messages."""
    kind: Kind = "volume"
    paths: tuple[str, ...] = ()
    """As records name it, relative to `folder`: a folder, "folder#3", or files."""
    body_part: str = ""
    """A term of the standard, "other", or empty."""
    spacing: tuple[float, ...] | None = None
    """Millimeters between slices, rows, columns of a volume."""
    problem: str | None = None
    """Why it cannot be used."""

    @property
    def modality(self) -> str:
        """A known modality, or "unknown"."""
        return self.headers[0].modality if self.headers else "unknown"

    @property
    def slices(self) -> int:
        return sum(header.frames for header in self.headers)

    def read(self, keywords: Sequence[str]) -> Dataset:
        """Return elements of its first file, which are data of a patient."""
        with quiet():
            return read_elements(self.headers[0], keywords)


@dataclass(slots=True)
class DicomIndex:
    """Everything that a folder holds."""

    series: list[DicomSeries]
    """In the order of their places."""
    without_image: int = 0
    """DICOM files without an image: reports, structure sets, directories."""
    not_dicom: int = 0
    links: int = 0
    """Links to files or folders that were not followed."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Files that belong to no known series, and why they cannot be read."""

    @property
    def usable(self) -> list[DicomSeries]:
        return [series for series in self.series if series.problem is None]


def index_series(
    folder: Path,
    *,
    min_slices: int = MIN_SLICES,
    uids_in_paths: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> DicomIndex:
    """Find the series of a folder by the headers of its files, and name what cannot be used.

    Args:
        folder: is searched at any depth; links are not followed.
        min_slices: fewest slices of a volume.
        uids_in_paths: a path may name a series by its SeriesInstanceUID, where its SeriesNumber
            does not tell it from another one in its folder.
        progress: called with the number of files that were looked at.

    Raises:
        MediaError: no such folder, or it holds no DICOM image.
    """
    if not folder.is_dir():
        raise MediaError(f"{folder}: no such folder; expected one with DICOM files")
    index = DicomIndex([])
    found: dict[str, DicomSeries] = {}
    foreign: list[Path] = []
    files: Counter[Path] = Counter()
    paths, index.links = regular_files(folder)
    for done, path in enumerate(paths, start=1):
        progress(done)
        name = path.relative_to(folder).as_posix()
        files.update(parent for parent in path.parents if parent.is_relative_to(folder))
        if not is_dicom(path):
            foreign.append(path)
            continue
        try:
            header = read_header(path, name)
        except MediaError as error:
            key = _series_uid(path)
            if key is None:
                index.unreadable[name] = error.reason
                continue
            series = found.setdefault(key, DicomSeries(folder, place=_parent(name)))
            series.problem = series.problem or error.reason
            continue
        if header is None:
            index.without_image += 1
            continue
        key = header.series_uid or f"without UID in {path.parent}"
        series = found.setdefault(key, DicomSeries(folder))
        series.headers.append(header)
    index.not_dicom = len(foreign)
    index.series = list(found.values())
    if not any(series.headers for series in index.series):
        raise MediaError(
            f"{folder}: holds no DICOM image that can be read; {len(index.series)} series and "
            f"{len(index.unreadable)} files cannot be, {index.without_image} have no image; "
            f"{index.links} links not followed"
        )
    for series in index.series:
        if series.headers:
            series.place = _common(folder, [series])
    owners = _owners(folder, index.series)
    for series in index.series:
        if series.problem is None:
            _describe(series, owners, files, min_slices, uids_in_paths=uids_in_paths)
    _note_lost_slices(folder, foreign, index.series)
    index.series.sort(
        key=lambda series: (
            (series.place, series.headers[0].series_number or 0)
            if series.headers
            else (series.place, 0)
        )
    )
    return index


def _parent(name: str) -> str:
    return name.rpartition("/")[0] or "."


def _series_uid(path: Path) -> str | None:
    """Return the SeriesInstanceUID of a file whose header is not usable; None without one."""
    pydicom = load_pydicom()
    try:
        with quiet():
            dataset = pydicom.dcmread(
                path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"]
            )
            return str(dataset.get("SeriesInstanceUID", "")) or None
    except (*DECODE_ERRORS, pydicom.errors.InvalidDicomError):
        return None


def _common(folder: Path, series: Sequence[DicomSeries]) -> str:
    """Return the folder that holds all files of some series, relative to the searched one."""
    parents = {header.path.parent for one in series for header in one.headers}
    return Path(os.path.commonpath(parents)).relative_to(folder).as_posix()


def _owners(folder: Path, all_series: Sequence[DicomSeries]) -> dict[Path, list[DicomSeries]]:
    """Return the series that have files in each folder, or in a folder in it."""
    owners: dict[Path, list[DicomSeries]] = {}
    for series in all_series:
        parents = {header.path.parent for header in series.headers}
        above = {place for parent in parents for place in (parent, *parent.parents)}
        for place in above:
            if place.is_relative_to(folder):
                owners.setdefault(place, []).append(series)
    return owners


def _describe(
    series: DicomSeries,
    owners: Mapping[Path, Sequence[DicomSeries]],
    files: Counter[Path],
    min_slices: int,
    *,
    uids_in_paths: bool,
) -> None:
    """Fill in kind, geometry and paths of a series, or its problem."""
    first = series.headers[0]
    if len({(header.patient_id, header.study_uid) for header in series.headers}) > 1:
        series.problem = "files of several patients or studies under one SeriesInstanceUID"
        return
    elements = series.read(["BodyPartExamined", "ImageType", "SOPClassUID"])
    body_part = str(elements.get("BodyPartExamined") or "").strip().upper()
    series.body_part = body_part if body_part in _BODY_PARTS or not body_part else "other"
    storage = str(elements.get("SOPClassUID", ""))
    if storage == _SECONDARY_CAPTURE or storage.startswith(f"{_SECONDARY_CAPTURE}."):
        series.problem = "secondary capture: a picture of a screen, which may show names"
        return
    if "LOCALIZER" in [str(value).upper() for value in elements.get("ImageType") or ()]:
        series.problem = "localizer"
        return
    is_volume = first.modality in _VOLUME_MODALITIES or first.frames > 1
    if not is_volume:
        if any(header.frames > 1 for header in series.headers):
            series.problem = "some files have several frames, others one"
            return
        instances = [header.instance_uid for header in series.headers if header.instance_uid]
        if copies := len(instances) - len(set(instances)):
            series.problem = f"duplicate images: {copies} have the SOPInstanceUID of another file"
            return
        series.kind = "image"
        series.paths = tuple(
            header.path.relative_to(series.folder).as_posix() for header in series.headers
        )
        return
    if series.slices < min_slices:
        series.problem = f"too few slices: {series.slices}, expected {min_slices} or more"
        return
    try:
        _, geometry = arrange_series(series.headers, series.place)
        path = _volume_path(series, owners, files, uids_in_paths=uids_in_paths)
    except MediaError as error:
        series.problem = error.reason.removeprefix(f"{series.place}: ")
        return
    series.spacing = tuple(round(float(spacing), 3) for spacing in geometry.spacing)
    series.paths = (path,)


def _volume_path(
    series: DicomSeries,
    owners: Mapping[Path, Sequence[DicomSeries]],
    files: Counter[Path],
    *,
    uids_in_paths: bool,
) -> str:
    """Return the path by which a reader finds a series. Raises `MediaError` where there is none."""
    if series.headers[0].frames > 1:
        return series.headers[0].path.relative_to(series.folder).as_posix()
    place = series.folder / series.place
    if files[place] > MAX_FRAMES:
        raise MediaError(
            f"its folder holds {files[place]} files, more than {MAX_FRAMES}; put each study into "
            "a folder of its own"
        )
    beside = [other for other in owners[place] if other is not series]
    if not beside:
        return series.place
    if series.place == ".":
        raise MediaError(
            "its files lie at the top beside other series; put each series into a folder of its "
            "own, or give the folder above"
        )
    number = series.headers[0].series_number
    if number is not None and all(other.headers[0].series_number != number for other in beside):
        return f"{series.place}#{number}"
    if uids_in_paths and series.headers[0].series_uid:
        return f"{series.place}#{series.headers[0].series_uid}"
    raise MediaError(
        "its SeriesNumber does not tell it from another series in its folder; put each series into "
        "a folder of its own, or allow UIDs in paths by --keep-tag SeriesInstanceUID"
    )


def _note_lost_slices(folder: Path, foreign: Sequence[Path], all_series: list[DicomSeries]) -> None:
    """Mark volumes whose folder holds a file that could be a slice and is not DICOM."""
    volumes: dict[Path, list[DicomSeries]] = {}
    for series in all_series:
        if series.problem is None and series.spacing and series.headers[0].frames == 1:
            volumes.setdefault(folder / series.place, []).append(series)
    for path in foreign:
        for series in (one for place in path.parents for one in volumes.get(place, ())):
            suffixes = frozenset(header.path.suffix.lower() for header in series.headers) - {""}
            try:
                refuse_lost_slice(path, series.place, expected="DICOM", suffixes=suffixes)
            except MediaError as error:
                series.problem = error.reason.removeprefix(f"{series.place}: ")
