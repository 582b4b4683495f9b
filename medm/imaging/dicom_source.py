"""The DICOM images that a new object (SEG, SR) refers to: what it takes over of their headers."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from medm import __version__
from medm.errors import DeviceError, MediaError
from medm.imaging.dicom import Header, read_elements

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

IDENTIFIERS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID")
"""Elements by which an image is referred to, besides its StudyInstanceUID."""
_PATIENT_AND_STUDY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID",
    "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
"""Elements of type 1 and 2 of the modules Patient and General Study."""
EQUIPMENT = {
    "manufacturer": "medm",
    "manufacturer_model_name": "medm",
    "software_versions": __version__,
    "device_serial_number": "none",
}
"""What writes new objects, by the names of highdicom's arguments."""
_FORMS = {
    "PatientBirthDate": r"\d{8}",
    "StudyDate": r"\d{8}",
    "StudyTime": r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?",
    "PatientSex": r"[MFO]",
}
"""Forms of elements of type 2; what has another form is left empty, as the type allows."""


def load_highdicom(what: str) -> ModuleType:
    """Return highdicom, whose log is off: its messages quote header values.

    Raises:
        DeviceError: it is not installed; the message says that `what` needs it.
    """
    try:
        highdicom = importlib.import_module("highdicom")
    except ModuleNotFoundError as error:
        if error.name != "highdicom":
            raise
        raise DeviceError(
            f"{what} needs highdicom: pip install 'highdicom' (or 'medm[dicom]')"
        ) from None
    logging.getLogger("highdicom").setLevel(logging.CRITICAL)
    return highdicom


def read_source_image(
    header: Header, keywords: Sequence[str], *, required: Sequence[str] = ()
) -> Dataset:
    """Return what an object needs of an image that it is made from, and nothing else.

    Args:
        header: of the image.
        keywords: elements besides those of the patient and the study.
        required: elements that must be there besides the identifiers.

    Raises:
        MediaError: an element is missing.
    """
    image = read_elements(header, [*IDENTIFIERS, *keywords, *_PATIENT_AND_STUDY])
    needed = [*IDENTIFIERS, "StudyInstanceUID", *required]
    missing = [keyword for keyword in needed if not image.get(keyword)]
    if missing:
        raise MediaError(
            f"{header.name}: {', '.join(missing)} missing or empty; expected them in every image "
            "that a DICOM object refers to. Choose another format, or add the identifiers"
        )
    for keyword in _PATIENT_AND_STUDY:
        value = image.get(keyword)
        text = "" if value is None else str(value)
        form = _FORMS.get(keyword)
        # Decoded, because the object is written in UTF-8 whatever the image is written in.
        setattr(image, keyword, text if form is None or re.fullmatch(form, text) else "")
    image.pop("SpecificCharacterSet", None)
    return image
