"""Masks to DICOM Segmentation objects (SEG) on the series that they were drawn on.

Needs highdicom, the extra 'dicom'. A SEG holds the patient and the study of its series, as the
standard demands (PS3.3 A.51); nothing else of the headers is copied, and nothing of them is quoted
in a message or a log.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from medm import __version__
from medm.errors import MediaError
from medm.files import atomic_file
from medm.imaging.damage import DECODE_ERRORS
from medm.imaging.dicom import Header, quiet
from medm.imaging.dicom_image import read_image_header
from medm.imaging.dicom_series import select_series
from medm.imaging.dicom_source import (
    EQUIPMENT,
    IDENTIFIERS,
    load_highdicom,
    read_source_image,
)
from medm.imaging.mask_colors import mask_color
from medm.imaging.mask_output import NamedMasks, as_mask
from medm.imaging.paths import split_series
from medm.imaging.placement import Placement

CONTENT_LABEL = "NOT_CLINICAL"
"""Content Label (0070,0080) of every SEG: 16 capitals at most."""
NOTICE = "Masks of a model, not for clinical use"
"""Content Description (0070,0081) of every SEG."""
_SERIES_NUMBER = 1000
_LONG_STRING = 64
"""Most characters of a label, VR LO."""

_IMAGE = (
    *IDENTIFIERS, "Modality", "ImageType",
    "FrameOfReferenceUID", "PositionReferenceIndicator", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "Rows",
    "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation",
    "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod",
    "DimensionOrganizationType", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)  # fmt: skip
"""Elements that place a SEG on its images."""


@dataclass(frozen=True, slots=True)
class SegmentCode:
    """Coded category and type of a segment: (value, coding scheme, meaning) each."""

    category: tuple[str, str, str]
    """Segmented Property Category, of CID 7150."""
    type: tuple[str, str, str]
    """Segmented Property Type."""


UNKNOWN_STRUCTURE = SegmentCode(("85756007", "SCT", "Tissue"), ("85756007", "SCT", "Tissue"))
"""Code of a phrase that is no term of the DICOM lists: it claims neither an organ nor a disease."""
ABNORMALITY = SegmentCode(
    ("49755003", "SCT", "Morphologically Abnormal Structure"),
    ("49755003", "SCT", "Morphologically Abnormal Structure"),
)
"""Code for findings whose kind has no code of its own."""


def write_dicom_seg(
    path: str | Path,
    masks: NamedMasks,
    source: str | Path,
    placement: Placement,
    *,
    several: Literal["only", "largest"] = "only",
    codes: Mapping[str, SegmentCode] | None = None,
) -> None:
    """Write masks as one DICOM SEG of binary segments that references the images it lies on.

    Segments may overlap. Slices without a voxel of a segment are left out, as is usual; where all
    masks are empty, every slice is written. The needed memory is that of all masks, once more.

    Args:
        path: file to write.
        masks: at least one; a mask may be empty.
        source: DICOM that the masks were drawn on: the folder of a series ("folder#3" for
            SeriesNumber 3), a multi-frame file, or the file of one image.
        placement: of that volume or image (`medm.imaging.prepare`).
        several: what was done with a folder of several series when none is named.
        codes: category and type of phrases that are not to be looked up (`find_code`).

    Raises:
        DeviceError: highdicom is not installed.
        MediaError: the source is no DICOM, lies elsewhere than the placement or lacks what a SEG
            needs; masks of another size or with other values than 0 and 1.
        OSError: the file cannot be written.
    """
    highdicom = load_highdicom("DICOM SEG")
    if not masks:
        raise MediaError(f"{path}: expected at least one mask for a DICOM SEG, found none")
    headers, stored_at = _source_headers(Path(source), placement, several=several)
    placed = ["FrameOfReferenceUID"] if headers[0].planes else []
    images = [read_source_image(header, _IMAGE, required=placed) for header in headers]
    pixels = np.zeros((*_stack_shape(placement), len(masks)), np.uint8)  # [D, H, W, segments]
    for index, (phrase, mask) in enumerate(masks):
        inside = as_mask(mask, placement, name=f"{path}: mask {index + 1} ({phrase!r})")
        pixels[..., index] = inside if inside.ndim == 3 else inside[None]
    if len(headers) == 1:
        pixels = pixels[np.argsort(stored_at)]  # frames as they are stored
    else:
        images = [images[index] for index in stored_at]
    chosen = [(codes or {}).get(phrase) or find_code(phrase) for phrase, _ in masks]
    segments = [
        _segment(highdicom, number, phrase, code)
        for number, ((phrase, _), code) in enumerate(zip(masks, chosen, strict=True), start=1)
    ]
    try:
        with quiet():
            seg = highdicom.seg.Segmentation(
                source_images=images,
                pixel_array=pixels,
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=segments,
                series_instance_uid=highdicom.UID(),
                series_number=_SERIES_NUMBER,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                **EQUIPMENT,
                content_description=NOTICE,
                content_label=CONTENT_LABEL,
                series_description=NOTICE,
                omit_empty_frames=bool(pixels.any()),
            )
    except DECODE_ERRORS as error:  # their messages quote the header
        raise MediaError(
            f"{source}: highdicom cannot make a SEG of this series ({type(error).__name__}); "
            "check its headers with a validator such as dciodvfy"
        ) from None
    seg.SpecificCharacterSet = "ISO_IR 192"  # UTF-8: phrases are of any language
    with atomic_file(Path(path)) as temporary, quiet():
        seg.save_as(temporary, enforce_file_format=True)


def find_code(phrase: str) -> SegmentCode:
    """Return the code of a phrase that is a term of the DICOM lists, in any case of the letters.

    The lists are anatomical structures (CID 7192), lesions (CID 7159, 7194) and tissues (CID
    7166). Every other phrase gets `UNKNOWN_STRUCTURE`: a code that is nearly right is wrong.
    """
    return _terms().get(" ".join(phrase.lower().split()), UNKNOWN_STRUCTURE)


@functools.cache
def _terms() -> Mapping[str, SegmentCode]:
    """Codes by their meaning in small letters."""
    from pydicom.sr.codedict import codes

    lists = (
        ("AnatomicalStructure", ("cid7192",)),
        ("MorphologicallyAbnormalStructure", ("cid7159", "cid7194")),
        ("Tissue", ("cid7166",)),
    )
    found: dict[str, SegmentCode] = {}
    for name, contexts in lists:
        category = getattr(codes.cid7150, name)
        for context in contexts:
            terms = getattr(codes, context)
            for term in terms.dir():
                code = getattr(terms, term)
                if term != "Background":  # among the lesions, and none
                    found.setdefault(
                        code.meaning.lower(),
                        SegmentCode(
                            (category.value, category.scheme_designator, category.meaning),
                            (code.value, code.scheme_designator, code.meaning),
                        ),
                    )
    return found


def _source_headers(
    source: Path, placement: Placement, *, several: Literal["only", "largest"]
) -> tuple[list[Header], list[int]]:
    """Return the headers of the images, and the position among them of each slice of the masks.

    Raises `MediaError` where their grid is not that of the placement.
    """
    if len(placement.source_shape) == 2:
        if not source.exists():
            raise MediaError(f"{source}: no such file")
        header = read_image_header(source, str(source))
        _check_shape((header.rows, header.columns), source, placement)
        return [header], [0]
    folder, series = split_series(source)
    if not folder.exists():
        raise MediaError(f"{source}: no such file or folder")
    headers, order, geometry = select_series(folder, str(folder), series=series, several=several)
    _check_shape((len(order), headers[0].rows, headers[0].columns), source, placement)
    own = Placement.of_source(placement.source_shape, geometry).affine
    if placement.affine is None or not np.allclose(placement.affine, np.asarray(own), atol=1e-3):
        raise MediaError(
            f"{source}: the series lies elsewhere in the patient than the volume of the masks; "
            "expected the series that the volume was read from"
        )
    return headers, order


def _check_shape(shape: tuple[int, ...], source: Path, placement: Placement) -> None:
    if shape != placement.source_shape:
        found, expected = (" x ".join(map(str, sides)) for sides in (shape, placement.source_shape))
        raise MediaError(
            f"{source}: images of {found} for masks of {expected}; expected the series or image "
            "that the masks were drawn on"
        )


def _stack_shape(placement: Placement) -> tuple[int, ...]:
    shape = placement.source_shape
    return shape if len(shape) == 3 else (1, *shape)


def _segment(highdicom: ModuleType, number: int, phrase: str, code: SegmentCode) -> Any:
    from pydicom.sr.codedict import codes

    concept = highdicom.sr.CodedConcept
    red, green, blue = mask_color(number - 1)
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=_label(phrase) or f"mask {number}",
        segmented_property_category=concept(*code.category),
        segmented_property_type=concept(*code.type),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="medm", version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(red, green, blue),
    )


def _label(phrase: str) -> str:
    """Return a phrase as VR LO: no control characters or backslash, 64 characters at most."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\\]", " ", phrase).split())[:_LONG_STRING].strip()
