"""The cache gives the same numbers, never a stale or damaged one, and holds nothing of the
patient."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medm.data import content, volume_cache
from medm.data.content import content_hash, identity
from medm.data.volume_cache import MediaCache
from medm.errors import MediaError
from medm.imaging import ImagePreprocess, Preprocess, VolumePreprocess, load_pixels, prepare
from medm.imaging.placement import Prepared
from tests.imaging.tiny import CANARY, phantom, write_series

PREPROCESS = VolumePreprocess(size=[4, 6, 8])
INDEX_BYTES = 64
FILE_BYTES = 4 * 6 * 8 * 4 + 128 + 12 + INDEX_BYTES
"""What a file takes without its placement: numbers, header, footer, and its line in the index."""


def placement_bytes(path: Path) -> int:
    """What the placement of a file takes in its entry."""
    return len(json.dumps(prepare(path, PREPROCESS).placement.to_dict()))


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / f"{CANARY}.nii.gz"
    sitk.WriteImage(phantom(), str(path))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> MediaCache:
    return MediaCache(tmp_path / "cache", max_bytes=10**6)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Every file that is read and prepared."""
    seen: list[Path] = []

    def counted(path: Path, preprocess: Preprocess, *, device: str = "cpu") -> Prepared:
        seen.append(path)
        return prepare(path, preprocess, device=device)

    monkeypatch.setattr(volume_cache, "prepare", counted)
    return seen


def entries(cache: MediaCache) -> list[Path]:
    return sorted(cache.folder.glob("arrays/*/*.npy"))


def test_the_same_numbers_and_one_reading(
    cache: MediaCache, volume: Path, reads: list[Path]
) -> None:
    expected = load_pixels(volume, PREPROCESS)
    for again in range(3):
        pixels = cache.load(volume, PREPROCESS)
        np.testing.assert_array_equal(pixels, expected)
        assert pixels.dtype == np.float32
        assert len(reads) == 1, again
    other = MediaCache(cache.folder, max_bytes=10**6)  # the next run
    np.testing.assert_array_equal(other.load(volume, PREPROCESS), expected)
    assert len(reads) == 1
    assert cache.size() == (1, entries(cache)[0].stat().st_size + INDEX_BYTES)
    assert cache.size() == (1, FILE_BYTES + placement_bytes(volume))


def test_the_placement_is_stored_beside_the_numbers(
    cache: MediaCache, volume: Path, reads: list[Path]
) -> None:
    expected = prepare(volume, PREPROCESS)
    for again in range(2):
        for found in (
            cache.prepare(volume, PREPROCESS),
            MediaCache(cache.folder, 10**6).prepare(volume, PREPROCESS),
        ):
            np.testing.assert_array_equal(found.pixels, expected.pixels)
            assert found.placement == expected.placement
            assert len(reads) == 1, again


def forget_placement(entry: Path, pixels: np.ndarray) -> None:
    """Write an entry as earlier versions of medm did: numbers, a mark and their checksum."""
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    entry.write_bytes(
        buffer.getvalue() + struct.pack("<8sI", b"medm-v1\0", zlib.crc32(pixels.tobytes()))
    )


def test_entries_of_an_earlier_version_open_and_get_their_placement_when_it_is_asked_for(
    cache: MediaCache, volume: Path, reads: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    expected = prepare(volume, PREPROCESS)
    cache.load(volume, PREPROCESS)
    forget_placement(entries(cache)[0], expected.pixels)
    later = MediaCache(cache.folder, max_bytes=10**6)
    np.testing.assert_array_equal(later.load(volume, PREPROCESS), expected.pixels)
    assert len(reads) == 1  # pixels alone need nothing new
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert later.prepare(volume, PREPROCESS).placement == expected.placement
    assert caplog.text.count("of an earlier medm without the placement") == 1
    assert len(reads) == 2
    np.testing.assert_array_equal(later.load(volume, PREPROCESS), expected.pixels)


@pytest.mark.parametrize("place", [-13, -40, -2])
def test_a_damaged_placement_is_made_again(
    cache: MediaCache, volume: Path, reads: list[Path], place: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In its text, and in the checksum behind it."""
    expected = cache.prepare(volume, PREPROCESS).placement
    entry = entries(cache)[0]
    data = bytearray(entry.read_bytes())
    data[place] ^= 1
    entry.write_bytes(data)
    assert (
        MediaCache(cache.folder, max_bytes=10**6).prepare(volume, PREPROCESS).placement == expected
    )
    assert "damaged cache entry is written again" in caplog.text
    assert len(reads) == 2


def test_what_is_handed_out_may_be_written_to(cache: MediaCache, volume: Path) -> None:
    expected = cache.load(volume, PREPROCESS).copy()
    cache.load(volume, PREPROCESS)[:] = 7
    np.testing.assert_array_equal(cache.load(volume, PREPROCESS), expected)


def test_another_description_is_another_entry(
    cache: MediaCache, volume: Path, reads: list[Path]
) -> None:
    cache.load(volume, PREPROCESS)
    wider = cache.load(volume, VolumePreprocess(size=[4, 6, 8], windows=[[-200, 200]]))
    np.testing.assert_array_equal(
        wider, load_pixels(volume, VolumePreprocess(size=[4, 6, 8], windows=[[-200, 200]]))
    )
    assert len(entries(cache)) == 2


def test_a_changed_file_is_read_again_and_a_copy_is_not(
    cache: MediaCache, volume: Path, reads: list[Path], tmp_path: Path
) -> None:
    cache.load(volume, PREPROCESS)
    copy = tmp_path / "copy.nii.gz"
    copy.write_bytes(volume.read_bytes())
    os.utime(volume, (1, 1))  # touched, not changed
    cache.load(copy, PREPROCESS)
    cache.load(volume, PREPROCESS)
    assert len(reads) == 1
    sitk.WriteImage(phantom() + 100, str(volume))
    np.testing.assert_array_equal(cache.load(volume, PREPROCESS), load_pixels(volume, PREPROCESS))
    assert len(reads) == 2


def test_folders_and_images(cache: MediaCache, tmp_path: Path, reads: list[Path]) -> None:
    write_series(tmp_path / "ct", phantom())
    expected = load_pixels(tmp_path / "ct", PREPROCESS)
    for path in (tmp_path / "ct", tmp_path / "ct#3", tmp_path / "ct"):
        np.testing.assert_array_equal(cache.load(path, PREPROCESS), expected)
    assert len(reads) == 2
    write_series(tmp_path / "ct", phantom() + 100)
    np.testing.assert_allclose(
        cache.load(tmp_path / "ct", PREPROCESS).max() - expected.max(), 100 / 2000, atol=0.01
    )
    assert len(reads) == 3
    sitk.WriteImage(sitk.GetImageFromArray(np.eye(5, dtype=np.uint8)), str(tmp_path / "a.png"))
    small = ImagePreprocess(size=[3, 3])
    for _ in range(2):
        np.testing.assert_array_equal(
            cache.load(tmp_path / "a.png", small), load_pixels(tmp_path / "a.png", small)
        )
    assert len(reads) == 4


@pytest.mark.parametrize(("header", "voxels"), [("ct.mhd", "ct.raw"), ("ct.nhdr", "ct.raw")])
def test_a_detached_header_is_known_by_its_voxels(
    cache: MediaCache, tmp_path: Path, reads: list[Path], header: str, voxels: str
) -> None:
    """They are in another file, which may change alone."""
    path = tmp_path / header
    sitk.WriteImage(phantom(), str(path))
    first = cache.load(path, PREPROCESS).copy()
    cache.load(path, PREPROCESS)
    assert len(reads) == 1
    data = np.fromfile(tmp_path / voxels, dtype="<i2")
    (data + 100).tofile(tmp_path / voxels)
    os.utime(tmp_path / voxels, (1, 1))
    np.testing.assert_allclose(
        cache.load(path, PREPROCESS).max() - first.max(), 100 / 2000, atol=0.01
    )
    assert len(reads) == 2


def test_nothing_of_a_folder_is_opened_but_regular_files_inside_it(
    cache: MediaCache, tmp_path: Path
) -> None:
    """A pipe or /dev/zero among the slices would be read for ever."""
    folder = tmp_path / "ct"
    write_series(folder, phantom())
    os.mkfifo(folder / "pipe")
    expected = load_pixels(folder, PREPROCESS)
    np.testing.assert_array_equal(cache.load(folder, PREPROCESS), expected)
    (folder / "endless").symlink_to("/dev/zero")
    with pytest.raises(MediaError, match="link out of the folder"):
        cache.load(folder, PREPROCESS)
    with pytest.raises(MediaError, match="link out of the folder"):
        identity(folder)
    (folder / "endless").unlink()
    (folder / "loop").symlink_to("loop")
    np.testing.assert_array_equal(cache.load(folder, PREPROCESS), expected)
    with pytest.raises(MediaError, match="device or pipe"):
        identity(folder / "pipe")


def test_a_folder_of_too_many_files_is_not_listed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "MAX_FRAMES", 3)
    for number in range(4):
        (tmp_path / f"{number}").write_bytes(b"x")
    with pytest.raises(MediaError, match="more than 3 files"):
        content_hash(tmp_path)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "header", "longer"])
def test_a_damaged_entry_is_made_again(
    cache: MediaCache,
    volume: Path,
    reads: list[Path],
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = cache.load(volume, PREPROCESS).copy()
    entry = entries(cache)[0]
    data = bytearray(entry.read_bytes())
    if damage == "flipped":
        data[-100] ^= 1
    elif damage == "header":
        data[20] ^= 255
    entry.write_bytes(
        {"truncated": data[:-50], "empty": b"", "longer": data + b"x"}.get(damage, data)
    )
    later = MediaCache(cache.folder, max_bytes=10**6)
    np.testing.assert_array_equal(later.load(volume, PREPROCESS), expected)
    assert "damaged cache entry is written again" in caplog.text
    assert len(reads) == 2
    np.testing.assert_array_equal(later.load(volume, PREPROCESS), expected)
    assert len(reads) == 2


@pytest.mark.parametrize("garbage", [bytes(64), b"\xff" * 64, b"Z" * 64, b"", b"0" * 63 + b"\n"])
def test_a_damaged_index_is_written_anew(tmp_path: Path, reads: list[Path], garbage: bytes) -> None:
    """Zeros are what a file system leaves after a power failure. Two files with equal garbage stay
    apart."""
    paths = make_volumes(tmp_path, 2)
    expected = [load_pixels(path, PREPROCESS) for path in paths]
    cache = MediaCache(tmp_path / "cache", max_bytes=10**6)
    for path in paths:
        cache.load(path, PREPROCESS)
    whole = {index: index.read_bytes() for index in cache.folder.glob("index/*/*")}
    assert len(whole) == 2
    for index in whole:
        index.write_bytes(garbage)
    for path, pixels in zip(paths, expected, strict=True):
        np.testing.assert_array_equal(
            MediaCache(tmp_path / "cache", max_bytes=10**6).load(path, PREPROCESS), pixels
        )
    assert {index: index.read_bytes() for index in whole} == whole


def test_nothing_of_the_patient_is_stored(cache: MediaCache, volume: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "ct", phantom())
    cache.load(volume, PREPROCESS)
    cache.load(tmp_path / "ct", PREPROCESS)
    files = [path for path in cache.folder.rglob("*") if path.is_file()]
    assert len(files) == 5  # two entries, two lines of the index, the ledger
    for path in files:
        for word in CANARY.encode().split(b"^"):
            assert word not in path.read_bytes()
            assert word.decode() not in path.name


def make_volumes(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{i}.npy" for i in range(count)]
    for i, path in enumerate(paths):
        np.save(path, np.full((4, 4, 4), -500 + 100 * i, dtype=np.int16))
    return paths


def test_the_size_is_bounded_and_a_full_cache_keeps_what_it_has(
    tmp_path: Path, reads: list[Path]
) -> None:
    paths = make_volumes(tmp_path, 6)
    cache = MediaCache(
        tmp_path / "cache", max_bytes=int(3.9 * (FILE_BYTES + placement_bytes(paths[0])))
    )
    for _ in range(2):
        for path in paths:
            np.testing.assert_array_equal(
                cache.load(path, PREPROCESS), load_pixels(path, PREPROCESS)
            )
    number, size = cache.size()
    assert number == 3
    assert size <= cache.max_bytes
    assert size == sum(path.stat().st_size for path in cache.folder.glob("*/*/*"))
    assert len(reads) == 6 + 3  # in the second epoch half are found


def test_entries_of_earlier_runs_give_way(tmp_path: Path) -> None:
    paths = make_volumes(tmp_path, 6)
    folder = tmp_path / "cache"
    before = MediaCache(folder, max_bytes=10**6)
    for path in paths[:3]:
        before.load(path, PREPROCESS)
    for age, entry in enumerate(entries(before)):
        os.utime(entry, (time.time() - 1000 - age,) * 2)
    now = MediaCache(folder, max_bytes=int(3.9 * (FILE_BYTES + placement_bytes(paths[0]))))
    now.load(paths[0], PREPROCESS)  # in use in this run too
    for path in paths[3:5]:
        now.load(path, PREPROCESS)
    assert now.size()[0] == 3
    recent = [entry for entry in entries(now) if entry.stat().st_mtime > time.time() - 500]
    assert len(recent) == 3


def test_a_disk_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, volume: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = MediaCache(tmp_path / "file", max_bytes=10**6)
    for _ in range(2):
        np.testing.assert_array_equal(
            cache.load(volume, PREPROCESS), load_pixels(volume, PREPROCESS)
        )
    assert caplog.text.count("nothing more is cached") == 1


def test_what_a_killed_process_left_is_swept(cache: MediaCache, volume: Path) -> None:
    cache.load(volume, PREPROCESS)
    left = entries(cache)[0].with_name(".left.npy.1.abc")
    left.write_bytes(b"half")
    assert cache.size()[0] == 1
    assert left.exists()  # perhaps still being written
    os.utime(left, (1, 1))
    assert cache.size()[0] == 1
    assert not left.exists()


def test_bad_files_raise_as_without_a_cache(cache: MediaCache, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        cache.load(tmp_path / "nothing.nii", PREPROCESS)
    (tmp_path / "bad.nii").write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(MediaError, match="too few"):
            cache.load(tmp_path / "bad.nii", PREPROCESS)
    assert not entries(cache)


_HELD = """
import sys
from pathlib import Path
from medm.data.volume_cache import MediaCache
from medm.imaging import VolumePreprocess

folder, preprocess = Path(sys.argv[1]), VolumePreprocess(size=[8, 128, 128])
cache = MediaCache(folder / "cache", max_bytes=10**9)
held = []
for count in (20, 200):
    held += [cache.load(folder / f"{i}.npy", preprocess) for i in range(len(held), count)]
    total = sum(float(array.sum()) for array in held)  # every page is touched
    private = [line for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:")]
    print(len(held), int(private[0].split()[1]))
"""


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's account of private memory"
)
def test_memory_is_flat_in_the_number_of_volumes(tmp_path: Path) -> None:
    """All of 200 volumes are held and read to the last byte; their memory is the page cache's, not
    the process's."""
    paths = [tmp_path / f"{i}.npy" for i in range(200)]
    filling = MediaCache(tmp_path / "cache", max_bytes=10**9)
    for i, path in enumerate(paths):
        np.save(path, np.full((2, 2, 2), i, dtype=np.int16))
        filling.load(path, VolumePreprocess(size=[8, 128, 128]))
    done = subprocess.run(
        [sys.executable, "-c", _HELD, str(tmp_path)],
        # Freed buffers go back to the system: fragments of the heap are not memory of the volumes.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (few, before), (many, after) = (
        tuple(map(int, line.split())) for line in done.stdout.splitlines()
    )
    assert (few, many) == (20, 200)
    assert after - before < 8_000, (
        "180 volumes of 512 KiB are 92,000 KiB; allowed are their names and objects"
    )


def _many_loads(cache: MediaCache, paths: list[Path], seed: int, clear: bool) -> None:
    generator = np.random.default_rng(seed)
    for index in generator.integers(0, len(paths), 60):
        pixels = cache.load(paths[index], PREPROCESS)
        if not np.allclose(pixels, (500 + 100 * index) / 2000, atol=1e-6):
            raise AssertionError(f"wrong numbers for {index}")
        if clear and generator.random() < 0.2:  # somebody clears the cache meanwhile
            for entry in list(cache.folder.glob("arrays/*/*.npy"))[:1]:
                entry.unlink(missing_ok=True)


@pytest.mark.parametrize("clear", [False, True])
def test_many_processes_share_a_folder_and_its_bound(tmp_path: Path, clear: bool) -> None:
    paths = make_volumes(tmp_path, 8)
    limit = 5 * (FILE_BYTES + placement_bytes(paths[0]))
    cache = pickle.loads(pickle.dumps(MediaCache(tmp_path / "cache", max_bytes=limit)))
    cache.load(paths[0], PREPROCESS)  # imports are paid before the fork
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_many_loads, args=(cache, paths, seed, clear)) for seed in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert not list(cache.folder.glob("*/*/.*"))
    number, size = cache.size()
    assert size <= limit
    assert clear or number >= 4


def test_a_header_with_an_open_bracket_is_written_again(cache: MediaCache, volume: Path) -> None:
    expected = cache.load(volume, PREPROCESS)
    [entry] = entries(cache)
    entry.write_bytes(entry.read_bytes().replace(b"}", b"(", 1))
    again = MediaCache(cache.folder, max_bytes=10**6)
    np.testing.assert_array_equal(again.load(volume, PREPROCESS), expected)
