"""Masks of generated replies: states by one pass, images encoded once, masks on the file's grid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from medm.errors import MediaError, RecipeError
from medm.imaging import load_pixels, prepare
from medm.imaging.volumes import read_volume
from medm.inference.generator import Engine, Request
from medm.inference.options import SegmentationOptions
from medm.inference.segmenter import Answered, Segmenter, Shown
from medm.inference.volume_modes import SlicedVolumes, choose, conditioning, open_slices
from medm.types import Media, Sample, Turn
from tests.heads.tiny import TINY_MEMORY, TINY_SAM2
from tests.inference.grounded import build_grounded, ids_of, request
from tests.inference.tiny import build_tiny
from tests.models import plain_head

VIEW = "image@masks"


@pytest.fixture(scope="module")
def grounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    with plain_head.registered():
        yield build_grounded(tmp_path_factory.mktemp("grounded"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Wider than high, and of another size than the head's input."""
    pixels = np.random.default_rng(3).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def answered(processor: Any, reply: str, image: Any = None, **shown: Any) -> Answered:
    media = () if image is None else (Shown("image", image),)
    return Answered(
        request(processor, shown.pop("text", "Where?"), **shown), ids_of(processor, reply), media
    )


def test_a_batch_of_mixed_counts_equals_one_by_one(grounded: tuple[Any, Any], image: Path) -> None:
    model, processor = grounded
    segmenter = Segmenter(Engine(model, processor))
    replies = ["Nothing.", "It is [SEG]", "<p>a</p>[SEG] <p>b</p>[SEG], c [SEG].", "x" * 40]
    batch = [
        answered(processor, reply, image, text="Where?" * (index + 1), seed=index)
        for index, reply in enumerate(replies)
    ]
    together = segmenter.prompts(batch)
    assert [len(one) for one in together] == [0, 1, 3, 0]
    for one, states in zip(batch, together, strict=True):
        torch.testing.assert_close(segmenter.prompts([one])[0], states, atol=1e-5, rtol=1e-4)
    found = segmenter.segment(batch)
    assert [len(one.masks) for one in found] == [0, 1, 3, 0]
    assert [mask.phrase.text for mask in found[2].masks] == ["a", "b", "a b, c."]
    for one, masks in zip(batch, found, strict=True):
        (alone,) = Segmenter(Engine(model, processor)).segment([one])
        for a, b in zip(masks.masks, alone.masks, strict=True):
            assert (a.mask == b.mask).all()
            assert a.mask.shape == (20, 30)
            assert a.quality == pytest.approx(b.quality, abs=1e-5)


def test_states_are_those_of_the_training_forward(grounded: tuple[Any, Any], image: Path) -> None:
    """Also of a token at the very end, which has no next step of generation."""
    model, processor = grounded
    one = answered(processor, "<p>a</p>[SEG] and [SEG]", image, seed=4)
    (states,) = Segmenter(Engine(model, processor)).prompts([one])
    ids = torch.from_numpy(np.concatenate([one.request.input_ids, one.reply]))[None]
    labels = ids.clone()
    pixels = {"image": one.request.items["image"][0].pixels[None]}
    prepared = prepare(image, processor.preprocess[VIEW])
    out = model(
        ids,
        pixels={**pixels, VIEW: torch.from_numpy(prepared.pixels)[None]},
        labels=labels,
        mask_tokens=torch.tensor([0, 1]),
        mask_items=torch.tensor([0, 0]),
    )
    logits = model.masks.head(
        torch.from_numpy(prepared.pixels)[None], states, torch.tensor([0, 0])
    ).logits
    torch.testing.assert_close(logits, out.mask_logits, atol=1e-4, rtol=1e-4)


def test_only_tokens_of_the_reply_count(grounded: tuple[Any, Any], image: Path) -> None:
    """Earlier turns hold tokens, and a user types the letters."""
    model, processor = grounded
    segmenter = Segmenter(Engine(model, processor))
    plain = answered(processor, "It is [SEG]", image)
    seg = processor.control_token_ids["[SEG]"]
    earlier = Answered(
        Request(
            np.concatenate([plain.request.input_ids, [seg, 5, seg, 7]]), dict(plain.request.items)
        ),
        plain.reply,
        plain.media,
    )
    found = segmenter.prompts([plain, earlier])
    assert [len(one) for one in found] == [1, 1]
    whole = torch.from_numpy(np.concatenate([earlier.request.input_ids, earlier.reply]))[None]
    features = {"image": plain.request.items["image"][0].pixels[None]}
    states = model.mask_prompts(whole, pixels=features)
    assert len(states) == 3
    torch.testing.assert_close(found[1][0], states[2], atol=1e-5, rtol=1e-4)

    typed = answered(processor, "No.", image, text="Write [SEG] and [SEG]")
    assert seg not in typed.request.input_ids
    assert segmenter.segment([typed])[0].masks == ()


def test_the_mask_is_the_head_on_the_grid_of_the_file(
    grounded: tuple[Any, Any], image: Path
) -> None:
    model, processor = grounded
    segmenter = Segmenter(Engine(model, processor), soft=True)
    one = answered(processor, "[SEG][SEG]", image)
    (prompts,) = segmenter.prompts([one])
    (found,) = segmenter.segment([one])
    pixels = torch.from_numpy(load_pixels(image, processor.preprocess[VIEW]))[None]
    logits, quality, presence = model.masks.head(pixels, prompts, torch.tensor([0, 0]))
    expected = torch.nn.functional.interpolate(logits[:, None], (20, 30), mode="bilinear")[:, 0]
    for number, mask in enumerate(found.masks):
        assert mask.probabilities is not None
        np.testing.assert_allclose(mask.probabilities, expected[number].sigmoid(), atol=1e-4)
        assert (mask.mask == (mask.probabilities > 0.5)).all()
        assert mask.quality == pytest.approx(float(quality[number]), abs=1e-5)
        assert mask.presence == pytest.approx(float(presence[number].sigmoid()), abs=1e-5)
        assert mask.voxels == mask.mask.sum() > 0


def test_an_image_is_encoded_once(grounded: tuple[Any, Any], image: Path) -> None:
    model, processor = grounded
    segmenter = Segmenter(Engine(model, processor))
    before = model.masks.head.encoded
    batch = [answered(processor, "[SEG][SEG][SEG]", image), answered(processor, "[SEG]", image)]
    segmenter.segment(batch)
    segmenter.segment(batch)
    assert model.masks.head.encoded - before == 1


def test_absent_targets_are_empty_and_said_so(grounded: tuple[Any, Any], image: Path) -> None:
    model, processor = grounded
    one = answered(processor, "[SEG]", image)
    (plain,) = Segmenter(Engine(model, processor)).segment([one])
    presence = plain.masks[0].presence
    assert 0.01 < presence < 0.99
    assert plain.masks[0].voxels > 0
    for threshold, absent in ((presence - 0.01, False), (presence + 0.01, True)):
        options = SegmentationOptions(presence_threshold=threshold)
        (found,) = Segmenter(Engine(model, processor), options, soft=True).segment([one])
        assert found.masks[0].absent is absent
        assert (found.masks[0].voxels == 0) is absent
        assert found.masks[0].presence == pytest.approx(presence)


def test_replies_whose_masks_have_no_image(grounded: tuple[Any, Any]) -> None:
    model, processor = grounded
    (found,) = Segmenter(Engine(model, processor)).segment(
        [answered(processor, "It is [SEG].", images=0)]
    )
    assert found.masks == ()
    assert found.without_image == 1
    assert found.text.text == "It is."


def test_the_last_image_of_several(grounded: tuple[Any, Any], image: Path) -> None:
    model, processor = grounded
    other = np.full((9, 7), 3, np.uint8)
    one = Answered(
        request(processor, "Where?", images=2),
        ids_of(processor, "[SEG]"),
        (Shown("image", image), Shown("image", other)),
    )
    (found,) = Segmenter(Engine(model, processor)).segment([one])
    assert found.masks[0].media == 1
    assert found.masks[0].mask.shape == (9, 7)
    with pytest.raises(MediaError, match=r"missing\.png"):
        Segmenter(Engine(model, processor)).segment(
            [answered(processor, "[SEG]", image.with_name("missing.png"))]
        )


def test_models_without_masks_are_refused(tmp_path: Path) -> None:
    model, processor = build_tiny(tmp_path)
    with pytest.raises(RecipeError, match="no mask head"):
        Segmenter(Engine(model, processor))


# Volumes.


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """An oblique, anisotropic CT whose slices run from head to feet."""
    rng = np.random.default_rng(5)
    voxels = rng.integers(-900, 900, (6, 12, 10)).astype(np.int16)
    file = sitk.GetImageFromArray(voxels)
    turn, tilt = np.deg2rad(12), np.deg2rad(9)
    about_z = np.array(
        [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    )
    about_x = np.array(
        [[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]]
    )
    direction = about_z @ about_x @ np.diag([1.0, -1.0, -1.0])
    file.SetDirection(direction.ravel().tolist())
    file.SetSpacing((0.8, 0.9, 4.0))
    file.SetOrigin((12.0, -30.0, 55.0))
    sitk.WriteImage(file, str(tmp_path / "ct.nii.gz"))
    return tmp_path / "ct.nii.gz"


def test_slices_are_axial_and_windowed(volume: Path, grounded: tuple[Any, Any]) -> None:
    _, processor = grounded
    options = SegmentationOptions(slice_window="-100,200")
    stack = open_slices(volume, options, processor.preprocess[VIEW])
    voxels = read_volume(volume).voxels  # (slices, rows, columns) of the file
    expected = np.round(((voxels.astype(float) + 100) / 300).clip(0, 1) * 255)
    assert stack.pixels.dtype == np.uint8
    back = stack.placement.to_source(stack.pixels)
    assert (back == expected).all()
    assert not (stack.pixels == expected).all()  # the file runs from head to feet
    own = open_slices(voxels, SegmentationOptions(), processor.preprocess[VIEW])
    assert (own.pixels.min(), own.pixels.max()) == (0, 255)  # the range of the volume
    assert SegmentationOptions(slice_window=[-100, 200]).window == (-100, 200)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["200,-100", "1", "a,b", "0,inf"])
def test_windows_that_are_none(given: str) -> None:
    with pytest.raises(ValueError, match="two rising numbers"):
        SegmentationOptions(slice_window=given)


def test_the_choice_of_slices() -> None:
    assert choose(3, 10, "first") == [0, 1, 2]
    assert choose(3, 10, "uniform") == [1, 5, 8]
    assert choose(5, 2, "uniform") == [0, 1]
    assert choose(1, 7, "score") == [3]


def test_a_volume_is_shown_as_slices(volume: Path, grounded: tuple[Any, Any]) -> None:
    _, processor = grounded
    options = SegmentationOptions(slices=2, slice_choice="first")
    sliced = SlicedVolumes(processor, options)
    sample = Sample((Turn("user", (Media("volume", "ct.nii.gz"), "\nWhere?")),))
    assert sliced.needed(sample)
    assert not sliced.needed(Sample((Turn("user", (Media("image", "a.png"), "?")),)))
    example = sliced.example(sample, [volume])
    stack = open_slices(volume, options, processor.preprocess["image"])
    expected = [load_pixels(stack.pixels[index], processor.preprocess["image"]) for index in (0, 1)]
    assert len(example.pixels["image"]) == 2
    for found, own in zip(example.pixels["image"], expected, strict=True):
        assert (found == own).all()
    runs = (np.array(example.input_ids) == processor.placeholder_ids["image"]).sum()
    assert runs == 2 * processor.num_tokens["image"]


def sliced_answer(
    grounded: tuple[Any, Any], volume: Path, options: SegmentationOptions
) -> Answered:
    _, processor = grounded
    sample = Sample((Turn("user", (Media("volume", "ct.nii.gz"), "\nWhere?")),))
    example = SlicedVolumes(processor, options).example(sample, [volume])
    return Answered(
        Request.of(example),
        ids_of(processor, "<p>mass</p>[SEG] [SEG]"),
        (Shown("volume", volume),),
    )


def test_slices_are_segmented_one_by_one(volume: Path, grounded: tuple[Any, Any]) -> None:
    model, processor = grounded
    options = SegmentationOptions(slices=2)
    segmenter = Segmenter(Engine(model, processor), options, soft=True)
    one = sliced_answer(grounded, volume, options)
    (prompts,) = segmenter.prompts([one])
    (found,) = segmenter.segment([one])
    stack = open_slices(volume, options, processor.preprocess[VIEW])
    for number, mask in enumerate(found.masks):
        assert mask.kind == "volume"
        assert mask.mask.shape == (6, 12, 10)
        by_hand = []
        for pixels in stack.pixels:  # each slice as an image
            prepared = prepare(pixels, processor.preprocess[VIEW])
            logits = model.masks.head(
                torch.from_numpy(prepared.pixels)[None], prompts, torch.tensor([0, 0])
            ).logits[number]
            by_hand.append(
                torch.nn.functional.interpolate(logits[None, None], (12, 10), mode="bilinear")[0, 0]
            )
        expected = torch.stack(by_hand).sigmoid().numpy()
        assert mask.probabilities is not None
        back = stack.placement.to_source(expected)  # axes flipped, no voxel resampled
        np.testing.assert_allclose(mask.probabilities, back, atol=1e-4)
        assert mask.placement.source_shape == (6, 12, 10)
        geometry, own = mask.placement.geometry, read_volume(volume).geometry
        assert geometry is not None
        assert own is not None
        np.testing.assert_allclose(geometry.steps, own.steps)
        np.testing.assert_allclose(geometry.origin, own.origin)
    assert found.masks[0].phrase.text == "mass"


def test_images_of_a_record_as_slices(grounded: tuple[Any, Any]) -> None:
    model, processor = grounded
    arrays = np.random.default_rng(8).integers(0, 256, (4, 12, 10), np.uint8)
    content: list[Any] = [part for _ in arrays for part in (Media("image"), "\n")]
    sample = Sample((Turn("user", (*content, "Where?")),))
    options = SegmentationOptions(volume_mode="slices", slices=2, slice_choice="first")
    sliced = SlicedVolumes(processor, options)
    assert sliced.needed(sample)
    assert not SlicedVolumes(processor, SegmentationOptions(slices=2)).needed(sample)
    example = sliced.example(sample, list(arrays))
    same = Sample((Turn("user", (*content[:4], "Where?")),))
    pixels = [load_pixels(array, processor.preprocess["image"]) for array in arrays[:2]]
    expected = processor.encode(same, {"image": pixels}, generation=True)
    assert example.input_ids == expected.input_ids
    assert len(example.pixels["image"]) == 2
    one = Answered(
        Request.of(example),
        ids_of(processor, "[SEG][SEG]"),
        [Shown("image", array) for array in arrays],
    )
    (found,) = Segmenter(Engine(model, processor), options).segment([one])
    assert [(mask.token, mask.media) for mask in found.masks] == [
        (token, image) for token in range(2) for image in range(4)
    ]
    single = Answered(one.request, one.reply, one.media[:3])  # the third alone is the last one
    (alone,) = Segmenter(Engine(model, processor)).segment([single])
    assert (alone.masks[1].mask == found.masks[6].mask).all()


def test_slices_without_the_target_are_empty(volume: Path, grounded: tuple[Any, Any]) -> None:
    model, processor = grounded
    one = sliced_answer(grounded, volume, SegmentationOptions())
    (plain,) = Segmenter(Engine(model, processor)).segment([one])
    best = plain.masks[0].presence
    options = SegmentationOptions(presence_threshold=best - 1e-4)  # that of one slice
    (found,) = Segmenter(Engine(model, processor), options).segment([one])
    slices = [found.masks[0].mask[index].any() for index in range(6)]
    assert sum(slices) == 1
    shown = slices.index(True)
    assert (found.masks[0].mask[shown] == plain.masks[0].mask[shown]).all()
    assert not found.masks[0].absent
    options = SegmentationOptions(presence_threshold=best + 1e-4)
    (found,) = Segmenter(Engine(model, processor), options).segment([one])
    assert found.masks[0].absent
    assert found.masks[0].voxels == 0


def test_targets_are_followed_by_memory(
    volume: Path, tmp_path: Path, grounded: tuple[Any, Any]
) -> None:
    sizes = TINY_SAM2 | TINY_MEMORY
    model, processor = build_grounded(
        tmp_path, head={"name": "sam2", "memory": True, "architecture": sizes}
    )
    own = SegmentationOptions(volume_mode="memory", slices=2, slice_choice="first")
    segmenter = Segmenter(Engine(model, processor), own, soft=True)
    one = sliced_answer((model, processor), volume, own)
    (prompts,) = segmenter.prompts([one])
    (found,) = segmenter.segment([one])
    stack = open_slices(volume, own, processor.preprocess[VIEW])
    prepared = [stack.prepared(index, processor.preprocess[VIEW]) for index in range(6)]
    pixels = torch.from_numpy(np.stack([each.pixels for each in prepared]))
    with torch.no_grad():
        maps = model.masks.head.encode(pixels)
        logits, _ = model.masks.head.memory().propagate(
            lambda index: tuple(level[index : index + 1] for level in maps),
            6,
            [{0: prompts[1], 1: prompts[1]}],
        )
    whole = torch.nn.functional.interpolate(logits, (12, 10), mode="bilinear")[:, 0]
    expected = stack.placement.to_source(whole.sigmoid().numpy())
    assert found.masks[1].probabilities is not None
    np.testing.assert_allclose(found.masks[1].probabilities, expected, atol=1e-4)
    assert found.masks[1].mask.shape == (6, 12, 10)

    trust = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.0, 0.3])
    for choice, slices in (("first", [0, 1]), ("uniform", [1, 4]), ("score", [1, 3])):
        chosen = SegmentationOptions.model_validate({"slices": 2, "slice_choice": choice})
        assert conditioning(chosen, trust) == slices
    by_score = own.model_copy(update={"slice_choice": "score"})
    (scored,) = Segmenter(Engine(model, processor), by_score).segment([one])
    assert scored.masks[0].mask.shape == (6, 12, 10)
    with pytest.raises(RecipeError, match="PlainHead has no memory"):
        Segmenter(Engine(*grounded), own)


def test_a_head_of_volumes_reads_the_volume_itself(
    volume: Path, tmp_path: Path, grounded: tuple[Any, Any]
) -> None:
    model, processor = build_grounded(
        tmp_path,
        view="volume",
        head={"name": plain_head.NAME, "architecture": {"axes": 3}},
        preprocess={"scale": "hu", "orientation": "SPL", "oblique": "keep"},
    )
    options = SegmentationOptions(volume_mode="volume")
    segmenter = Segmenter(Engine(model, processor), options)
    one = sliced_answer((model, processor), volume, options)  # the language model reads slices
    (found,) = segmenter.segment([one])
    assert found.masks[0].mask.shape == (6, 12, 10)
    prepared = prepare(volume, processor.preprocess["volume@masks"])
    (prompts,) = segmenter.prompts([one])
    logits = model.masks.head(
        torch.from_numpy(prepared.pixels)[None], prompts, torch.tensor([0, 0])
    ).logits[0]
    grid = prepared.placement.resized(tuple(logits.shape))
    expected = grid.to_source(logits.numpy(), interpolation="linear", fill=-1) > 0
    assert (found.masks[0].mask == expected).all()
    with pytest.raises(RecipeError, match=r"volume_mode: 'slices'.*reads volumes"):
        Segmenter(Engine(model, processor), SegmentationOptions(volume_mode="slices"))
    with pytest.raises(RecipeError, match=r"volume_mode: 'volume'.*reads images"):
        Segmenter(Engine(*grounded), options)
