"""`medm data cache`, `preview` and `convert` on the volumes that are shipped, and on a benchmark as
it is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import SimpleITK
import yaml
from PIL import Image

from medm.data.conversations import Conversations
from medm.data.options import SourceOptions
from medm.data.records import Records
from tests import tiny
from tests.cli.runner import medm
from tests.encoders.tiny import TINY_ENCODERS
from tests.tasks.layouts import LAYOUTS

DOCS = Path(__file__).parents[2] / "docs"
BALL = DOCS / "examples_media" / "ball_left.nii.gz"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    section = tiny.lvlm_section(tiny.save_llm("llama-3.2", folder / "llm"), family="llama-3.2")
    section["branches"] = {
        "volume": {
            "encoder": TINY_ENCODERS["m3d-clip"].block,
            "connector": {"name": "spatial-pooling"},
        }
    }
    written: dict[str, Any] = {
        "model": section,
        "data": {
            "train": [{"path": str(DOCS / "example_finetune_3d.json")}],
            "cache": {"dir": str(folder / "cache"), "max_gb": 0.1},
        },
        "parts": {"volume.connector": "full"},
        "output_dir": str(folder / "out"),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(written))
    return file


def test_cache_is_filled_once_and_again_for_another_preprocessing(recipe: Path) -> None:
    entries = recipe.parent / "cache" / "arrays"
    done = medm("data", "cache", str(recipe), "--workers", "0")
    assert done.code == 0, done.out + done.err
    assert done.out.startswith("3 files, 0 bad;")
    before = {path: path.stat().st_mtime_ns for path in entries.rglob("*.npy")}
    assert len(before) == 3
    assert medm("data", "cache", str(recipe), "--workers", "0").code == 0
    assert {path: path.stat().st_mtime_ns for path in entries.rglob("*.npy")} == before
    other = "model.branches.volume.preprocess={windows: [[-160, 240]]}"
    assert medm("data", "cache", str(recipe), other, "--workers", "0").code == 0
    assert len(list(entries.rglob("*.npy"))) == 6


def test_shards_of_a_cache_are_merged_into_one_manifest(recipe: Path, tmp_path: Path) -> None:
    command = ["data", "cache", str(recipe), f"data.cache.dir={tmp_path}", "--workers", "0"]
    early = medm(*command, "--merge")
    assert early.code == 2 and "run --shard 0/N to --shard N-1/N first" in early.err
    files = [medm(*command, "--shard", f"{i}/2") for i in range(2)]
    assert [done.code for done in files] == [0, 0]
    assert sum(int(done.out.partition(" files")[0]) for done in files) == 3
    done = medm(*command, "--merge")
    assert done.code == 0, done.err
    assert done.out.startswith(f"{tmp_path / 'manifest.jsonl'}: 3 files, ")
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 3
    for words, expected in {
        ("--shard", "2/2"): "expected i/N with i from 0 to N-1",
        ("--merge", "--shard", "0/2"): "takes no --shard",
        ("--only-failed",): "needs --shard",
    }.items():
        refused = medm(*command, *words)
        assert refused.code == 2 and expected in refused.err, refused.err


def test_cache_names_what_is_bad_and_what_is_missing(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.nii.gz").write_bytes(BALL.read_bytes()[:300])
    bad = {
        "volume": "cut.nii.gz",
        "conversations": [{"from": "human", "value": "<volume>\n?"}, {"from": "gpt", "value": "A"}],
    }
    (tmp_path / "data.json").write_text(json.dumps([bad]))
    done = medm(
        "data",
        "cache",
        str(recipe),
        f"data.train=[{{path: {tmp_path / 'data.json'}}}]",
        "--workers",
        "0",
    )
    assert done.code == 1
    assert done.out.startswith(f"{tmp_path / 'data.json'}, record 0, field 'volume': ")
    assert medm("data", "cache", str(recipe), "data.cache=null").code == 2


def test_a_volume_of_which_nothing_is_left_is_neither_cached_nor_drawn_nor_passed(
    recipe: Path, tmp_path: Path
) -> None:
    """HU minus 8192: every voxel is below the window of -1000..1000."""
    image = SimpleITK.Cast(SimpleITK.ReadImage(str(BALL)), SimpleITK.sitkInt16) - 8192
    SimpleITK.WriteImage(image, str(tmp_path / "shifted.nii.gz"))
    turns = [{"from": "human", "value": "<volume>\n?"}, {"from": "gpt", "value": "A"}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"volume": "shifted.nii.gz", "conversations": turns}]))
    train = f"data.train=[{{path: {data}}}]"
    convention = "model.branches.volume.preprocess={convention: medm-clip}"
    reason = "window -1000..1000 makes 0 of the values -9192..-"
    done = medm("data", "cache", str(recipe), train, convention, "--workers", "0")
    assert (done.code, "1 files, 1 bad" in done.out, reason in done.out) == (1, True, True)
    output = tmp_path / "sheet.png"
    drawn = medm(
        "data", "preview", str(tmp_path / "shifted.nii.gz"), str(output), "convention=medm-clip"
    )
    assert (drawn.code, output.exists(), reason in drawn.err) == (1, False, True)
    checked = medm("data", "check", str(data), "--recipe", str(recipe), "--decode")
    assert checked.code == 1
    assert "-9192..-" in checked.out


def test_preview_finds_out_that_a_volume_is_one(recipe: Path, tmp_path: Path) -> None:
    sizes = {}
    for name, arguments in {
        "published": ["convention=medm-vl", "--slices", "4"],
        "own": ["--recipe", str(recipe), "--slices", "4"],
    }.items():
        done = medm("data", "preview", str(BALL), str(tmp_path / f"{name}.png"), *arguments)
        assert done.code == 0, done.err
        sizes[name] = Image.open(tmp_path / f"{name}.png").size
    assert all(width > 400 and height > 200 for width, height in sizes.values())


def test_preview_takes_window_for_a_volume_as_for_an_image(recipe: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, window in {
        "one": "window=[-160,240]",
        "pair": "windows=[[-160,240]]",
        "other": "window=[0,80]",
    }.items():
        for arguments in ([], ["--recipe", str(recipe)], ["convention=m3d"]):
            done = medm(
                "data",
                "preview",
                str(BALL),
                str(tmp_path / "sheet.png"),
                *arguments,
                window,
                "--slices",
                "2",
            )
            assert done.code == 0, done.err
            drawn.setdefault(name, []).append((tmp_path / "sheet.png").read_bytes())
    assert drawn["one"] == drawn["pair"]
    assert all(one != other for one, other in zip(drawn["one"], drawn["other"], strict=True))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (["window=[-160,240]", "windows=[[0,1]]"], "window and windows are both given"),
        (["window=[[-160,240],[0,80]]"], "expected [lower, upper]"),
        (["window=[240,-160]"], "lower < upper"),
    ],
)
def test_preview_refuses_windows_that_contradict_each_other(
    tmp_path: Path, fields: list[str], words: str
) -> None:
    done = medm("data", "preview", str(BALL), str(tmp_path / "sheet.png"), *fields)
    assert done.code == 2 and words in " ".join(done.err.split())


@pytest.mark.parametrize(
    "name", ["medm-vl-ct/finetune_lora", "medm-vl-ct-chest/pretrain", "medm-vl-2d/finetune"]
)
def test_preview_needs_no_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nor the network: the recipe's LLM is gated, and its encoder is not here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "medm.models.lvlm.build._text_config", lambda *_: pytest.fail("asked for the LLM")
    )
    monkeypatch.setattr(
        "medm.models.lvlm.build._tokenizer", lambda *_: pytest.fail("asked for the tokenizer")
    )
    file = DOCS / "examples_media" / "disc_left.png" if "2d" in name else BALL
    done = medm("data", "preview", str(file), str(tmp_path / "sheet.png"), "--recipe", name)
    assert done.code == 0, done.err
    assert (tmp_path / "sheet.png").is_file()


def records(file: Path, root: Path) -> Records:
    return Records([SourceOptions(path=str(file), root=str(root))], Conversations())


@pytest.mark.parametrize(
    ("task", "answer"), [("m3d-cap", "The heart is enlarged."), ("m3d-vqa-closed", "B. Sagittal")]
)
def test_convert_writes_records_that_training_reads(task: str, answer: str, tmp_path: Path) -> None:
    LAYOUTS[task].build(tmp_path / "M3D")
    for output in (tmp_path / "out.json", tmp_path / "out.jsonl"):
        done = medm("data", "convert", "--task", task, "--data", str(tmp_path / "M3D"), str(output))
        assert done.code == 0, done.err
        read = records(output, tmp_path / "M3D")
        assert len(read) == LAYOUTS[task].count
        assert read[0].turns[-1].text.startswith(answer)
        assert read.media_path(0, read[0].media[0]).is_file()
    assert (
        medm(
            "data", "check", str(tmp_path / "out.json"), "--root", str(tmp_path / "M3D"), "--decode"
        ).code
        == 0
    )


def test_convert_words_questions_anew_with_a_seed_and_keeps_to_the_limit(tmp_path: Path) -> None:
    LAYOUTS["m3d-cap"].build(tmp_path)
    questions = set()
    for seed in range(8):
        arguments = (
            "--task",
            "m3d-cap",
            "--data",
            str(tmp_path),
            "--seed",
            str(seed),
            "--limit",
            "1",
        )
        assert medm("data", "convert", str(tmp_path / "out.json"), *arguments).code == 0
        (sample,) = records(tmp_path / "out.json", tmp_path)
        questions.add(sample.turns[0].text)
    assert len(questions) > 2


def test_convert_says_what_is_wrong_and_leaves_an_older_file(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    output.write_text("mine")
    for arguments, words in {
        ("--task", "m3d-cap", "--data", str(tmp_path)): "M3D_Cap.json",
        ("--task", "m3d-kap", "--data", str(tmp_path)): "did you mean 'm3d-cap'",
        ("--task", "custom", "--data", str(tmp_path)): "needs path, metrics",
    }.items():
        done = medm("data", "convert", str(output), *arguments)
        assert done.code != 0
        assert words in " ".join(done.err.replace("\u2502", " ").split())
    assert output.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
