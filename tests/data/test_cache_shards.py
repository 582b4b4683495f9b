"""A cache that tasks of a job array fill: kills, failures, and one manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medm.data import cache_shards
from medm.data.cache_shards import fill_shard, merge_shards
from medm.data.cached import FillReport, fill, loader
from medm.data.conversations import Conversations
from medm.data.options import CacheOptions, SourceOptions
from medm.data.owners import Shard
from medm.data.records import Records
from medm.data.volume_cache import MediaCache
from medm.errors import MediaError, RecipeError
from medm.imaging import Preprocess, VolumePreprocess, fingerprint, prepare
from tests.data.tiny import record, write_json

VOLUME = VolumePreprocess(size=[2, 4, 4], scale="0-1", orientation=None)
PREPROCESS: dict[str, Preprocess] = {"volume": VOLUME}


def volume(file: Path, seed: int) -> str:
    values = np.random.default_rng(seed).random((4, 8, 8), dtype=np.float32)
    np.save(file, values)
    return file.name


def data(folder: Path, records: list[Any]) -> list[Records]:
    source = SourceOptions(path=str(write_json(folder / "data.json", records)))
    return [Records([source], Conversations())]


@pytest.fixture
def records(tmp_path: Path) -> list[Any]:
    """Nine volumes, of which one comes twice, a broken one and a broken record."""
    names = [volume(tmp_path / f"v{n}.npy", n) for n in range(9)]
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY not an array")
    return [
        *(record("<volume>?", volume=name) for name in [*names, names[0], "broken.npy"]),
        record("<volume>?", volume=[]),
    ]


def shard(data: list[Records], folder: Path, index: int, count: int, **more: Any) -> FillReport:
    cache = MediaCache(folder, more.pop("max_bytes", 10**9), evict=False)
    return fill_shard(data, PREPROCESS, cache, Shard(index, count), **more)


def test_shards_that_were_killed_and_merged_are_one_cache(
    records: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = data(tmp_path, records)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fill(opened, PREPROCESS, loader(CacheOptions(dir=str(whole))))
    with pytest.raises(RecipeError, match="has no shards yet"):
        merge_shards(opened, PREPROCESS, parts)

    describe, seen = cache_shards._EntryWriter.__call__, []

    def killed(self: Any, path: Path, preprocess: Preprocess) -> Any:
        seen.append(path.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return describe(self, path, preprocess)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cache_shards._EntryWriter, "__call__", killed)
        shard(opened, parts, 0, 2)
    assert MediaCache(parts, 0).size()[0] == 2
    assert not (parts / "shards").exists(), "an index is complete or not there"
    reports = [shard(opened, parts, 1, 2, workers=1)]
    with pytest.raises(RecipeError, match=r"1 of 2 shards are missing \(0/2\)"):
        merge_shards(opened, PREPROCESS, parts)
    reports.append(shard(opened, parts, 0, 2))
    assert sum(report.files for report in reports) == 10
    assert sum(report.num_bad for report in reports) == 2, "each problem by one shard"

    merged = merge_shards(opened, PREPROCESS, parts)
    assert (merged.entries, len(merged.failed)) == (9, 2)
    rows = [json.loads(line) for line in (parts / "manifest.jsonl").read_text().splitlines()]
    assert [Path(row["path"]).name for row in rows] == [f"v{n}.npy" for n in range(9)]
    for row in rows:
        entry = parts / row["entry"]
        assert entry.read_bytes() == (whole / row["entry"]).read_bytes()
        assert hashlib.sha256(entry.read_bytes()).hexdigest() == row["sha256"]
        expected = prepare(Path(row["path"]), VOLUME)
        mapped = np.memmap(
            entry, dtype=row["dtype"], mode="r", offset=row["offset"], shape=tuple(row["shape"])
        )
        np.testing.assert_array_equal(mapped, expected.pixels)
        assert row["placement"] == json.loads(json.dumps(expected.placement.to_dict()))
        assert row["preprocess"] == fingerprint(VOLUME)
    failed = [json.loads(line) for line in (parts / "failed.jsonl").read_text().splitlines()]
    assert [row["record"]["index"] for row in failed] == [10, 11]
    assert all(row["error"] for row in failed)


def test_only_what_failed_is_tried_again(
    records: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, folder = data(tmp_path, records[:-1]), tmp_path / "cache"
    with pytest.raises(RecipeError, match="no such index; run --shard 0/1 first"):
        shard(opened, folder, 0, 1, only_failed=True)
    assert shard(opened, folder, 0, 1).num_bad == 1
    volume(tmp_path / "broken.npy", 20)
    report = shard(opened, folder, 0, 1, only_failed=True)
    assert (report.files, report.num_bad) == (1, 0)
    merged = merge_shards(opened, PREPROCESS, folder)
    assert (merged.entries, merged.failed) == (10, [])
    assert not (folder / "failed.jsonl").exists()
    assert shard(opened, folder, 0, 1, only_failed=True).files == 0


def test_added_records_keep_their_owners_and_are_asked_for(
    records: list[Any], tmp_path: Path
) -> None:
    folder, old = tmp_path / "cache", records[:9]
    opened = data(tmp_path, old)
    for index in range(3):
        shard(opened, folder, index, 3)
    before = {file.name: file.read_text() for file in (folder / "shards").iterdir()}
    name = volume(tmp_path / "new.npy", 30)
    opened = data(tmp_path, [record("<volume>?", volume=name), *reversed(old)])
    owner = next(number for number in range(3) if Shard(number, 3).owns(name))
    with pytest.raises(RecipeError, match=rf"shard {owner}/3 lacks 1 files .* is new.npy"):
        merge_shards(opened, PREPROCESS, folder)
    shard(opened, folder, owner, 3)
    assert merge_shards(opened, PREPROCESS, folder).entries == 10
    after = {file.name: file.read_text() for file in (folder / "shards").iterdir()}
    assert {file for file in before if before[file] != after[file]} == {f"shard-{owner}-of-3.jsonl"}


def test_other_settings_lost_entries_and_two_sets_are_refused(
    records: list[Any], tmp_path: Path
) -> None:
    opened, folder = data(tmp_path, records[:9]), tmp_path / "cache"
    shard(opened, folder, 0, 1)
    other: dict[str, Preprocess] = {"volume": VOLUME.model_copy(update={"size": [2, 4, 2]})}
    with pytest.raises(RecipeError, match="written with other settings"):
        merge_shards(opened, other, folder)
    lost = next((folder / "arrays").glob("*/*.npy"))
    lost.write_bytes(lost.read_bytes()[:-1])
    with pytest.raises(MediaError, match="run its shard again"):
        merge_shards(opened, PREPROCESS, folder)
    shard(opened, folder, 0, 1)  # the damaged entry is written again
    assert merge_shards(opened, PREPROCESS, folder).entries == 9
    shard(opened, folder, 0, 2)
    with pytest.raises(RecipeError, match="has shards of 1 and of 2"):
        merge_shards(opened, PREPROCESS, folder)


def test_a_full_cache_is_the_reason_of_a_file_and_keeps_the_others(
    records: list[Any], tmp_path: Path
) -> None:
    """A task evicts nothing: the entries of tasks that ended before it are needed."""
    opened, folder = data(tmp_path, records[:9]), tmp_path / "cache"
    shard(opened, folder, 0, 2)
    entries, size = MediaCache(folder, 0).size()
    report = shard(opened, folder, 1, 2, max_bytes=size)
    assert report.num_bad == report.files == 9 - entries
    assert "raise data.cache.max_gb" in str(report.bad[0])
    assert MediaCache(folder, 0).size()[0] == entries
