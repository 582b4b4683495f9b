"""Damaged, lying and hostile volumes: each a `MediaError` that names the file and the reason, and
never the patient."""

from __future__ import annotations

import gzip
import io
import logging
import os
import re
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import MPEG2MPML, DeflatedExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from medm.errors import MediaError
from medm.imaging import VolumePreprocess, load_pixels
from medm.imaging.volumes import read_volume
from tests.imaging.tiny import (
    CANARY,
    body,
    dicom_slice,
    phantom,
    write_multi_frame,
    write_report,
    write_series,
)

Build = Callable[[Path], Path]
CASES: dict[str, tuple[Build, str]] = {}


def bad(reason: str) -> Callable[[Build], Build]:
    """Add a case: the function writes the file, and `reason` is a pattern of the message."""

    def add(build: Build) -> Build:
        CASES[build.__name__] = (build, reason)
        return build

    return add


def nifti(folder: Path, *, packed: bool = False, voxels: np.ndarray | None = None) -> bytearray:
    """The bytes of a NIfTI file with a canary in its description."""
    path = folder / "whole.nii"
    image = phantom() if voxels is None else sitk.GetImageFromArray(voxels)
    sitk.WriteImage(image, str(path))
    data = bytearray(path.read_bytes())
    path.unlink()
    data[148 : 148 + len(CANARY)] = CANARY.encode()
    return bytearray(gzip.compress(bytes(data), mtime=0)) if packed else data


def patched(folder: Path, at: int, form: str, *values: float) -> Path:
    """A NIfTI file with some header fields replaced."""
    data = nifti(folder)
    struct.pack_into("<" + form, data, at, *values)
    return written(folder / "ct.nii", data)


def written(path: Path, data: bytes | bytearray | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else bytes(data))
    return path


# NIfTI


@bad("need 12480 bytes, found 6064; the file is truncated")
def nii_truncated(folder: Path) -> Path:
    return written(folder / "ct.nii", nifti(folder)[:6416])


@bad("truncated or damaged")
def nii_gz_truncated(folder: Path) -> Path:
    data = nifti(folder, packed=True)
    return written(folder / "ct.nii.gz", data[: len(data) // 2])


@bad("truncated or damaged")
def nii_gz_wrong_checksum(folder: Path) -> Path:
    data = nifti(folder, packed=True)
    data[-7] ^= 1
    return written(folder / "ct.nii.gz", data)


@bad("holds more than the 12832 bytes")
def nii_gz_bomb(folder: Path) -> Path:
    return written(folder / "ct.nii.gz", gzip.compress(bytes(nifti(folder)) + bytes(50_000_000)))


@bad(r"packed bytes cannot hold the 1073742176 bytes that its header declares")
def nii_gz_of_a_gibibyte_in_a_hundred_bytes(folder: Path) -> Path:
    data = nifti(folder)[:352]
    struct.pack_into("<4h", data, 40, 3, 1024, 1024, 512)
    return written(folder / "ct.nii.gz", gzip.compress(bytes(data)))


@bad("too few for a NIfTI header")
def nii_gz_of_nothing(folder: Path) -> Path:
    return written(folder / "ct.nii.gz", gzip.compress(b""))


@bad("the file is empty")
def nii_empty(folder: Path) -> Path:
    return written(folder / "ct.nii", b"")


@bad("not a NIfTI file")
def nii_is_a_web_page(folder: Path) -> Path:
    return written(folder / "ct.nii", "<html>" + CANARY * 100)


@bad("20000 x 20000 x 20000 voxels, more than")
def nii_huge(folder: Path) -> Path:
    return patched(folder, 40, "4h", 3, 20000, 20000, 20000)


@bad("impossible size 12 x 20 x -26")
def nii_negative_side(folder: Path) -> Path:
    return patched(folder, 42, "h", -26)


@bad("impossible size")
def nii_side_of_zero(folder: Path) -> Path:
    return patched(folder, 44, "h", 0)


@bad("declares 9 dimensions")
def nii_nine_dimensions(folder: Path) -> Path:
    return patched(folder, 40, "h", 9)


@bad(r"spacing 0, 2, 5 \(pixdim 0, 2, 5 in mm\): expected 0\.01 to 50 mm")
def nii_zero_spacing(folder: Path) -> Path:
    return patched(folder, 80, "f", 0.0)


@bad("spacing 1.5, nan, 5")
def nii_nan_spacing(folder: Path) -> Path:
    return patched(folder, 84, "f", float("nan"))


@bad("spacing 1.5, 2, 5000")
def nii_spacing_of_meters(folder: Path) -> Path:
    return patched(folder, 88, "f", 5000.0)


@bad("2 of 6240 voxels are NaN or infinite")
def nii_nan_and_inf(folder: Path) -> Path:
    voxels = body().astype(np.float32)
    voxels[0, 0, 0], voxels[1, 1, 1] = np.nan, np.inf
    return written(folder / "ct.nii", nifti(folder, voxels=voxels))


@bad("1 of 6240 voxels are NaN or infinite")
def nii_beyond_single_precision(folder: Path) -> Path:
    voxels = body().astype(np.float64)
    voxels[0, 0, 0] = 1e300
    return written(folder / "ct.nii", nifti(folder, voxels=voxels))


@bad("expected a volume of 3 axes, found 4")
def nii_over_time(folder: Path) -> Path:
    return patched(folder, 40, "5h", 4, 26, 20, 6, 2)


@bad("single slice")
def nii_one_slice(folder: Path) -> Path:
    return patched(folder, 46, "h", 1)


@bad("datatype 128")
def nii_colour(folder: Path) -> Path:
    return patched(folder, 70, "2h", 128, 24)


@bad(r"datatype 4 \(int16\) has 16 bits, but bitpix declares 32")
def nii_bits_of_another_type(folder: Path) -> Path:
    return patched(folder, 72, "h", 32)


@bad("voxels begin at byte")
def nii_voxels_before_the_header_ends(folder: Path) -> Path:
    return patched(folder, 108, "f", 100.0)


@bad("voxels begin at byte")
def nii_offset_nan(folder: Path) -> Path:
    return patched(folder, 108, "f", float("nan"))


@bad("scl_slope 2 is valid, but scl_inter is nan: expected a finite number")
def nii_nan_intercept(folder: Path) -> Path:
    return patched(folder, 112, "2f", 2.0, float("nan"))


@bad(
    r"scl_slope 1e-30 with scl_inter -1024 turns the stored values -1000\.\.700 into the one value -1024"
)
def nii_slope_that_leaves_one_value(folder: Path) -> Path:
    return patched(folder, 112, "2f", 1e-30, -1024.0)


@bad("voxels are NaN or infinite")
def nii_slope_that_leaves_no_number(folder: Path) -> Path:
    return patched(folder, 112, "f", 3e38)


@bad(r"spacing 1500, 2000, 5000 \(pixdim 1\.5, 2, 5 in m\)")
def nii_units_of_meters_beside_millimetres(folder: Path) -> Path:
    return patched(folder, 123, "B", 1)


@bad("voxels begin at byte 352.5 by the header")
def nii_offset_between_bytes(folder: Path) -> Path:
    return patched(folder, 108, "f", 352.5)


@bad("voxels begin at byte 0 by the header")
def nii_offset_of_zero(folder: Path) -> Path:
    return patched(folder, 108, "f", 0.0)


@bad("singular")
def nii_singular_direction(folder: Path) -> Path:
    return patched(folder, 280, "12f", 1.5, 1.5, 0, 0, 1.5, 1.5, 0, 0, 0, 0, 5, 0)


@bad("sheared by .* degrees")
def nii_sheared(folder: Path) -> Path:
    return patched(folder, 280, "12f", 1.5, 0, 0, 0, 0, 2, 1, 0, 0, 0, 5, 0)


@bad("NaN or infinite numbers")
def nii_nan_direction(folder: Path) -> Path:
    return patched(folder, 280, "f", float("nan"))


@bad("left and right cannot be known")
def nii_two_directions(folder: Path) -> Path:
    return patched(
        folder, 280, "12f", 1.5, 0, 0, 0, 0, 2, 0, 0, 0, 0, 5, 0
    )  # the qform says x grows to the left


@bad("not a rotation")
def nii_no_rotation(folder: Path) -> Path:
    return patched(folder, 256, "3f", 5, 5, 5)


@bad("hdr/.img pair")
def nii_header_alone(folder: Path) -> Path:
    data = nifti(folder)[:352]
    data[344:348] = b"ni1\0"
    return written(folder / "ct.hdr", data)


# NRRD


def nrrd(folder: Path, *, packed: bool = False) -> bytes:
    path = folder / "whole.nrrd"
    sitk.WriteImage(phantom(), str(path), packed)
    data = path.read_bytes().replace(b"kinds:", f"patient:={CANARY}\n# {CANARY}\nkinds:".encode())
    path.unlink()
    return data


def nrrd_with(folder: Path, old: str, new: str, *, suffix: str = ".nrrd") -> Path:
    data = nrrd(folder)
    assert old.encode() in data
    return written(folder / f"ct{suffix}", data.replace(old.encode(), new.encode()))


@bad("need 12480 bytes")
def nrrd_truncated(folder: Path) -> Path:
    return written(folder / "ct.nrrd", nrrd(folder)[:-100])


@bad("truncated or damaged")
def nrrd_gzip_truncated(folder: Path) -> Path:
    return written(folder / "ct.nrrd", nrrd(folder, packed=True)[:-4])


@bad("truncated or damaged")
def nrrd_gzip_wrong_checksum(folder: Path) -> Path:
    data = bytearray(nrrd(folder, packed=True))
    data[-6] ^= 1
    return written(folder / "ct.nrrd", data)


@bad("need 24960 bytes")
def nrrd_more_slices_than_there_are(folder: Path) -> Path:
    return nrrd_with(folder, "sizes: 26 20 12", "sizes: 26 20 24")


@bad("holds more than the 6240 bytes")
def nrrd_fewer_slices_than_there_are(folder: Path) -> Path:
    return nrrd_with(folder, "sizes: 26 20 12", "sizes: 26 20 6")


@bad(r"packed bytes cannot hold the 1073741824 bytes")
def nrrd_of_a_gibibyte_in_few_bytes(folder: Path) -> Path:
    data = nrrd(folder, packed=True).replace(b"sizes: 26 20 12", b"sizes: 1024 1024 512")
    return written(folder / "ct.nrrd", data)


@bad("30000 x 30000 x 3000|3000 x 30000 x 30000")
def nrrd_huge(folder: Path) -> Path:
    return nrrd_with(folder, "sizes: 26 20 12", "sizes: 30000 30000 3000")


@bad("'sizes' does not hold whole numbers")
def nrrd_sizes_are_words(folder: Path) -> Path:
    return nrrd_with(folder, "sizes: 26 20 12", f"sizes: 26 20 {CANARY}")


@bad("spacing 1.5, 2, 0")
def nrrd_zero_spacing(folder: Path) -> Path:
    return nrrd_with(folder, "(0,0,5)", "(0,0,0)")


@bad("singular")
def nrrd_singular(folder: Path) -> Path:
    return nrrd_with(folder, "(0,0,5)", "(0,5,0)")


@bad("sheared")
def nrrd_sheared(folder: Path) -> Path:
    return nrrd_with(folder, "(0,0,5)", "(0,2,5)")


@bad("outside its folder")
def nrrd_detached_elsewhere(folder: Path) -> Path:
    return nrrd_with(
        folder, "space origin", "data file: /etc/services\nspace origin", suffix=".nhdr"
    )


@bad("outside its folder")
def nrrd_detached_above(folder: Path) -> Path:
    return nrrd_with(
        folder, "space origin", "data file: ../secret.raw\nspace origin", suffix=".nhdr"
    )


@bad("link out of it")
def nrrd_detached_to_a_link(folder: Path) -> Path:
    (folder / "voxels.raw").symlink_to("/etc/services")
    return nrrd_with(folder, "space origin", "data file: voxels.raw\nspace origin", suffix=".nhdr")


@bad(r"voxels are in another file; only \.nhdr headers may do that")
def nrrd_detached_under_a_whole_name(folder: Path) -> Path:
    written(folder / "voxels.raw", bytes(12480))
    return nrrd_with(folder, "space origin", "data file: voxels.raw\nspace origin")


@bad("three space directions of three numbers")
def nrrd_ragged_directions(folder: Path) -> Path:
    return nrrd_with(folder, "(0,0,5)", "(0,5)")


@bad("does not end")
def nrrd_endless_header(folder: Path) -> Path:
    return written(folder / "ct.nrrd", "NRRD0004\n" + f"# {CANARY}\n" * 10_000)


@bad("endian")
def nrrd_without_byte_order(folder: Path) -> Path:
    return nrrd_with(folder, "endian: little\n", "")


@bad("another dimension than its 4 sizes|3 axes, found 4")
def nrrd_over_time(folder: Path) -> Path:
    return written(
        folder / "ct.nrrd",
        nrrd(folder)
        .replace(b"sizes: 26 20 12", b"sizes: 26 20 6 2")
        .replace(b"sion: 3", b"sion: 4"),
    )


@bad("encoding is declared that is not read")
def nrrd_unknown_encoding(folder: Path) -> Path:
    return nrrd_with(folder, "encoding: raw", f"encoding: {CANARY}")


# MetaImage


def mha(folder: Path, *, packed: bool = False) -> bytes:
    path = folder / "whole.mha"
    sitk.WriteImage(phantom(), str(path), packed)
    data = path.read_bytes().replace(
        b"ElementDataFile", f"PatientName = {CANARY}\nElementDataFile".encode()
    )
    path.unlink()
    return data


def mha_with(folder: Path, pattern: str, new: str, *, suffix: str = ".mha") -> Path:
    data, count = re.subn(pattern.encode(), new.encode(), mha(folder))
    assert count == 1
    return written(folder / f"ct{suffix}", data)


@bad("need 12480 bytes")
def mha_truncated(folder: Path) -> Path:
    return written(folder / "ct.mha", mha(folder)[:-100])


@bad("truncated or damaged")
def mha_packed_truncated(folder: Path) -> Path:
    return written(folder / "ct.mha", mha(folder, packed=True)[:-100])


@bad("truncated or damaged")
def mha_wrong_checksum(folder: Path) -> Path:
    data = bytearray(mha(folder, packed=True))
    data[-3] ^= 1
    return written(folder / "ct.mha", data)


@bad("holds more than the 12480 bytes")
def mha_bomb(folder: Path) -> Path:
    header = mha(folder, packed=True).partition(b"LOCAL\n")[0]
    return written(folder / "ct.mha", header + b"LOCAL\n" + zlib.compress(bytes(50_000_000)))


@bad(r"packed bytes cannot hold the 1073741824 bytes")
def mha_of_a_gibibyte_in_few_bytes(folder: Path) -> Path:
    data = mha(folder, packed=True).replace(b"DimSize = 26 20 12", b"DimSize = 1024 1024 512")
    return written(folder / "ct.mha", data)


@bad("impossible size")
def mha_negative_side(folder: Path) -> Path:
    return mha_with(folder, "DimSize = 26 20 12", "DimSize = -26 20 12")


@bad("more than the")
def mha_huge(folder: Path) -> Path:
    return mha_with(folder, "DimSize = 26 20 12", "DimSize = 30000 30000 3000")


@bad("spacing 1.5, 2, -5")
def mha_negative_spacing(folder: Path) -> Path:
    return mha_with(folder, "ElementSpacing = .*", "ElementSpacing = 1.5 2 -5")


@bad("singular")
def mha_singular(folder: Path) -> Path:
    return mha_with(folder, "TransformMatrix = .*", "TransformMatrix = 1 0 0 1 0 0 0 0 1")


@bad("not made of unit vectors")
def mha_stretched_direction(folder: Path) -> Path:
    return mha_with(folder, "TransformMatrix = .*", "TransformMatrix = 0 0 0 0 1 0 0 0 1")


@bad("outside its folder")
def mha_detached_elsewhere(folder: Path) -> Path:
    return mha_with(
        folder, "ElementDataFile = LOCAL", "ElementDataFile = ../../etc/passwd", suffix=".mhd"
    )


@bad(r"voxels are in another file; only \.mhd headers may do that")
def mha_detached_under_a_whole_name(folder: Path) -> Path:
    written(folder / "voxels.raw", bytes(12480))
    return mha_with(folder, "ElementDataFile = LOCAL", "ElementDataFile = voxels.raw")


@bad("'DimSize' does not hold whole numbers")
def mha_size_nan(folder: Path) -> Path:
    return mha_with(folder, "DimSize = 26 20 12", "DimSize = nan 20 12")


@bad("'DimSize' does not hold whole numbers")
def mha_size_infinite(folder: Path) -> Path:
    return mha_with(folder, "DimSize = 26 20 12", "DimSize = 26 20 inf")


@bad("several numbers a voxel")
def mha_vectors(folder: Path) -> Path:
    return mha_with(folder, "ElementType", "ElementNumberOfChannels = 3\nElementType")


@bad("ElementType is declared that is not read")
def mha_unknown_type(folder: Path) -> Path:
    return mha_with(folder, "MET_SHORT", CANARY)


# NPY and NPZ


def npy_header(shape: str, descr: str = "'<i2'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


@bad("Python objects, which would run code")
def npy_objects(folder: Path) -> Path:
    np.save(folder / "ct.npy", np.array([[[{"a": CANARY}]]], dtype=object), allow_pickle=True)
    return folder / "ct.npy"


@bad("needs 12480 bytes, found 4952")
def npy_truncated(folder: Path) -> Path:
    np.save(folder / "whole.npy", body())
    return written(folder / "ct.npy", (folder / "whole.npy").read_bytes()[:5080])


@bad("damaged or oversized")
def npy_huge_header(folder: Path) -> Path:
    return written(
        folder / "ct.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b" " * 20_000
    )


@bad("more than the .* numbers")
def npy_huge_shape(folder: Path) -> Path:
    return written(folder / "ct.npy", npy_header("(20000, 20000, 20000)"))


@bad("expected an array of numbers")
def npy_complex(folder: Path) -> Path:
    np.save(folder / "ct.npy", body().astype(np.complex64))
    return folder / "ct.npy"


@bad("Python objects")
def npy_of_a_strange_type(folder: Path) -> Path:
    return written(
        folder / "ct.npy", npy_header("(2, 2, 2)", "[('a', '<i2'), ('b', 'O')]") + bytes(16)
    )


@bad("3 axes, found 2")
def npy_flat(folder: Path) -> Path:
    np.save(folder / "ct.npy", body()[0])
    return folder / "ct.npy"


@bad("3 axes, found 4")
def npy_channels(folder: Path) -> Path:
    np.save(folder / "ct.npy", np.stack([body()] * 3))
    return folder / "ct.npy"


@bad("voxels are NaN")
def npy_nan(folder: Path) -> Path:
    np.save(folder / "ct.npy", np.full((2, 2, 2), np.nan, dtype=np.float16))
    return folder / "ct.npy"


@bad("one array, found 2 members")
def npz_of_two(folder: Path) -> Path:
    np.savez(folder / "ct.npz", a=body(), b=body())
    return folder / "ct.npz"


@bad("Python objects")
def npz_objects(folder: Path) -> Path:
    np.savez(folder / "ct.npz", np.array([CANARY, None], dtype=object))
    return folder / "ct.npz"


@bad("truncated or damaged")
def npz_damaged(folder: Path) -> Path:
    np.savez_compressed(folder / "whole.npz", np.random.default_rng(0).normal(size=(9, 9, 9)))
    data = bytearray((folder / "whole.npz").read_bytes())
    data[len(data) // 2] ^= 255
    return written(folder / "ct.npz", data)


def npz(
    folder: Path, content: bytes, packing: int = zipfile.ZIP_DEFLATED, name: str = "a.npy"
) -> Path:
    with zipfile.ZipFile(folder / "ct.npz", "w", packing) as archive:
        archive.writestr(name, content)
    return folder / "ct.npz"


def npz_declaring(folder: Path, content: bytes, size: int) -> Path:
    """An archive whose directory declares another size than it holds."""
    path = npz(folder, content)
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    for at in (22, entry + 24):  # local header and directory
        assert struct.unpack_from("<I", data, at)[0] == len(content)
        struct.pack_into("<I", data, at, size)
    return written(path, data)


CUBE = npy_header("(9, 9, 9)") + bytes(9 * 9 * 9 * 2)


@bad(r"packed by method 14 of ZIP; expected 0 \(stored\) or 8 \(deflated\)")
def npz_lzma(folder: Path) -> Path:
    return npz(folder, CUBE, zipfile.ZIP_LZMA)


@bad(r"packed by method 12 of ZIP")
def npz_bzip2(folder: Path) -> Path:
    return npz(folder, CUBE, zipfile.ZIP_BZIP2)


@bad("declares 4000000000 bytes, more than the 2147483648 that are allowed")
def npz_declares_more_than_is_allowed(folder: Path) -> Path:
    return npz_declaring(folder, CUBE, 4_000_000_000)


@bad(r"packed bytes cannot hold the 2000000000 bytes")
def npz_declares_more_than_deflate_can_hold(folder: Path) -> Path:
    return npz_declaring(folder, CUBE, 2_000_000_000)


@bad("truncated or damaged")
def npz_declares_less_than_its_array(folder: Path) -> Path:
    return npz_declaring(folder, CUBE, len(CUBE) - 500)


@bad(r"shape \(512, 1024, 1000\) of int16 needs 1048576000 bytes, found 1458")
def npz_array_declares_more_than_its_member(folder: Path) -> Path:
    return npz(folder, npy_header("(512, 1024, 1000)") + bytes(1458))


@bad("the NPZ archive is encrypted")
def npz_encrypted(folder: Path) -> Path:
    data = bytearray(npz(folder, CUBE).read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return written(folder / "ct.npz", data)


@bad("expected an archive with one array, found 1 members")
def npz_in_an_npz(folder: Path) -> Path:
    return npz(folder, npz(folder, CUBE).read_bytes(), name="inner.npz")


@bad(r"declares the shape \(True, 2, 2\); expected whole numbers")
def npy_shape_of_truth_values(folder: Path) -> Path:
    return written(folder / "ct.npy", npy_header("(True, 2, 2)") + bytes(8))


@bad(r"declares the shape \(-2, -2, 2\); expected whole numbers")
def npy_negative_sides(folder: Path) -> Path:
    return written(folder / "ct.npy", npy_header("(-2, -2, 2)") + bytes(16))


@bad(r"declares shape \(1{99}\.\.\., more than the .* numbers")
def npy_side_of_a_thousand_digits(folder: Path) -> Path:
    return written(folder / "ct.npy", npy_header(f"({'1' * 4000}, 2, 2)") + bytes(16))


@bad("more than the 2147483648 bytes")
def npy_too_many_bytes(folder: Path) -> Path:
    return written(folder / "ct.npy", npy_header("(512, 1024, 1024)", "'<f8'"))


@bad("more than the 2147483648 bytes")
def npz_too_many_bytes(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "ct.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy_header("(512, 1024, 1024)", "'<f8'"))
    return folder / "ct.npz"


@bad("found 50000000; the file is damaged")
def npz_bomb(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "ct.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy_header("(2, 2, 2)") + bytes(50_000_000))
    return folder / "ct.npz"


# DICOM


def series(folder: Path, change: Callable[[Dataset, int], None] | None = None) -> Path:
    write_series(folder / "ct", phantom(), change=change)
    return folder / "ct"


def with_field(folder: Path, keyword: str, value: Any, *, only: int | None = None) -> Path:
    """A series in which one field of all slices, or of one, has another value; None removes it."""

    def change(dataset: Dataset, z: int) -> None:
        if only is None or z == only:
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    return series(folder, change)


@bad("neither DICOM files nor slice images")
def folder_empty(folder: Path) -> Path:
    (folder / "ct").mkdir()
    return folder / "ct"


@bad("none with an image")
def dicom_structure_set_and_report(folder: Path) -> Path:
    (folder / "ct").mkdir()
    write_report(folder / "ct" / "a", "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT")
    write_report(folder / "ct" / "b", "1.2.840.10008.5.1.4.1.1.88.22", "SR")
    return folder / "ct"


@bad("without an image")
def dicom_report_alone(folder: Path) -> Path:
    return write_report(folder / "sr.dcm", "1.2.840.10008.5.1.4.1.1.88.22", "SR")


@bad("cannot be opened")
def slice_links_to_itself(folder: Path) -> Path:
    (folder / "ct").mkdir()
    (folder / "ct" / "slice_1.png").symlink_to("slice_1.png")
    return folder / "ct"


@bad("2 series fit")
def dicom_among_links_in_a_circle(folder: Path) -> Path:
    path = dicom_two_series(folder)
    (path / "loop").symlink_to("loop")
    return path


@bad(r"without Pixel Data \(7FE0,0010\): the file is truncated or encrypted")
def dicom_encrypted(folder: Path) -> Path:
    def encrypt(dataset: Dataset, _: int) -> None:
        part = Dataset()
        part.EncryptedContentTransferSyntaxUID = "1.2.840.10008.1.2.1"
        part.EncryptedContent = CANARY.encode() * 10
        dataset.EncryptedAttributesSequence = Sequence([part])
        del dataset.PixelData

    return series(folder, encrypt)


@bad("2 series fit.*SeriesNumber 3: 12 slices 20 x 26 CT; SeriesNumber 4: 6 slices")
def dicom_two_series(folder: Path) -> Path:
    write_series(folder / "ct", phantom(), number=3, prefix="A")
    write_series(folder / "ct", phantom()[:, :, :6], number=4, prefix="B")
    return folder / "ct"


@bad("not among them")
def dicom_series_not_there(folder: Path) -> Path:
    return series(folder).with_name("ct#77")


@bad("about 2 slices are missing: distances of 5.00 mm, but up to 15.00")
def dicom_missing_slices(folder: Path) -> Path:
    paths = write_series(folder / "ct", phantom())
    paths[4].unlink()
    paths[5].unlink()
    return folder / "ct"


@bad("1 slices lie where another lies")
def dicom_duplicate_slice(folder: Path) -> Path:
    paths = write_series(folder / "ct", phantom())
    (folder / "ct" / "copy").write_bytes(paths[3].read_bytes())
    return folder / "ct"


@bad("mixes slices of 2 sizes")
def dicom_mixed_sizes(folder: Path) -> Path:
    def change(dataset: Dataset, z: int) -> None:
        if z == 3:
            dataset.Rows, dataset.Columns = 26, 20

    return series(folder, change)


@bad("different orientations")
def dicom_scout_in_the_series(folder: Path) -> Path:
    return with_field(folder, "ImageOrientationPatient", [0, 1, 0, 0, 0, -1], only=0)


@bad("different PixelSpacing")
def dicom_mixed_spacing(folder: Path) -> Path:
    return with_field(folder, "PixelSpacing", [3, 3], only=5)


@bad("gantry tilt of 21.8 degrees")
def dicom_gantry_tilt(folder: Path) -> Path:
    def tilt(dataset: Dataset, z: int) -> None:
        x, y, place = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, float(y) + 2 * z, place]  # 2 mm for each 5 mm

    return series(folder, tilt)


@bad("uneven, 4.00 to 6.00 mm")
def dicom_uneven_distances(folder: Path) -> Path:
    def move(dataset: Dataset, z: int) -> None:
        x, y, place = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, float(place) + (z == 5)]

    return series(folder, move)


@bad("1 of 12 slices lack ImagePositionPatient")
def dicom_slice_without_position(folder: Path) -> Path:
    return with_field(folder, "ImagePositionPatient", None, only=2)


@bad("spacing .* expected 0.01 to 50 mm")
def dicom_zero_spacing(folder: Path) -> Path:
    return with_field(folder, "PixelSpacing", [0, 0])


@bad("ImageOrientationPatient is singular")
def dicom_singular_orientation(folder: Path) -> Path:
    return with_field(folder, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0])


@bad("`scale: hu` is declared, but this DICOM of modality CT has no RescaleSlope")
def dicom_without_rescale(folder: Path) -> Path:
    return with_field(folder, "RescaleSlope", None)


@bad("some slices of the series have RescaleSlope")
def dicom_one_slice_without_rescale(folder: Path) -> Path:
    return with_field(folder, "RescaleSlope", None, only=4)


@bad("`scale: hu` is declared, but this DICOM of modality MR")
def dicom_of_another_modality(folder: Path) -> Path:
    return with_field(folder, "Modality", "MR")


@bad("`scale: hu` is declared, but this DICOM of modality unknown")
def dicom_modality_is_free_text(folder: Path) -> Path:
    return with_field(folder, "Modality", CANARY[:16].upper())


@bad("RescaleSlope is 0")
def dicom_slope_of_zero(folder: Path) -> Path:
    return with_field(folder, "RescaleSlope", 0)


@bad("single slice")
def dicom_one_slice_series(folder: Path) -> Path:
    write_series(folder / "ct", phantom()[:, :, 3:4])
    return folder / "ct"


@bad("one DICOM slice, not a volume")
def dicom_one_file(folder: Path) -> Path:
    return write_series(folder / "ct", phantom())[2]


@bad("pixels need 1040 bytes, the file has 1000")
def dicom_pixels_too_short(folder: Path) -> Path:
    return with_field(folder, "PixelData", bytes(1000), only=7)


@bad("truncated")
def dicom_file_truncated(folder: Path) -> Path:
    paths = write_series(folder / "ct", phantom())
    paths[1].write_bytes(paths[1].read_bytes()[:-300])
    return folder / "ct"


@bad("Rows 0")
def dicom_no_rows(folder: Path) -> Path:
    return with_field(folder, "Rows", 0)


@bad("3 samples and 16 bits|in color")
def dicom_colour(folder: Path) -> Path:
    def colour(dataset: Dataset, _: int) -> None:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = (
            3,
            "RGB",
            0,
        )
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelData = bytes(20 * 26 * 3)

    return series(folder, colour)


@bad("1 samples and 32 bits are not read")
def dicom_of_32_bits(folder: Path) -> Path:
    return with_field(folder, "BitsAllocated", 32)


def with_syntax(folder: Path, syntax: str) -> Path:
    def change(dataset: Dataset, _: int) -> None:
        dataset.file_meta.TransferSyntaxUID = syntax

    return (
        series(folder, change)
        if syntax not in (JPEG2000Lossless, MPEG2MPML)
        else raw_syntax(folder, syntax)
    )


def raw_syntax(folder: Path, syntax: str) -> Path:
    """Slices that claim an encoding which their bytes do not have."""
    for path in write_series(folder / "ct", phantom()):
        data = path.read_bytes()
        old, new = b"1.2.840.10008.1.2.1\0", syntax.encode()
        at = data.index(old)
        new += b"\0" * (len(new) % 2)
        group_length = struct.unpack_from("<I", data, 140)[0] + len(new) - len(old)
        data = data[: at - 2] + struct.pack("<H", len(new)) + new + data[at + len(old) :]
        path.write_bytes(data[:140] + struct.pack("<I", group_length) + data[144:])
    return folder / "ct"


@bad("transfer syntax 'MPEG2 Main Profile / Main Level' is not read")
def dicom_film(folder: Path) -> Path:
    return with_syntax(folder, MPEG2MPML)


@bad("transfer syntax 'Deflated Explicit VR Little Endian' is not read")
def dicom_deflated(folder: Path) -> Path:
    return with_syntax(folder, DeflatedExplicitVRLittleEndian)


@bad("a compressed encoding is declared, but the pixels are not in frames")
def dicom_raw_pixels_as_jpeg_2000(folder: Path) -> Path:
    return with_syntax(folder, JPEG2000Lossless)


@bad("pixels are damaged or encoded in a way that is not read")
def dicom_broken_jpeg_2000(folder: Path) -> Path:
    def garble(dataset: Dataset, _: int) -> None:
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
        dataset.PixelData = encapsulate([b"\xff\x4f\xff\x51" + bytes(range(200))])
        dataset["PixelData"].VR = "OB"

    return series(folder, garble)


@bad("a DICOM element declares 2147483647 bytes, the file has")
def dicom_lying_length(folder: Path) -> Path:
    paths = write_series(folder / "ct", phantom())
    for path in paths:
        data = bytearray(path.read_bytes())
        at = data.index(b"\x10\x00\x20\x00LO")  # PatientID, before everything that is needed
        data[at + 4 : at + 6] = b"UN"
        data[at + 6 : at + 8] = b"\0\0"
        struct.pack_into("<I", data, at + 8, 0x7FFFFFFF)
        path.write_bytes(data)
    return folder / "ct"


@bad("12 frames without positions")
def dicom_film_over_time(folder: Path) -> Path:
    whole = phantom()
    dataset = dicom_slice(
        whole, body()[0], 0, series=generate_uid(), study=generate_uid(), number=1
    )
    dataset.NumberOfFrames = 12
    dataset.PixelData = bytes(20 * 26 * 2 * 12)
    dataset.save_as(folder / "film.dcm", enforce_file_format=True)
    return folder / "film.dcm"


@bad("about 1 slice is missing")
def dicom_frames_with_a_gap(folder: Path) -> Path:
    return write_multi_frame(folder / "ct.dcm", phantom(), order=[0, 1, 2, 4, 5, 6])


@bad("link out of the folder")
def dicom_link_out_of_the_folder(folder: Path) -> Path:
    paths = write_series(folder / "elsewhere", phantom())
    (folder / "ct").mkdir()
    for path in paths:
        (folder / "ct" / path.name).symlink_to(path)
    return folder / "ct"


# Stacks of slices, and what is no volume at all


def slices(
    folder: Path, names: list[str], pixels: Callable[[int], np.ndarray] | None = None
) -> Path:
    (folder / "ct").mkdir()
    for z, name in enumerate(names):
        array = pixels(z) if pixels else np.full((4, 5), z, dtype=np.uint8)
        sitk.WriteImage(
            sitk.GetImageFromArray(array, isVector=array.ndim == 3), str(folder / "ct" / name)
        )
    return folder / "ct"


@bad("2 slices are missing between numbers 1 and 6")
def slices_with_a_gap(folder: Path) -> Path:
    return slices(folder, ["1.png", "2.png", "5.png", "6.png"])


@bad("no number in its name")
def slices_without_numbers(folder: Path) -> Path:
    return slices(folder, ["a.png", "b.png"])


@bad("slice 1 is there twice")
def slices_of_one_number(folder: Path) -> Path:
    return slices(folder, ["a1.png", "b1.png"])


@bad(r"slice 2 is \(4, 6\) of uint8, slice 1 is \(4, 5\)")
def slices_of_two_sizes(folder: Path) -> Path:
    return slices(folder, ["1.png", "2.png"], lambda z: np.zeros((4, 5 + z), dtype=np.uint8))


@bad("in color; expected gray")
def slices_in_colour(folder: Path) -> Path:
    return slices(
        folder, ["1.png", "2.png"], lambda z: np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    )


@bad("not a volume that is read")
def picture(folder: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5), dtype=np.uint8)), str(folder / "a.png"))
    return folder / "a.png"


@bad("no such file or folder")
def missing(folder: Path) -> Path:
    return folder / "nothing.nii"


@bad("found a device or pipe")
def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "ct.nii")
    return folder / "ct.nii"


@pytest.mark.parametrize("case", CASES)
def test_a_bad_volume_is_refused_with_its_reason(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    build, reason = CASES[case]
    path = build(tmp_path)
    with (
        warnings.catch_warnings(record=True) as warned,
        caplog.at_level(logging.DEBUG),
        pytest.raises(MediaError, match=reason) as caught,
    ):
        load_pixels(path, VolumePreprocess(size=[4, 4, 4]))
    message = str(caught.value)
    assert path.name.partition("#")[0] in message
    output = capfd.readouterr()
    for text in (
        message,
        caplog.text,
        output.out,
        output.err,
        *(str(warning.message) for warning in warned),
    ):
        for word in CANARY.lower().split("^"):
            assert word not in text.lower()
    assert caught.value.__cause__ is None  # what decoders say may quote the header


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 90


def test_what_simpleitk_reads_without_a_word_is_refused_here(tmp_path: Path) -> None:
    """The reason why voxels are not read by SimpleITK alone: if this fails, it has become
    stricter."""
    for build in (nii_truncated, nii_zero_spacing, nii_nan_intercept, mha_wrong_checksum):
        folder = tmp_path / build.__name__
        folder.mkdir()
        path = build(folder)
        sitk.ReadImage(str(path))
        with pytest.raises(MediaError):
            read_volume(path)


def test_nothing_in_the_foreground(tmp_path: Path) -> None:
    np.save(tmp_path / "air.npy", np.full((4, 4, 4), -1000, dtype=np.int16))
    with pytest.raises(MediaError, match="no voxel is above `crop_foreground: 0`"):
        load_pixels(tmp_path / "air.npy", VolumePreprocess(crop_foreground=0.0, size=[2, 2, 2]))


def test_spacing_of_an_array_is_not_made_up(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", body())
    with pytest.raises(MediaError, match="does not say where its voxels lie"):
        load_pixels(tmp_path / "a.npy", VolumePreprocess(spacing=[5, 2, 2]))


def test_resampling_is_bounded(tmp_path: Path) -> None:
    sitk.WriteImage(phantom(), str(tmp_path / "a.nii"))
    with pytest.raises(MediaError, match="resampling would give 6000 x 4000 x 3900 voxels"):
        load_pixels(tmp_path / "a.nii", VolumePreprocess(spacing=[0.01, 0.01, 0.01], size=None))


def test_a_constant_volume_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medm.imaging.notices._logged", set())
    np.save(tmp_path / "a.npy", np.full((4, 4, 4), 7, dtype=np.int16))
    pixels = load_pixels(tmp_path / "a.npy", VolumePreprocess(scale="minmax", size=[2, 2, 2]))
    np.testing.assert_array_equal(pixels, np.zeros((1, 2, 2, 2)))
    assert "all voxels are 7" in caplog.text


@pytest.mark.parametrize(
    ("scale", "values", "said"),
    [
        ("hu", [0, 255], "`scale: hu` is declared, but the values are 0..255"),
        ("0-1", [-1024, 3071], "`scale: 0-1` is declared, but the values are -1024..3071"),
        ("0-255", [0, 1], "`scale: 0-255` is declared, but the values are 0..1"),
        ("hu", [-3, 5], "`scale: hu` is declared, but the values are -3..5"),  # z-scores
        ("hu", [-1, 1], "`scale: hu` is declared, but the values are -1..1"),
        ("hu", [-1000, 400], None),
        ("0-255", [0, 200], None),
        ("minmax", [-5, 9], None),
    ],
)
def test_values_unlike_the_declared_scale_warn_with_numbers(
    tmp_path: Path,
    scale: Any,
    values: list[int],
    said: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("medm.imaging.notices._logged", {"no direction"})
    np.save(tmp_path / "a.npy", np.linspace(*values, 27).reshape(3, 3, 3).astype(np.float32))
    load_pixels(tmp_path / "a.npy", VolumePreprocess(scale=scale, size=[2, 2, 2]))
    assert (said in caplog.text) if said else not caplog.text


def test_a_file_without_direction_is_kept_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medm.imaging.notices._logged", set())
    data = nifti(tmp_path)
    struct.pack_into("<2h", data, 252, 0, 0)
    path = written(tmp_path / "a.nii", data)
    assert read_volume(path).geometry is None
    pixels = load_pixels(path, VolumePreprocess(size=[12, 20, 26]))
    np.testing.assert_allclose(pixels[0], np.clip((body() + 1000) / 2000, 0, 1), atol=1e-6)
    assert "says nothing of its direction" in caplog.text


def test_reading_a_stream_of_numbers_needs_no_seek(tmp_path: Path) -> None:
    """An array inside an archive is read as it is unpacked."""
    buffer = io.BytesIO()
    np.save(buffer, body())
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scan.npy", buffer.getvalue())
    np.testing.assert_array_equal(read_volume(tmp_path / "a.npz").voxels, body())


@pytest.mark.parametrize(
    "case",
    ["npz_declares_more_than_deflate_can_hold", "npz_array_declares_more_than_its_member", "npz_bomb_of_lzma",
     "npz_bomb_of_bzip2", "nii_gz_of_a_gibibyte_in_a_hundred_bytes", "nrrd_of_a_gibibyte_in_few_bytes",
     "mha_of_a_gibibyte_in_few_bytes"],
)  # fmt: skip
def test_a_lying_header_takes_no_memory(tmp_path: Path, case: str) -> None:
    """Refused before anything of the declared size is made: measured below 1 MB, and 64 MB to 1 GiB
    before."""
    if case.startswith("npz_bomb"):
        content = npy_header("(1, 2, 3)") + bytes(64_000_000)
        path = npz(tmp_path, content, {"a": zipfile.ZIP_LZMA, "2": zipfile.ZIP_BZIP2}[case[-1]])
        assert path.stat().st_size < 20_000
    else:
        path = CASES[case][0](tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(MediaError):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
