"""Features on disk: found by content, whole or not there."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medm.data import features
from medm.data.features import FeatureBatch, missing, open_store
from medm.errors import MediaError, MedmError
from medm.files import lock
from medm.imaging.placement import Placement
from tests.imaging.tiny import phantom, write_series


def write(folder: Path, **contents: str) -> dict[str, Path]:
    files = {}
    for name, content in contents.items():
        files[name] = folder / name
        files[name].write_text(content)
    return files


PLACEMENT = Placement.of_source((4, 6)).resized((2, 2))


def batch(keys: list[str], features: np.ndarray) -> FeatureBatch:
    return FeatureBatch(keys, [PLACEMENT] * len(keys), features)


def fill(store, files: list[Path]) -> int:
    wanted, bad = missing(store, files)
    assert not bad
    batches = (
        batch([key], np.full((1, 2, 3), len(file.read_text()), np.float16)) for key, file in wanted
    )
    if wanted:
        store.add(batches, most=len(wanted), shape=(2, 3), dtype=np.dtype(np.float16))
    return len(wanted)


def test_items_are_found_by_content_and_filled_once(tmp_path: Path) -> None:
    files = write(tmp_path, a="x", b="xy", same_as_a="x")
    store = open_store(tmp_path / "cache", "encoder")
    assert store.get(files["a"]) is None
    assert fill(store, list(files.values())) == 2
    assert store.get(files["same_as_a"]).tolist() == np.full((2, 3), 1.0).tolist()
    again = open_store(tmp_path / "cache", "encoder")
    assert fill(again, list(files.values())) == 0
    assert again.get(files["b"])[0, 0] == 2
    assert isinstance(again.get(files["b"]), np.memmap)


def test_the_placement_is_stored_with_the_features(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write(tmp_path, a="x", same_as_a="x", b="xy")
    fill(open_store(tmp_path / "cache", "encoder"), [files["a"]])
    with caplog.at_level(logging.INFO):
        again = open_store(tmp_path / "cache", "encoder")
    assert again.placement(files["same_as_a"]) == PLACEMENT
    assert again.placement(files["b"]) is None
    assert not caplog.text


def test_features_of_an_earlier_version_are_used_and_have_no_placement(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The index of a shard was a list of keys."""
    files = write(tmp_path, a="x", b="xy")
    store = open_store(tmp_path / "cache", "encoder")
    fill(store, list(files.values()))
    [index] = store.folder.glob("*.json")
    index.write_text(json.dumps(json.loads(index.read_text())["keys"]))
    with caplog.at_level(logging.INFO):
        old = open_store(tmp_path / "cache", "encoder")
    assert old.get(files["b"])[0, 0] == 2
    assert old.placement(files["b"]) is None
    assert "2 features of an earlier medm have no placement" in caplog.text
    assert fill(old, list(files.values())) == 0


def test_a_file_that_changed_is_not_found(tmp_path: Path) -> None:
    files = write(tmp_path, a="x")
    store = open_store(tmp_path / "cache", "encoder")
    fill(store, [files["a"]])
    files["a"].write_text("other")
    assert store.get(files["a"]) is None
    assert fill(store, [files["a"]]) == 1
    assert store.get(files["a"])[0, 0] == 5


def test_another_encoder_has_a_store_of_its_own(tmp_path: Path) -> None:
    files = write(tmp_path, a="x")
    fill(open_store(tmp_path / "cache", "one"), [files["a"]])
    assert open_store(tmp_path / "cache", "two").get(files["a"]) is None


def test_row_17_an_interruption_keeps_what_was_written(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cache", "encoder")

    def dies() -> Iterator[FeatureBatch]:
        yield batch(["k"], np.ones((1, 2, 3), np.float16))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add(dies(), most=2, shape=(2, 3), dtype=np.dtype(np.float16))
    assert "k" in store
    assert "k" in open_store(tmp_path / "cache", "encoder")
    assert sorted(path.suffix for path in store.folder.iterdir()) == [".json", ".npy"]


def test_items_that_differ_in_number_leave_nothing(tmp_path: Path) -> None:
    files = write(tmp_path, a="x", b="xy")
    store = open_store(tmp_path / "cache", "encoder")
    for most, rows in ((2, 1), (1, 2)):
        with pytest.raises(
            ValueError, match=f"2 items in 2 rows, at most {most} rows in all, found {rows}"
        ):
            store.add(
                [batch(["k", "l"], np.ones((rows, 2, 3)))],
                most=most,
                shape=(2, 3),
                dtype=np.dtype(np.float16),
            )
    assert list(store.folder.iterdir()) == []
    assert fill(open_store(tmp_path / "cache", "encoder"), list(files.values())) == 2


def test_row_14_a_flipped_bit_is_found_and_its_shard_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write(tmp_path, a="x", b="xy")
    fill(open_store(tmp_path / "cache", "encoder"), list(files.values()))
    [shard] = (tmp_path / "cache" / "encoder").glob("*.npy")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    store = open_store(tmp_path / "cache", "encoder")
    assert len(missing(store, [files["b"], files["a"]])[0]) == 2
    assert "a damaged shard of features is computed again (a checksum does not fit)" in caplog.text
    assert not shard.exists()
    assert fill(store, list(files.values())) == 2
    assert store.get(files["b"]).tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".npy", lambda old: old[:-1]),
        (".npy", lambda old: b""),
        (".npy", lambda old: bytes(len(old))),
        (".json", lambda old: old[: len(old) // 2]),
        (".json", lambda old: bytes(len(old))),
        (".json", lambda old: b"{}"),
        (".json", lambda old: b"[1, [2]]"),
        (".json", lambda old: old.replace(b'"placements": [', b'"placements": [3, ')),
        (".json", lambda old: b"null"),
    ],
)
def test_row_15_a_damaged_shard_or_index_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, content: Callable[[bytes], bytes]
) -> None:
    files = write(tmp_path, a="x", b="xy")
    fill(open_store(tmp_path / "cache", "encoder"), list(files.values()))
    [damaged] = (tmp_path / "cache" / "encoder").glob(f"*{suffix}")
    damaged.write_bytes(content(damaged.read_bytes()))
    store = open_store(tmp_path / "cache", "encoder")
    assert "is computed again" in caplog.text
    assert fill(store, list(files.values())) == 2
    assert len(list(store.folder.iterdir())) == 2
    assert store.get(files["a"])[0, 0] == 1


def test_row_15_a_shard_that_another_rank_removed_is_forgotten(tmp_path: Path) -> None:
    files = write(tmp_path, a="x")
    store = open_store(tmp_path / "cache", "encoder")
    fill(store, [files["a"]])
    for file in store.folder.iterdir():
        file.unlink()
    store.refresh()
    assert store.get(files["a"]) is None


def test_row_16_a_disk_that_fills_while_features_are_made_is_an_error(tmp_path: Path) -> None:
    """The limit on the size of files (RLIMIT_FSIZE) stands for a disk that another program fills.

    A memory map would end with SIGBUS.
    """
    program = f"""
import resource, signal
import numpy as np
from medm.data import features
from medm.data.features import FeatureBatch, open_store
from medm.imaging.placement import Placement
store = open_store(__import__("pathlib").Path({str(tmp_path)!r}), "encoder")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
place = Placement.of_source((4, 6))
parts = (FeatureBatch([str(n)], [place], np.ones((1, 1000), np.float32)) for n in range(100))
try:
    store.add(parts, most=100, shape=(1000,), dtype=np.dtype(np.float32))
except OSError as error:
    print(error.errno, str(error.filename).endswith(".npy"), list(store.folder.iterdir()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == f"{errno.EFBIG} True []", done.stderr


def test_row_17_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    files = write(tmp_path, a="x")
    folder = open_store(tmp_path / "cache", "encoder").folder
    fill(open_store(tmp_path / "cache", "encoder"), [files["a"]])
    killed, orphan, young, held = (
        folder / name for name in (".a.npy.1-2.tmp", "b.npy", ".c.npy.1-2.tmp", ".d.npy.1-2.tmp")
    )
    for file in (killed, orphan, young, held):
        file.write_bytes(b"x")
    for file in (killed, orphan, held):
        os.utime(file, (time.time() - 120,) * 2)
    with held.open("rb") as stream:
        lock(stream)
        store = open_store(tmp_path / "cache", "encoder")
        assert [file.exists() for file in (killed, orphan, young, held)] == [
            False,
            False,
            True,
            True,
        ]
    assert store.get(files["a"]) is not None


def test_items_are_spread_over_shards_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_SHARD_BYTES", 150)
    files = write(tmp_path, a="x", b="xy", c="xyz")
    store = open_store(tmp_path / "cache", "encoder")
    fill(store, list(files.values()))
    assert len(list(store.folder.glob("*.npy"))) > 1
    again = open_store(tmp_path / "cache", "encoder")
    assert [int(again.get(file)[0, 0]) for file in files.values()] == [1, 2, 3]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cache", "encoder")
    with pytest.raises(MedmError, match=r"need .* GB, and .* GB are free"):
        store.add([], most=10, shape=(10**12,), dtype=np.dtype(np.float32))
    assert list(store.folder.iterdir()) == []


def test_a_shard_is_no_larger_than_its_items(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cache", "encoder")
    store.add(
        [batch(["k"], np.ones((1, 1000)))], most=10_000, shape=(1000,), dtype=np.dtype(np.float64)
    )
    assert "k" in open_store(tmp_path / "cache", "encoder")
    [table] = store.folder.glob("*.npy")
    assert table.stat().st_size == 8000 + 128
    assert np.load(table).shape == (1, 1000)


def test_what_cannot_be_read_is_named_beside_what_is_missing(tmp_path: Path) -> None:
    files = write(tmp_path, a="x")
    wanted, bad = missing(
        open_store(tmp_path / "cache", "encoder"), [tmp_path / "gone", files["a"]]
    )
    assert [file for _, file in wanted] == [files["a"]]
    assert bad == [f"{tmp_path / 'gone'}: no such file or folder"]


def test_folders_and_their_series_have_a_name(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", phantom())
    (tmp_path / "copy").mkdir()
    for file in (tmp_path / "ct").iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    store = open_store(tmp_path / "cache", "encoder")
    whole, series = store.key(tmp_path / "ct"), store.key(tmp_path / "ct#3")
    assert store.key(tmp_path / "copy") == whole != series
    wanted, _ = missing(store, [tmp_path / "ct", tmp_path / "copy", tmp_path / "ct#3"])
    assert [path.name for _, path in wanted] == ["ct", "ct#3"]
    write_series(tmp_path / "ct", phantom() + 100)
    assert store.key(tmp_path / "ct") != whole
    with pytest.raises(MediaError, match="no such file or folder"):
        store.key(tmp_path / "gone#3")


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_a_header_without_voxels_is_known_by_those_beside_it(tmp_path: Path, suffix: str) -> None:
    store = open_store(tmp_path / "cache", "encoder")
    keys = []
    for case in ("one", "two"):
        (tmp_path / case).mkdir()
        sitk.WriteImage(phantom() + (case == "two"), str(tmp_path / case / f"ct{suffix}"))
        keys.append(store.key(tmp_path / case / f"ct{suffix}"))
    headers = [(tmp_path / case / f"ct{suffix}").read_bytes() for case in ("one", "two")]
    assert headers[0] == headers[1]
    assert keys[0] != keys[1]
    (tmp_path / "one" / "ct.raw").write_bytes((tmp_path / "two" / "ct.raw").read_bytes())
    assert store.key(tmp_path / "one" / f"ct{suffix}") == keys[1]


def test_an_image_that_is_cut_has_a_row_for_each_tile(tmp_path: Path) -> None:
    files = write(tmp_path, a="x", b="xy", c="xyz")
    store = open_store(tmp_path / "cache", "encoder")
    wanted, _ = missing(store, files.values())
    table = np.arange(6 * 3, dtype=np.float32).reshape(6, 1, 3)
    keys, counts = [key for key, _ in wanted], [3, 1, 2]
    batches = [
        FeatureBatch(keys[:2], [PLACEMENT] * 2, table[:4], counts[:2]),
        FeatureBatch(keys[2:], [PLACEMENT], table[4:], counts[2:]),
    ]
    store.add(batches, most=9, shape=(1, 3), dtype=table.dtype)
    for opened in (store, open_store(tmp_path / "cache", "encoder")):
        found = [opened.get(file) for _, file in wanted]
        expected = [table[:3], table[3:4], table[4:]]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    wrong = FeatureBatch(["k"], [PLACEMENT], table[:3], [2])
    with pytest.raises(ValueError, match=r"1 items in 2 rows, at most 9 .*found 3 arrays"):
        store.add([wrong], most=9, shape=(1, 3), dtype=table.dtype)
    with pytest.raises(ValueError, match="at most 2 rows in all"):
        store.add(batches[:1], most=2, shape=(1, 3), dtype=table.dtype)
