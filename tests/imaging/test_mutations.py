"""Files with bytes changed at random, from fixed seeds: pixels or a `MediaError`, quickly, and
nothing else."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medm.errors import MediaError
from medm.imaging import VolumePreprocess, load_pixels
from tests.imaging.tiny import CANARY, body, phantom, write_multi_frame

PREPROCESS = VolumePreprocess(size=[4, 4, 4], scale="minmax")


def by_simpleitk(name: str, packed: bool = False) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        sitk.WriteImage(phantom()[:10, :10], str(folder / name), packed)
        return folder / name

    return build


def npy(folder: Path) -> Path:
    np.save(folder / "a.npy", body())
    return folder / "a.npy"


def half_packed(folder: Path) -> Path:
    """Not compressed, so that changes reach the header inside."""
    path = by_simpleitk("b.nii")(folder)
    packed = folder / "a.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes(), compresslevel=0))
    return packed


FORMATS: dict[str, Callable[[Path], Path]] = {
    "nifti": by_simpleitk("a.nii"),
    "nifti.gz": half_packed,
    "nrrd": by_simpleitk("a.nrrd"),
    "packed nrrd": by_simpleitk("b.nrrd", True),
    "mha": by_simpleitk("a.mha"),
    "packed mha": by_simpleitk("b.mha", True),
    "npy": npy,
    "dicom": lambda folder: write_multi_frame(folder / "a.dcm", phantom()[:10, :10]),
}


@pytest.mark.parametrize("form", FORMATS)
def test_mutated_files_give_pixels_or_a_media_error(tmp_path: Path, form: str) -> None:
    path = FORMATS[form](tmp_path)
    whole = path.read_bytes()
    generator = np.random.default_rng(len(form))
    slowest, refused = 0.0, 0
    for number in range(150):
        data = bytearray(whole)
        reach = len(data) if number % 2 else min(len(data), 1500)  # half of them in the header
        for at in generator.integers(0, reach, generator.integers(1, 8)):
            data[at] = generator.integers(0, 256)
        path.write_bytes(data[: generator.integers(1, len(data))] if number % 5 == 0 else data)
        start = time.process_time()
        try:
            pixels = load_pixels(path, PREPROCESS)
            assert pixels.shape == (1, 4, 4, 4)
            assert np.isfinite(pixels).all()
        except MediaError as error:
            refused += 1
            assert str(path) in str(error)
            assert CANARY.split("^")[0].lower() not in str(error).lower()
        slowest = max(slowest, time.process_time() - start)
    assert refused > 20
    assert slowest < 5
