"""Mutated caches and tar shards: the same numbers as without the damage, or a message."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from campaign.harness import Part, WrongResultError
from campaign.mutate import Target, mutation_cases, prepare
from medm.data.features import open_store
from medm.data.options import SourceOptions
from medm.data.shard_writing import write_shards
from medm.data.shards import ShardFile
from medm.data.volume_cache import MediaCache
from medm.imaging import VolumePreprocess, load_pixels
from tests.data.test_features import fill
from tests.data.test_features import write as write_files
from tests.data.tiny import write_image, write_lines
from tests.imaging.tiny import phantom

PREPROCESS = VolumePreprocess(size=[4, 6, 8])
FILES = {"a": "x", "b": "xy", "c": "xyz"}


def features(kind: str) -> Callable[[Path], Path]:
    """Return a maker of a store of features; the file is its shard or its index."""

    def make(folder: Path) -> Path:
        files = write_files(folder, **FILES)
        store = open_store(folder / "cache", "encoder")
        fill(store, list(files.values()))
        [file] = store.folder.glob(f"*.{kind}")
        return file

    return make


def read_features(file: Path) -> None:
    """What a run does at its start: damaged shards are computed again."""
    folder = next(one.parent for one in file.parents if one.name == "cache")
    store = open_store(folder, "encoder")
    files = [folder / name for name in FILES]
    store.verify([store.key(one) for one in files])
    wanted = [one for one in files if store.get(one) is None]
    if wanted:
        fill(store, wanted)
    for one in files:
        found, length = store.get(one), len(one.read_text())
        if found is None or not np.array_equal(found, np.full((2, 3), length)):
            raise WrongResultError(f"other features of {one.name}: {found}")
    if wanted:  # the next mutation starts from the whole shard
        for made in store.folder.iterdir():
            if not made.name.startswith(file.stem):
                made.unlink()
        _restore(store.folder)


def _restore(folder: Path) -> None:
    """Write back a sibling that was removed with the damaged file."""
    for kept in folder.glob("*.sibling"):
        kept.with_suffix("").write_bytes(kept.read_bytes())


def features_with_sibling(kind: str) -> Callable[[Path], Path]:
    """As `features`; keeps a copy of the other file of the shard, which medm removes with it."""

    def make(folder: Path) -> Path:
        file = features(kind)(folder)
        for other in list(file.parent.iterdir()):
            if other != file:
                other.with_name(f"{other.name}.sibling").write_bytes(other.read_bytes())
        return file

    return make


def volume_cache(pattern: str) -> Callable[[Path], Path]:
    """Return a maker of a cached volume; the file is its entry or its line in the index."""

    def make(folder: Path) -> Path:
        sitk.WriteImage(phantom(), str(folder / "a.nii.gz"))
        cache = MediaCache(folder / "cache", max_bytes=10**7)
        np.save(folder / "expected.npy", cache.load(folder / "a.nii.gz", PREPROCESS))
        [file] = [one for one in (folder / "cache").glob(pattern) if one.is_file()]
        return file

    return make


def read_volume_cache(file: Path) -> None:
    folder = next(one.parent for one in file.parents if one.name == "cache")
    cache = MediaCache(folder / "cache", max_bytes=10**7)
    for pixels in (
        cache.load(folder / "a.nii.gz", PREPROCESS),
        cache.prepare(folder / "a.nii.gz", PREPROCESS).pixels,
        load_pixels(folder / "a.nii.gz", PREPROCESS),
    ):
        if not np.array_equal(pixels, np.load(folder / "expected.npy")):
            raise WrongResultError("other pixels than the file's")


def shards(name: str) -> Callable[[Path], Path]:
    """Return a maker of two tar shards with manifest and index; the file is one of them."""

    def make(folder: Path) -> Path:
        for number in range(3):
            write_image(folder / f"{number}.png", shade=number)
        lines = [
            {"image": f"{n}.png", "captions": [f"caption {n}"], "id": f"p{n}"} for n in range(3)
        ]
        source = SourceOptions(path=str(write_lines(folder / "in.jsonl", *lines)), root=str(folder))
        manifest = folder / "a.shards.json"
        write_shards(manifest, [source], samples=2)
        expected = [_content(ShardFile(manifest), index) for index in range(3)]
        (folder / "expected.json").write_text(json.dumps(expected))
        return sorted(folder.glob(name))[0]

    return make


def _content(file: ShardFile, index: int) -> list[object]:
    record = file[index]
    if not isinstance(record, dict):
        raise WrongResultError("a record that is no object")
    with file.open_media(index, record["image"]) as stream:
        return [record, stream.read().hex()]


def read_shards(file: Path) -> None:
    """Read all samples; where the checksums fit, they are those that were written."""
    manifest = file.parent / "a.shards.json"
    opened = ShardFile(manifest)
    damage = next(iter(opened.verify()), None)
    expected = json.loads((file.parent / "expected.json").read_text())
    found = [_content(opened, index) for index in range(len(opened))]
    if damage is not None:
        raise damage
    if found != expected:
        raise WrongResultError("other samples, and no damage was found")


TARGETS = [
    Target("feature shard", features_with_sibling("npy"), read_features),
    Target("feature index", features_with_sibling("json"), read_features, text=True),
    Target("volume cache entry", volume_cache("arrays/*/*.npy"), read_volume_cache),
    Target("volume cache index", volume_cache("index/*/*"), read_volume_cache),
    Target("tar shard", shards("*.tar"), read_shards),
    Target("tar manifest", shards("a.shards.json"), read_shards, text=True),
    Target("tar index", shards("*.npy"), read_shards),
]
PART = Part(
    "caches",
    "Mutated caches and tar shards",
    partial(prepare, TARGETS),
    partial(mutation_cases, TARGETS),
    2000,
)
