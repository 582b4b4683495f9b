"""Texts to DICOM Structured Reports (SR) on the images that they are about.

Needs highdicom, the extra 'dicom'. The document is a Comprehensive SR by template TID 2000 (Basic
Diagnostic Imaging Report, PS3.16): the device as observer, the text as a finding, and a library of
the images. It is preliminary and unverified. It holds the patient and the study of its images, as
the standard demands (PS3.3 A.35); nothing of the headers is quoted in a message or a log.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from medm import __version__
from medm.errors import MediaError
from medm.files import atomic_file
from medm.imaging.damage import DECODE_ERRORS
from medm.imaging.dicom import Header, is_dicom, quiet
from medm.imaging.dicom_image import read_image_header
from medm.imaging.dicom_series import select_series
from medm.imaging.dicom_source import EQUIPMENT, load_highdicom, read_source_image
from medm.imaging.paths import split_series
from medm.types import Kind

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

NOTICE = "Report of a model, not for clinical use"
"""Series Description of every SR, and the comment before its text."""
_SERIES_NUMBER = 1001
_DEVICE_UID = "2.25.289604013178262018394870812549210146737"
"""Of medm as the observer; a constant, and no identifier of a machine."""


class ReportSource(NamedTuple):
    """DICOM that a report is about."""

    path: Path
    """The folder of a series ("folder#3" for SeriesNumber 3), or a file."""
    kind: Kind


def write_dicom_sr(
    path: str | Path,
    text: str,
    sources: Sequence[ReportSource],
    *,
    several: Literal["only", "largest"] = "only",
) -> None:
    """Write a text as one DICOM SR that references every image that it is about.

    The report belongs to the study of the last source, as a prompt shows earlier studies first.

    Args:
        path: file to write.
        text: of any language; control characters other than line breaks are left out.
        sources: at least one, all of one patient.
        several: what is done with a folder of several series when none is named.

    Raises:
        DeviceError: highdicom is not installed.
        MediaError: no text; a source that is no DICOM or lacks what an SR needs; sources of
            several patients.
        OSError: the file cannot be written.
    """
    highdicom = load_highdicom("DICOM SR")
    text = _text(text)
    if not text:
        raise MediaError(f"{path}: expected text for a DICOM SR, found none")
    if not sources:
        raise MediaError(f"{path}: a DICOM SR refers to images; expected at least one, found none")
    evidence: list[Dataset] = []
    for source in reversed(sources):
        headers = _headers(source, several)
        evidence += [read_source_image(header, ()) for header in headers]
    patients = {(image.PatientID, str(image.PatientName)) for image in evidence}
    if len(patients) > 1:
        raise MediaError(
            f"{path}: the images are of {len(patients)} patients by PatientID and PatientName; "
            "expected one patient"
        )
    try:
        with quiet():
            report = highdicom.sr.ComprehensiveSR(
                evidence=evidence,
                content=_content(highdicom, text, evidence),
                series_instance_uid=highdicom.UID(),
                series_number=_SERIES_NUMBER,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                **EQUIPMENT,
                series_description=NOTICE,
                is_complete=True,
                is_final=False,
                is_verified=False,
                specific_character_set="ISO_IR 192",
            )
    except DECODE_ERRORS as error:  # their messages quote the header
        raise MediaError(
            f"{path}: highdicom cannot make an SR of these images ({type(error).__name__}); "
            "check their headers with a validator such as dciodvfy"
        ) from None
    with atomic_file(Path(path)) as temporary, quiet():
        report.save_as(temporary, enforce_file_format=True)


def _headers(source: ReportSource, several: Literal["only", "largest"]) -> list[Header]:
    """Return the headers of a source's files. Raises `MediaError` for what is no DICOM."""
    folder, series = split_series(source.path)
    if not folder.exists():
        raise MediaError(f"{source.path}: no such file or folder")
    if folder.is_file() and not is_dicom(folder):
        raise MediaError(f"{source.path}: no DICOM; a DICOM SR refers to DICOM images")
    if source.kind == "image":
        return [read_image_header(source.path, str(source.path))]
    headers, _, _ = select_series(folder, str(folder), series=series, several=several)
    return headers


def _content(highdicom: ModuleType, text: str, evidence: Sequence[Dataset]) -> Any:
    """Return the root of the content tree."""
    from pydicom.sr.codedict import codes

    sr, dcm = highdicom.sr, codes.DCM
    contains, context = (
        sr.RelationshipTypeValues.CONTAINS,
        sr.RelationshipTypeValues.HAS_OBS_CONTEXT,
    )

    def said(name: Any, value: str) -> Any:
        return sr.TextContentItem(name=name, value=value, relationship_type=contains)

    root = sr.ContainerContentItem(name=codes.cid7000.DiagnosticImagingReport, template_id="2000")
    findings = sr.ContainerContentItem(name=dcm.Findings, relationship_type=contains)
    findings.ContentSequence = sr.ContentSequence([said(dcm.Finding, text)])
    library = sr.ContainerContentItem(name=dcm.ImageLibrary, relationship_type=contains)
    library.ContentSequence = sr.ContentSequence(
        [
            sr.ImageContentItem(
                name=dcm.SourceImage,
                referenced_sop_class_uid=image.SOPClassUID,
                referenced_sop_instance_uid=image.SOPInstanceUID,
                relationship_type=contains,
            )
            for image in evidence
        ]
    )
    root.ContentSequence = sr.ContentSequence(
        [
            sr.CodeContentItem(name=dcm.ObserverType, value=dcm.Device, relationship_type=context),
            sr.UIDRefContentItem(
                name=dcm.DeviceObserverUID, value=_DEVICE_UID, relationship_type=context
            ),
            sr.TextContentItem(
                name=dcm.DeviceObserverName,
                value=f"medm {__version__}",
                relationship_type=context,
            ),
            said(dcm.Comment, NOTICE),
            findings,
            library,
        ]
    )
    return root


def _text(text: str) -> str:
    """Return a text as VR UT: no control characters but line breaks and tabs."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", lines).strip()
