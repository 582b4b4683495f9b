"""Vectors, ensembles, scores and maps of a tiny dual encoder, against its own features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from medm.config import validate
from medm.errors import CheckpointError, RecipeError
from medm.inference.batch import infer
from medm.inference.embedder import load_embedder
from medm.inference.options import EmbedOptions
from medm.models.dual_encoder.embedder import Embedder
from tests.models.dual_encoder import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved dual encoder with a class token, `model`, and six images."""
    root = tmp_path_factory.mktemp("dual")
    model, processor = tiny.make(tiny.section(tiny.save_tokenizer(root / "tokenizer")))
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return load_embedder(str(folder / "model"), device=torch.device("cpu"), batch_size=2)


def test_vectors_are_the_models_features_at_length_one(embedder: Embedder, folder: Path) -> None:
    files = [folder / f"{index}.png" for index in range(5)]
    pixels = embedder.processor(images=files)["pixels"]
    with torch.no_grad():
        expected = normalize(embedder.model.get_image_features(pixels), dim=-1)
    torch.testing.assert_close(embedder.images(files), expected)
    texts = ["a chest radiograph", "normal", "effusion of the left"]
    encoded = embedder.processor.encode_text(texts)
    with torch.no_grad():
        expected = normalize(embedder.model.get_text_features(**encoded), dim=-1)
    torch.testing.assert_close(embedder.texts(texts), expected)


def test_an_ensemble_is_the_normalized_mean_of_normalized_texts(embedder: Embedder) -> None:
    ensemble = embedder.ensembles([["normal", "a chest radiograph"], ["mass"]])
    one, two, three = embedder.texts(["normal", "a chest radiograph", "mass"])
    torch.testing.assert_close(ensemble[0], (one + two) / (one + two).norm())
    torch.testing.assert_close(ensemble[1], three)
    assert ensemble.norm(dim=1).tolist() == pytest.approx([1, 1])


def test_probabilities_are_over_texts_or_of_each_alone_with_a_bias(embedder: Embedder) -> None:
    images, texts = embedder.texts(["normal"]), embedder.texts(["mass", "effusion"])
    logits = embedder.logits(images, texts)
    torch.testing.assert_close(logits, 14.2857 * images @ texts.T, atol=1e-3, rtol=1e-4)
    assert embedder.probabilities(logits).sum() == pytest.approx(1)
    biased = Embedder(embedder.model, embedder.processor)
    biased.bias = -10.0
    torch.testing.assert_close(biased.logits(images, texts), logits - 10)
    torch.testing.assert_close(biased.probabilities(logits), 1 / (1 + (-logits).exp()))


def test_a_map_is_the_cosine_of_each_cell(embedder: Embedder, folder: Path) -> None:
    pixels = torch.from_numpy(embedder.processor.load_pixels(folder / "0.png"))[None]
    texts = embedder.texts(["mass", "normal", "effusion"])
    maps = embedder.similarity_maps(pixels, texts)
    assert maps.shape == (1, 3, 2, 2)
    with torch.no_grad():
        cells, grid = embedder.model.get_patch_features(pixels)
    assert grid == (2, 2)
    torch.testing.assert_close(maps[0, 1, 1, 0], normalize(cells[0, 2], dim=0) @ texts[1])


def embed(folder: Path, output: Path, **changes: Any) -> Any:
    data = folder / "data.jsonl"
    if not data.exists():
        rows = [{"id": f"p{n}", "image": f"{n}.png", "captions": ["normal", "mass"]} for n in
                range(6)]  # fmt: skip
        data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    section = {"model": str(folder / "model"), "data": str(data), "output": str(output)}
    return infer(validate(EmbedOptions, {**section, **changes}, source="test"))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_that_was_stopped_resumes_and_gives_the_same_lines(
    embedder: Embedder, folder: Path, tmp_path: Path
) -> None:
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    summary = embed(folder, whole, captions=True)
    assert (summary.records, summary.answered, summary.resumed) == (6, 6, 0)
    found = lines(whole)
    assert [line["id"] for line in found] == [f"p{n}" for n in range(6)]
    expected = embedder.images([folder / f"{n}.png" for n in range(6)])
    torch.testing.assert_close(torch.tensor([line["embedding"] for line in found]), expected)
    torch.testing.assert_close(
        torch.tensor(found[0]["text_embeddings"]), embedder.texts(["normal", "mass"])
    )
    embed(folder, torn, captions=True)
    content = torn.read_bytes()
    torn.write_bytes(content[: content.index(b"\n", len(content) // 2) + 20])  # a torn line
    summary = embed(folder, torn, captions=True)
    assert 0 < summary.resumed < 6
    # Rows of another batch may differ in the last digit.
    again = lines(torn)
    assert [(line["index"], line["id"]) for line in again] == [(n, f"p{n}") for n in range(6)]
    for line, other in zip(again, found, strict=True):
        assert line["embedding"] == pytest.approx(other["embedding"], abs=1e-6)


def test_a_file_that_cannot_be_read_becomes_an_error_and_is_tried_again(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.new("L", (9, 9)).save(tmp_path / "good.png")
    data = tmp_path / "d.csv"
    data.write_text("id,image\nx,bad.png\ny,good.png\n")
    output = tmp_path / "out.jsonl"
    summary = embed(folder, output, data=str(data))
    assert (summary.answered, summary.errors) == (1, 1)
    assert "error" in lines(output)[0]
    assert len(lines(output)[1]["embedding"]) == 20
    Image.new("L", (9, 9)).save(tmp_path / "bad.png")
    assert embed(folder, output, data=str(data)).errors == 0


def test_vectors_of_another_model_are_not_resumed(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    embed(folder, output)
    with pytest.raises(RecipeError, match="captions was False and is now True"):
        embed(folder, output, captions=True)
    assert embed(folder, output, captions=True, overwrite=True).resumed == 0


def test_scores_are_those_of_the_ensembles_of_the_records_task(
    embedder: Embedder, folder: Path, tmp_path: Path
) -> None:
    data = folder / "sets.jsonl"
    data.write_text(
        '{"id": "a", "image": "0.png", "task": "one"}\n{"id": "b", "image": "1.png", "task": "two"}'
    )
    texts = {"one": {"x": ["normal", "mass"], "y": ["effusion"]}, "two": {"z": ["left"]}}
    embed(folder, tmp_path / "o.jsonl", data=str(data), class_texts=texts, vectors="none")
    first, second = lines(tmp_path / "o.jsonl")
    assert "embedding" not in first
    images = embedder.images([folder / "0.png", folder / "1.png"])
    logits = embedder.logits(images, embedder.ensembles([["normal", "mass"], ["effusion"]]))
    assert first["scores"] == pytest.approx(dict(zip("xy", logits[0].tolist(), strict=True)))
    assert list(second["scores"]) == ["z"]


def test_a_model_that_replies_in_text_gives_no_vectors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "medm-lvlm"}')
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises((CheckpointError, RecipeError)):
        load_embedder(str(tmp_path), device=torch.device("cpu"))
