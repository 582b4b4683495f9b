"""Files that ask for much: refused by their headers, before memory is taken (docs/faults.md)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medm.errors import MediaError
from medm.imaging import ImagePreprocess, VolumePreprocess, prepare
from medm.imaging.volumes import check_volume
from medm.limits import MAX_SIDE
from tests import crafted

VOLUME = VolumePreprocess(size=[8, 8, 8])


@pytest.mark.parametrize("size", [(1, MAX_SIDE + 1), (MAX_SIDE + 1, 1)])
def test_row_27_an_image_of_one_long_line_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    crafted.png(*size)(tmp_path / "a.png")
    with pytest.raises(MediaError, match=f"at most {MAX_SIDE} along one side"):
        prepare(tmp_path / "a.png", ImagePreprocess())


def test_row_27_deep_color_counts_by_its_bytes(tmp_path: Path) -> None:
    crafted.png(8192, 4097, bits=16, color=6)(tmp_path / "a.png")
    with pytest.raises(MediaError, match=r"8192 x 4097 pixels of \d+ bytes are more than"):
        prepare(tmp_path / "a.png", ImagePreprocess())


SLICES = {
    "nifti with a slope": (
        ".nii.gz",
        crafted.nifti((1024, 1024, 512), datatype=4, bits=16, slope=2.0, held=2**21),
    ),
    "nifti of int32": (
        ".nii.gz",
        crafted.nifti((1024, 1024, 512), datatype=8, bits=32, held=2**21),
    ),
    "nifti of int64": (
        ".nii.gz",
        crafted.nifti((1024, 1024, 256), datatype=1024, bits=64, held=2**21),
    ),
}


@pytest.mark.parametrize("name", SLICES)
def test_row_27_a_small_file_may_not_take_much_memory(tmp_path: Path, name: str) -> None:
    suffix, make = SLICES[name]
    file = tmp_path / f"a{suffix}"
    make(file)
    with file.open("ab") as stream:  # as large as deflate needs for the voxels that are declared
        stream.write(bytes(3 * 2**20))
    started = time.process_time()
    for action in (lambda: prepare(file, VOLUME), lambda: check_volume(file)):
        with pytest.raises(MediaError, match=r"reading it would take [34]\.0 GiB of memory"):
            action()
    assert time.process_time() - started < 1


def test_row_27_the_limit_is_settable_and_larger_files_have_more(tmp_path: Path) -> None:
    crafted.nifti((64, 64, 64))(tmp_path / "a.nii.gz")
    program = (
        "import sys; from pathlib import Path; from medm.imaging.volumes import read_volume; "
        "print(read_volume(Path(sys.argv[1])).voxels.shape)"
    )
    for allowed, words in (("786432", "(64, 64, 64)"), ("786431", "MEDM_MAX_MEMORY")):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "a.nii.gz")],
            env={**os.environ, "MEDM_MAX_MEMORY": allowed},
            capture_output=True,
            text=True,
        )
        assert words in done.stdout + done.stderr


def test_row_27_resampling_counts_what_it_makes(tmp_path: Path) -> None:
    crafted.nifti((16, 16, 16), spacing=40.0)(tmp_path / "a.nii.gz")
    fine = VolumePreprocess(size=[8, 8, 8], spacing=[1.0, 1.0, 1.0], crop_foreground=0.0)
    with pytest.raises(MediaError, match=r"preparing it would take [0-9.]+ GiB of memory"):
        prepare(tmp_path / "a.nii.gz", fine)


def test_row_42_a_shape_of_truth_values_is_refused(tmp_path: Path) -> None:
    crafted.npy_header("(True, 2, 2)", data=bytes(4))(tmp_path / "a.npy")
    for preprocess in (ImagePreprocess(), VOLUME):
        with pytest.raises(MediaError, match="expected whole numbers"):
            prepare(tmp_path / "a.npy", preprocess)


def test_the_cost_of_a_lying_file_is_measured(tmp_path: Path) -> None:
    """Of the measurement that `docs/faults.md` reports."""
    crafted.nifti((1024, 1024, 512), held=1000)(tmp_path / "a.nii.gz")
    cost = crafted.measured(
        "from pathlib import Path\nfrom medm.imaging.volumes import read_volume",
        f"read_volume(Path({str(tmp_path / 'a.nii.gz')!r}))",
    )
    assert cost.said.startswith("MediaError")
    assert cost.seconds < 2
    assert cost.gib < 0.2
