"""Preparation of volumes: numbers by hand, and the published chains through an independent
library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medm.encoders.i3d_resnet import I3DResNetEncoder
from medm.encoders.volume_vit import M3DCLIPEncoder, MedMCLIPEncoder
from medm.errors import RecipeError
from medm.imaging import VolumePreprocess, fingerprint, load_pixels, preprocess_from_dict
from medm.imaging.geometry import Geometry
from medm.imaging.transforms import prepare_volume
from medm.imaging.volumes import Volume
from tests.imaging.tiny import body, phantom


def volume(voxels: Any, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    """Along S, P, L."""
    direction = np.eye(3)[:, ::-1].copy()
    return Volume(
        np.asarray(voxels, dtype=np.float32),
        "x",
        geometry=Geometry(np.asarray(spacing), direction, np.zeros(3)),
    )


CUBE = volume([[[-2000, -1000], [-500, 0]], [[40, 240], [1000, 3000]]])


def test_windows_become_channels() -> None:
    pixels = prepare_volume(
        VolumePreprocess(size=None, windows=[[-1000, 1000], [-160, 240]]), CUBE
    ).pixels
    expected = [
        [[[0, 0], [0.25, 0.5]], [[0.52, 0.62], [1, 1]]],
        [[[0, 0], [0, 0.4]], [[0.5, 1], [1, 1]]],
    ]
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "values", "expected"),
    [
        ({"scale": "0-255"}, [0, 51, 255], [0, 0.2, 1]),
        ({"scale": "0-1"}, [0, 0.2, 1], [0, 0.2, 1]),
        ({"scale": "minmax"}, [-3, -2, 2], [0, 0.2, 1]),
        ({"scale": "minmax", "windows": [[0.0, 0.5]]}, [-3, -2, 2], [0, 0.4, 1]),
        ({"windows": [[0.0, 100.0]], "stretch": True}, [20, 40, 60], [0, 0.5, 1]),
        ({"mean": [0.5], "std": [0.25]}, [-1000, 0, 1000], [-2, 0, 2]),
    ],
)
def test_scales_by_hand(fields: dict[str, Any], values: list[float], expected: list[float]) -> None:
    pixels = prepare_volume(
        VolumePreprocess(size=None, **fields), volume([[values, values], [values, values]])
    ).pixels
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, (1, 2, 2, 3)), atol=1e-6)


def test_one_window_repeated_for_encoders_of_colour() -> None:
    pixels = prepare_volume(
        VolumePreprocess(size=None, channels=3, mean=[0.0, 0.5, 1.0], std=[1.0, 1.0, 0.5]), CUBE
    ).pixels
    np.testing.assert_allclose(pixels[1], pixels[0] - 0.5)
    np.testing.assert_allclose(pixels[2], (pixels[0] - 1) / 0.5)


def test_foreground_is_the_smallest_box_and_the_same_for_all_windows() -> None:
    voxels = np.full((6, 7, 8), -1000.0)
    voxels[2:4, 1:6, 3:5] = 100
    voxels[3, 5, 4] = 300
    pixels = prepare_volume(
        VolumePreprocess(size=None, windows=[[-1000, 1000], [200, 400]], crop_foreground=0.0),
        volume(voxels),
    ).pixels
    assert pixels.shape == (2, 2, 5, 2)
    expected = np.full((2, 2, 5, 2), [[[[0.55]]], [[[0]]]])
    expected[:, 1, 4, 1] = [0.65, 0.5]
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_spacing_then_size_crops_or_pads_around_the_centre() -> None:
    voxels = np.full((4, 4, 4), -1000.0)
    voxels[1:3, 1:3, 1:3] = 1000
    preprocess = VolumePreprocess(spacing=[1, 1, 1], size=[2, 4, 6])
    pixels = prepare_volume(preprocess, volume(voxels)).pixels
    expected = np.zeros((2, 4, 6))
    expected[:, 1:3, 2:4] = 1
    np.testing.assert_allclose(pixels[0], expected, atol=1e-6)
    # With a crop between: the foreground of 2 x 2 x 2 is padded.
    pixels = prepare_volume(
        VolumePreprocess(spacing=[1, 1, 1], size=[2, 4, 6], crop_foreground=0.0), volume(voxels)
    ).pixels
    np.testing.assert_allclose(pixels[0], expected, atol=1e-6)


def test_spacing_gives_the_size_in_millimetres() -> None:
    pixels = prepare_volume(
        VolumePreprocess(spacing=[2, 2, 2], size=None), volume(np.zeros((10, 20, 30)), (4, 1, 2))
    ).pixels
    assert pixels.shape == (1, 20, 10, 30)


def test_area_averages_and_keeps_places() -> None:
    """Voxels of 1 mm to 2 mm: the mean of pairs along x; linear interpolation would give the same
    only by chance."""
    row = np.array([0, 100, 0, 100, 400, 400], dtype=np.float32)
    pixels = prepare_volume(
        VolumePreprocess(spacing=[1, 1, 2], size=None, interpolation="area", windows=[[0, 400]]),
        volume(np.broadcast_to(row, (2, 2, 6))),
    ).pixels
    np.testing.assert_allclose(pixels[0, 0, 0] * 400, [50, 50, 400], atol=1e-4)


@pytest.mark.parametrize("interpolation", ["area", "trilinear"])
def test_no_voxel_is_dropped_and_the_centre_stays(interpolation: Any) -> None:
    """A length that blocks do not divide: a ramp stays where it is in millimetres."""
    ramp = np.broadcast_to(np.arange(23, dtype=np.float32), (2, 2, 23))
    preprocess = VolumePreprocess(
        spacing=[1, 1, 4.5], size=None, interpolation=interpolation, windows=[[0, 23]]
    )
    row = prepare_volume(preprocess, volume(ramp)).pixels[0, 0, 0] * 23
    places = 11 + (np.arange(5) - 2) * 4.5  # five voxels of 4.5 mm around the centre of 23 mm
    assert len(row) == 5
    np.testing.assert_allclose(row[:-1], places[:-1], atol=1e-3)
    np.testing.assert_allclose(
        row[-1], places[-1], atol=0.5
    )  # area: its block is filled up with the last voxel
    last = np.zeros((2, 2, 9), dtype=np.float32)
    last[..., -1] = 90
    preprocess = VolumePreprocess(
        spacing=[1, 1, 2], size=[2, 2, 5], interpolation=interpolation, windows=[[0, 90]]
    )
    assert prepare_volume(preprocess, volume(last)).pixels[0, 0, 0, -1] > 0.2


def test_nearest_makes_no_new_values() -> None:
    voxels = np.random.default_rng(0).integers(0, 3, (5, 6, 7)) * 100.0
    for fields in ({"size": [3, 9, 5]}, {"size": None, "spacing": [1.5, 0.7, 1.2]}):
        pixels = prepare_volume(
            VolumePreprocess(interpolation="nearest", windows=[[0, 200]], **fields), volume(voxels)
        ).pixels
        assert set(np.unique(pixels)) <= {0.0, 0.5, 1.0}


@pytest.mark.parametrize("convention", ["m3d", "medm-vl"])
def test_published_chains_through_monai(tmp_path: Path, convention: str) -> None:
    """M3D: 0..1, min-max, CropForeground, Resize. MedM-VL: HU -1000..1000 to 0..255, / 255, then
    the same.

    Measured worst case 2e-7; a crop off by one voxel gives 0.4.
    """
    voxels = body().astype(np.float32)
    if convention == "m3d":
        voxels = (voxels + 1000) / 1700
        np.save(tmp_path / "a.npy", voxels[None])
        chain = voxels
    else:
        np.save(tmp_path / "a.npy", voxels)
        chain = (np.clip(voxels, -1000, 1000) + 1000) / 2000 * 255 / 255
    chain = chain[None]
    chain = (chain - chain.min()) / (chain.max() - chain.min())
    expected = mt.Resize([32, 256, 256], mode="trilinear")(
        mt.CropForeground()(torch.from_numpy(chain))
    )
    pixels = load_pixels(tmp_path / "a.npy", VolumePreprocess(convention=convention))
    assert pixels.shape == (1, 32, 256, 256)
    np.testing.assert_allclose(pixels, np.asarray(expected), atol=2e-6)


def test_medm_clip_normalises_on_its_own_scale() -> None:
    pixels = prepare_volume(VolumePreprocess(convention="medm-clip", size=None), CUBE).pixels
    on_255 = (np.clip(CUBE.voxels, -1000, 1000) + 1000) / 2000 * 255
    np.testing.assert_allclose(pixels[0], (on_255 - 55.698) / 66.194, rtol=1e-5)


def test_astra_takes_slices_rightwards_and_to_the_front(tmp_path: Path) -> None:
    sitk.WriteImage(phantom(), str(tmp_path / "a.nii"))
    pixels = load_pixels(tmp_path / "a.nii", VolumePreprocess(convention="astra", size=None))
    expected = np.clip((body() + 1000) / 1200, 0, 1).transpose(0, 2, 1)[
        :, ::-1, ::-1
    ]  # S, P, L to S, R, A
    box = [slice(places.min(), places.max() + 1) for places in np.nonzero(expected > 0)]
    np.testing.assert_allclose(pixels[0], expected[tuple(box)], atol=1e-6)


@pytest.mark.parametrize(
    ("encoder", "convention"),
    [(I3DResNetEncoder, "astra"), (M3DCLIPEncoder, "medm-vl"), (MedMCLIPEncoder, "medm-clip")],
)
def test_a_convention_by_name_is_what_its_encoder_asks_for(encoder: Any, convention: Any) -> None:
    """One definition: the name in a recipe and the encoder of that name cannot drift apart."""
    assert VolumePreprocess(**encoder.preprocess_from({}, {})) == VolumePreprocess(
        convention=convention
    )


def test_oblique_can_be_kept(tmp_path: Path) -> None:
    turn = np.deg2rad(30)
    image = phantom()
    image.SetDirection([np.cos(turn), -np.sin(turn), 0, np.sin(turn), np.cos(turn), 0, 0, 0, 1])
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    kept = load_pixels(tmp_path / "a.nii", VolumePreprocess(size=None, oblique="keep"))
    np.testing.assert_allclose(kept[0], np.clip((body() + 1000) / 2000, 0, 1), atol=1e-6)
    straight = load_pixels(tmp_path / "a.nii", VolumePreprocess(size=None))
    assert straight.shape[2] > kept.shape[2]  # the box that holds a turned volume is larger
    assert straight.shape[3] > kept.shape[3] - 1


def test_merlin_is_its_published_chain_through_monai(tmp_path: Path) -> None:
    """On a grid of Merlin's own spacing nothing is interpolated, so that axes, window, padding and
    cropping show alone; the slices stand in front, as its tower turns them.
    """
    voxels = np.random.default_rng(0).uniform(-1500, 1500, (170, 90, 230)).astype(np.float32)
    image = sitk.GetImageFromArray(voxels)  # stored x, y, z of LPS
    image.SetSpacing([1.5, 1.5, 3.0])
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    x_y_z = torch.from_numpy(voxels).permute(2, 1, 0).flip(0, 1)[None]  # LPS to RAS
    scaled = mt.ScaleIntensityRange(-1000, 1000, 0.0, 1.0, clip=True)(x_y_z)
    padded = mt.SpatialPad([224, 224, 160])(scaled)
    expected = mt.CenterSpatialCrop([224, 224, 160])(padded).permute(0, 3, 1, 2)
    found = load_pixels(tmp_path / "a.nii", VolumePreprocess(convention="merlin"))
    assert found.shape == (1, 160, 224, 224)
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-5)


@pytest.mark.parametrize("convention", [None, "m3d", "medm-vl", "medm-clip", "astra", "merlin"])
def test_descriptions_come_back_from_their_dictionary(convention: Any) -> None:
    preprocess = VolumePreprocess(convention=convention, series="largest")
    again = preprocess_from_dict(preprocess.model_dump(mode="json"))
    assert again == preprocess
    assert fingerprint(again) == fingerprint(preprocess)


def test_a_written_field_wins_over_the_convention() -> None:
    preprocess = VolumePreprocess(convention="m3d", size=[8, 64, 64])
    assert (preprocess.size, preprocess.scale, preprocess.stretch) == ([8, 64, 64], "0-1", True)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"orientation": "SPP"}, "three letters, one each of R/L, A/P and S/I"),
        ({"orientation": "XYZ"}, "three letters"),
        ({"size": [8, 8]}, "size"),
        ({"spacing": [0.0, 1.0, 1.0]}, "spacing: expected numbers above 0"),
        ({"windows": [[5.0, -5.0]]}, r"windows: expected \[lower, upper\]"),
        (
            {"windows": [[0.0, 1.0], [0.0, 2.0]], "channels": 3},
            "channels is 3, but there are 2 windows",
        ),
        ({"mean": [0.1, 0.2]}, "mean: expected 1 or 1 values"),
        ({"convention": "m3dd"}, "convention"),
        ({"scale": "hounsfield"}, "scale"),
    ],
)
def test_impossible_descriptions_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        preprocess_from_dict({"kind": "volume", **fields})


@pytest.mark.parametrize("shape", [(40, 20, 24), (9, 12, 8), (33, 12, 8), (8, 30, 8), (100, 5, 31)])
def test_shrinking_in_two_steps_gives_the_numbers_of_one(shape: tuple[int, int, int]) -> None:
    voxels = np.random.default_rng(0).integers(-1200, 1500, shape, dtype=np.int16)
    preprocess = VolumePreprocess(
        windows=[[-1000.0, 400.0], [-160.0, 240.0]], size=[8, 12, 8], orientation=None
    )
    found = prepare_volume(preprocess, Volume(voxels, "v")).pixels
    for channel, (low, high) in zip(found, preprocess.windows or [], strict=True):
        windowed = ((torch.from_numpy(voxels).float() - low) / (high - low)).clamp(0, 1)
        expected = torch.nn.functional.interpolate(
            windowed[None, None], size=(8, 12, 8), mode="trilinear"
        )[0, 0]
        assert np.allclose(channel, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("stored", ["<i2", ">i2", "u1", "u2", "i4", "f4", "f8"])
def test_voxels_that_travel_as_they_are_stored_give_the_same_numbers(stored: str) -> None:
    """As to a GPU; "cpu:0" is another device than "cpu" by its name alone."""
    drawn = volume(np.random.default_rng(0).integers(0, 250, (10, 6, 5)).astype(stored))
    for size in ([4, 3, 3], None):  # a blend of some slices, and all of them
        preprocess = VolumePreprocess(
            scale="0-255", size=size, orientation=None, windows=[[0.0, 255.0]]
        )
        there = prepare_volume(preprocess, drawn, device="cpu:0").pixels
        assert np.array_equal(there, prepare_volume(preprocess, drawn).pixels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("convention", ["m3d", "medm-vl", "astra"])
def test_a_gpu_gives_what_the_cpu_gives(convention: str) -> None:
    drawn = volume(np.random.default_rng(0).integers(-1000, 1000, (40, 60, 50)))
    preprocess = VolumePreprocess(
        convention=convention, size=[16, 32, 32], scale="hu", windows=[[-1000.0, 1000.0]]
    )
    np.testing.assert_allclose(
        prepare_volume(preprocess, drawn, device="cuda").pixels,
        prepare_volume(preprocess, drawn).pixels,
        atol=1e-5,
    )
