"""One contract for every pipeline; and a pipeline of another package through dataset, check and
collator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from medm.data.base import Pipeline
from medm.data.cached import fill, loader
from medm.data.check import check, merged
from medm.data.conversations import Conversations
from medm.data.dataset import ExampleDataset
from medm.data.features import FeatureBatch, missing, open_store
from medm.data.limits import LengthLimit
from medm.data.options import CacheOptions, DataOptions, SourceOptions
from medm.data.pipelines import PIPELINES, pipeline_for
from medm.data.records import Records
from medm.errors import DataError, RecipeError, UnknownNameError
from medm.imaging import Augment, ImagePreprocess, VolumePreprocess, prepare
from medm.types import IGNORE_INDEX, Example
from tests.data.pairs import load, pair, pairs, processor
from tests.data.tiny import conversations, record, write_image, write_lines


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    with PIPELINES.temporary():
        yield


def source(folder: Path, *values: Any, **fields: Any) -> SourceOptions:
    for name, shade in (("a", 0), ("b", 255)):
        write_image(folder / f"{name}.png", shade)
    return SourceOptions(path=str(write_lines(folder / "p.jsonl", *values)), **fields)


# -- the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES.names())
def test_every_pipeline_reads_without_a_processor_and_refuses_what_is_no_record(name: str) -> None:
    pipeline = PIPELINES.get(name)()
    assert not pipeline.makes_examples
    with pytest.raises(ValueError, match="has no processor"):
        _ = pipeline.preprocess
    for value in (None, [], "text", 3, {}):
        with pytest.raises(DataError):
            pipeline.read(value, file=Path("a.json"), index=0)


def test_a_kind_of_model_names_its_pipeline() -> None:
    from medm.models.base import ModelKind
    from medm.models.lvlm.build import LVLM

    assert (ModelKind.pipeline, ModelKind.needs_mask) == ("conversations", True)
    assert isinstance(pipeline_for(LVLM()), Conversations) and not pipeline_for(LVLM()).needs_mask
    with pytest.raises(UnknownNameError, match=r"unknown data pipeline 'pears'.*conversations"):
        pipeline_for(SimpleNamespace(pipeline="pears", needs_mask=True))


def test_the_same_pipeline_for_a_processor() -> None:
    reading = Conversations(inference=True, needs_mask=False)
    bound = reading.with_processor(conversations().processor)
    assert bound.makes_examples and not reading.makes_examples
    assert (bound.inference, bound.needs_mask) == (True, False)


# -- masks -----------------------------------------------------------------------------------------

EXAMPLES = [Example([5, 6, 7], [-100, 6, 7]), Example([8, 9], [-100, 9])]


def test_a_training_batch_has_the_mask_unless_the_kind_needs_none() -> None:
    from medm.models.base import ModelKind
    from medm.models.lvlm.build import LVLM

    class SaysNothing(ModelKind):
        """A kind of another package; its abstract methods are not called."""

    processor = conversations().processor
    masked = pipeline_for(SaysNothing, processor).training_collator(DataOptions())(EXAMPLES)
    assert masked["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    without = pipeline_for(LVLM, processor).training_collator(DataOptions())(EXAMPLES)
    assert masked.keys() - without.keys() == {"attention_mask"}
    assert all(torch.equal(masked[key], without[key]) for key in without)


@pytest.mark.parametrize("needs_mask", [True, False])
def test_held_out_batches_always_have_the_mask(needs_mask: bool) -> None:
    batch = conversations(needs_mask=needs_mask).eval_collator()(EXAMPLES)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_packing_is_refused_where_a_mask_is_needed_and_where_a_pipeline_cannot_pack(
    tmp_path: Path,
) -> None:
    packed = DataOptions(packing=True)
    with pytest.raises(
        RecipeError,
        match=r"data\.packing: packed rows have position_ids in place of an attention_mask",
    ):
        conversations().check_options(packed)
    conversations(needs_mask=False).check_options(packed)
    for pipeline in (conversations(), conversations(needs_mask=False), pairs(tmp_path)):
        pipeline.check_options(DataOptions())
    with pytest.raises(RecipeError, match=r"data\.packing: Pairs puts one record in a row"):
        pairs(tmp_path).check_options(packed)


# -- a pipeline of another package -----------------------------------------------------------------


def test_a_check_of_pairs(tmp_path: Path) -> None:
    data = source(
        tmp_path,
        pair(id="1", task="ct"),
        pair("gone.png"),
        pair(caption=" "),
        pair("../a.png"),
        "text",
        pair("b.png", "Effusion.", id="1"),
    )
    pipeline = pairs(tmp_path)
    report = check([data], pipeline, preview=True)
    assert [(error.index, error.field) for error in report.bad] == [
        (1, "image"), (2, "caption"), (3, "image"), (4, None),
    ]  # fmt: skip
    assert all(str(error.file) == data.path for error in report.bad)
    assert report.lengths == [6, 0, 0, 0, 0, 9]
    lines = report.lines()
    assert "6 records, 4 bad; the good ones have 2 captions, 2 images, 0 text only" in lines
    assert lines[-1] == "  [x] 'Clear.'" and report.num_duplicate_ids == 1
    shards = [check([data], pipeline, preview=True, shard=(number, 2)) for number in range(2)]
    assert merged(shards).lines() == lines
    assert check([data], load(tmp_path)()).num_bad == 4  # files alone, without a model


def test_the_check_and_the_dataset_find_the_same_records_usable(tmp_path: Path) -> None:
    data = source(
        tmp_path,
        pair(),
        pair("gone.png"),
        pair(caption=""),
        pair(caption="long " * 9),
        pair("b.png"),
    )
    limit = LengthLimit(20, "skip")
    report = check([data], pairs(tmp_path), length_limit=limit)
    dataset = ExampleDataset(Records([data], pairs(tmp_path)), limit=limit, bad_records="skip")
    found = [dataset[index] for index in range(5)]
    assert (
        [0 if one is None else len(one.input_ids) for one in found]
        == report.lengths
        == [6, 0, 0, 0, 6]
    )
    assert dataset.counts == {"bad": 2, "too_long": 1, "truncated": 0}
    assert (report.num_bad, report.num_too_long) == (2, 1)


def test_each_pipeline_says_how_a_long_record_is_shortened(tmp_path: Path) -> None:
    data = source(tmp_path, pair(caption="abcdefgh"))
    records = Records([data], pairs(tmp_path))
    cut = ExampleDataset(records, limit=LengthLimit(3, "truncate_text"))[0]
    assert cut is not None and cut.input_ids == [ord(c) + 2 for c in "abc"]
    with pytest.raises(DataError, match=r"record 0: 8 tokens, but data\.max_length is 3; raise it"):
        ExampleDataset(records, limit=LengthLimit(3))[0]

    class Whole(type(records.pipeline)):  # type: ignore[misc]
        shorten = Pipeline.shorten

    whole = Records([data], Whole(processor()))
    with pytest.raises(
        DataError, match=r"record 0: 8 tokens, .* is 3, and records of this kind are never cut"
    ):
        ExampleDataset(whole, limit=LengthLimit(3, "truncate_text"))[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pairs_reach_the_model_in_batches(tmp_path: Path, num_workers: int) -> None:
    values = [pair("ab"[number % 2] + ".png", "x" * (number + 1)) for number in range(4)]
    data = source(tmp_path, *values, pair("gone.png"))
    pipeline = pairs(tmp_path)
    dataset = ExampleDataset(Records([data], pipeline), bad_records="skip")
    collate: Any = pipeline.training_collator(DataOptions())
    batches = list(DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=collate))
    assert [batch["attention_mask"].sum(1).tolist() for batch in batches] == [[1, 2], [3, 4], []]
    assert [batch["pixels"]["image"][:, 0, 0, 0].tolist() for batch in batches] == [
        [-1, 1],
        [-1, 1],
        [],
    ]
    assert batches[-1]["pixels"]["image"].shape == (0, 3, 4, 4)
    assert all("labels" not in batch for batch in batches)


def test_augmentation_caches_and_features_work_for_every_pipeline(tmp_path: Path) -> None:
    data = source(tmp_path, pair("grey.png"))
    Image.linear_gradient("L").save(tmp_path / "grey.png")
    records = Records([data], pairs(tmp_path))
    plain = ExampleDataset(records)[0]
    changed = ExampleDataset(records, augmentation={"image": Augment(brightness=0.5)}, seed=3)[0]
    assert plain is not None and changed is not None
    assert not np.array_equal(plain.pixels["image"][0], changed.pixels["image"][0])
    options = CacheOptions(dir=str(tmp_path / "cache"), branches=["image"])
    assert fill([records], dict(records.pipeline.preprocess), loader(options)).files == 1
    store = open_store(tmp_path / "features", "encoder")
    ((key, _),), _ = missing(store, [tmp_path / "grey.png"])
    array = np.full((1, 2, 3), 7, np.float32)
    placement = prepare(tmp_path / "grey.png", records.pipeline.preprocess["image"]).placement
    store.add(
        [FeatureBatch(keys=[key], placements=[placement], features=array)],
        most=1,
        shape=(2, 3),
        dtype=array.dtype,
    )
    kept = ExampleDataset(records, features={"image": store})[0]
    assert (
        kept is not None
        and not kept.pixels
        and kept.features["image"][0].tolist() == np.full((2, 3), 7).tolist()
    )
    batch = records.pipeline.training_collator(DataOptions())([kept])
    assert batch["features"]["image"].shape == (1, 2, 3) and "pixels" not in batch


def test_a_source_names_the_task_of_its_records(tmp_path: Path) -> None:
    data = source(tmp_path, pair(), pair(task="own"), task="ct")
    assert [sample.task for sample in Records([data], pairs(tmp_path))] == ["ct", "own"]


def test_labels_are_the_conversations_own_business(tmp_path: Path) -> None:
    """A conversation without a learned token is bad; one that is only a prompt is not."""
    silent = Example([5, 6], [IGNORE_INDEX] * 2)
    with pytest.raises(DataError, match="no token of this record is learned"):
        conversations().require_usable(silent)
    conversations(inference=True).require_usable(silent)
    data = source(tmp_path, record("q", "A"))
    (sample,) = Records([data], conversations())
    assert sample.turns[-1].text == "A"


# -- views -----------------------------------------------------------------------------------------

VIEWS = {
    "image": ImagePreprocess(size=[4, 4]),
    "image@sam2": ImagePreprocess(size=[8, 6], fit="pad"),
}


def test_every_view_of_a_kind_of_file_gets_its_pixels(tmp_path: Path) -> None:
    """One file, two preprocessings: in the dataset, the check, the cache that is filled, and a
    batch."""
    data = source(tmp_path, pair("a.png"), pair("b.png"), pair("gone.png"))
    pipeline = load(tmp_path)(processor(VIEWS))
    records = Records([data], pipeline)
    dataset = ExampleDataset(records, bad_records="skip")
    examples = [example for example in (dataset[0], dataset[1]) if example is not None]
    for example, name in zip(examples, ("a.png", "b.png"), strict=True):
        for view, preprocess in VIEWS.items():
            (pixels,) = example.pixels[view]
            np.testing.assert_array_equal(pixels, prepare(tmp_path / name, preprocess).pixels)
    batch = pipeline.training_collator(DataOptions())(examples)
    assert {view: tuple(pixels.shape) for view, pixels in batch["pixels"].items()} == {
        "image": (2, 3, 4, 4),
        "image@sam2": (2, 3, 8, 6),
    }
    for decode in (False, True):
        report = check([data], pipeline, decode=decode)
        assert report.num_bad == 1
        assert report.media == {"image": 2}
    filled = fill(
        [records], VIEWS, loader(CacheOptions(dir=str(tmp_path / "cache"), branches=["image"]))
    )
    assert (filled.files, filled.num_bad) == (4, 1)


def test_a_view_can_stand_alone_and_other_kinds_are_refused_by_kind(tmp_path: Path) -> None:
    alone = load(tmp_path)(processor({"image@sam2": VIEWS["image@sam2"]}))
    data = source(tmp_path, pair("a.png"))
    example = ExampleDataset(Records([data], alone))[0]
    assert example is not None and list(example.pixels) == ["image@sam2"]
    volumes = load(tmp_path)(
        processor({"volume": VolumePreprocess(), "volume@coarse": VolumePreprocess()})
    )
    with pytest.raises(
        DataError, match=r"record 0, field 'image': the model takes no images; it takes volumes$"
    ):
        ExampleDataset(Records([data], volumes))[0]


def test_augmentation_of_one_view_leaves_the_other(tmp_path: Path) -> None:
    data = source(tmp_path, pair("grey.png"))
    Image.linear_gradient("L").save(tmp_path / "grey.png")
    records = Records([data], load(tmp_path)(processor(VIEWS)))
    plain = ExampleDataset(records)[0]
    changed = ExampleDataset(records, augmentation={"image@sam2": Augment(brightness=0.5)}, seed=3)[
        0
    ]
    assert plain is not None and changed is not None
    np.testing.assert_array_equal(plain.pixels["image"][0], changed.pixels["image"][0])
    assert not np.array_equal(plain.pixels["image@sam2"][0], changed.pixels["image@sam2"][0])
