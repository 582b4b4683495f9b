"""Blocks of CT: what is asked is where they were cut, left is the patient's left, and medm reads
what is written."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from medm.data.conversations import Conversations
from medm.data.options import SourceOptions
from medm.data.records import Records
from medm.imaging import load_pixels
from medm.imaging.options import VolumePreprocess
from medm.training.recipe import load_recipe
from tests.examples.scripts import scripts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def blocks():
    with scripts("quickstart_3d", "quickstart"):
        yield importlib.import_module("blocks")


@pytest.fixture
def scan(blocks):
    """24 slices of a body that is 40 columns wide; the patient's left half is 100 HU, the right 50
    HU."""
    prepare = sys.modules["prepare"]
    voxels = np.full((24, 30, 60), -1024)
    voxels[:, 5:25, 10:30] = 50
    voxels[:, 5:25, 30:50] = 100
    about = blocks.read_table()["chest-ct-1"].model_copy(
        update={"level": [0, 23], "lesion": False, "lungs": False}
    )
    return prepare.Scan("chest-ct-1", about, voxels, np.array([5.0, 2.0, 1.0]), None, None)


def test_midline_halves_the_body(blocks, scan):
    assert blocks.midline(scan.voxels) in (29, 30)


def test_halves_hold_their_side(blocks, scan):
    random = np.random.default_rng(0)
    for side, value, other in (("left", 100, 50), ("right", 50, 100)):
        for _ in range(10):
            block = blocks.half(scan, side, random)
            voxels = scan.voxels[tuple(slice(*bounds) for bounds in block.box)]
            assert block.answers == {"region": "chest", "side": side}
            assert (voxels == value).sum() > 5 * (voxels == other).sum()


def test_slabs_lie_in_their_third(blocks, scan):
    random = np.random.default_rng(0)
    for number in range(12):
        block = blocks.slab(scan, number, random)
        start, stop = block.box[0]
        centre = (start + stop) / 2 / 24
        assert block.answers["level"] == ("lower", "middle", "upper")[int(centre * 3)]
        assert stop - start == 8


def test_written_block_is_read_by_medm_with_left_where_it_was(blocks, scan, tmp_path):
    block = blocks.Block(((0, 24), (0, 30), (0, 60)), {})
    blocks.save(scan, block, tmp_path / "block.nii.gz")
    preprocess = VolumePreprocess(size=[24, 30, 60], orientation="SPL", windows=[[-1024, 1024]])
    read = load_pixels(tmp_path / "block.nii.gz", preprocess)[0] * 2048 - 1024
    assert read.shape == (24, 30, 60)
    assert np.abs(read - scan.voxels).max() < 1


def test_padding_of_the_atlas_becomes_air(blocks, scan, tmp_path):
    prepare = sys.modules["prepare"]
    voxels = np.zeros((4, 4, 4))
    voxels[1] = 35
    atlas = prepare.Scan("head-ct-atlas", scan.about, voxels, np.ones(3), None, None)
    saved = blocks.save(atlas, blocks.Block(((0, 4), (0, 4), (0, 4)), {}), tmp_path / "x.nii.gz")
    assert set(np.unique(saved)) == {-1024, 35}


def test_records_fit_the_recipe_and_are_split_by_volume(blocks, tmp_path, monkeypatch, capsys):
    prepare, volumes = sys.modules["prepare"], sys.modules["volumes"]
    monkeypatch.setattr(prepare, "ASSETS", Path("/nowhere"))
    for name in ("SLABS", "HALVES"):
        monkeypatch.setattr(blocks, name, 3)
    folder = tmp_path / "data"
    assert blocks.main([str(folder)]) == 0
    table, sides = volumes.read_table(), {}
    for name, inference in (("finetune", False), ("test", True)):
        records = Records(
            [SourceOptions(path=str(folder / f"{name}.json"), root=str(folder / "volumes"))],
            Conversations(inference=inference),
        )
        for index in range(len(records)):
            sample = records[index]
            assert records.media_path(index, sample.media[0]).is_file()
            assert sample.media[0].branch == "volume"
            about = table[sample.extra["source_volume"]]
            assert about.modality == "CT" and about.split == ("test" if inference else "train")
            sides.setdefault(name, set()).add(sample.extra["source_volume"])
    assert sides["finetune"] == {"chest-ct-1", "chest-ct-3", "abdomen-ct-1", "head-ct-atlas"}
    assert sides["test"] == {"chest-ct-2", "abdomen-ct-2"}
    about = json.loads((folder / "about.json").read_text())
    for record in json.loads((folder / "test.json").read_text()):
        assert record["answer"] in about["questions"][record["question_type"]][1]
        assert (folder / "images" / record["picture"]).is_file()
    capsys.readouterr()
    assert blocks.main([str(folder)]) == 0
    assert "here already" in capsys.readouterr().out

    recipe = load_recipe(ROOT / "recipes" / "quickstart-3d" / "finetune.yaml")
    (source,) = recipe.data.train
    assert (
        Path(source.path).parent == Path(source.root).parent == Path("work_dirs/quickstart_3d/data")
    )
