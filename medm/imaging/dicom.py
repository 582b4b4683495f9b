"""DICOM headers: the elements that are needed, checked.

pydicom reads the few numbers that matter, so wrong lengths, missing pixels and unknown encodings
are refused before anything is decoded. GDCM (inside SimpleITK) would fill missing pixels with
zeros. Names, dates and free text of the header are never read into an object and never quoted in a
message.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from medm.errors import MediaError
from medm.imaging.damage import DECODE_ERRORS
from medm.imaging.dicom_bare import (
    BIG_ENDIAN,
    EXPLICIT,
    HEAD,
    IMPLICIT,
    bare_syntax,
    has_file_header,
    is_dicom_head,
)
from medm.imaging.dicom_values import (
    LookupTable,
    Voi,
    as_stored,
    read_table,
    read_window,
    stored_numbers,
)
from medm.imaging.notices import warn_once

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

logger = logging.getLogger(__name__)

MAX_FRAMES = 10_000
"""Most frames of one file, and most files of one folder."""

_KEYWORDS = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "PatientID", "StudyInstanceUID",
    "SeriesInstanceUID", "SeriesNumber", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated",
    "BitsStored",
    "HighBit", "PixelRepresentation", "PhotometricInterpretation", "RescaleIntercept",
    "RescaleSlope", "RescaleType",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "ModalityLUTSequence",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit", "PresentationLUTShape", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_NOT_APPLIED = {
    0x00281101: "Supplemental palette (0028,1101)",
    0x00286100: "Mask Subtraction Sequence (0028,6100)",
    0x00289422: "Pixel Intensity Relationship LUT Sequence (0028,9422)",
    0x00409096: "Real World Value Mapping Sequence (0040,9096)",
    0x20500010: "Presentation LUT Sequence (2050,0010)",
    **{
        0x60000010 + (group << 16): f"overlay of group {0x6000 + group:04X}"
        for group in range(0, 0x20, 2)
    },
}
"""Elements that change how a viewer shows the file and are not applied here, by their names."""

NATIVE = {IMPLICIT, EXPLICIT, BIG_ENDIAN}
"""Transfer syntaxes of uncompressed pixels."""
_COMPRESSED = {
    # JPEG baseline and extended: 8 x 8 in some bits
    "1.2.840.10008.1.2.4.50": 300, "1.2.840.10008.1.2.4.51": 300,
    "1.2.840.10008.1.2.4.57": 64, "1.2.840.10008.1.2.4.70": 64,  # JPEG lossless: one bit per pixel
    "1.2.840.10008.1.2.4.80": 10_000, "1.2.840.10008.1.2.4.81": 10_000,  # JPEG-LS
    "1.2.840.10008.1.2.4.90": 10_000, "1.2.840.10008.1.2.4.91": 10_000,  # JPEG 2000
    "1.2.840.10008.1.2.5": 64,  # run lengths: 128 pixels in two bytes
}  # fmt: skip
"""Compressed transfer syntaxes and the most bytes of pixels that one byte of the file can hold.

A file that declares more is refused. Deflated files are left out: pydicom would inflate them
without a limit.
"""

_DIRECTORY = "1.2.840.10008.1.3.10"
_OTHER_IMAGES = {"RT Dose Storage", "Segmentation Storage", "Parametric Map Storage"}
"""Storage classes with pixels whose name lacks "Image Storage"."""
_MODALITIES = {
    "CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "OT", "SC", "OP", "OPT", "SM",
    "ES", "GM", "IO", "IVUS",
    "PX", "XC", "RTIMAGE", "RTDOSE", "SEG",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plane:
    """Position and orientation of a slice in the patient, in millimeters (LPS)."""

    position: np.ndarray
    """(3,) center of the first pixel."""
    across: np.ndarray
    """(3,) unit vector along which the column index grows."""
    down: np.ndarray
    """(3,) unit vector along which the row index grows."""
    spacing: tuple[float, float]
    """Between rows, between columns."""


@dataclass(frozen=True, slots=True)
class Header:
    """The numbers of one DICOM file that decide how its pixels are read."""

    path: Path
    name: str
    """The file, for messages."""
    modality: str
    """A known modality, or "unknown": never free text."""
    patient_id: str = field(repr=False)
    study_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    instance_uid: str = field(repr=False)
    """Like those above for grouping only; patient data, never shown."""
    series_number: int | None
    rows: int
    columns: int
    frames: int
    samples: int
    """1 for gray, 3 for color and for indices of a palette, which become color."""
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    inverted: bool
    """The smallest value is white (MONOCHROME1)."""
    palette: bool
    syntax: str
    """UID of the transfer syntax."""
    bare: bool
    """The file lacks the preamble, prefix or meta information of DICOM."""
    pixels_at: int
    """Byte of the file at which uncompressed pixels begin."""
    in_words: bool
    """The pixels are stored as 16-bit words (VR OW), whatever the bits of a pixel are."""
    rescale: tuple[float, float] | None
    """Slope and intercept; None where the file has neither."""
    frame_rescale: tuple[tuple[float, float], ...]
    """Slope and intercept of each frame, where they differ; empty where `rescale` holds for all."""
    table: LookupTable | None
    """Modality LUT, which takes the place of slope and intercept."""
    hounsfield: bool
    """A CT whose values become Hounsfield units by its rescale or its modality LUT."""
    window: tuple[float, float] | None
    """Lower and upper value, after the modality transform, of the file's linear window."""
    voi: Voi | None
    """VOI LUT or sigmoid window, which takes the place of a linear one."""
    padding: tuple[int, int] | None
    """Smallest and largest stored number that mark pixels outside of the image."""
    not_applied: tuple[str, ...]
    """Elements that change what a viewer shows and that are not applied."""
    planes: tuple[Plane, ...]
    """One per frame; empty if the file gives no positions."""

    @property
    def value_range(self) -> tuple[float, float]:
        """Smallest and largest value that the file can hold, after the modality transform."""
        if self.table is not None:
            return 0.0, float(self.table.top)
        slope, intercept = self.rescale or (1.0, 0.0)
        low, high = sorted(slope * number + intercept for number in self.stored_range)
        return low, high

    @property
    def byte_order(self) -> str:
        """Byte order of the pixels, as NumPy writes it."""
        return ">" if self.syntax == BIG_ENDIAN else "<"

    @property
    def direct(self) -> bool:
        """Return true if the pixels are uncompressed gray values."""
        return self.syntax in NATIVE and self.samples == 1

    @property
    def stored_range(self) -> tuple[int, int]:
        """Smallest and largest number that the stored bits can hold, before rescale."""
        lowest = -(2 ** (self.bits_stored - 1)) if self.signed else 0
        return lowest, lowest + 2**self.bits_stored - 1


def is_dicom(path: Path) -> bool:
    """Return true if a regular file is DICOM by its first bytes, with a file header or not."""
    try:
        if not path.is_file():  # opening a pipe would wait forever
            return False
        with path.open("rb") as stream:
            return is_dicom_head(stream.read(HEAD))
    except OSError:
        return False


def read_header(path: Path, name: str | None = None) -> Header | None:
    """Return the header of one file; None for DICOM without an image (RTSTRUCT, SR, DICOMDIR).

    Raises:
        MediaError: damaged, of an encoding that is not read, or declaring more than the file holds.
    """
    name = name or str(path)
    pydicom_errors = load_pydicom().errors
    try:
        size = path.stat().st_size
        with path.open("rb") as stream, quiet():
            found = _read_until_pixels(stream, size, name)
            if found.declared is None or found.storage == _DIRECTORY:
                _check_no_image(found, name)
                return None
            header = _header(found, path, name)
    except MediaError:
        raise
    except (
        *DECODE_ERRORS,
        pydicom_errors.InvalidDicomError,
        pydicom_errors.BytesLengthException,
    ) as error:
        raise MediaError(f"{name}: the DICOM header is damaged ({type(error).__name__})") from None
    _check_pixels(header, found.declared, size - header.pixels_at)
    return header


def read_elements(header: Header, keywords: Sequence[str]) -> Dataset:
    """Return some elements of a file whose header was read; none that is not named.

    Their values are a patient's: a caller copies them into a file, and never into a message.

    Raises:
        MediaError: the elements are damaged.
    """
    pydicom = load_pydicom()
    wanted = [pydicom.tag.Tag(keyword) for keyword in keywords]
    try:
        with header.path.open("rb") as stream, quiet():
            dataset: Dataset = pydicom.filereader.read_partial(
                stream,
                stop_when=lambda tag, _vr, _length: tag == 0x7FE00010,
                specific_tags=wanted,
                force=header.bare,
            )
            dataset.decode()
    except (
        *DECODE_ERRORS,
        pydicom.errors.InvalidDicomError,
        pydicom.errors.BytesLengthException,
    ) as error:
        raise MediaError(
            f"{header.name}: the DICOM header is damaged ({type(error).__name__})"
        ) from None
    return dataset


def warn_not_applied(header: Header) -> None:
    """Name what the file holds for viewers and what is not applied here, once for each element."""
    for element in header.not_applied:
        warn_once(logger, f"dicom {element}", f"{header.name}: DICOM {element} is not applied")


@contextmanager
def quiet() -> Iterator[None]:
    """Header values are a patient's, and pydicom quotes them in its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def load_pydicom() -> ModuleType:
    """Return pydicom, whose log is off: its messages quote header values."""
    import pydicom
    import pydicom.errors
    import pydicom.filereader
    import pydicom.tag

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    return pydicom


@dataclass(frozen=True, slots=True)
class _Found:
    """Elements of a file before its pixels."""

    dataset: Dataset
    """The wanted tags."""
    syntax: str
    storage: str
    """UID of the SOP class."""
    bare: bool
    """The file lacks its DICOM file header."""
    in_words: bool
    """The pixels are of VR OW."""
    declared: int | None
    """Length of the pixels; 2**32 - 1 where it is undefined, None where there are none."""
    pixels_at: int


def _read_until_pixels(stream: BinaryIO, size: int, name: str) -> _Found:
    pydicom = load_pydicom()
    bare = not has_file_header(stream.read(HEAD))
    stream.seek(0)
    storage, is_declared = "", True
    if bare:
        syntax, is_declared = bare_syntax(stream, name)
    else:
        meta = pydicom.filereader.read_file_meta_info(stream.name)
        syntax, storage = (
            str(meta.get("TransferSyntaxUID", "")),
            str(meta.get("MediaStorageSOPClassUID", "")),
        )
    if syntax not in NATIVE and syntax not in _COMPRESSED:
        what = pydicom.uid.UID(syntax).name if syntax in pydicom.uid.UID_dictionary else "unknown"
        raise MediaError(
            f"{name}: DICOM transfer syntax '{what}' is not read; convert the file to Explicit VR "
            "Little Endian"
        )
    found: list[int] = []
    overlong: list[int] = []

    def stop(tag: int, _vr: str | None, length: int) -> bool:
        if tag == 0x7FE00010:
            found.append(length)
        elif length != 0xFFFFFFFF and length > size:
            overlong.append(length)
        return bool(found or overlong)

    wanted = [pydicom.tag.Tag(keyword) for keyword in [*_KEYWORDS, *_NOT_APPLIED]]
    dataset = pydicom.filereader.read_partial(
        stream, stop_when=stop, specific_tags=wanted, force=bare
    )
    if overlong:
        raise MediaError(
            f"{name}: a DICOM element declares {overlong[0]} bytes, the file has {size}; it is "
            "damaged"
        )
    if found and found[0] == 0xFFFFFFFF and not is_declared:
        raise MediaError(
            f"{name}: DICOM without its file header, which would name the encoding of its "
            "compressed pixels; write the file anew with one (TransferSyntaxUID)"
        )
    # The reader stands before the tag. A value representation of two letters is followed by a
    # length of four bytes.
    start, tag = stream.tell(), stream.read(8)
    return _Found(
        dataset=dataset,
        syntax=syntax,
        storage=str(dataset.get("SOPClassUID", "")) or storage,
        bare=bare,
        in_words=tag[4:6] == b"OW",
        declared=found[0] if found else None,
        pixels_at=start + (12 if tag[4:6] in (b"OB", b"OW", b"UN") else 8),
    )


def _check_no_image(found: _Found, name: str) -> None:
    """Refuse an image class without pixels; skipping the file would shorten a volume."""
    uid = load_pydicom().uid.UID(found.storage)
    known = uid in load_pydicom().uid.UID_dictionary
    if (
        "Image Storage" in uid.name
        or uid.name in _OTHER_IMAGES
        or (not known and "Rows" in found.dataset)
    ):
        raise MediaError(
            f"{name}: a DICOM image without Pixel Data (7FE0,0010): the file is truncated or "
            "encrypted, or holds Float Pixel Data or a link to its pixels, which are not read"
        )


def _rescale_of_frames(
    dataset: Dataset,
    per_frame: Sequence[Dataset],
    shared: Dataset | None,
    frames: int,
    name: str,
) -> tuple[float | None, float | None, str, tuple[tuple[float, float], ...]]:
    """Return slope, intercept and type of the rescaling, and slope and intercept of each frame.

    The functional groups of a multi-frame file take precedence over the elements of the file. The
    frames have none of their own where the tuple is empty.
    """
    of_shared = _items(shared, 0x00289145)
    of_frames = [_items(group, 0x00289145) for group in per_frame]
    items = [*of_shared, *itertools.chain.from_iterable(of_frames)]
    if items and not of_shared and not all(of_frames):
        raise MediaError(
            f"{name}: Pixel Value Transformation Sequence (0028,9145) stands in "
            f"{sum(map(bool, of_frames))} of {len(per_frame)} frames, so the values of the others "
            "are unknown"
        )
    slope, intercept = _rescale(items[0] if items else dataset)
    for value, keyword in ((slope, "RescaleSlope"), (intercept, "RescaleIntercept")):
        if value is not None and not math.isfinite(value):
            raise MediaError(f"{name}: DICOM {keyword} is not a finite number")
    if slope == 0:
        raise MediaError(f"{name}: DICOM RescaleSlope is 0, which would make all pixels equal")
    if not items:
        return slope, intercept, str(dataset.get("RescaleType", "")), ()
    types = {str(item.get("RescaleType", "")) for item in items}
    rescale_type = types.pop() if len(types) == 1 else "several"
    return slope, intercept, rescale_type, _frame_rescale(of_frames, of_shared, frames, name)


def _header(found: _Found, path: Path, name: str) -> Header:
    dataset = found.dataset
    modality = str(dataset.get("Modality", "unknown"))
    frames = int(_number(dataset, "NumberOfFrames") or 1)
    per_frame, shared = _groups(dataset)
    slope, intercept, rescale_type, frame_rescale = _rescale_of_frames(
        dataset, per_frame, shared, frames, name
    )
    rescale = (
        (slope or 1.0, intercept or 0.0) if slope is not None or intercept is not None else None
    )
    signed = _number(dataset, "PixelRepresentation") == 1
    order = ">" if found.syntax == BIG_ENDIAN else "<"
    table, unit = _modality_table(dataset, name, signed=signed, order=order)
    if table is not None and rescale not in (None, (1.0, 0.0)):
        raise MediaError(
            f"{name}: DICOM Modality LUT Sequence (0028,3000) beside RescaleSlope {slope:g} and "
            f"RescaleIntercept {intercept or 0:g}: a file may have one of the two"
        )
    # "US" is DICOM for "unspecified"; toolkits write it for every CT.
    is_hounsfield = (
        unit == "HU"
        if table is not None
        else (slope is not None and intercept is not None and rescale_type in ("HU", "US", ""))
    )
    voi, window, ignored = None, None, []
    if frames == 1:
        low = rescale[0] * -32768 + rescale[1] if rescale and signed else (rescale or (1.0, 0.0))[1]
        voi, window, reason = _voi(
            dataset, per_frame, shared, name, signed=signed or low < 0, order=order
        )
        ignored += [reason] if reason else []
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    ignored += _not_applied(dataset, per_frame, shared, photometric)
    number = _number(dataset, "SeriesNumber")
    stored = int(_number(dataset, "BitsStored") or _number(dataset, "BitsAllocated") or 0)
    high_bit = _number(dataset, "HighBit")
    return Header(
        path=path,
        name=name,
        modality=modality if modality in _MODALITIES else "unknown",
        patient_id=str(dataset.get("PatientID") or "").strip(),
        study_uid=str(dataset.get("StudyInstanceUID") or "").strip(),
        series_uid=str(dataset.get("SeriesInstanceUID", "")),
        instance_uid=str(dataset.get("SOPInstanceUID") or "").strip(),
        series_number=None if number is None else int(number),
        rows=int(_number(dataset, "Rows") or 0),
        columns=int(_number(dataset, "Columns") or 0),
        frames=frames,
        samples=3
        if photometric == "PALETTE COLOR"
        else int(_number(dataset, "SamplesPerPixel") or 1),
        bits_allocated=int(_number(dataset, "BitsAllocated") or 0),
        bits_stored=stored,
        high_bit=stored - 1 if high_bit is None else int(high_bit),
        signed=signed,
        inverted=photometric == "MONOCHROME1",
        palette=photometric == "PALETTE COLOR",
        syntax=found.syntax,
        bare=found.bare,
        pixels_at=found.pixels_at,
        in_words=found.in_words,
        rescale=rescale,
        frame_rescale=frame_rescale,
        table=table,
        hounsfield=modality == "CT" and is_hounsfield,
        window=window,
        voi=voi,
        padding=_padding(dataset, signed=signed, order=order),
        not_applied=tuple(ignored),
        planes=_planes(dataset, per_frame, shared, frames),
    )


def _check_pixels(header: Header, declared: int, available: int) -> None:
    name = header.name
    if header.rows < 1 or header.columns < 1 or not 1 <= header.frames <= MAX_FRAMES:
        raise MediaError(
            f"{name}: DICOM Rows {header.rows}, Columns {header.columns}, NumberOfFrames "
            f"{header.frames}: expected at least 1 of each and at most {MAX_FRAMES} frames"
        )
    if (
        header.samples not in (1, 3)
        or header.bits_allocated not in (8, 16)
        or not 1 <= header.bits_stored <= 16
    ):
        raise MediaError(
            f"{name}: DICOM pixels of {header.samples} samples and {header.bits_allocated} bits "
            "are not read; expected 1 or 3 samples of 8 or 16 bits"
        )
    if header.samples == 3 and header.bits_allocated != 8:
        raise MediaError(
            f"{name}: DICOM color of {header.bits_allocated} bits is not read; expected 8"
        )
    if header.high_bit != header.bits_stored - 1 or header.bits_stored > header.bits_allocated:
        raise MediaError(
            f"{name}: DICOM HighBit {header.high_bit} and BitsStored {header.bits_stored} do not "
            f"fit together in {header.bits_allocated} bits"
        )
    # The smallest native layouts of color: indices of a palette, and YBR_FULL_422, two bytes per
    # pixel.
    samples = 1 if header.samples == 1 or header.palette else 2
    needed = header.rows * header.columns * header.frames * samples * header.bits_allocated // 8
    if header.syntax in _COMPRESSED:
        if declared != 0xFFFFFFFF:
            raise MediaError(
                f"{name}: a compressed encoding is declared, but the pixels are not in frames"
            )
        if needed > available * _COMPRESSED[header.syntax]:
            raise MediaError(
                f"{name}: {header.frames} x {header.rows} x {header.columns} DICOM pixels are "
                f"declared, which {available} compressed bytes cannot hold; it is damaged"
            )
    elif declared == 0xFFFFFFFF or min(declared, available) < needed:
        raise MediaError(
            f"{name}: {header.frames} x {header.rows} x {header.columns} DICOM pixels need "
            f"{needed} bytes, the file has {min(declared, available)}; it is truncated"
        )


def _number(dataset: Dataset, keyword: str) -> float | None:
    """One number, or None where it is missing, empty or not a number."""
    try:
        value = dataset.get(keyword)
        return None if value is None or value == "" else float(value)
    except DECODE_ERRORS:
        return None


def _numbers(dataset: Dataset, keyword: str, count: int) -> np.ndarray | None:
    try:
        values = np.asarray([float(value) for value in dataset.get(keyword) or ()])
    except DECODE_ERRORS:
        return None
    return values if values.shape == (count,) and np.isfinite(values).all() else None


def _rescale(dataset: Dataset) -> tuple[float | None, float | None]:
    return _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")


def _frame_rescale(
    of_frames: list[list[Dataset]], of_all: list[Dataset], frames: int, name: str
) -> tuple[tuple[float, float], ...]:
    """Return slope and intercept of each frame if they differ (PET, some MR), else an empty tuple.

    Args:
        of_frames: items of the Pixel Value Transformation Sequence of each frame.
        of_all: those of the shared functional groups.
        frames: how many frames the file declares.
        name: the file, for messages.

    Raises:
        MediaError: a frame without a usable slope and intercept, where others have one.
    """
    found = [_rescale((own or of_all)[0]) for own in of_frames if own or of_all]
    if len(set(found)) < 2:
        return ()
    usable = [
        (a, b) for a, b in found if a and b is not None and math.isfinite(a) and math.isfinite(b)
    ]
    if len(usable) < frames or len(found) != frames:
        raise MediaError(
            f"{name}: Pixel Value Transformation Sequence (0028,9145) gives {len(usable)} of "
            f"{frames} frames a RescaleSlope that is not 0 and a RescaleIntercept"
        )
    return tuple(usable)


def _modality_table(
    dataset: Dataset, name: str, *, signed: bool, order: str
) -> tuple[LookupTable | None, str]:
    """Return the Modality LUT of a file and the unit of its output ("HU", "OD", "US")."""
    items = _items(dataset, 0x00283000)
    if not items:
        return None, ""
    element = "Modality LUT Sequence (0028,3000)"
    return (
        read_table(items[0], name, element=element, signed=signed, order=order),
        str(items[0].get("ModalityLUTType", "")),
    )


def _voi(
    dataset: Dataset,
    per_frame: list[Dataset],
    shared: Dataset | None,
    name: str,
    *,
    signed: bool,
    order: str,
) -> tuple[Voi | None, tuple[float, float] | None, str]:
    """Return the first VOI table or window of a single-frame file, and what could not be applied.

    A frame's own functional group comes before the shared one, and both before the top of the file.
    Where a table and a window stand side by side, they are alternatives; the table is taken, as
    pydicom does.
    """
    items = _items(dataset, 0x00283010)
    if items:
        element = "VOI LUT Sequence (0028,3010)"
        return (
            Voi(read_table(items[0], name, element=element, signed=signed, order=order)),
            None,
            "",
        )
    groups = [*_items(per_frame[0] if per_frame else None, 0x00289132), *_items(shared, 0x00289132)]
    source = groups[0] if groups else dataset
    function = str(source.get("VOILUTFunction") or "LINEAR").strip()
    found, reason = read_window(source.get("WindowCenter"), source.get("WindowWidth"), function)
    return (found, None, "") if isinstance(found, Voi) else (None, found, reason)


def _padding(dataset: Dataset, *, signed: bool, order: str) -> tuple[int, int] | None:
    """Stored numbers from PixelPaddingValue to PixelPaddingRangeLimit, in either order."""
    value = stored_numbers(dataset, 0x00280120, order)
    if value is None or len(value) != 1:
        return None
    limit = stored_numbers(dataset, 0x00280121, order)
    ends = sorted(
        as_stored(int(number), signed=signed)
        for number in (value[0], limit[0] if limit is not None and len(limit) == 1 else value[0])
    )
    return ends[0], ends[1]


def _not_applied(
    dataset: Dataset, per_frame: list[Dataset], shared: Dataset | None, photometric: str
) -> list[str]:
    """Names of elements that change what a viewer shows and that are not applied."""
    groups = [dataset, *([] if shared is None else [shared]), *per_frame]
    names = [
        element
        for tag, element in _NOT_APPLIED.items()
        if any(tag in group for group in groups)
        and not (tag == 0x00281101 and photometric == "PALETTE COLOR")
    ]
    shape = str(dataset.get("PresentationLUTShape", ""))
    expected = {"MONOCHROME1": "INVERSE", "MONOCHROME2": "IDENTITY"}.get(photometric)
    if shape in ("INVERSE", "IDENTITY") and expected not in (None, shape):
        names.append(
            f"Presentation LUT Shape (2050,0020) {shape}, which contradicts {photometric},"
        )
    return names


def _groups(dataset: Dataset) -> tuple[list[Dataset], Dataset | None]:
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    return list(dataset.get("PerFrameFunctionalGroupsSequence") or []), shared[0] if len(
        shared
    ) else None


def _items(group: Dataset | None, tag: int) -> list[Dataset]:
    return list(group[tag].value or []) if group is not None and tag in group else []


def _planes(
    dataset: Dataset, per_frame: list[Dataset], shared: Dataset | None, frames: int
) -> tuple[Plane, ...]:
    if not per_frame:
        plane = _plane(dataset, dataset, dataset) if frames == 1 else None
        return () if plane is None else (plane,)
    planes = []
    for group in per_frame:
        parts = [
            _items(group, tag) or _items(shared, tag)
            for tag in (0x00209113, 0x00209116, 0x00289110)
        ]
        plane = _plane(*(items[0] for items in parts)) if all(parts) else None
        if plane is None:
            return ()
        planes.append(plane)
    return tuple(planes) if len(planes) == frames else ()


def _plane(position_of: Dataset, orientation_of: Dataset, spacing_of: Dataset) -> Plane | None:
    position = _numbers(position_of, "ImagePositionPatient", 3)
    axes = _numbers(orientation_of, "ImageOrientationPatient", 6)
    spacing = _numbers(spacing_of, "PixelSpacing", 2)
    if position is None or axes is None or spacing is None:
        return None
    return Plane(position, axes[:3], axes[3:], (float(spacing[0]), float(spacing[1])))
