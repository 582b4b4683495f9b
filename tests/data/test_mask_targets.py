"""Masks of records to batches: only their images, on the target grid, with the right numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medm.data.base import MaskView
from medm.data.cached import fill, loader
from medm.data.check import check
from medm.data.collator import Collator
from medm.data.conversations import Conversations
from medm.data.dataset import ExampleDataset
from medm.data.features import FeatureBatch, missing, open_store
from medm.data.limits import LengthLimit
from medm.data.mask_targets import masked_media, read_targets
from medm.data.options import CacheOptions, SourceOptions
from medm.data.packing import PackingCollator
from medm.data.records import Records
from medm.data.turns import parse_record
from medm.errors import DataError, RecipeError
from medm.imaging import Augment, ImagePreprocess, Preprocess, VolumePreprocess, prepare, rle
from medm.imaging.geometry import Geometry
from medm.imaging.nifti import write_nifti
from medm.imaging.placement import Placement
from medm.types import Example, MaskTargets, Sample
from tests.data.tiny import CONTROL, PAD, encode, record, write_lines

VIEW = "image@masks"
PLAIN: dict[str, Any] = {"mean": [0.0] * 3, "std": [1.0] * 3}
IMAGES: dict[str, Preprocess] = {
    VIEW: ImagePreprocess(size=[8, 8], **PLAIN),
    "image": ImagePreprocess(size=[4, 4], **PLAIN),
}


def encode_masked(
    sample: Sample,
    pixels: Mapping[str, list[np.ndarray]],
    *,
    generation: bool = False,
    masks: MaskTargets | None = None,
) -> Example:
    seen = {view: items for view, items in pixels.items() if not view.endswith("@masks")}
    example = encode(sample, seen, generation=generation)
    assert (masks is None) == (len(seen) == len(pixels)), "pixels of the view come with masks"
    if masks is not None:
        example.pixels |= {view: items for view, items in pixels.items() if view not in seen}
        example.masks = masks
    return example


def pipeline(
    preprocess: Mapping[str, Preprocess] = IMAGES,
    *,
    view: str | None = VIEW,
    grid: tuple[int, ...] = (4, 4),
    **settings: Any,
) -> Conversations:
    processor: Any = SimpleNamespace(
        preprocess=dict(preprocess),
        placeholder_ids={"image": 1},
        control_token_ids={"[SEG]": CONTROL},
        mask_view=view,
        mask_grid=None if view is None else grid,
        regions=None,
        pad_id=PAD,
        encode=encode_masked,
    )
    return Conversations(processor, **settings)


def quadrant(number: int) -> np.ndarray:
    """8 x 8, inside in one quarter, by rows."""
    mask = np.zeros((8, 8), bool)
    row, column = divmod(number, 2)
    mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
    return mask


def folder_of(folder: Path) -> Path:
    """Images 0..3, white in the quadrant of their number, and masks of all quadrants."""
    for number in range(4):
        inside = quadrant(number)
        Image.fromarray(inside.astype(np.uint8) * 255).save(folder / f"i{number}.png")
        Image.fromarray(inside.astype(np.uint8)).save(folder / f"m{number}.png")
    return folder


def dataset(
    folder: Path, *values: Any, of: Conversations | None = None, **settings: Any
) -> ExampleDataset[Example]:
    source = SourceOptions(path=str(write_lines(folder_of(folder) / "a.jsonl", *values)))
    return ExampleDataset(Records([source], of or pipeline()), **settings)


def example_of(data: ExampleDataset[Example], index: int = 0) -> Example:
    example = data[index]
    assert example is not None
    return example


SMALL = np.zeros((4, 4), np.uint8)
THREE = record(
    "<image><image><image>?",
    "[SEG], [SEG] and none [SEG]",
    image=["i0.png", "i1.png", "i2.png"],
    masks=[
        {"file": "m2.png", "image": 2},
        [{"rle": rle.encode(quadrant(0)), "image": 0}, {"file": "m3.png", "image": 2}],
        None,
    ],
)
ONE = record("<image>?", "At [SEG].", image="i3.png", masks=["m3.png"])
NONE = record("<image>?", "No.", image="i1.png")


def quarter(number: int) -> np.ndarray:
    grid = SMALL.copy()
    row, column = divmod(number, 2)
    grid[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1
    return grid


def test_only_images_with_masks_are_prepared_for_the_head(tmp_path: Path) -> None:
    """Images 0 and 2 of three; the masks lie on a grid of 4 x 4, one cell for 2 x 2 pixels."""
    example = example_of(dataset(tmp_path, THREE))
    assert [array.shape for array in example.pixels["image"]] == [(3, 4, 4)] * 3
    assert [array.shape for array in example.pixels[VIEW]] == [(3, 8, 8)] * 2
    for array, number in zip(example.pixels[VIEW], (0, 2), strict=True):
        np.testing.assert_allclose(array[0], quadrant(number), atol=1e-6)
    masks = example.masks
    assert masks is not None
    assert (masks.tokens, masks.items) == ([0, 1, 1, 2], [1, 0, 1, 1])
    expected = [quarter(2), quarter(0), quarter(3), SMALL]
    np.testing.assert_array_equal(masks.arrays, expected)
    assert {array.dtype for array in masks.arrays} == {np.dtype(np.uint8)}


def test_without_a_head_or_for_a_prompt_no_mask_is_read(tmp_path: Path) -> None:
    gone = record("<image>?", "At [SEG].", image="i3.png", masks=["gone.png"])
    only = {"image": IMAGES["image"]}
    for made in (pipeline(only, view=None), pipeline(inference=True)):
        example = example_of(dataset(tmp_path, gone, of=made))
        assert example.pixels.keys() == {"image"}
        assert example.masks is None
    plain = example_of(dataset(tmp_path, NONE))
    assert plain.pixels.keys() == {"image"} and plain.masks is None


@pytest.mark.parametrize(
    ("masks", "field", "reason"),
    [
        (["gone.png"], "masks.0", "no such file"),
        ([{"file": "wide.png", "value": 1}], "masks.0", "3 x 5 voxels for an image of 8 x 8"),
        ([{"rle": {"size": [8, 8], "counts": [3]}}], "masks.0.rle.counts", "3 voxels in all"),
        ([[{"file": "m0.png"}, {"file": "wide.png", "volume": 0}]], "masks.0.1", "of a volume"),
    ],
)
def test_a_bad_mask_is_named_with_file_record_and_field(
    tmp_path: Path, masks: Any, field: str, reason: str
) -> None:
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(tmp_path / "wide.png")
    np.save(tmp_path / "v.npy", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    bad = record("<volume><image>?", "[SEG]", image="i0.png", volume="v.npy", masks=masks)
    views = IMAGES | {"volume": VolumePreprocess(scale="minmax", size=[2, 2, 2])}
    data = dataset(tmp_path, NONE, bad, of=pipeline(views))
    with pytest.raises(DataError, match=reason) as caught:
        data[1]
    assert (str(caught.value.file), caught.value.index) == (str(tmp_path / "a.jsonl"), 1)
    assert caught.value.field == field
    lenient = dataset(tmp_path, bad, of=pipeline(views), bad_records="skip")
    assert lenient[0] is None and lenient.counts["bad"] == 1


def test_a_structure_smaller_than_a_cell_stays(tmp_path: Path) -> None:
    """One pixel of 100 x 100 on a grid of 4 x 4; one outside of the crop is absent."""
    mask = np.zeros((100, 100), np.uint8)
    mask[70, 30] = 1
    Image.fromarray(mask).save(tmp_path / "m.png")
    sample = parse_record(record("<image>", "[SEG]", image="i.png", masks="m.png"))
    placement = Placement.of_source((100, 100)).resized((16, 16))
    view = MaskView(VIEW, (4, 4))
    (found,) = read_targets(sample, tmp_path, {0: placement}, view).arrays
    assert np.argwhere(found).tolist() == [[2, 1]]
    cropped = Placement.of_source((100, 100)).boxed((0, 0), (50, 50))
    (found,) = read_targets(sample, tmp_path, {0: cropped}, view).arrays
    assert not found.any()
    assert masked_media(sample, MaskView("volume@masks", (2, 2, 2))) == []


# Batches


def expected_numbers(batch: Mapping[str, Any], examples: list[Example]) -> None:
    """Each mask's [SEG] is the n-th of the batch by rows and positions; its image is white there."""
    places = np.argwhere(np.asarray(batch["input_ids"]) == CONTROL).tolist()
    count = Counter(map(len, [example.masks.arrays for example in examples if example.masks]))
    assert count[1] and count[4]
    assert len(set(batch["mask_tokens"].tolist())) == len(places)
    assert batch["mask_tokens"].tolist() == sorted(batch["mask_tokens"].tolist())
    assert batch["mask_targets"].shape == (len(batch["mask_tokens"]), 4, 4)


def test_a_padded_batch_of_mixed_counts(tmp_path: Path) -> None:
    """Of 0, 1 and 4 masks (3 [SEG]): numbers go on from one row to the next."""
    data = dataset(tmp_path, THREE, NONE, ONE, THREE)
    examples = [example_of(data, index) for index in range(4)]
    batch = Collator(PAD)(examples)
    expected_numbers(batch, examples)
    assert batch["mask_tokens"].tolist() == [0, 1, 1, 2, 3, 4, 5, 5, 6]
    assert batch["mask_items"].tolist() == [1, 0, 1, 1, 2, 4, 3, 4, 4]
    assert batch["pixels"][VIEW].shape == (5, 3, 8, 8)
    assert batch["pixels"]["image"].shape == (8, 3, 4, 4)
    for number, item in enumerate(batch["mask_items"].tolist()):
        assert batch["pixels"][VIEW][item].shape == (3, 8, 8), number
    np.testing.assert_array_equal(batch["mask_targets"][4], quarter(3))
    assert str(batch["mask_targets"].dtype) == "torch.uint8"
    # One by one, each example has the same masks.
    alone = [Collator(PAD)([example]) for example in examples]
    assert "mask_targets" not in alone[1] and VIEW not in alone[1]["pixels"]
    joined = np.concatenate([one["mask_targets"] for one in alone if "mask_targets" in one])
    np.testing.assert_array_equal(batch["mask_targets"], joined)
    without = Collator(PAD)([examples[1], None])
    assert not {"mask_targets", "mask_tokens", "mask_items"} & without.keys()


@pytest.mark.parametrize("padding_free", [False, True])
def test_packed_rows_number_the_masks_in_the_order_that_they_are_written(
    tmp_path: Path, padding_free: bool
) -> None:
    """Best fit moves the third example into the first row, in front of the second."""
    long = record("<image>" + "x" * 20, "At [SEG].", image="i1.png", masks=["m1.png"])
    data = dataset(tmp_path, THREE, long, ONE, NONE)
    examples = [example_of(data, index) for index in range(4)]
    lengths = [len(example.input_ids) for example in examples]
    capacity = lengths[0] + lengths[2]
    assert lengths[0] + lengths[1] > capacity >= lengths[1] + lengths[3]
    batch = PackingCollator(PAD, capacity, padding_free=padding_free)(examples)
    order = [0, 1, 2, 3] if padding_free else [0, 2, 1, 3]
    ids = np.asarray(batch["input_ids"])
    written = [token for index in order for token in examples[index].input_ids]
    assert [token for token in ids.ravel().tolist() if token == CONTROL] == [CONTROL] * 5
    assert [token for token in ids.ravel().tolist() if token != PAD] == written
    assert batch["mask_tokens"].tolist() == [0, 1, 1, 2, 3, 4]
    assert batch["mask_items"].tolist() == [1, 0, 1, 1, 2, 3]
    third, fourth = (1, 3) if padding_free else (3, 1)
    np.testing.assert_array_equal(batch["mask_targets"][4], quarter(third))
    np.testing.assert_array_equal(batch["mask_targets"][5], quarter(fourth))
    for number in (4, 5):
        image = batch["pixels"][VIEW][batch["mask_items"][number], 0]
        np.testing.assert_allclose(image[::2, ::2], batch["mask_targets"][number], atol=1e-6)


def test_truncation_keeps_the_masks(tmp_path: Path) -> None:
    long = record("<image>?", "At [SEG]. And more text", image="i3.png", masks=["m3.png"])
    whole = example_of(dataset(tmp_path, long))
    limit = LengthLimit(len(whole.input_ids) - 5, "truncate_text")
    cut = example_of(dataset(tmp_path, long, limit=limit))
    assert len(cut.input_ids) == len(whole.input_ids) - 5 and cut.masks is not None
    np.testing.assert_array_equal(cut.masks.arrays, [quarter(3)])


# Augmentation

MOVES: dict[str, Any] = {"rotate": 30.0, "scale": 0.2, "shift": 0.15, "mirror": True}


def blob(folder: Path, size: tuple[int, int]) -> np.ndarray:
    """An ellipse off the middle, as white image and as mask."""
    rows, columns = np.indices(size)
    inside = ((rows / size[0] - 0.42) / 0.2) ** 2 + ((columns / size[1] - 0.55) / 0.3) ** 2 < 1
    Image.fromarray(inside.astype(np.uint8) * 255).save(folder / "blob.png")
    Image.fromarray(inside.astype(np.uint8)).save(folder / "mask.png")
    return inside


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * (first & second).sum() / (first.sum() + second.sum())


@pytest.mark.parametrize("seed", range(6))
def test_masks_and_both_views_of_an_image_move_alike(tmp_path: Path, seed: int) -> None:
    """The language model's view is a crop of a wide image, the head's is squashed: the content
    that both show lies at the same place of the file."""
    blob(tmp_path, (60, 90))
    views: dict[str, Preprocess] = {
        "image": ImagePreprocess(size=[48, 48], fit="crop", **PLAIN),
        VIEW: ImagePreprocess(size=[64, 64], fit="squash", **PLAIN),
    }
    value = record("<image>", "[SEG]", image="blob.png", masks=["mask.png"])
    made = pipeline(views, grid=(32, 32))
    augmented = {"image": Augment(**MOVES), VIEW: Augment(brightness=0.05)}
    example = example_of(dataset(tmp_path, value, of=made, augmentation=augmented, seed=seed))
    plain = example_of(dataset(tmp_path, value, of=made))
    assert example.masks is not None and plain.masks is not None
    target = example.masks.arrays[0].astype(bool)
    assert dice(target, plain.masks.arrays[0].astype(bool)) < 0.97, "it moved"
    head = example.pixels[VIEW][0][0]
    assert dice(target, head[::2, ::2] > 0.5) > 0.93
    # Both views show one scene: the crop's pixels are found in the squashed view by their places
    # in the file.
    placed = [prepare(tmp_path / "blob.png", views[name]).placement for name in ("image", VIEW)]
    grid = np.indices((48, 48)).reshape(2, -1).T
    places = placed[1].points_to_prepared(placed[0].points_to_source(grid))
    cells = np.rint(places).astype(int).clip(0, 63)
    seen = head[cells[:, 0], cells[:, 1]].reshape(48, 48) > 0.5
    assert dice(seen, example.pixels["image"][0][0] > 0.5) > 0.93


def test_an_image_without_masks_is_augmented_as_ever(tmp_path: Path) -> None:
    """The random numbers of the language model's view do not depend on the head."""
    folder_of(tmp_path)
    augmentation = {"image": Augment(**MOVES, contrast=0.2)}
    with_head = example_of(dataset(tmp_path, THREE, augmentation=augmentation, seed=4))
    without = example_of(
        dataset(
            tmp_path,
            THREE,
            of=pipeline({"image": IMAGES["image"]}, view=None),
            augmentation=augmentation,
            seed=4,
        )
    )
    np.testing.assert_array_equal(with_head.pixels["image"], without.pixels["image"])


@pytest.mark.parametrize("name", MOVES)
def test_the_view_of_a_head_has_no_motion_of_its_own(tmp_path: Path, name: str) -> None:
    own = {VIEW: Augment.model_construct(**{name: MOVES[name]})}
    with pytest.raises(RecipeError, match=rf"data\.augment\.image@masks\.{name}: .*augment\.image"):
        dataset(tmp_path, ONE, augmentation=own)


# Caches

VOLUMES: dict[str, Preprocess] = {
    "volume": VolumePreprocess(windows=[[-900, 500]], size=[6, 6, 6], orientation="SPL"),
    "volume@masks": VolumePreprocess(
        windows=[[-900, 500]], size=[24, 26, 30], spacing=[1.2, 1.2, 1.2], orientation="SPL"
    ),
}


def scan(folder: Path) -> dict[str, Any]:
    inside = np.zeros((12, 14, 16), bool)
    inside[3:8, 4:11, 5:13] = True
    turn = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, -1.0]])
    geometry = Geometry(np.array([1.5, 2.0, 2.5]), turn[:, [2, 0, 1]], np.array([5.0, -3.0, 40.0]))
    write_nifti(folder / "v.nii", np.where(inside, 500, -900).astype(np.int16), geometry)
    write_nifti(folder / "m.nii", np.where(inside, 2, 0).astype(np.uint8), geometry)
    masks = [{"file": "m.nii", "value": 2}]
    return record("<volume>", "[SEG]", volume="v.nii", masks=masks)


def test_a_cached_volume_has_the_same_placement(tmp_path: Path) -> None:
    """Filled before training, read twice; with and without the cache the example is the same."""
    value = scan(tmp_path)
    made = pipeline(VOLUMES, view="volume@masks", grid=(24, 26, 30))
    load = loader(CacheOptions(dir=str(tmp_path / "cache"), branches=["volume"]))
    augmentation = {"volume": Augment(rotate=20.0)}
    for moves in (None, augmentation):
        plain = dataset(tmp_path, value, of=made, augmentation=moves, seed=1)
        cached: ExampleDataset[Example] = ExampleDataset(
            plain.records, load=load, prepare=load.prepare, augmentation=moves, seed=1
        )
        report = fill([cached.records], VOLUMES, load)
        assert (report.files, report.num_bad) == (2, 0)
        for _ in range(2):
            first, second = example_of(plain), example_of(cached)
            assert first.masks is not None and second.masks is not None
            for view in VOLUMES:
                np.testing.assert_array_equal(first.pixels[view], second.pixels[view])
            np.testing.assert_array_equal(first.masks.arrays, second.masks.arrays)
        target = first.masks.arrays[0].astype(bool)
        assert dice(target, first.pixels["volume@masks"][0][0] > 0.5) > 0.85
    assert len(list((tmp_path / "cache" / "arrays").rglob("*.npy"))) == 2


def test_a_cache_is_filled_for_the_head_with_files_that_have_masks(tmp_path: Path) -> None:
    value = scan(tmp_path)
    without = record("<volume>", "None.", volume="v.nii")
    load = loader(CacheOptions(dir=str(tmp_path / "cache"), branches=["volume"]))
    made = pipeline(VOLUMES, view="volume@masks", grid=(24, 26, 30))
    counts = [
        fill([dataset(tmp_path, entry, of=made).records], VOLUMES, load).files
        for entry in (without, value)
    ]
    assert counts == [1, 2]


def test_cached_features_of_the_language_models_view_go_beside_masks(tmp_path: Path) -> None:
    store = open_store(tmp_path / "features", "encoder")
    data = dataset(tmp_path, THREE, features={"image": store})
    for number in range(3):
        ((key, file),), _ = missing(store, [tmp_path / f"i{number}.png"])
        placement = prepare(file, IMAGES["image"]).placement
        features = np.full((1, 5, 2), number, np.float32)
        batches = [FeatureBatch([key], [placement], features)]
        store.add(batches, most=1, shape=(5, 2), dtype=np.dtype(np.float32))
    example = example_of(data)
    assert example.pixels.keys() == {VIEW} and len(example.features["image"]) == 3
    assert example.masks is not None
    batch = Collator(PAD)([example])
    assert batch["features"]["image"].shape == (3, 5, 2)
    assert batch["mask_targets"].shape == (4, 4, 4)


# Checks


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_a_check_counts_masks_and_absent_targets(tmp_path: Path, decode: bool, head: bool) -> None:
    empty = rle.encode(np.zeros((8, 8), bool))
    value = record(
        "<image>?",
        "[SEG][SEG][SEG][SEG]",
        image="i0.png",
        masks=["m0.png", {"file": "m1.png", "value": 7}, None, {"rle": empty}],
    )
    bad = record("<image>?", "[SEG]", image="i0.png", masks=[{"rle": rle.encode(np.ones((9, 9)))}])
    of = pipeline() if head else pipeline({"image": IMAGES["image"]}, view=None)
    data = dataset(tmp_path, value, ONE, NONE, bad, of=of)
    report = check(data.records.sources, of, decode=decode)
    assert [(error.index, error.field) for error in report.bad] == [(3, "masks.0.rle.size")]
    expected = {"image": 3, "mask": 5, "absent target": 2}
    assert dict(report.media) == expected | ({"missing label": 1} if decode else {})
    line = "2 absent targets, 3 images, 5 masks" + (", 1 missing label" if decode else "")
    assert any(line in text for text in report.lines())
    assert all(length > 0 for length in report.lengths[:3])
    files = check(data.records.sources, Conversations(), decode=decode)
    assert files.media["mask"] == 5 and files.num_bad == 1


def test_a_check_compares_volumes_by_their_headers_and_geometry(tmp_path: Path) -> None:
    value = scan(tmp_path)
    good = check(dataset(tmp_path, value).records.sources, Conversations(), decode=True)
    assert good.ok and good.media["mask"] == 1
    np.save(tmp_path / "m.npy", np.zeros((12, 14, 17), np.uint8))
    small = {**value, "masks": ["m.npy"]}
    report = check(dataset(tmp_path, small).records.sources, Conversations())
    assert [error.field for error in report.bad] == ["masks.0"]
    assert "12 x 14 x 17 for an image of 12 x 14 x 16" in report.bad[0].reason
    moved = Geometry(np.array([1.5, 2.0, 2.5]), np.eye(3), np.zeros(3))
    write_nifti(tmp_path / "m.nii", np.zeros((12, 14, 16), np.uint8), moved)
    sources = dataset(tmp_path, value).records.sources
    assert check(sources, Conversations()).ok, "the header alone"
    (error,) = check(sources, Conversations(), decode=True).bad
    assert error.field == "masks.0" and "Resample the label map" in error.reason
