"""Header cleaning of DICOM files by a profile of PS3.15, annex E.

It is no anonymization: pixels stay as they are, with what is written in them and the face that a
head scan shows. Files whose pixels may hold annotations are listed. No value of a header reaches a
log, a message or the report.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from medm import __version__
from medm.errors import MediaError
from medm.files import atomic_directory, atomic_file, atomic_write_text
from medm.imaging.damage import DECODE_ERRORS
from medm.imaging.dicom import is_dicom, load_pydicom, quiet
from medm.imaging.dicom_bare import HEAD, has_file_header
from medm.imaging.dicom_profiles import Action, Profile
from medm.imaging.folders import regular_files
from medm.imaging.pseudonyms import Pseudonyms
from medm.types import JsonObject

if TYPE_CHECKING:
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset, FileDataset
    from pydicom.tag import BaseTag

logger = logging.getLogger(__name__)

REPORT = "cleaning.json"
"""File of the report in the folder of the cleaned files."""
NOTICE = (
    "Header cleaning, no anonymization: pixels are unchanged. Look at the files in `flagged` "
    "before they leave the hospital; heads show faces"
)
_METHOD = "medm header cleaning; pixels unchanged"
"""Deidentification Method (0012,0063), VR LO; the profile is a second value."""
_DUMMY = "REMOVED"
_DUMMIES: dict[str, object] = {
    "DA": "19000101", "TM": "000000", "DT": "19000101000000", "AS": "000Y", "IS": "0", "DS": "0",
    "AT": 0, "FL": 0.0, "FD": 0.0, "SL": 0, "SS": 0, "SV": 0, "UL": 0, "US": 0, "UV": 0,
    "OB": b"\0\0", "OD": bytes(8), "OF": bytes(4), "OL": bytes(4), "OV": bytes(8), "OW": b"\0\0",
    "UN": b"\0\0", "UR": "urn:removed",
}  # fmt: skip
"""Dummy values by value representation; of those that are not listed it is `_DUMMY`."""
_PATIENT_ID = 0x00100020
_DEFLATED = "1.2.840.10008.1.2.1.99"
_STANDARD_UIDS = "1.2.840.10008."
_FREE_TEXT_VRS = {"LO", "LT", "PN", "SH", "ST", "UC", "UT"}
_TEXT_VRS = {"AE", "CS", "UR", *_FREE_TEXT_VRS}
_IDENTIFYING = (
    "PatientName", "PatientID", "OtherPatientIDs", "AccessionNumber", "PatientBirthName",
    "PatientMotherBirthName", "PatientAddress",
)  # fmt: skip
"""Elements whose values are searched for in the elements that stay."""
_OWN_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
"""Elements whose UIDs are searched for in the elements that stay."""
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_DRAWN_MODALITIES = {"US", "IVUS", "ES", "GM", "XC", "SC", "OT"}
"""Modalities whose devices write names and dates into the pixels."""
_DRAWN_CONVERSIONS = {"WSD", "DF", "SD", "SI", "DRW"}
"""Conversion types of screens, films, paper and drawings (PS3.3, C.8.6.1)."""


@dataclass(slots=True)
class CleaningReport:
    """What was done, without a value of any header."""

    profile: str
    files: int = 0
    actions: dict[str, Counter[str]] = field(default_factory=dict)
    """By keyword, the files in which each action of `Action` was taken."""
    private: int = 0
    """Private elements removed."""
    unknown: int = 0
    """Public elements removed that the dictionary of DICOM does not know, or whose content is bytes
    that cannot be looked at."""
    uids: int = 0
    """Different UIDs that were replaced."""
    links: int = 0
    """Links to files or folders that were not followed."""
    flagged: dict[str, list[str]] = field(default_factory=dict)
    """Cleaned files to look at, and why."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Files of the source that were not written, and why; for the screen, not for the report."""

    def as_json(self) -> JsonObject:
        """Return the report that lies beside the cleaned files. It names no file of the source."""
        return {
            "notice": NOTICE,
            "profile": self.profile,
            "table": "DICOM PS3.15 2024b, Table E.1-1, and additions of medm",
            "medm": __version__,
            "files": self.files,
            "actions": {keyword: dict(self.actions[keyword]) for keyword in sorted(self.actions)},
            "private_elements_removed": self.private,
            "unknown_elements_removed": self.unknown,
            "uids_replaced": self.uids,
            "flagged": self.flagged,
            "links_not_followed": self.links,
            "left_out": dict(Counter(self.left_out.values())),
        }


def clean_folder(
    folder: Path,
    output: Path,
    profile: Profile,
    *,
    pseudonyms: Pseudonyms,
    progress: Callable[[int], None] = lambda done: None,
) -> CleaningReport:
    """Write the images of a folder with cleaned headers, and the report of it (`REPORT`).

    Files are named `study-0001/series-0001/000001.dcm`, by the order of the source. Names of the
    source are not kept, because they often hold names of patients.

    Args:
        folder: DICOM files at any depth.
        output: new folder, written as a whole or not at all.
        profile: what is done with each element.
        pseudonyms: names of patients and UIDs; equal in all files.
        progress: called with the number of files that were looked at.

    Raises:
        MediaError: no such folder, it holds no image, or `output` lies in it.
        OSError: a file cannot be written.
    """
    if not folder.is_dir():
        raise MediaError(f"{folder}: no such folder; expected one with DICOM files")
    if output.resolve().is_relative_to(folder.resolve()):
        raise MediaError(f"{output}: lies in {folder}; choose a folder outside of it")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise MediaError(f"{output}: exists and is not empty; choose a new folder")
    report = CleaningReport(profile.name)
    places: dict[tuple[str, ...], int] = {}
    uids: set[str] = set()
    files, report.links = regular_files(folder)
    with atomic_directory(output) as written:
        for done, file in enumerate(files, start=1):
            progress(done)
            try:
                dataset = _read(file)
                if dataset is None:
                    report.left_out[str(file)] = "not DICOM"
                    continue
                if "PixelData" not in dataset:
                    report.left_out[str(file)] = "DICOM without an image"
                    continue
                name = _place(dataset, places)
                cleaner = _Cleaner(profile, pseudonyms, report, uids)
                reasons = cleaner.clean(dataset)
                _save(dataset, written / name)
            except MediaError as error:
                report.left_out[str(file)] = error.reason
                continue
            except OSError as error:
                if error.errno is not None:
                    raise
                report.left_out[str(file)] = f"damaged ({type(error).__name__})"
                continue
            except (*DECODE_ERRORS, load_pydicom().errors.InvalidDicomError) as error:
                # Their messages quote the header.
                report.left_out[str(file)] = f"damaged ({type(error).__name__})"
                continue
            report.files += 1
            if reasons:
                report.flagged[name] = reasons
        report.uids = len(uids)
        if not report.files:
            raise MediaError(
                f"{folder}: holds no DICOM image that can be read; {report.links} links not "
                "followed"
            )
        text = json.dumps(report.as_json(), indent=2)
        atomic_write_text(written / REPORT, f"{text}\n")
    return report


def _read(file: Path) -> FileDataset | None:
    """Return a file with its pixels as they are stored; None for what is not DICOM.

    Raises `MediaError` for a deflated file, which pydicom would inflate without a limit.
    """
    pydicom = load_pydicom()
    if not is_dicom(file):
        return None
    with quiet():
        with file.open("rb") as stream:
            bare = not has_file_header(stream.read(HEAD))
        if not bare:
            meta = pydicom.filereader.read_file_meta_info(file)
            if meta.get("TransferSyntaxUID") == _DEFLATED:
                raise MediaError("deflated, which is not read")
        # A bare data set has no file header; `is_dicom` has looked at its elements.
        dataset: FileDataset = pydicom.dcmread(file, force=bare)
    return dataset


def _save(dataset: FileDataset, target: Path) -> None:
    """Write a file as a whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as temporary, quiet():
        # A file without its identifiers stays one: they are not invented.
        dataset.save_as(temporary, enforce_file_format=False)


def _place(dataset: Dataset, places: dict[tuple[str, ...], int]) -> str:
    """Return the new name of a file, by study and series in the order of their appearance."""
    study = ("study", str(dataset.get("StudyInstanceUID", "")))
    series = (*study, "series", str(dataset.get("SeriesInstanceUID", "")))

    def number(of: tuple[str, ...], within: tuple[str, ...]) -> int:
        if of not in places:
            places[within] = places.get(within, 0) + 1
            places[of] = places[within]
        return places[of]

    first, second = number(study, ("studies",)), number(series, (*study, "count"))
    places[(*series, "files")] = places.get((*series, "files"), 0) + 1
    third = places[(*series, "files")]
    return f"study-{first:04d}/series-{second:04d}/{third:06d}.dcm"


class _Cleaner:
    """Cleans the header of one file."""

    def __init__(
        self, profile: Profile, pseudonyms: Pseudonyms, report: CleaningReport, uids: set[str]
    ) -> None:
        self._profile, self._pseudonyms = profile, pseudonyms
        self._report, self._uids = report, uids
        self._done: set[tuple[str, Action]] = set()

    def clean(self, dataset: FileDataset) -> list[str]:
        """Clean a data set in place. Return why its pixels or its text should be looked at."""
        with quiet():
            reasons = _pixel_reasons(dataset)
            searched = _Searched.of(dataset)
            self._items(dataset)
            dataset.DeidentificationMethod = [_METHOD, f"profile {self._profile.name}"[:64]]
            _write_file_meta(dataset)
            reasons += searched.reasons(dataset)
        for keyword, action in self._done:
            self._report.actions.setdefault(keyword, Counter())[action] += 1
        return reasons

    def _items(self, dataset: Dataset, *, dummy: bool = False) -> None:
        """Clean the elements of a data set or of an item of a sequence.

        Args:
            dataset: changed in place.
            dummy: every element gets a dummy value, as in a sequence whose action is D.
        """
        from pydicom.datadict import dictionary_has_tag, keyword_for_tag, repeater_has_tag

        for tag in list(dataset.keys()):
            if tag.is_private:
                del dataset[tag]
                self._report.private += 1
                continue
            # Of the elements that repeat in groups, curves and overlays stay.
            repeated = tag.group >> 8 in (0x50, 0x60) and repeater_has_tag(int(tag))
            action = self._profile.action(int(tag))
            if action is None and not (dictionary_has_tag(tag) or repeated or tag.element == 0):
                del dataset[tag]
                self._report.unknown += 1
                continue
            element = dataset[tag]
            if action != "X" and _is_opaque(element):
                del dataset[tag]
                self._report.unknown += 1
                continue
            if dummy and action not in ("X", "Z", "U"):
                action = "D"
            if action is not None and action != "K":
                keyword = keyword_for_tag(tag) or element.keyword or f"{tag.group:04X}xxxx"
                self._done.add((keyword, action))
            self._apply(dataset, element, action)

    def _apply(self, dataset: Dataset, element: DataElement, action: Action | None) -> None:
        if action == "X":
            del dataset[element.tag]
        elif element.VR == "SQ":
            if action == "Z":
                element.value = []
            for item in element.value or []:
                self._items(item, dummy=action == "D")
        elif action == "Z":
            element.value = element.empty_value
        elif action == "U" or (action == "D" and element.VR == "UI"):
            self._replace_uids(element)
        elif action == "D" and element.tag == _PATIENT_ID:
            # A pseudonym in place of one dummy for all, so that patients can still be told apart.
            value = str(element.value or "").strip()
            element.value = self._pseudonyms.name(value, "patient") if value else ""
        elif action == "D":
            element.value = _DUMMIES.get(element.VR, _DUMMY)

    def _replace_uids(self, element: DataElement) -> None:
        """Replace UIDs, except those of the standard itself (classes, syntaxes)."""
        values = element.value if element.VM > 1 else [element.value] if element.value else []
        own = [str(value) for value in values if not str(value).startswith(_STANDARD_UIDS)]
        self._uids.update(own)
        replaced = [
            self._pseudonyms.uid(str(value)) if str(value) in own else value for value in values
        ]
        element.value = replaced if len(replaced) > 1 else (replaced or [""])[0]


def _write_file_meta(dataset: FileDataset) -> None:
    """Replace preamble and file meta information, which may hold names of stations and programs."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:  # a bare data set, whose encoding pydicom has found out
        implicit = dataset.original_encoding[0]
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    dataset.preamble = bytes(128)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    if dataset.get("SOPClassUID"):
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    if dataset.get("SOPInstanceUID"):
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID


def _pixel_reasons(dataset: Dataset) -> list[str]:
    """Return why the pixels of a file may show a name or a date."""
    burned_in = str(dataset.get("BurnedInAnnotation", "")).upper()
    storage = str(dataset.get("SOPClassUID", ""))
    modality = str(dataset.get("Modality") or "").strip()
    reasons = []
    if burned_in == "YES":
        reasons.append("BurnedInAnnotation is YES")
    if storage == _SECONDARY_CAPTURE or storage.startswith(f"{_SECONDARY_CAPTURE}."):
        reasons.append("secondary capture")
    elif modality in _DRAWN_MODALITIES and burned_in != "NO":
        reasons.append(f"modality {modality}, and BurnedInAnnotation is not NO")
    if not modality:
        reasons.append("no Modality")
    conversion = str(dataset.get("ConversionType") or "").strip().upper()
    if conversion in _DRAWN_CONVERSIONS:
        reasons.append(f"ConversionType is {conversion}")
    image_type = re.sub(r"[\s_]", "", str(dataset.get("ImageType") or "").upper())
    if "SCREENSAVE" in image_type:
        reasons.append("ImageType is SCREEN SAVE")
    if any(_has_overlay_in_pixels(dataset, group) for group in range(0x6000, 0x6100, 2)):
        reasons.append("an overlay in spare bits of the pixels")
    if str(dataset.get("RecognizableVisualFeatures", "")).upper() == "YES":
        reasons.append("RecognizableVisualFeatures is YES")
    return reasons


def _has_overlay_in_pixels(dataset: Dataset, group: int) -> bool:
    """Return true if Overlay Bit Position (60xx,0102) is above 0."""
    element = dataset.get((group, 0x0102))
    return element is not None and isinstance(element.value, int) and element.value > 0


@dataclass(frozen=True, slots=True)
class _Searched:
    """Values of identifying elements, to search for; they leave this module nowhere."""

    parts: frozenset[str]
    """Found anywhere in a text."""
    words: frozenset[str]
    """Short ones, which occur in other words by chance: found as whole words of free text."""
    uids: frozenset[str]

    @classmethod
    def of(cls, dataset: Dataset) -> _Searched:
        """Return the values of a data set that is not cleaned yet."""
        split = itertools.chain.from_iterable(
            re.split(r"[\\^=,;\s]+", str(dataset.get(keyword) or "")) for keyword in _IDENTIFYING
        )
        found = {value.casefold() for value in split}
        # Scripts without capitals, such as Chinese, have names of two characters and no spaces.
        parts = {
            value
            for value in found
            if len(value) >= 4 or (len(value) > 1 and value.isalpha() and value.upper() == value)
        }
        words = {value for value in found - parts if len(value) > 1 and value.isalpha()}
        uids = {str(dataset.get(keyword) or "").strip() for keyword in _OWN_UIDS} - {""}
        return cls(frozenset(parts), frozenset(words), frozenset(uids))

    def reasons(self, dataset: Dataset) -> list[str]:
        """Return which elements of a cleaned data set hold one of the values."""
        found = {
            f"{element.keyword or _number(element.tag)} holds {what}"
            for element in dataset.iterall()
            for what in self._held(element)
        }
        return sorted(found)

    def _held(self, element: DataElement) -> Iterator[str]:
        if element.VR not in _TEXT_VRS and element.VR != "UI":
            return
        text = str(element.value).casefold()
        if element.VR != "UI" and (
            any(part in text for part in self.parts)
            or (element.VR in _FREE_TEXT_VRS and self.words.intersection(re.split(r"\W+", text)))
        ):
            yield "a value of an identifying element"
        if self.uids.intersection(re.findall(r"[0-9.]+", text)):
            yield "a UID of the source"


def _number(tag: BaseTag) -> str:
    return f"({tag.group:04X},{tag.element:04X})"


def _is_opaque(element: DataElement) -> bool:
    """Return true for an element whose content cannot be looked at, such as names in a sequence.

    pydicom takes the value representation of known elements of VR UN from the dictionary up to
    65534 bytes, and what is longer as bytes. Numbers of pixels and tables are bytes anyhow.
    """
    from pydicom.datadict import dictionary_has_tag, dictionary_VR, repeater_has_tag

    is_known = dictionary_has_tag(element.tag) or repeater_has_tag(int(element.tag))
    known = dictionary_VR(element.tag) if is_known else ""
    if known == "SQ":
        return element.VR != "SQ"
    if any(vr.startswith("O") for vr in known.split(" or ")):
        return False
    return element.VR == "UN" or isinstance(element.value, bytes)
