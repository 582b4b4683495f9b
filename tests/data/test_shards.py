"""Tar shards as records: any position at once, damage named, every pair once, sources weighted."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from medm.data import shards as shards_module
from medm.data.build import build_batches
from medm.data.check import check, require_sources
from medm.data.dataset import ExampleDataset
from medm.data.options import DataOptions, SourceOptions
from medm.data.pairs import Pairs
from medm.data.records import Records
from medm.data.sampling import Mixture, shard_order
from medm.data.shard_writing import shards_in, write_manifest, write_shards
from medm.data.shards import MAX_SAMPLE_BYTES, ShardFile, index_shard
from medm.errors import DataError, InputLostError, RecipeError
from medm.imaging.paths import MissingFileError
from tests.data.shard_ranks import batches
from tests.data.test_pairs import processor, text_of
from tests.data.tiny import write_image, write_lines
from tests.launch import on_processes


def png(shade: int = 0, size: int = 6) -> bytes:
    stream = io.BytesIO()
    pixels = np.full((size, size, 3), shade, np.uint8)
    pixels[0] = 255 - shade
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(*captions: str, first: int = 0) -> list[tuple[str, bytes]]:
    """Members as the published shards have them: .jpg in whatever format, and .txt."""
    return [
        (f"{number + first:06d}.{suffix}", content)
        for number, caption in enumerate(captions)
        for suffix, content in (("jpg", png(number)), ("txt", caption.encode()))
    ]


def shard_set(folder: Path, *sizes: int, name: str = "set") -> Path:
    """Shards of captions "shard.sample", and their manifest."""
    paths = [
        write_tar(
            folder / f"dataset-{number:06d}.tar", samples(*[f"{number}.{k}" for k in range(size)])
        )
        for number, size in enumerate(sizes)
    ]
    manifest = folder / f"{name}.shards.json"
    write_manifest(manifest, paths)
    return manifest


def source(path: Path, **fields: Any) -> SourceOptions:
    return SourceOptions(path=str(path), **fields)


def pairs_of(*sources: SourceOptions, **settings: Any) -> ExampleDataset[Any]:
    return ExampleDataset(Records(sources, Pairs(processor())), **settings)


# -- reading ---------------------------------------------------------------------------------------


def test_every_position_is_read_without_those_before_it(tmp_path: Path) -> None:
    manifest = shard_set(tmp_path, 3, 1, 2)
    file = ShardFile(manifest)
    assert file.groups == (3, 1, 2)
    expected = ["0.0", "0.1", "0.2", "1.0", "2.0", "2.1"]
    assert [record["caption"] for record in file] == expected
    for index in (5, 0, 3, 2):
        assert file[index]["caption"] == expected[index]
    assert file[5] == {"id": "000001", "image": "000001.jpg", "caption": "2.1"}
    assert file.open_media(5, "000001.jpg").read() == png(1)
    again = pickle.loads(pickle.dumps(file))
    assert again[4] == file[4]
    with pytest.raises(IndexError):
        file[6]


def test_one_shard_needs_no_manifest(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples("one", "two"))
    data = pairs_of(source(path))
    assert [text_of(data[index]) for index in range(2)] == ["one", "two"]
    pixels = [data[index].pixels["image"][0].shape for index in range(2)]
    assert pixels == [(3, 4, 4)] * 2


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, form: int) -> None:
    long = "folder/" + "n" * (90 if form == tarfile.USTAR_FORMAT else 180)
    name = f"{long}é" if form != tarfile.USTAR_FORMAT else long
    members = [(f"{name}{k}.{suffix}", b"x%d" % k) for k in range(3) for suffix in ("txt", "jpg")]
    file = ShardFile(write_tar(tmp_path / "a.tar", members, form))
    assert [record["id"] for record in file] == [f"{name}{k}" for k in range(3)]
    assert file[2]["image"] == f"{name}2.jpg" and file[2]["caption"] == "x2"


def test_fields_of_the_members(tmp_path: Path) -> None:
    fields = {
        "captions": ["a", "b"],
        "label": "mass",
        "id": "p1",
        "image": "elsewhere.png",
        "age": 3,
    }
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("0.json", json.dumps(fields).encode()), ("0.png", png()), ("0.txt", b"unused"),
            ("1.seg.png", png()), ("1.JPG", png()), ("1.cls", b"7\n"), ("1.txt", b"one"),
            ("2.cls", b"mass"), ("2.txt", b"two"), ("2.tif", png()),
        ],
    )  # fmt: skip
    file = ShardFile(path)
    assert file[0] == {
        "captions": ["a", "b"], "label": "mass", "id": "p1", "image": "0.png", "age": 3,
    }  # fmt: skip
    assert file[1] == {"image": "1.JPG", "label": 7, "caption": "one", "id": "1"}
    assert file[2]["label"] == "mass"


def test_hidden_files_and_folders_are_no_samples(tmp_path: Path) -> None:
    """A Mac writes notes beside every file, and tar programs write the folder."""
    path = tmp_path / "a.tar"
    members = [("._0.jpg", b"note"), ("0.jpg", png()), ("._0.txt", b"note"), ("0.txt", b"one")]
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("set")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in [*members, *samples("two", first=1)]:
            member = tarfile.TarInfo(f"set/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert [record["caption"] for record in ShardFile(path)] == ["one", "two"]
    assert bad_of(source(path)) == []


def test_published_texts_follow_their_marks(tmp_path: Path) -> None:
    text = "original._openi_rewritten._openi_rewritten again._openi_"
    path = write_tar(tmp_path / "a.tar", samples(text, "plain"))
    data = pairs_of(source(path, captions="sentinel"))
    assert [text_of(data[index]) for index in range(2)] == ["original.", "plain"]


# -- damage ----------------------------------------------------------------------------------------


def bad_of(*sources: SourceOptions, **settings: Any) -> list[str]:
    return [str(error) for error in check(sources, Pairs(processor()), **settings).bad]


def test_bad_samples_are_named_by_shard_key_and_offset(tmp_path: Path) -> None:
    members = [
        *samples("good"),
        ("000001.jpg", png()),
        ("000002.txt", b"no image"),
        ("000003.jpg", png()[:45]), ("000003.txt", b"cut image"),
        ("000004.jpg", png()), ("000004.txt", b" "),
        ("000005.jpg", png()), ("000005.txt", b"\xff"),
        ("000006.jpg", png()), ("000006.json", b"[1]"),
        ("000007.jpg", png()), ("000007.png", png()), ("000007.txt", b"two"),
        ("000008.jpg", b""), ("000008.txt", b"empty"),
        ("000009.jpg", png()), ("000009.txt", b"one"), ("000009.txt", b"two"),
        *samples("also good", first=10),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    found = [message.removeprefix(f"{path}, ") for message in bad_of(source(path))]
    expected = [
        ("record 1: ", "'000001'", "expected text in 'caption'"),
        ("record 2: ", "'000002'", "expected one of 'image' and 'volume', found neither"),
        ("record 3, field 'image': ", "'000003'", "image: "),
        ("record 4, field 'caption': ", "'000004'", "found blank text"),
        ("record 5, field 'caption': ", "'000005'", "000005.txt is not valid UTF-8 at byte 0"),
        ("record 6: ", "'000006'", "expected an object in the .json member, found list"),
        ("record 7, field 'image': ", "'000007'", "found 000007.jpg, 000007.png"),
        ("record 8, field 'image': ", "'000008'", "the file is empty"),
        ("record 9: ", "'000009'", "expected files of different kinds in a sample, found 000009"),
    ]
    assert len(found) == len(expected)
    for message, (start, key, reason) in zip(found, expected, strict=True):
        assert message.startswith(f"{start}a.tar, sample {key} at byte "), message
        assert reason in message
    data = pairs_of(source(path), bad_records="skip")
    kept = [data[index] for index in range(len(data))]
    assert [text_of(example) for example in kept if example is not None] == ["good", "also good"]
    assert data.num_bad == 9


def test_a_missing_shard_costs_its_samples_alone(tmp_path: Path) -> None:
    manifest = shard_set(tmp_path, 2, 2, 1)
    (tmp_path / "dataset-000001.tar").unlink()
    messages = bad_of(source(manifest))
    assert len(messages) == 2
    assert all("'dataset-000001.tar': no such file under the data root" in one for one in messages)
    data = pairs_of(source(manifest), bad_records="skip")
    found = [data[index] for index in range(5)]
    assert [None if one is None else text_of(one) for one in found] == [
        "0.0", "0.1", None, None, "2.0",
    ]  # fmt: skip
    assert data.noted("bad") == [2, 3]
    with pytest.raises(MissingFileError):
        pairs_of(source(manifest))[2]


def test_a_shard_that_vanishes_during_a_run_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medm.data.dataset.RETRY_SECONDS", (0.0,))
    manifest = shard_set(tmp_path, 1, 1)
    data = pairs_of(source(manifest), bad_records="skip", usable=[True, True])
    (tmp_path / "dataset-000001.tar").unlink()
    with pytest.raises(InputLostError, match="it was there when the run began"):
        data[1]


def test_a_shard_that_changed_is_refused_and_its_checksum_told(tmp_path: Path) -> None:
    manifest = shard_set(tmp_path, 2, 2)
    first, second = (tmp_path / f"dataset-{number:06d}.tar" for number in range(2))
    with first.open("ab") as file:
        file.write(bytes(512))
    content = bytearray(second.read_bytes())
    at = content.index(b"1.1")
    content[at : at + 3] = b"9.9"
    second.write_bytes(content)
    messages = bad_of(source(manifest))
    assert len(messages) == 2
    assert all("the manifest says" in message for message in messages)
    report = check([source(manifest)], Pairs(processor()), decode=True)
    messages = [str(error) for error in report.bad]
    assert sum("its sha256 is not that of the manifest" in message for message in messages) == 2
    lines = report.lines()
    assert "2 shards not as in the manifest" in lines
    assert any(line.startswith("4 records, 2 bad; ") for line in lines)


@pytest.mark.parametrize("where", ["header", "end", "cut data", "cut between"])
def test_damage_is_one_bad_record_and_ends_a_shard(tmp_path: Path, where: str) -> None:
    path = write_tar(tmp_path / "dataset-000000.tar", samples("one", "two", "three"))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar.getmembers()]
    kept = {"header": 2, "end": 3, "cut data": 2, "cut between": 2}[where]
    if where == "header":
        content[offsets[4] + 10] ^= 255
    elif where == "end":
        content = content[: offsets[5] + 1024]
    elif where == "cut data":
        content = content[: offsets[4] + 520]
    else:
        content = content[: offsets[4]]
    path.write_bytes(content)
    other = write_tar(tmp_path / "dataset-000001.tar", samples("four"))
    manifest = tmp_path / "a.shards.json"
    written = write_manifest(manifest, [path, other])
    assert (written.samples, written.num_bad) == (kept + 1, 1)
    (message,) = bad_of(source(manifest))
    assert f"record {kept}: dataset-000000.tar: " in message
    assert "lost" in message
    data = pairs_of(source(manifest), bad_records="skip")
    texts = [data[index] for index in range(len(data))]
    assert [text_of(one) for one in texts if one is not None] == [
        *["one", "two", "three"][:kept], "four",
    ]  # fmt: skip


def test_a_header_that_is_damaged_after_indexing_is_one_bad_sample(tmp_path: Path) -> None:
    manifest = shard_set(tmp_path, 3)
    path = tmp_path / "dataset-000000.tar"
    start = int(index_shard(path).samples[1]["start"])
    content = bytearray(path.read_bytes())
    content[start + 5] ^= 255
    path.write_bytes(content)
    (message,) = bad_of(source(manifest))
    assert f"record 1: dataset-000000.tar, sample at byte {start}: the sample is damaged" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x1f\x8b\x08" + bytes(600), "is a packed tar file"),
        (b"no tar" * 200, "not a tar file"),
        (b"", "not a tar file"),
        (bytes(10240), "the shards hold no samples"),
    ],
)
def test_files_that_are_no_shards(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        ShardFile(tmp_path / "a.tar")
    assert str(caught.value.file) == str(tmp_path / "a.tar")


def test_manifest_and_index_belong_together(tmp_path: Path) -> None:
    manifest = shard_set(tmp_path, 2)
    other = shard_set(tmp_path / "other", 3)
    index = tmp_path / "set.index.npy"
    index.write_bytes((other.parent / "set.index.npy").read_bytes())
    with pytest.raises(DataError, match="belongs to another manifest; write the manifest again"):
        ShardFile(manifest)
    index.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        ShardFile(manifest)
    for text in ("[]", "{}", '{"version": 2}', "{"):
        manifest.write_text(text)
        with pytest.raises(DataError, match="no manifest of shards"):
            ShardFile(manifest)
        with pytest.raises(RecipeError, match=r"data\.train\.0\.path: .*no manifest of shards"):
            require_sources(DataOptions(train=[source(manifest)]), Pairs.formats)


@pytest.mark.parametrize("name", ["", ".", "/", "a/..", "a\0b"])
def test_a_manifest_names_its_index(tmp_path: Path, name: str) -> None:
    manifest = shard_set(tmp_path, 1)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"index": name}))
    with pytest.raises(DataError, match="index"):
        ShardFile(manifest)


def test_damage_without_a_reason_is_told(tmp_path: Path) -> None:
    manifest = shard_set(tmp_path, 1)
    content = json.loads(manifest.read_text())
    content["shards"][0]["damage"] = ""
    manifest.write_text(json.dumps(content))
    (message,) = bad_of(source(manifest))
    assert "the shard is damaged" in message


def test_a_manifest_leads_nowhere_out_of_its_root(tmp_path: Path) -> None:
    shard_set(tmp_path / "secret", 1)
    manifest = shard_set(tmp_path / "a", 1)
    content = json.loads(manifest.read_text())
    content["shards"][0]["file"] = "../secret/dataset-000000.tar"
    manifest.write_text(json.dumps(content))
    (message,) = bad_of(source(manifest))
    assert "'..' is refused" in message
    with pytest.raises(DataError, match="lies outside"):
        write_manifest(
            tmp_path / "a" / "b.shards.json", [tmp_path / "secret" / "dataset-000000.tar"]
        )


def test_a_sample_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_SAMPLE_BYTES >= 2**28
    monkeypatch.setattr(shards_module, "MAX_SAMPLE_BYTES", 1000)
    (message, *_) = bad_of(source(shard_set(tmp_path, 2)))
    assert "a sample of 2,048 bytes; at most 1,000 are read" in message


# -- where shards are refused ----------------------------------------------------------------------


def test_what_needs_files_of_their_own_is_refused(tmp_path: Path) -> None:
    manifest = shard_set(tmp_path, 1)
    options = DataOptions(train=[source(manifest)], cache_features="features")
    with pytest.raises(RecipeError, match=r"data\.cache_features: features are kept by file"):
        Pairs(processor()).check_options(options)
    records = Records([source(manifest)], Pairs(processor()))
    with pytest.raises(DataError, match="lies in a shard and is no file of its own"):
        records.media_path(0, records[0].item)
    fields = json.dumps({"volume": "0.nii", "caption": "c"}).encode()
    path = write_tar(tmp_path / "v.tar", [("0.json", fields), ("0.nii", b"x")])
    (message,) = bad_of(source(path))
    assert "the model takes no volumes" in message or "a volume in a shard is not read" in message


def test_a_folder_of_shards_says_what_to_do(tmp_path: Path) -> None:
    shard_set(tmp_path, 1)
    with pytest.raises(DataError, match="write a manifest with 'medm data shards'"):
        Records([source(tmp_path)], Pairs())


# -- order -----------------------------------------------------------------------------------------


def test_an_epoch_goes_from_shard_to_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medm.data.sampling.OPEN_SHARDS", 2)
    sizes = [5, 1, 7, 3, 4]
    rng = np.random.default_rng(1)
    order = shard_order(sizes, rng)
    assert sorted(order) == list(range(20))
    shard = np.searchsorted(np.cumsum(sizes), order, side="right")
    runs = [set(shard[:at].tolist()) & set(shard[at:].tolist()) for at in range(1, 20)]
    assert max(map(len, runs)) <= 2
    assert sum(not run for run in runs) >= 2  # three runs of at most two shards
    assert order.tolist() != sorted(order)
    assert not np.array_equal(order, shard_order(sizes, rng))
    assert np.array_equal(
        shard_order([9], np.random.default_rng(3)), np.random.default_rng(3).permutation(9)
    )


def position(data: ExampleDataset[Any], *, world: int, rank: int, **settings: Any) -> Any:
    return build_batches(
        DataOptions(train=list(data.records.sources)),
        data.records.sizes,
        batch_size=3,
        rank=rank,
        world=world,
        groups=data.records.groups,
        **settings,
    )


def read(data: ExampleDataset[Any], sampler: Any, *, workers: int = 0) -> list[list[str]]:
    loading: Any = DataLoader(
        data, batch_sampler=sampler, num_workers=workers, collate_fn=lambda examples: examples
    )
    return [[text_of(example) for example in examples] for examples in loading]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_uneven_shards_over_ranks_and_workers_give_every_pair_once(
    tmp_path: Path, world: int
) -> None:
    data = pairs_of(source(shard_set(tmp_path, 7, 1, 4, 2)))
    expected = sorted(f"{k}.{n}" for k, size in enumerate((7, 1, 4, 2)) for n in range(size))
    for epoch in range(2):
        seen: list[str] = []
        for rank in range(world):
            sampler = position(data, world=world, rank=rank)
            sampler.start(epoch)
            batches = read(data, sampler, workers=2 if rank == 0 else 0)
            assert len(batches) == len(sampler)
            seen += [text for batch in batches for text in batch]
        assert sorted(seen) == expected


def test_two_processes_read_together_what_one_reads(tmp_path: Path) -> None:
    """The check, the order and the batches of a run: shards of 6, 5 and 1 with a bad sample, and a
    JSON file; each step has the same pairs, and none twice."""
    manifest = shard_set(tmp_path, 6, 5, 1)
    write_tar(tmp_path / "dataset-000001.tar", [*samples("1.0", "1.1"), ("9.txt", b"no image")])
    write_manifest(manifest, shards_in([tmp_path]))
    write_image(tmp_path / "a.png")
    records = [
        {"image": "a.png", "captions": [f"j.{k}", f"j.{k}b"], "id": f"{k}"} for k in range(5)
    ]
    lines = write_lines(tmp_path / "p.jsonl", *records)
    one = batches(str(manifest), str(lines))
    on_processes(2, "tests.data.shard_ranks", str(manifest), str(lines), str(tmp_path / "rank"))
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert all(found["counts"] == one["counts"] for found in ranks)
    assert one["counts"]["left_out_by_check"] == 1
    for epoch in range(2):
        steps = [found["epochs"][epoch] for found in (*ranks, one)]
        assert [sorted(a + b) for a, b in zip(*steps[:2], strict=True)] == [
            sorted(batch) for batch in steps[2]
        ]
        seen = sorted(text.rstrip("b") for batch in steps[2] for text in batch)
        assert seen == sorted(
            [*(f"0.{k}" for k in range(6)), "1.0", "1.1", "2.0", *(f"j.{k}" for k in range(5))]
        )


def test_a_position_in_the_middle_of_a_shard_is_found_again(tmp_path: Path) -> None:
    data = pairs_of(source(shard_set(tmp_path, 5, 6, 4)))
    sampler = position(data, world=1, rank=0)
    sampler.start(1)
    whole = read(data, sampler)
    sampler.start(0)
    assert read(data, sampler) != whole
    for done in range(len(whole)):
        fresh = position(pairs_of(*data.records.sources), world=1, rank=0)
        fresh.start(1, done)
        assert read(data, fresh) == whole[done:]


def test_left_out_records_leave_the_order_of_the_others_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medm.data.sampling.OPEN_SHARDS", 1)
    data = pairs_of(source(shard_set(tmp_path, 4, 3, 4)))
    lengths = [1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    (order,) = [
        [
            text
            for batch in read(data, position(data, world=1, rank=0, lengths=lengths))
            for text in batch
        ]
    ]
    assert sorted(order) == ["0.0", "0.2", "0.3", "2.0", "2.1", "2.2", "2.3"]
    assert len({text[0] for text in order[:3]}) == 1 or len({text[0] for text in order[:4]}) == 1


def test_several_sets_are_mixed_evenly_without_weights_and_by_weight_with(tmp_path: Path) -> None:
    large = source(shard_set(tmp_path / "large", 30, 30, 30))
    small = source(write_lines(tmp_path / "s.jsonl", *[{"image": "a.png", "caption": "s"}] * 30))
    records = Records([large, small], Pairs(processor()))

    def sources_of(options: DataOptions) -> np.ndarray:
        sampler = build_batches(options, records.sizes, batch_size=6, groups=records.groups, seed=2)
        return np.asarray([index >= 90 for batch in sampler for index in batch])

    even = sources_of(DataOptions(train=[large, small]))
    assert even.sum() == 30 and len(even) == 120
    assert all(2 <= part.sum() <= 8 for part in np.split(even, 6))
    weighted = DataOptions(
        train=[
            one.model_copy(update={"weight": weight})
            for one, weight in ((large, 1.0), (small, 3.0))
        ]
    )
    found = sources_of(weighted)
    assert found.sum() == 90 and len(found) == 120
    assert all(abs(part.sum() - 15) <= 2 for part in np.split(found, 6))


def test_sets_without_shards_keep_their_order() -> None:
    """A set of one group draws what it drew before there were groups."""
    sizes = [40, 7]
    assert np.array_equal(
        Mixture(sizes, [1, 2], seed=4)(3), Mixture(sizes, [1, 2], seed=4, groups=[[40], [7]])(3)
    )


def test_a_limit_cuts_the_last_shard(tmp_path: Path) -> None:
    records = Records([source(shard_set(tmp_path, 3, 3, 3), limit=4)], Pairs())
    assert records.sizes == (4,) and records.groups == ((3, 1),)


# -- writing ---------------------------------------------------------------------------------------


def write_pairs(folder: Path, count: int, **changes: Mapping[str, Any]) -> Path:
    write_image(folder / "images" / "a.png", 10)
    Image.new("L", (5, 4), 77).save(folder / "images" / "b.jpg")
    records: list[dict[str, Any]] = [
        {
            "image": f"images/{'a.png' if k % 2 else 'b.jpg'}",
            "captions": [f"{k}", "é"],
            "label": k % 3,
        }
        for k in range(count)
    ]
    for index, change in changes.items():
        records[int(index.removeprefix("r"))] |= change
    return write_lines(folder / "p.jsonl", *records)


def test_written_shards_hold_the_same_pairs(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 7, r3={"id": "case 3", "source": "roco", "split": "train"})
    manifest = tmp_path / "out" / "p.shards.json"
    written = write_shards(manifest, [source(path)], samples=3)
    assert (written.shards, written.samples, written.num_bad) == (3, 7, 0)
    assert sorted(file.name for file in manifest.parent.iterdir()) == [
        "p-000000.tar", "p-000001.tar", "p-000002.tar", "p.index.npy", "p.shards.json",
    ]  # fmt: skip
    assert ShardFile(manifest).groups == (3, 3, 1)
    before, after = pairs_of(source(path)), pairs_of(source(manifest))
    for index in range(7):
        one, other = before.records[index], after.records[index]
        assert (one.captions, one.label, one.source, one.extra) == (
            other.captions, other.label, other.source, other.extra,
        )  # fmt: skip
        first, second = before[index], after[index]
        assert first is not None and second is not None
        np.testing.assert_array_equal(first.pixels["image"][0], second.pixels["image"][0])
        assert first.input_ids == second.input_ids
    assert after.records[3].id == "case 3"
    report = check([source(manifest)], Pairs(processor()), decode=True)
    assert report.ok, report.lines()
    again = tmp_path / "again" / "p.shards.json"
    write_shards(again, [source(path)], samples=3)
    for file in manifest.parent.iterdir():
        assert (again.parent / file.name).read_bytes() == file.read_bytes()


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    write_image(tmp_path / "0.png", shade=0)
    path = write_lines(tmp_path / "in.jsonl", {"image": "0.png", "captions": ["a"], "id": "p"})
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("p-000000.tar", "p.index.npy", "p.shards.json"):
        (folder / f".{name}.99-0123abcd.tmp").write_bytes(b"half")
    (folder / ".q-000000.tar.99-0123abcd.tmp").write_bytes(b"of another set")
    write_shards(folder / "p.shards.json", [source(path)])
    hidden = [file.name for file in folder.iterdir() if file.name.startswith(".")]
    assert hidden == [".q-000000.tar.99-0123abcd.tmp"]


def test_bad_records_are_refused_or_left_out_when_writing(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "r1": {"image": "images/gone.png"}, "r2": {"captions": []}, "r4": {"image": "p.jsonl"},
    }  # fmt: skip
    path = write_pairs(tmp_path, 6, **changes)
    manifest = tmp_path / "out" / "p.shards.json"
    with pytest.raises(DataError, match=r"p\.jsonl, record 1, field 'image': .*no such file"):
        write_shards(manifest, [source(path)])
    assert not list(manifest.parent.glob("*"))
    written = write_shards(manifest, [source(path)], bad_records="skip")
    assert (written.samples, written.num_bad) == (3, 3)
    assert [error.index for error in written.bad] == [1, 2, 4]
    assert [record["captions"][0] for record in ShardFile(manifest)] == ["0", "3", "5"]


def test_volumes_are_refused_when_writing(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"volume": "a.nii", "caption": "c"})
    with pytest.raises(DataError, match="shards hold 2-D images; train volumes from a JSON file"):
        write_shards(tmp_path / "p.shards.json", [source(path)])
    with pytest.raises(DataError, match=r"expected a name that ends in \.shards\.json"):
        write_shards(tmp_path / "p.json", [source(path)])


def test_shards_elsewhere_are_named_by_root(tmp_path: Path) -> None:
    shard_set(tmp_path / "readonly", 2, 1)
    found = shards_in([tmp_path / "readonly"])
    assert [path.name for path in found] == ["dataset-000000.tar", "dataset-000001.tar"]
    manifest = tmp_path / "mine" / "m.shards.json"
    write_manifest(manifest, found, root=tmp_path / "readonly")
    data = pairs_of(source(manifest, root=str(tmp_path / "readonly")))
    assert [text_of(data[index]) for index in range(3)] == ["0.0", "0.1", "1.0"]
    assert shards_in([tmp_path / "mine" / "m.shards.json"]) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.tar files"):
        shards_in([tmp_path / "empty"])


def num_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_MAX_OPEN", 2)
    file = ShardFile(shard_set(tmp_path, *[1] * 6))
    before = num_open()
    for _ in range(2):
        assert [record["caption"] for record in file] == [f"{k}.0" for k in range(6)]
    assert num_open() <= before + 3
    del file
    assert num_open() <= before


def test_a_damaged_index_is_not_parsed(tmp_path: Path) -> None:
    """numpy raises TokenError for a header with an open bracket."""
    write_image(tmp_path / "a.png")
    lines = write_lines(tmp_path / "in.jsonl", {"image": "a.png", "captions": ["one"]})
    manifest = tmp_path / "a.shards.json"
    write_shards(manifest, [SourceOptions(path=str(lines), root=str(tmp_path))])
    [index] = tmp_path.glob("*.npy")
    index.write_bytes(index.read_bytes().replace(b"}", b"(", 1))
    with pytest.raises(DataError, match="belongs to another manifest"):
        ShardFile(manifest)
