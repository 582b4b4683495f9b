"""The tutorials, run to the letter: every command of a page, in order, in one folder of a reader.

Ids of the hub lead to tiny models in the published layouts (`tests.hub`). The port of the server is
replaced by a free one.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pydicom
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import medm
from tests import hub, own_files
from tests.launch import free_port
from tests.pages import DOCS, ROOT, Block, not_printed, run_page

PAGES = {"own-dicom-folder", "own-images", "own-benchmark", "medgemma-tower"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a reader's shell without a GPU, with the hub of the tests; of this process, too."""
    cache = tmp_path_factory.mktemp("hub")
    variables = {"CUDA_VISIBLE_DEVICES": "", "GPUS": "", "OMP_NUM_THREADS": "1"}
    variables |= hub.fill(cache)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the server, which is another process, so that sums are equal
    with hub.opened(cache), patch.object(torch.cuda, "is_available", return_value=False):
        yield variables
    torch.set_num_threads(threads)


def checkout(folder: Path) -> Path:
    """Make a folder look like a checkout."""
    for name in ("scripts", "docs", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def printed_by(run: list[Block], command: str) -> str:
    """What the only block with a command printed."""
    (block,) = [block for block in run if command in block.source]
    return block.printed


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in lines(folder / "loss.jsonl") if "loss" in entry]


def changed(before: Path, after: Path) -> set[str]:
    """The parts of a model of which training changed a tensor, or added one that is not zero."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    parts = set()
    for name, tensor in new.items():
        known = old.get(name.replace(".base_layer.", "."))
        added = known is None and "lora_B" in name and bool(tensor.any())
        if added or (known is not None and not torch.equal(known, tensor)):
            parts.add(".".join(name.split(".")[1:3]) if name.startswith("branches.") else "llm")
    return parts


def patients_of(file: Path) -> set[str]:
    return {record["patient"] for record in lines(file)}


def shows_what_is_printed(run: list[Block], *, but: str = "no block") -> None:
    """The output on a page is that of its commands; `but` is in a block whose output is not."""
    for block in run:
        assert but in block.source or not not_printed(block), (not_printed(block), block.printed)


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text("utf-8"))


def test_every_tutorial_is_run() -> None:
    assert {page.stem for page in (DOCS / "tutorials").glob("*.md")} == PAGES


@pytest.mark.timeout(600)
def test_own_dicom_folder(environment: dict[str, str], tmp_path: Path) -> None:
    own_files.ct_studies(checkout(tmp_path))
    run = run_page(
        "tutorials/own-dicom-folder.md", tmp_path, environment=environment,
        replace={"8000": str(free_port())},
    )  # fmt: skip

    shows_what_is_printed(run, but="medm estimate")  # whose table is of the published sizes
    assert "17 series, 2 not used" in run[0].printed
    with (tmp_path / "data" / "ct.series.csv").open(encoding="utf-8", newline="") as table:
        listed = {row["place"]: row for row in csv.DictReader(table)}
    refused = {place: row["reason"] for place, row in listed.items() if row["usable"] == "no"}
    assert len(listed) == 2 * own_files.CASES + 1
    assert refused == {
        own_files.LOCALIZER: "localizer",
        own_files.GAPS: "too few slices: 6, expected 8 or more",
    }
    records = lines(tmp_path / "data" / "ct.jsonl")
    cases = sorted(record["volume"][0] for record in records)
    assert cases == [f"case{case}/thin" for case in range(1, own_files.CASES + 1)]

    train, test = (
        patients_of(tmp_path / "data" / f"ct.{part}.jsonl") for part in ("train", "test")
    )
    assert not train & test and (len(train), len(test)) == (6, 2)
    assert "no leak between 2 files of 8 records" in printed_by(run, "data leaks")
    assert "8 records, 0 bad" in printed_by(run, "data check")
    with Image.open(tmp_path / "work_dirs" / "sheet.png") as sheet:
        assert sheet.format == "PNG"
    assert "one volume: 32 tokens" in printed_by(run, "medm estimate")

    trained = tmp_path / "work_dirs" / "ct"
    assert changed(tmp_path / "models" / "medm-vl-ct", trained) == {"llm", "volume.connector"}
    steps = losses(trained)
    assert len(steps) == 9 and steps[-1] < steps[0]

    scored = results_of(tmp_path / "work_dirs" / "ct_eval" / "custom")
    assert (scored["n"], scored["answered"], scored["scores"][0]["clusters"]) == (2, 2, 2)
    held_out = {record["id"] for record in lines(tmp_path / "data" / "ct.test.jsonl")}
    answered = lines(tmp_path / "work_dirs" / "ct_eval" / "custom" / "predictions.jsonl")
    assert {line["id"] for line in answered} == held_out

    (report,) = (tmp_path / "work_dirs" / "sr").iterdir()
    assert (pydicom.dcmread(report).Modality, pydicom.dcmread(report).PatientID) == (
        "SR",
        "patient-1",
    )
    reply = printed_by(run, "medm infer").rpartition("\ncut at 256 tokens\n")[0]
    (client,) = [block for block in run if block.language == "python"]
    served = re.sub(r"^[\d:]{8}  req-.*\n", "", client.printed, flags=re.MULTILINE)
    assert len(reply) > 8 and served.strip("\n") == reply.strip("\n")
    model = medm.load(str(tmp_path / "models" / "medm-vl-ct"))
    series = [tmp_path / "data" / "studies" / f"case{case}" / "thin" for case in (1, 2)]
    question = "Describe the findings of this CT."
    one, other = (model.ask(question, volume=place, max_new_tokens=64) for place in series)
    assert one != other, "a reply does not depend on the volume: equal replies would say nothing"
    # `wait` gives the exit status of the server, and the page ends at the first that is not 0.
    assert "draining" in run[-1].printed and "Traceback" not in run[-1].printed


@pytest.fixture(scope="module")
def images(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Block]]:
    """The folder in which a reader followed the tutorial on images, and what was printed."""
    folder = checkout(tmp_path_factory.mktemp("images"))
    own_files.image_table(folder)
    return folder, run_page("tutorials/own-images.md", folder, environment=environment)


@pytest.mark.timeout(600)
def test_own_images(images: tuple[Path, list[Block]]) -> None:
    folder, run = images
    shows_what_is_printed(run)
    records = lines(folder / "data" / "own.jsonl")
    assert [record["id"] for record in records] == [f"q{number}" for number in range(20)]
    train, test = (patients_of(folder / "data" / f"own.{part}.jsonl") for part in ("train", "test"))
    assert not train & test and (len(train), len(test)) == (7, 3)
    assert "no leak" in printed_by(run, "data leaks")
    assert "20 records, 0 bad" in printed_by(run, "data check")

    model = folder / "work_dirs" / "own"
    assert changed(folder / "models" / "medm-vl-2d", model) == {"llm", "image.connector"}
    steps = losses(model)
    assert len(steps) == 12 and steps[-1] < steps[0]

    asked = {record["id"]: record for record in lines(folder / "data" / "own.test.jsonl")}
    answered = {line["id"]: line for line in lines(folder / "work_dirs" / "own_test.jsonl")}
    assert set(answered) == set(asked) and len(asked) == 6
    for name, line in answered.items():
        assert line["reply"] and line["answer"] == asked[name]["conversations"][1]["value"]
    scored = results_of(folder / "work_dirs" / "own_eval" / "custom")
    assert (scored["n"], scored["scores"][0]["clusters"]) == (6, 3)
    assert scored["scores"][0]["name"] == "closed-accuracy"


@pytest.mark.timeout(600)
def test_own_benchmark(environment: dict[str, str], images: tuple[Path, list[Block]]) -> None:
    folder, _ = images
    run = run_page("tutorials/own-benchmark.md", folder, environment=environment)
    shows_what_is_printed(run)
    assert "no leak between 2 files of 19 records" in run[0].printed
    eval_dirs = folder / "work_dirs"
    after = results_of(eval_dirs / "after" / "custom")
    assert after["against"] == "work_dirs/before" and after["n"] == 5
    assert set(after["groups"]["kind"]) == {"place", "presence"}
    other = results_of(eval_dirs / "other" / "custom")
    score, compared = other["scores"][0], other["comparison"][0]
    assert (score["value"], score["low"], score["high"]) == (0.8, 0.5, 1.0)  # 4 of 5; p11: 1 of 2
    assert score["per_item"] == [1, 1, 0, 1, 1] and score["clusters"] == 3
    assert compared["first"] - compared["second"] == compared["difference"]
    assert compared["p_value"] > 0.2 or compared["difference"] == 0
    sides = results_of(eval_dirs / "after" / "sides")
    assert (sides["n"], sides["scores"][0]["name"]) == (4, "side-accuracy")
    assert "first side named|version:1" in sides["scores"][0]["signature"]
    assert sides["comparison"][0]["n"] == 4
    for name in ("before", "after"):
        replies = lines(eval_dirs / name / "sides" / "predictions.jsonl")
        assert [line["answer"] for line in replies] == ["left", "right", "left", "right"]


@pytest.mark.timeout(600)
def test_medgemma_tower(environment: dict[str, str], tmp_path: Path) -> None:
    run = run_page("tutorials/medgemma-tower.md", checkout(tmp_path), environment=environment)
    shows_what_is_printed(run)
    assert "4 records, 0 bad" in run[0].printed
    pretrained, finetuned = (
        tmp_path / "work_dirs/medgemma" / name for name in ("pretrain", "finetune")
    )
    assert changed(pretrained, finetuned) == {"llm", "image.connector"}
    snapshots = Path(environment["HF_HUB_CACHE"]) / "models--google--medgemma-4b-it" / "snapshots"
    published: dict[str, torch.Tensor] = {}
    for shard in (snapshots / hub.COMMIT).glob("*.safetensors"):
        published |= load_file(shard)
    tower = "branches.image.encoder."
    own = load_file(finetuned / "model.safetensors")
    patches = "embeddings.patch_embedding.weight"
    (name,) = [name for name in own if name.startswith(tower) and name.endswith(patches)]
    assert torch.equal(own[name], published[f"vision_tower.vision_model.{patches}"])
    config = json.loads((finetuned / "config.json").read_text())
    assert config["branches"]["image"]["spatial"] == [64, 64]
    assert "one image: 4 tokens" in printed_by(run, "medm estimate")
    assert len(printed_by(run, "medm infer").partition("\ncut at")[0]) > 4
    assert (tmp_path / "work_dirs" / "sheet.png").stat().st_size > 0
