"""A cache is filled once: every file, whatever the order of the records; what is bad is named and
passed over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medm.data.cached import MediaLoader, fill, loader
from medm.data.conversations import Conversations
from medm.data.dataset import ExampleDataset
from medm.data.options import CacheOptions, DataOptions, SourceOptions
from medm.data.records import Records
from medm.data.volume_cache import MediaCache
from medm.imaging import ImagePreprocess, Preprocess, VolumePreprocess, prepare
from medm.imaging.placement import Prepared
from tests.data.tiny import conversations, record, write_image, write_json

PREPROCESS: dict[str, Preprocess] = {
    "image": ImagePreprocess(size=[4, 4]),
    "volume": VolumePreprocess(size=[2, 4, 4], scale="0-1", orientation=None),
}


@pytest.fixture
def source(tmp_path: Path) -> SourceOptions:
    """Two volumes of which one comes twice, an image, a broken volume and a broken record."""
    for name, shade in (("a", 0.25), ("b", 0.5)):
        np.save(
            tmp_path / f"{name}.npy",
            np.linspace(0, shade, 4 * 8 * 8, dtype=np.float32).reshape(4, 8, 8),
        )
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY not an array")
    write_image(tmp_path / "c.png")
    records = [
        record("<volume><volume>?", volume=["a.npy", "b.npy"]),
        record("<volume><image>?", volume="a.npy", image="c.png"),
        record("<volume>?", volume="broken.npy"),
        record("<volume>?", volume=[]),
    ]
    return SourceOptions(path=str(write_json(tmp_path / "data.json", records)))


@pytest.mark.parametrize("workers", [0, 1])
def test_every_file_is_prepared_once_and_bad_ones_are_named(
    source: SourceOptions, tmp_path: Path, workers: int
) -> None:
    load = loader(CacheOptions(dir=str(tmp_path / "cache")))
    seen: list[tuple[int, int]] = []
    volumes = {"volume": PREPROCESS["volume"]}
    filled = fill(
        [Records([source], Conversations())],
        volumes,
        load,
        workers=workers,
        progress=lambda *done: seen.append(done),
    )
    assert (filled.files, filled.num_bad) == (3, 2)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert MediaCache(tmp_path / "cache", 0).size()[0] == 2
    places = sorted((str(error.file), error.index, error.field) for error in filled.bad)
    assert places == [(source.path, 2, "volume"), (source.path, 3, "volume")]


def test_training_reads_the_cache_and_gets_the_same_numbers(
    source: SourceOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loader(CacheOptions(dir=str(tmp_path / "cache")))
    fill([Records([source], Conversations())], {"volume": PREPROCESS["volume"]}, load)
    read: list[str] = []

    def counted(path: Path, preprocess: Preprocess, *, device: str = "cpu") -> Prepared:
        read.append(path.name)
        return prepare(path, preprocess, device=device)

    monkeypatch.setattr("medm.data.cached.load_pixels", lambda *given: counted(*given).pixels)
    monkeypatch.setattr("medm.data.volume_cache.prepare", counted)
    dataset = ExampleDataset(Records([source], conversations(PREPROCESS)), load=load)
    plain = ExampleDataset(Records([source], conversations(PREPROCESS)))
    for index in (0, 1):
        cached, fresh = dataset[index], plain[index]
        assert cached is not None and fresh is not None
        for branch in fresh.pixels:
            for one, other in zip(cached.pixels[branch], fresh.pixels[branch], strict=True):
                np.testing.assert_array_equal(one, other)
    assert read == ["c.png"]  # images are not kept unless asked for


def test_images_are_kept_where_the_recipe_says_so(source: SourceOptions, tmp_path: Path) -> None:
    options = CacheOptions(dir=str(tmp_path / "cache"), branches=["image", "volume"])
    fill([Records([source], Conversations())], PREPROCESS, loader(options))
    assert MediaCache(tmp_path / "cache", 0).size()[0] == 3


def test_the_cache_is_off_unless_it_is_named() -> None:
    assert DataOptions().cache is None
    assert loader(None) == MediaLoader(cache=None)
