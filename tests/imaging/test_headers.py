"""Header fields that are undefined or contradict each other: what the standard says, or a warning
with both numbers."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medm.errors import MediaError
from medm.imaging.notices import collected
from medm.imaging.probe import probe
from medm.imaging.volumes import Volume, read_volume

NAN, INF = float("nan"), float("inf")
VOXELS = np.arange(-12, 12, dtype=np.int16).reshape(2, 3, 4)

_FIELDS = {
    1: {"dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"), "vox_offset": (108, "f"),
        "slope": (112, "f"), "inter": (116, "f"), "units": (123, "B"), "cal": (124, "2f"), "qform": (252, "h"),
        "sform": (254, "h"), "quaternion": (256, "6f"), "rows": (280, "12f")},
    2: {"dim": (16, "8q"), "datatype": (12, "h"), "bitpix": (14, "h"), "pixdim": (104, "8d"), "vox_offset": (168, "q"),
        "slope": (176, "d"), "inter": (184, "d"), "units": (500, "i"), "cal": (192, "2d"), "qform": (344, "i"),
        "sform": (348, "i"), "quaternion": (352, "6d"), "rows": (400, "12d")},
}  # fmt: skip
"""Place and format by version, from nifti1.h and nifti2.h."""
SFORM = (-2, 0, 0, 5, 0, -3, 0, 6, 0, 0, 4, 7)
"""RAS rows: x to the left, y to the back, z to the head; voxels of 2, 3, 4 mm."""


def nifti(path: Path, *, order: str = "<", version: int = 1, **fields: Any) -> Path:
    """A NIfTI file field by field: `VOXELS` as int16, 2 x 3 x 4 mm, direction by `SFORM`."""
    size = {1: 352, 2: 544}[version]
    values = {
        "dim": (3, 4, 3, 2, 1, 1, 1, 1), "datatype": 4, "bitpix": 16, "pixdim": (1, 2, 3, 4, 0, 0, 0, 0),
        "vox_offset": size, "slope": 1, "inter": 0, "units": 2, "sform": 1, "rows": SFORM, **fields,
    }  # fmt: skip
    header = bytearray(size)
    struct.pack_into(order + "i", header, 0, {1: 348, 2: 540}[version])
    at = {1: 344, 2: 4}[version]
    header[at : at + 8] = {1: b"n+1\0", 2: b"n+2\0\r\n\x1a\n"}[version].ljust(8, b"\0")
    for name, value in values.items():
        place, form = _FIELDS[version][name]
        struct.pack_into(
            order + form, header, place, *(value if isinstance(value, tuple) else (value,))
        )
    content = bytes(header) + VOXELS.astype(order + "i2").tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path: Path) -> tuple[Volume, list[str]]:
    """The volume and the warnings about it; its header alone gives the same warnings."""
    with collected() as notices:
        volume = read_volume(path)
    with collected() as from_header:
        probe(path, kind="volume")
    assert from_header == notices
    return volume, [notice.message for notice in notices]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("slope", "inter"),
    [(NAN, 0), (NAN, NAN), (INF, 0), (-INF, NAN), (0, NAN), (0, INF), (0, 0), (1, 0)],
)
def test_a_slope_that_is_none_means_stored_numbers(
    tmp_path: Path, name: str, order: str, version: int, slope: float, inter: float
) -> None:
    path = nifti(tmp_path / name, order=order, version=version, slope=slope, inter=inter)
    volume, warnings = read(path)
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    assert volume.voxels.dtype == np.int16
    assert warnings == []


@pytest.mark.parametrize("place", [{"vox_offset": 900}, {"vox_offset": 1e30},
                                   {"vox_offset": 2**60, "version": 2}])  # fmt: skip
def test_voxels_behind_the_end_of_the_file_are_refused(
    tmp_path: Path, place: dict[str, Any]
) -> None:
    with pytest.raises(MediaError, match=r"a\.nii: .*(truncated|by the header)"):
        read_volume(nifti(tmp_path / "a.nii", **place))


@pytest.mark.parametrize("slope", [0, NAN])
def test_an_intercept_that_is_not_added_is_said(tmp_path: Path, slope: float) -> None:
    volume, warnings = read(nifti(tmp_path / "a.nii", slope=slope, inter=-1024))
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    assert len(warnings) == 1
    assert (
        f"scl_slope {slope:g} means that the values are not scaled, so scl_inter -1024 is not added"
        in warnings[0]
    )


@pytest.mark.parametrize(("slope", "inter"), [(2, -1024), (-1, 0), (1, 5), (0.5, 0)])
def test_a_valid_slope_is_applied(tmp_path: Path, slope: float, inter: float) -> None:
    volume, warnings = read(
        nifti(tmp_path / "a.nii.gz", slope=slope, inter=inter, cal=(5, 1))
    )  # cal: display alone
    np.testing.assert_array_equal(volume.voxels, VOXELS * slope + inter)
    assert warnings == []


@pytest.mark.parametrize("inter", [NAN, INF])
def test_a_valid_slope_beside_no_intercept_is_refused_from_the_header(
    tmp_path: Path, inter: float
) -> None:
    path = nifti(tmp_path / "a.nii", slope=1, inter=inter)
    for decode in (False, True):
        with pytest.raises(MediaError, match=f"scl_slope 1 is valid, but scl_inter is {inter:g}"):
            probe(path, kind="volume", decode=decode)


def spacing(volume: Volume) -> list[float]:
    """Of x, y, z in mm."""
    assert volume.geometry is not None
    return [round(float(value), 4) for value in volume.geometry.spacing[::-1]]


@pytest.mark.parametrize(
    ("units", "factor"),
    [
        (3, 1000),
        (3 + 8, 1000),
        (1, 0.001),
        (2, 1),
        (0, 1),
        (2 + 16, 1),
    ],  # um, with seconds, m, mm, unknown, with ms
)
def test_units_are_converted(tmp_path: Path, units: int, factor: float) -> None:
    rows = tuple(value * factor for value in SFORM)
    pixdim = (1, *(value * factor for value in (2, 3, 4)), 0, 0, 0, 0)
    volume, warnings = read(nifti(tmp_path / "a.nii", units=units, rows=rows, pixdim=pixdim))
    assert spacing(volume) == [2, 3, 4]
    assert volume.geometry is not None
    np.testing.assert_allclose(volume.geometry.origin, [-5, -6, 7], rtol=1e-5)
    assert warnings == []


def test_an_undefined_unit_warns(tmp_path: Path) -> None:
    volume, warnings = read(nifti(tmp_path / "a.nii", units=5))
    assert spacing(volume) == [2, 3, 4]
    assert len(warnings) == 1
    assert (
        "the unit 5 of xyzt_units is not defined (1 m, 2 mm, 3 um); mm are taken: voxels of 2, "
        "3, 4 mm" in warnings[0]
    )


def test_spacing_of_sform_and_pixdim_that_differ_are_said(tmp_path: Path) -> None:
    volume, warnings = read(nifti(tmp_path / "a.nii", pixdim=(1, 1, 1, 1, 0, 0, 0, 0)))
    assert spacing(volume) == [2, 3, 4]
    assert len(warnings) == 1
    assert (
        "voxels of 2, 3, 4 mm by the sform, of 1, 1, 1 mm by pixdim; the sform is used"
        in warnings[0]
    )


def about_z(degrees: float) -> tuple[float, ...]:
    """Quaternion of half a turn about z (x to the left, y to the back), and some degrees more."""
    half = np.deg2rad(180 + degrees) / 2
    return (0, 0, float(np.sin(half)), 5, 6, 7)


def test_a_qform_that_is_turned_against_the_sform_is_said(tmp_path: Path) -> None:
    volume, warnings = read(nifti(tmp_path / "a.nii", qform=1, quaternion=about_z(10)))
    assert volume.geometry is not None
    assert volume.geometry.tilt < 0.1
    assert len(warnings) == 1
    assert "sform and qform are turned by 10.0 degrees against each other" in warnings[0]
    assert "by 0.0 and 10.0 degrees); the sform is used" in warnings[0]


@pytest.mark.parametrize("code", [0, -1])
def test_forms_without_a_code_are_not_used(tmp_path: Path, code: int) -> None:
    volume, warnings = read(nifti(tmp_path / "a.nii", sform=code, qform=1, quaternion=about_z(10)))
    assert volume.geometry is not None
    assert round(volume.geometry.tilt) == 10  # of the qform
    assert warnings == []
    volume, warnings = read(
        nifti(tmp_path / "b.nii", sform=code, qform=code, quaternion=(9, 9, 9, 0, 0, 0))
    )
    assert volume.geometry is None
    assert warnings == []


@pytest.mark.parametrize(
    ("qfac", "axes"), [(1, "SPL"), (0, "SPL"), (-1, "IPL"), (NAN, "SPL"), (-7, "IPL")]
)
def test_qfac_is_a_sign(tmp_path: Path, qfac: float, axes: str) -> None:
    """The standard: -1 turns z round, and 0 counts as 1."""
    path = nifti(
        tmp_path / "a.nii",
        sform=0,
        qform=1,
        quaternion=about_z(0),
        pixdim=(qfac, -2, 3, -4, 0, 0, 0, 0),
    )
    volume, warnings = read(path)
    assert volume.geometry is not None
    assert volume.geometry.axes == axes
    assert spacing(volume) == [2, 3, 4]  # nor has the sign of a voxel size a meaning
    assert warnings == []


def test_a_quaternion_rounded_above_unit_length_is_a_rotation(tmp_path: Path) -> None:
    volume, _ = read(
        nifti(tmp_path / "a.nii", sform=0, qform=1, quaternion=(0, 0, 1.0004, 5, 6, 7))
    )
    assert spacing(volume) == [2, 3, 4]


def nrrd(path: Path, **fields: str | None) -> Path:
    """`VOXELS` with 2 x 3 x 4 mm along LPS; None leaves a field out."""
    values = {
        "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "4 3 2",
        "space directions": "(2,0,0) (0,3,0) (0,0,4)", "kinds": "domain domain domain", "endian": "little",
        "encoding": "raw", "space origin": "(5,6,7)", **{key.replace("_", " "): value for key, value in fields.items()},
    }  # fmt: skip
    text = "".join(f"{key}: {value}\n" for key, value in values.items() if value is not None)
    path.write_bytes(f"NRRD0005\n{text}\n".encode() + VOXELS.astype("<i2").tobytes())
    return path


@pytest.mark.parametrize(
    ("fields", "origin"),
    [
        ({}, [5, 6, 7]),
        ({"spacings": "2 3.001 4"}, [5, 6, 7]),  # superfluous, but the same
        ({"spacings": "0.2 0.3 0.4", "units": '"cm" "cm" "cm"'}, [5, 6, 7]),
        ({"space_units": '"mm" "mm" "mm"'}, [5, 6, 7]),
        ({"space_units": '"um" "um" "um"', "space_directions": "(2000,0,0) (0,3000,0) (0,0,4000)"},
         [0.005, 0.006, 0.007]),
        ({"space_units": '"cm" "mm" "mm"', "space_directions": "(.2,0,0) (0,3,0) (0,0,4)"}, [50, 6, 7]),
        # the origin is the center of the first voxel in both cases
        ({"centers": "cell cell cell"}, [5, 6, 7]),
        ({"centers": "node node node"}, [5, 6, 7]),
        ({"kinds": None}, [5, 6, 7]),
        ({"kinds": "space space space"}, [5, 6, 7]),
        ({"space": "RAS", "space_directions": "(-2,0,0) (0,-3,0) (0,0,4)", "space_origin": "(-5,-6,7)"}, [5, 6, 7]),
        ({"line_skip": "0", "byteskip": "0"}, [5, 6, 7]),
        ({"type": "signed short int", "Space": "left-posterior-superior"}, [5, 6, 7]),
    ],
)  # fmt: skip
def test_nrrd_fields_by_the_standard(
    tmp_path: Path, fields: dict[str, str], origin: list[float]
) -> None:
    volume, warnings = read(nrrd(tmp_path / "a.nrrd", **fields))
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    assert spacing(volume) == [2, 3, 4]
    assert volume.geometry is not None
    assert volume.geometry.axes == "SPL"
    np.testing.assert_allclose(volume.geometry.origin, origin)
    assert warnings == []


@pytest.mark.parametrize(
    "fields", [{"space": None}, {"space": "scanner-xyz"}, {"space": None, "space_dimension": "3"},
               {"space_directions": None, "spacings": "2 3 4"},
               {"space_directions": None, "spacings": "2000 3000 4000", "units": '"um" "um" "um"'}]
)  # fmt: skip
def test_nrrd_without_a_space_of_the_patient_has_no_direction(
    tmp_path: Path, fields: dict[str, str | None]
) -> None:
    volume, warnings = read(nrrd(tmp_path / "a.nrrd", **fields))
    assert volume.geometry is None
    assert warnings == []


NRRD_REFUSED: dict[str, tuple[dict[str, str | None], str]] = {
    "two spacings": ({"spacings": "1 1 1"},
                     "voxels of 2, 3, 4 mm by 'space directions', of 1, 1, 1 mm by 'spacings'"),
    "units of meters": ({"space_units": '"m" "m" "m"'}, "spacing 4000, 3000, 2000|spacing 2000, 3000, 4000"),
    "unknown units": ({"space_units": '"ell" "mm" "mm"'}, "'spaceunits' holds 3 units, of which 1 are not known"),
    "two units": ({"space_units": '"mm" "mm"'}, "'spaceunits' holds 2 units"),
    "colors": ({"kinds": "RGB-color domain domain"}, "axis 1 of the NRRD file is 'rgb-color'"),
    "time": ({"kinds": "domain domain time"}, "axis 3 of the NRRD file is 'time'"),
    "a kind that is a name": ({"kinds": "domain Canary domain"}, "axis 2 of the NRRD file is a kind that is not known"),
    "no byte order": ({"endian": None}, "'endian' is missing"),
    "skipped bytes": ({"byte_skip": "-1"}, "skip lines or bytes"),
    "skipped lines": ({"lineskip": "2"}, "skip lines or bytes"),
    "a field twice": ({"Sizes": "4 2 3"}, "has the field 'sizes' twice"),
    "an alias twice": ({"encoding": "raw", "Encoding": "gzip"}, "has the field 'encoding' twice"),
    "two dimensions of space": ({"space_dimension": "2"}, "another 'space dimension' than 3"),
    "an axis without direction": ({"space_directions": "none (0,3,0) (0,0,4)"}, "needs three space directions"),
    "undefined spacing": ({"space_directions": None, "spacings": "nan 3 4"}, "spacing nan, 3, 4"),
    "undefined direction": ({"space_directions": "(nan,0,0) (0,3,0) (0,0,4)"}, "NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("case", NRRD_REFUSED)
def test_nrrd_fields_that_contradict_each_other_are_refused_from_the_header(
    tmp_path: Path, case: str
) -> None:
    fields, reason = NRRD_REFUSED[case]
    path = nrrd(tmp_path / "a.nrrd", **fields)
    for decode in (False, True):
        with pytest.raises(MediaError, match=reason) as caught:
            probe(path, kind="volume", decode=decode)
        assert "canary" not in str(caught.value).lower()


def test_nrrd_of_one_byte_needs_no_byte_order(tmp_path: Path) -> None:
    path = nrrd(tmp_path / "a.nrrd", type="uchar", endian=None, sizes="4 3 4")
    assert read(path)[0].voxels.shape == (4, 3, 4)


def mha(path: Path, *more: str, **fields: str | None) -> Path:
    """`VOXELS` with 2 x 3 x 4 mm along LPS; None leaves a field out."""
    values = {
        "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "5 6 7",
        "AnatomicalOrientation": "RAI", "ElementSpacing": "2 3 4", "DimSize": "4 3 2", "ElementType": "MET_SHORT",
        **fields,
    }  # fmt: skip
    lines = [f"{key} = {value}" for key, value in values.items() if value is not None]
    order = (
        ">"
        if "True" in (fields.get("BinaryDataByteOrderMSB"), fields.get("ElementByteOrderMSB"))
        else "<"
    )
    header = "\n".join([*lines, *more, "ElementDataFile = LOCAL\n"])
    path.write_bytes(header.encode() + VOXELS.astype(order + "i2").tobytes())
    return path


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({}, None),
        ({"ElementSize": "2 3 1"}, None),  # slices of 1 mm with gaps of 3 mm
        ({"ElementSpacing": None, "ElementSize": "2 3 4"}, None),
        ({"BinaryDataByteOrderMSB": "True"}, None),
        ({"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": "True"}, None),
        ({"ElementByteOrderMSB": "False"}, None),
        ({"Position": "5 6 7", "Orientation": "1 0 0 0 1 0 0 0 1"}, None),
        ({"HeaderSize": "0", "ElementNumberOfChannels": "1"}, None),
        ({"ElementToIntensityFunctionSlope": "1", "ElementToIntensityFunctionOffset": "0"}, None),
        ({"AnatomicalOrientation": "???"}, None),
        ({"AnatomicalOrientation": None}, None),
        (
            {"AnatomicalOrientation": "LAI"},
            "the axes begin at RAI by TransformMatrix, at LAI by AnatomicalOrientation",
        ),
        ({"DistanceUnits": "mm"}, None),
    ],
)
def test_metaimage_fields_by_the_standard(
    tmp_path: Path, fields: dict[str, str | None], warning: str | None
) -> None:
    volume, warnings = read(mha(tmp_path / "a.mha", **fields))
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    assert spacing(volume) == [2, 3, 4]
    assert volume.geometry is not None
    assert volume.geometry.axes == "SPL"
    np.testing.assert_allclose(volume.geometry.origin, [5, 6, 7])
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]


def test_metaimage_units_are_converted(tmp_path: Path) -> None:
    volume, _ = read(
        mha(tmp_path / "a.mha", DistanceUnits="cm", ElementSpacing=".2 .3 .4", Offset=".5 .6 .7")
    )
    assert spacing(volume) == [2, 3, 4]
    assert volume.geometry is not None
    np.testing.assert_allclose(volume.geometry.origin, [5, 6, 7])


METAIMAGE_REFUSED: dict[str, tuple[list[str], dict[str, str | None], str]] = {
    "two byte orders": ([], {"ElementByteOrderMSB": "True"}, "MSB of the MetaImage header contradict each other"),
    "two directions": ([], {"Orientation": "-1 0 0 0 -1 0 0 0 1"},
                       "TransformMatrix 1, 0, 0, .* and Orientation -1, 0, .* contradict each " "other"),
    "two origins": ([], {"Position": "5 6 8"}, "Offset 5, 6, 7 and Position 5, 6, 8"),
    "a field twice": (["ElementSpacing = 1 1 1"], {}, "has 'ElementSpacing' twice"),
    "bytes before the voxels": ([], {"HeaderSize": "-1"}, "HeaderSize other than 0"),
    "colors": ([], {"ElementNumberOfChannels": "3"}, "several numbers a voxel"),
    "intensities": ([], {"ElementToIntensityFunctionSlope": "2", "ElementToIntensityFunctionOffset": "-1024"},
                    "2 times the stored values plus -1024"),
    "unknown units": ([], {"DistanceUnits": "ell"}, "DistanceUnits of the MetaImage header is not known"),
    "undefined spacing": ([], {"ElementSpacing": "2 nan 4"}, "spacing 2, nan, 4"),
    "singular": ([], {"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "singular"),
    "too few bytes": ([], {"DimSize": "4 3 3"}, "need 72 bytes, found 48"),
}  # fmt: skip


@pytest.mark.parametrize("case", METAIMAGE_REFUSED)
def test_metaimage_fields_that_contradict_each_other_are_refused_from_the_header(
    tmp_path: Path, case: str
) -> None:
    more, fields, reason = METAIMAGE_REFUSED[case]
    path = mha(tmp_path / "a.mha", *more, **fields)
    for decode in (False, True):
        with pytest.raises(MediaError, match=reason):
            probe(path, kind="volume", decode=decode)
