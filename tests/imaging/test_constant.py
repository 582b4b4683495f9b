"""Files of which preprocessing leaves nothing: refused with the step and its ranges, or a warning
for each file."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from medm.data.cached import fill
from medm.data.check import check
from medm.data.conversations import Conversations
from medm.data.dataset import ExampleDataset
from medm.data.options import SourceOptions
from medm.data.records import Records
from medm.data.volume_cache import MediaCache
from medm.errors import DataError, MediaError
from medm.imaging import ImagePreprocess, VolumePreprocess, fingerprint, load_pixels
from medm.imaging.constant import Step, check_prepared
from medm.imaging.notices import MAX_NAMED, collected
from medm.imaging.placement import Placement, Prepared
from medm.imaging.preview import contact_sheet
from tests.data.tiny import conversations, record, write_json
from tests.imaging.tiny import body, phantom

SIZE = [4, 6, 8]
HU = VolumePreprocess(size=SIZE, windows=[[-1000, 1000]])


def nifti(path: Path, voxels: np.ndarray) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
    return path


@pytest.fixture
def shifted(tmp_path: Path) -> Path:
    """The phantom with a wrong offset: -9192..-7492 where HU are declared."""
    path = tmp_path / "ct.nii.gz"
    sitk.WriteImage(phantom() - 8192, str(path))
    return path


def ramp(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 8 * 9 * 10).reshape(8, 9, 10).astype(np.float32)


def spot() -> np.ndarray:
    """One bright voxel in a corner of air."""
    voxels = np.full((9, 9, 9), -1000, np.int16)
    voxels[0, 0, 0] = 900
    return voxels


VOLUMES: dict[str, tuple[np.ndarray, dict[str, Any], str]] = {
    "below the window": (ramp(-9192, -7192), {"windows": [[-1000, 1000]]},
                         r"window -1000\.\.1000 makes 0 of the values -9192\.\.-7192"),
    "above the window": (ramp(2000, 3000), {"windows": [[-1000, 400]]},
                         r"window -1000\.\.400 makes 1 of the values 2000\.\.3000"),
    "outside of every window": (ramp(-9192, -7192), {"windows": [[-1000, 400], [-160, 240]]},
                                r"window -1000\.\.400 makes 0 .*; window -160\.\.240 makes 0 of the values -9192"),
    "fractions as HU": (ramp(0, 1e-4), {}, r"window -1000\.\.1000 makes 0\.5 of the values 0\.\.0\.0001"),
    "minmax and a window of its top": (spot(), {"scale": "minmax", "windows": [[-3, -2]]},
                                       r"window -3\.\.-2 makes 1 of the values"),
    "published convention": (ramp(-9192, -7192), {"convention": "medm-clip"},
                             r"window -1000\.\.1000 makes 0 of the values -9192"),
    "cropped to one voxel": (spot(), {"crop_foreground": 0.5}, r"crop_foreground 0\.5 makes 0\.95 of the values 0"),
    "cropped to nothing": (ramp(-9192, -7192), {"convention": "medm-vl"},
                           r"no voxel is above .* window -1000\.\.1000; nothing is left of the values -9192\.\.-7192"),
    "every second voxel": (spot()[::-1], {"interpolation": "nearest", "size": [3, 3, 3]},
                           r"size \[3, 3, 3\] makes 0 of the values 0\.\.0\.95"),
    "slices that the size leaves out": (spot(), {"size": [2, 9, 9], "interpolation": "trilinear"},
                                        r"size \[2, 9, 9\] \(its slices\) makes -1000 of the values -1000\.\.900"),
}  # fmt: skip


@pytest.mark.parametrize("case", VOLUMES)
def test_a_volume_of_which_nothing_is_left_is_refused(tmp_path: Path, case: str) -> None:
    voxels, fields, reason = VOLUMES[case]
    path = nifti(tmp_path / "ct.nii", voxels)
    with pytest.raises(MediaError, match=rf"ct\.nii: .*{reason}"):
        load_pixels(path, VolumePreprocess(**{"size": SIZE, "orientation": None, **fields}))


def test_a_centre_without_anything_is_refused(tmp_path: Path) -> None:
    """With `spacing`, `size` crops around the center."""
    path = nifti(tmp_path / "ct.nii", spot())
    with pytest.raises(
        MediaError, match=r"resampling to orientation SPL, spacing \[1\.0, 1\.0, 1\.0\] makes -1000"
    ):
        load_pixels(path, VolumePreprocess(spacing=[1, 1, 1], size=[3, 3, 3]))


def deep(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


IMAGES: dict[str, tuple[np.ndarray, dict[str, Any], str]] = {
    "outside of its window": (
        np.arange(3000, 3064, dtype=np.uint16).reshape(8, 8),
        {"window": [0, 1000]},
        r"window \[0\.0, 1000\.0\] makes 1 of the values 3000\.\.3063",
    ),
    "HU shifted": (
        np.arange(64, dtype=np.int16).reshape(8, 8) - 9192,
        {"window": [-1000, 1000]},
        r"makes 0 of the values -9192\.\.-9129",
    ),
    "cropped": (
        np.pad(np.full((8, 1), 255, np.uint8), ((0, 0), (0, 31))),
        {"fit": "crop"},
        r"fit crop to 4 x 4 makes 0 of the values 0\.\.1",
    ),
}


@pytest.mark.parametrize("case", IMAGES)
def test_an_image_of_which_nothing_is_left_is_refused(tmp_path: Path, case: str) -> None:
    pixels, fields, reason = IMAGES[case]
    with pytest.raises(MediaError, match=rf"a\.npy: .*every pixel .*{reason}"):
        load_pixels(deep(tmp_path / "a.npy", pixels), ImagePreprocess(size=[4, 4], **fields))


def test_a_blank_file_is_used_with_a_warning(tmp_path: Path) -> None:
    """The file itself is constant: preprocessing loses nothing, and a blank control image can be
    meant."""
    Image.new("RGB", (6, 5), (250, 100, 0)).save(tmp_path / "a.png")
    with collected() as notices:
        for fit in ("squash", "crop", "pad"):
            load_pixels(tmp_path / "a.png", ImagePreprocess(size=[4, 4], fit=fit))
        load_pixels(
            nifti(tmp_path / "a.nii", np.full((4, 4, 4), 7, np.int16)), VolumePreprocess(size=SIZE)
        )
    assert [(notice.kind, notice.message.partition(": ")[2]) for notice in notices] == [
        ("constant", "all pixels are 250, 100, 0; the file is blank, perhaps from a failed export"),
        ("constant", "all voxels are 7; the file is blank, perhaps from a failed export"),
    ]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_tensors_are_judged_as_arrays_are(value: float) -> None:
    """As they come from a GPU."""
    stored = np.arange(2000, dtype=np.int16).reshape(10, 10, 20)
    shown = torch.full((1, 10, 10, 20), value)
    steps = [Step("the file", 0, 1999, 0.0), Step("window 1..2", value, value)]
    with pytest.raises(MediaError, match=rf"window 1\.\.2 makes {value:g} of the values 0\.\.1999"):
        check_prepared(shown, stored, name="x", windows=[[1, 2]], trace=lambda _: steps)
    shown[0, 0, 0, 0] = 0.5
    with collected() as notices:
        check_prepared(shown, stored, name="x", windows=[[-2, -1]], trace=lambda _: steps)
    assert [notice.kind for notice in notices] == ["outside of the windows"]


def test_one_value_that_is_asked_for_is_no_fault(tmp_path: Path) -> None:
    with collected() as notices:
        pixels = load_pixels(nifti(tmp_path / "a.nii", body()), VolumePreprocess(size=[1, 1, 1]))
    assert pixels.shape == (1, 1, 1, 1)
    assert notices == []


def test_a_file_almost_wholly_outside_of_its_windows_warns(tmp_path: Path) -> None:
    """A metal part keeps the result from being constant; all else is lost."""
    voxels = ramp(-9192, -7192).repeat(3, axis=0)
    voxels[5, 5, 5] = 500
    preprocess = VolumePreprocess(size=None, orientation=None)
    with collected() as notices:
        load_pixels(nifti(tmp_path / "ct.nii", voxels), preprocess)
    said = [notice.message for notice in notices if notice.kind == "outside of the windows"]
    assert len(said) == 1
    assert (
        "99.95 % of the voxels lie outside of the windows (-1000..1000); the values are -9192..500"
        in said[0]
    )


@pytest.mark.parametrize(
    ("voxels", "fields"),
    [
        (body(), {"windows": [[-1000, 400], [-160, 240], [-200, 1000]]}),
        (body(), {"windows": [[250, 3000]]}),  # bone alone
        (
            np.where(np.arange(1000).reshape(10, 10, 10) == 555, 1, 0),
            {"scale": "0-1"},
        ),  # sparse by itself
    ],
)
def test_what_is_meant_gives_no_warning(
    tmp_path: Path, voxels: np.ndarray, fields: dict[str, Any]
) -> None:
    path = nifti(tmp_path / "ct.nii", voxels.astype(np.int16))
    with collected() as notices:
        load_pixels(path, VolumePreprocess(size=None, **fields))
    assert notices == []


def test_a_single_channel_that_becomes_one_value_warns(tmp_path: Path) -> None:
    with collected() as notices:
        load_pixels(
            nifti(tmp_path / "ct.nii", body()),
            VolumePreprocess(size=SIZE, windows=[[-1000, 1000], [2000, 3000]]),
        )
    assert [notice.message.partition(": ")[2] for notice in notices] == [
        "channel 2 of 2 becomes one value: window 2000..3000 makes 0 of the values -1000..700"
    ]


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha", ".npy"])
def test_numbers_beyond_single_precision_are_not_made_one(tmp_path: Path, suffix: str) -> None:
    voxels = 2**40 + np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    path = tmp_path / f"ct{suffix}"
    if suffix == ".npy":
        np.save(path, voxels)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
    with pytest.raises(MediaError, match=r"single precision turns the stored values 1\.09951e\+12"):
        load_pixels(path, VolumePreprocess(scale="minmax", size=SIZE))


def test_each_file_is_named_once_and_no_more_than_a_few(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(MAX_NAMED + 5)]
    for path in paths:
        Image.new("L", (4, 4)).save(path)
    for _ in range(2):
        for path in paths:
            load_pixels(path, ImagePreprocess(size=[4, 4]))
    messages = [entry.getMessage() for entry in caplog.records]
    assert sum("all pixels are 0" in message for message in messages) == MAX_NAMED
    assert sum("further files are not named" in message for message in messages) == 1
    assert len(messages) == MAX_NAMED + 1


def source(folder: Path, *names: str) -> SourceOptions:
    records = [record("<volume>?", volume=name) for name in names]
    return SourceOptions(path=str(write_json(folder / "data.json", records)))


def test_every_way_to_the_model_refuses_the_same_file(
    tmp_path: Path, shifted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Preview, data check, cache, training: one reason, from one place."""
    reason = r"window -1000\.\.1000 makes 0 of the values -9192\.\.-7492"
    described = {"volume": HU}
    data = source(tmp_path, "ct.nii.gz")
    with pytest.raises(MediaError, match=reason):
        contact_sheet(shifted, HU)
    report = check([data], conversations(described), decode=True)
    cache = MediaCache(tmp_path / "cache", 10**6)
    filled = fill([Records([data], Conversations())], described, cache.load)
    assert (report.num_bad, filled.num_bad, cache.size()[0]) == (1, 1, 0)
    for error in (*report.bad, *filled.bad):
        assert error.reason.startswith(str(shifted))
        assert re.search(reason, error.reason)
    with pytest.raises(DataError, match=reason):
        ExampleDataset(Records([data], conversations(described)))[0]


def test_an_entry_of_an_earlier_medm_is_not_used_in_silence(tmp_path: Path, shifted: Path) -> None:
    cache = MediaCache(tmp_path / "cache", 10**6)
    good = nifti(tmp_path / "good.nii.gz", body())
    cache.load(good, HU)
    entry = next(cache.folder.glob("arrays/*/*.npy"))
    key = cache._content(shifted, "ab" * 32)
    stale = cache.folder / "arrays" / str(key)[:2] / f"{key}-{fingerprint(HU)}.npy"
    blank = Prepared(np.zeros((1, *SIZE), np.float32), Placement.of_source(SIZE))
    MediaCache(tmp_path / "cache", 10**6)._store(stale, blank)
    assert entry != stale
    for _ in range(2):
        with pytest.raises(MediaError, match="-9192"):
            cache.load(shifted, HU)


def test_warnings_are_counted_and_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The data check and the cache name every file, and log none besides; a filled cache says it
    once more."""
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.full((4, 4, 4), 7, np.int16))
    nifti(tmp_path / "good.nii.gz", body())
    data = source(tmp_path, "a.npy", "b.npy", "a.npy", "good.nii.gz")
    described = {"volume": VolumePreprocess(size=SIZE, orientation=None)}
    for pipeline in (conversations(described), Conversations()):
        report = check([data], pipeline, decode=True)
        assert (report.num_bad, report.num_warnings) == (0, 2)
        text = "\n".join(report.lines())
        assert f"warning: {tmp_path / 'b.npy'}: all voxels are 7" in text
        assert "2 warnings about files" in text
    for _ in range(2):
        filled = fill(
            [Records([data], Conversations())],
            described,
            MediaCache(tmp_path / "cache", 10**6).load,
        )
        assert (filled.num_bad, filled.num_warnings, len(filled.warnings)) == (0, 2, 2)
    assert not [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
