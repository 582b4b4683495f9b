"""Texts, scores, vectors and matches of studies by a tiny model of kind `blip`."""

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
from medm.errors import DataError, RecipeError
from medm.inference.batch import infer
from medm.inference.options import EmbedOptions, InferOptions
from medm.models import load
from medm.models.blip.modeling import MedmBlip
from medm.models.blip.processing import MedmBlipProcessor
from tests.models.blip import tiny
from tests.models.dual_encoder.tiny import save_tokenizer

REPORTS = ("mass of the left lung", "normal", "effusion", "a chest radiograph", "normal")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with two views and knowledge in `model`, nine images, and five studies."""
    root = tmp_path_factory.mktemp("studies")
    tokenizer = save_tokenizer(root / "tokenizer")
    content = tiny.section(tokenizer, image={"views": 2}, knowledge=tiny.knowledge(root)[:1])
    model, processor = tiny.make(content)
    with torch.no_grad():  # tokens of random weights repeat; this decoder says different words
        assert model.decoder is not None
        model.decoder.bias.copy_(torch.linspace(-0.3, 0.3, len(model.decoder.bias)))
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    for index in range(9):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.png")
    write(root / "studies.jsonl", records())
    return root


def records() -> list[dict[str, Any]]:
    """Five studies of one to three images, one of which is asked about."""
    images = [
        ["0.png"],
        ["1.png", "2.png"],
        ["3.png", "4.png", "missing.png"],
        ["5.png"],
        ["6.png"],
    ]
    rows: list[dict[str, Any]] = [
        {"id": f"s{n}", "images": images[n], "report": REPORTS[n]} for n in range(5)
    ]
    del rows[3]["report"]
    rows[3]["question"] = "effusion left lung"
    return rows


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(root: Path, output: Path, data: Path | None = None, **changes: Any) -> list[dict[str, Any]]:
    section = {
        "model": str(root / "model"), "data": str(data or root / "studies.jsonl"),
        "root": str(root), "output": str(output), "workers": 0, "device": "cpu",
    }  # fmt: skip
    infer(validate(InferOptions, {**section, **changes}, source="test"))
    return [json.loads(line) for line in output.read_text().splitlines()]


def opened(root: Path) -> tuple[MedmBlip, MedmBlipProcessor]:
    model, processor = load(str(root / "model"))
    assert isinstance(model, MedmBlip)
    assert isinstance(processor, MedmBlipProcessor)
    return model.eval(), processor


def pixels_of(processor: MedmBlipProcessor, root: Path, names: list[str]) -> torch.Tensor:
    return torch.from_numpy(np.stack([processor.load_pixels(root / name) for name in names]))


def test_texts_and_scores_are_the_models_own_one_by_one(root: Path, tmp_path: Path) -> None:
    """A batch of studies with different numbers of images and different prompts is answered as each
    study by itself; of three images the first two are read."""
    found = run(root, tmp_path / "out.jsonl")
    model, processor = opened(root)
    replies = set()
    for line, record in zip(found, records(), strict=True):
        images = record["images"][:2]
        pixels, counts = pixels_of(processor, root, images), torch.tensor([len(images)])
        prompt = processor.encode_prompt(record.get("question"))
        ids = model.generate(pixels, counts, prompt, num_beams=3, max_length=12, min_length=5)
        own = ids[0, prompt.shape[1] :].tolist()
        words = own[: own.index(3)] if 3 in own else own
        assert line["reply"] == processor.decode(words)
        assert (line["tokens"], line["finished"]) == (len(words) + (3 in own), 3 in own)
        assert line["tokens"] > 1
        with torch.no_grad():
            logits = model.label_scores(model.encode_images(pixels, counts).label_vector)[0]
        assert list(line["scores"]) == tiny.LABELS
        torch.testing.assert_close(torch.tensor([*line["scores"].values()]), logits)
        assert [*line["probabilities"].values()] == pytest.approx(
            logits.sigmoid().tolist(), abs=1e-4
        )
        replies.add(line["reply"])
    assert len(replies) > 1
    small = run(root, tmp_path / "one.jsonl", batch_size=1)
    assert [line["reply"] for line in small] == [line["reply"] for line in found]


def test_vectors_of_images_and_reports_have_length_one(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors.jsonl"
    section = {
        "model": str(root / "model"), "data": str(root / "studies.jsonl"), "captions": True,
        "output": str(output), "workers": 0, "batch_size": 2, "device": "cpu",
    }  # fmt: skip
    infer(validate(EmbedOptions, section, source="test"))
    found = [json.loads(line) for line in output.read_text().splitlines()]
    model, processor = opened(root)
    assert found[3]["text_embeddings"] == []  # a question has no report
    pixels = pixels_of(processor, root, ["1.png", "2.png"])
    with torch.no_grad():
        image = normalize(model.get_image_features(pixels, torch.tensor([2])), dim=-1)[0]
        text = normalize(model.get_text_features(**processor.encode_text("normal")), dim=-1)[0]
    torch.testing.assert_close(torch.tensor(found[1]["embedding"]), image)
    torch.testing.assert_close(torch.tensor(found[1]["text_embeddings"][0]), text)
    assert image.norm() == pytest.approx(1)


def test_matches_are_logits_of_images_with_reports_of_the_file(root: Path, tmp_path: Path) -> None:
    rows = records()
    rows[1]["candidates"] = ["s0", "s1", "s2"]
    data = write(tmp_path / "matched.jsonl", rows)
    options = {"studies": {"answers": "matches"}}
    found = run(root, tmp_path / "out.jsonl", data, batch_size=1, **options)
    model, processor = opened(root)
    with torch.no_grad():
        seen = model.encode_images(
            pixels_of(processor, root, ["1.png", "2.png"]), torch.tensor([2])
        )
        for number in range(3):
            logits = model.match(seen, **processor.encode_text(REPORTS[number]))[0]
            assert found[1]["matches"][f"s{number}"] == pytest.approx(logits[1].item(), abs=1e-5)
    assert found[0]["matches"] == {}
    rows[1]["candidates"] = ["s3"]
    with pytest.raises(DataError, match="'s3': no record of the file has this id and a report"):
        run(root, tmp_path / "wrong.jsonl", write(tmp_path / "wrong.json", rows), **options)


def test_without_knowledge_tokens_are_those_of_the_tower(root: Path, tmp_path: Path) -> None:
    scores = {"studies": {"answers": "scores"}}
    on = run(root, tmp_path / "on.jsonl", **scores)
    off = run(root, tmp_path / "off.jsonl", studies={"answers": "scores", "knowledge": "off"})
    model, processor = opened(root)
    model.knowledge = None
    with torch.no_grad():
        seen = model.encode_images(pixels_of(processor, root, ["0.png"]))
        logits = model.label_scores(seen.label_vector)[0]
    torch.testing.assert_close(torch.tensor([*off[0]["scores"].values()]), logits)
    assert on[0]["scores"] != pytest.approx(off[0]["scores"])
    assert "reply" not in on[0]


def test_a_run_resumes_and_names_bad_records(root: Path, tmp_path: Path) -> None:
    rows = records()
    rows[0]["images"] = ["none.png"]
    data, output = write(tmp_path / "bad.jsonl", rows), tmp_path / "out.jsonl"
    options: dict[str, Any] = {"studies": {"answers": "scores"}}
    found = run(root, output, data, **options)
    assert [line["index"] for line in found] == list(range(5))
    assert "none.png" in found[0]["error"]
    assert [line for line in found if "error" in line] == found[:1]
    content = output.read_bytes()
    output.write_bytes(content[: content.rindex(b'{"index": 4') + 9])  # a torn line
    again = run(root, output, data, **options)
    for line, other in zip(again[1:], found[1:], strict=True):
        assert line["scores"] == pytest.approx(other["scores"], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation": {"max_new_tokens": 5}}, "max_new_tokens: for language models"),
        ({"overlays": True}, "overlays: not for models of studies"),
        ({"json_output": "x.json"}, "json_output: not for models of studies"),
    ],
)
def test_options_of_other_models_are_refused(
    root: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        run(root, tmp_path / "out.jsonl", **options)
