"""`medm zero-shot` and `medm embed` with a tiny dual encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medm.inference.embedder import load_embedder
from medm.inference.zero_shot import class_vectors
from medm.models.dual_encoder.embedder import Embedder
from tests.cli.runner import medm
from tests.encoders.tiny import TINY_ENCODERS
from tests.models.dual_encoder import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dual encoder in `model`, and images."""
    root = tmp_path_factory.mktemp("embed")
    tokenizer = tiny.save_tokenizer(root / "tokenizer")
    model, processor = tiny.make(tiny.section(tokenizer))
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    (root / "images/deep").mkdir(parents=True)
    for name, seed in (("a.png", 0), ("deep/b.png", 1), ("c.png", 2)):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / name)
    (root / "images/notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def embedder(root: Path) -> Embedder:
    return load_embedder(str(root / "model"), device=torch.device("cpu"))


def test_probabilities_are_the_softmax_of_the_ensembles(root: Path, embedder: Embedder) -> None:
    files = [str(root / "images/a.png"), str(root / "images/c.png")]
    templates = ["a radiograph of the {}", "{}"]
    flags = [part for text in templates for part in ("--template", text)]
    done = medm(
        "zero-shot", *files, "--model", str(root / "model"), "--labels", "knee; brain;chest",
        *flags, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [line["file"] for line in found] == files
    texts = class_vectors(embedder, ["knee", "brain", "chest"], templates)
    expected = (embedder.scale * embedder.images(files) @ texts.T).softmax(dim=1)
    for line, row in zip(found, expected, strict=True):
        assert list(line["probabilities"]) == ["knee", "brain", "chest"]
        assert list(line["probabilities"].values()) == pytest.approx(row.tolist())
    assert "Not for clinical use" in done.err


def test_the_table_is_ranked_and_a_broken_file_does_not_stop_the_others(
    root: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    good = str(root / "images/a.png")
    done = medm(
        "zero-shot", str(broken), good, "--model", str(root / "model"), "--labels", "knee; brain"
    )
    assert done.code == 1
    assert "broken.png" in done.err
    assert "1 of 2 files could not be read" in done.err
    numbers = [float(line.split()[-1]) for line in done.out.splitlines() if line.startswith("  ")]
    assert len(numbers) == 2
    assert numbers == sorted(numbers, reverse=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "knee"], "expected two or more different labels"),
        (["--labels", "knee; knee"], "expected two or more different labels"),
        (["--labels", "a; b", "--template", "a knee"], "expected one {}"),
    ],
)
def test_what_cannot_be_compared_is_refused(root: Path, flags: list[str], message: str) -> None:
    done = medm("zero-shot", str(root / "images/a.png"), "--model", str(root / "model"), *flags)
    assert done.code == 2
    assert message in " ".join(done.err.split())


def test_heatmaps_are_images_that_say_what_they_are_of(root: Path, tmp_path: Path) -> None:
    done = medm(
        "zero-shot", str(root / "images/a.png"), "--model", str(root / "model"), "--labels",
        "knee; left mass", "--heatmap", str(tmp_path / "maps"), "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    files = json.loads(done.out)["heatmaps"]
    assert Path(files["left mass"]).name == "000-a-1-left-mass.png"
    first, second = (np.asarray(Image.open(files[name])) for name in ("knee", "left mass"))
    assert first.shape[2] == 3
    assert (first != second).any()


def test_a_heatmap_is_red_where_the_similarity_is_highest(tmp_path: Path) -> None:
    from medm.imaging import load_pixels
    from medm.imaging.options import ImagePreprocess, VolumePreprocess
    from medm.imaging.preview import _covered, similarity_sheet, similarity_sheet_of_pixels

    covered = _covered(np.zeros((40, 40)), np.array([[0.0, 0.5], [0.25, 1.0]]))
    top, bottom = covered[2, 2], covered[-3, -3]
    assert top[2] > top[0]  # blue
    assert bottom[0] > bottom[2]  # red
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    np.save(tmp_path / "v.npy", np.zeros((8, 16, 16), np.float32))
    flat = similarity_sheet(
        tmp_path / "a.png", ImagePreprocess(size=[16, 16]), np.eye(2), "x", tile=64
    )
    deep = similarity_sheet(
        tmp_path / "v.npy", VolumePreprocess(size=[8, 16, 16], scale="minmax"),
        np.arange(8.0).reshape(2, 2, 2), "x", tile=64,
    )  # fmt: skip
    assert flat.size[0] >= 64
    assert deep.size[1] > flat.size[1]

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 48, 3), np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "v.npy", rng.normal(size=(8, 16, 16)).astype(np.float32))
    for name, preprocess, similarity in (
        ("a.png", ImagePreprocess(size=[16, 16]), np.eye(2)),
        ("v.npy", VolumePreprocess(size=[8, 16, 16], scale="minmax", mean=[0.2], std=[0.3]),
         np.arange(8.0).reshape(2, 2, 2)),
    ):  # fmt: skip
        path = tmp_path / name
        of_file = similarity_sheet(path, preprocess, similarity, "x", tile=64)
        pixels = load_pixels(path, preprocess)
        of_pixels = similarity_sheet_of_pixels(pixels, preprocess, similarity, "x", tile=64)
        lines = of_file.size[1] - of_pixels.size[1]
        assert lines > 0  # name and size of the file
        width = of_pixels.size[0]  # that of a file has a wider title
        same = [np.asarray(one).astype(int)[-60:, :width] for one in (of_pixels, of_file)]
        np.testing.assert_allclose(*same, atol=1)
        assert same[0].std() > 10


def test_a_folder_becomes_an_archive_of_ids_and_vectors(
    root: Path, embedder: Embedder, tmp_path: Path
) -> None:
    output = tmp_path / "x.npz"
    command = ("embed", str(root / "images"), "--model", str(root / "model"), "--output")
    done = medm(*command, str(output))
    assert done.code == 0, done.err
    assert "3 records: 3 with a vector, 0 without" in done.out
    with np.load(output, allow_pickle=False) as archive:
        assert archive["ids"].tolist() == ["a.png", "c.png", "deep/b.png"]
        vectors = archive["embeddings"]
    expected = embedder.images(
        [root / "images" / name for name in ("a.png", "c.png", "deep/b.png")]
    )
    np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-6)
    before = output.read_bytes()
    again = medm(*command, str(output))
    assert again.code == 0, again.err
    assert "3 of them by earlier runs" in again.err
    assert output.read_bytes() == before


def test_captions_have_rows_of_their_own(root: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.csv"
    data.write_text('id,image,captions\np,a.png,"[""knee"", ""mass""]"\nq,c.png,brain\n')
    output = tmp_path / "x.npz"
    done = medm(
        "embed", str(data), "--model", str(root / "model"), "--root", str(root / "images"),
        "--output", str(output), "--captions",
    )  # fmt: skip
    assert done.code == 0, done.err
    with np.load(output) as archive:
        assert archive["text_rows"].tolist() == [0, 0, 1]
        assert archive["text_embeddings"].shape == (3, 20)


def test_outputs_that_cannot_be_written_are_refused_before_any_work(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("embed", str(root / "images"), "--model", str(root / "model"), "--output")
    done = medm(*command, str(tmp_path / "x.txt"))
    assert done.code == 2
    assert "ends in .jsonl, .npz, .parquet" in " ".join(done.err.split())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = medm(*command, str(tmp_path / "x.parquet"))
    assert "Parquet needs pyarrow" in " ".join(done.err.split())
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    done = medm(
        "embed", str(tmp_path / "empty"), "--model", str(root / "model"), "--output",
        str(tmp_path / "x.jsonl"),
    )  # fmt: skip
    assert "expected images at any depth, found none" in " ".join(done.err.split())


def test_a_model_of_volumes_takes_volumes(tmp_path: Path) -> None:
    volume = TINY_ENCODERS["m3d-clip"]
    section = tiny.section(tiny.save_tokenizer(tmp_path / "tokenizer"), branch="volume")
    section["image"] = {
        "encoder": {key: value for key, value in volume.block.items() if key != "image_size"},
        "pool": "mean",
        "preprocess": {
            "size": list(volume.pixels[1:]), "scale": "minmax", "orientation": None,
        },
    }  # fmt: skip
    model, processor = tiny.make(section)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    voxels = np.random.default_rng(0).normal(size=(20, 30, 30)).astype(np.float32)
    (tmp_path / "scans").mkdir()
    np.save(tmp_path / "scans/a.npy", voxels)
    done = medm(
        "zero-shot", str(tmp_path / "scans/a.npy"), "--model", str(tmp_path / "model"), "--labels",
        "mass; normal", "--heatmap", str(tmp_path / "maps"),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(list((tmp_path / "maps").glob("*.png"))) == 2
    output = tmp_path / "x.npz"
    done = medm(
        "embed", str(tmp_path / "scans"), "--model", str(tmp_path / "model"), "--output",
        str(output),
    )  # fmt: skip
    assert done.code == 0, done.err
    with np.load(output) as archive:
        assert archive["ids"].tolist() == ["a.npy"]
