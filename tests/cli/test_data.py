"""`medm data check`: bad records are named, good ones counted, and the shipped examples pass."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import yaml
from PIL import Image

from medm.data.base import Pipeline, Segment
from medm.data.pipelines import PIPELINES
from medm.data.turns import media_field, parse_record
from medm.imaging import ImagePreprocess
from medm.models import MODELS
from medm.models.base import ModelKind
from medm.models.lvlm.build import LVLM
from medm.models.options import ModelOptions
from medm.types import Sample
from tests import tiny
from tests.cli.runner import medm

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    "name", ["pretrain", "finetune", "inference", "pretrain_3d", "finetune_3d", "inference_3d"]
)
def test_shipped_examples_pass(name: str) -> None:
    flags = ["--inference"] if name.startswith("inference") else []
    done = medm("data", "check", str(DOCS / f"example_{name}.json"), "--decode", *flags)
    assert done.code == 0, done.out
    assert " 0 bad;" in done.out


def test_bad_records_are_named_and_the_status_says_so(tmp_path: Path) -> None:
    good = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    bad = {
        "image": "missing.png",
        "conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}],
    }
    file = tmp_path / "data.json"
    file.write_text(json.dumps([good, bad, good]))
    done = medm("data", "check", str(file), "--root", str(tmp_path))
    assert done.code == 1
    (line,) = [line for line in done.out.splitlines() if "missing.png" in line]
    assert line.startswith(f"{file}, record 1, field 'image': ")
    assert "3 records, 1 bad" in done.out


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("none.json", "none.json: no such file"),
        (
            "table.csv",
            "table.csv: looks like CSV; docs/data-format.md shows how to turn a table into "
            "records; expected",
        ),
        (".", ".: is a folder; name the annotation file in it"),
    ],
)
def test_what_is_no_annotation_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("\ufeffid;image;question\n" + "1;a.png;q\n" * 50)
    done = medm("data", "check", name)
    lines = done.out.splitlines()
    assert done.code == 1 and len(lines) == 2
    assert lines[0].startswith(line) and lines[1] == "1 annotation file cannot be read"


def test_a_wrong_root_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "data.json").write_text(
        json.dumps([{"image": f"{i}.png", "conversations": turns} for i in range(9)])
    )
    done = medm("data", "check", "data.json")
    assert done.code == 1
    assert done.out.startswith(
        f"data.json: no file of this source exists under its root {tmp_path.resolve()}: "
    )
    assert done.out.count("no such file") == 1 and "9 records, 9 bad" in done.out


def test_a_check_says_how_far_it_looked(tmp_path: Path) -> None:
    file = str(DOCS / "example_finetune.json")
    assert (
        "checked by their headers; --decode reads them in full" in medm("data", "check", file).err
    )
    assert "--decode" not in medm("data", "check", file, "--decode").err


def test_nothing_to_check_is_a_usage_error() -> None:
    done = medm("data", "check")
    assert done.code == 2
    assert "name an annotation file" in done.err


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    llm = tiny.save_llm("qwen2.5", folder / "llm")
    file = folder / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": tiny.lvlm_section(llm),
                "data": {
                    "train": [{"path": str(DOCS / "example_finetune.json")}],
                    "max_length": 200,
                },
                "parts": {"image.connector": "full"},
                "output_dir": str(folder / "out"),
            }
        )
    )
    return file


def test_a_recipe_adds_lengths_and_a_preview_of_what_is_learned(recipe: Path) -> None:
    done = medm("data", "check", "--recipe", str(recipe))
    assert done.code == 0, done.out + done.err
    assert "example_finetune.json: 4 records" in done.out
    assert "tokens per record: " in done.out
    assert "[x] 'Left.<|im_end|>" in done.out  # the reply and its end are learned
    assert "<image> x 16 " in done.out  # 16 x 16 pixels in patches of 4
    assert "[ ] '<|im_start|>user" in done.out


class Words(ModelKind):
    """A kind of model with a way of its own to read records: a token a word."""

    config_class, model_class, processor_class = (
        LVLM.config_class,
        LVLM.model_class,
        LVLM.processor_class,
    )
    preprocess: ClassVar[dict[str, Any]] = {"image": ImagePreprocess()}
    pipeline = "words"

    def build(self, options: Any) -> Any:
        raise AssertionError("a check reads no weights")

    def processor(self, options: Any) -> Any:
        return self


@dataclass
class WordsExample:
    """No tokens and no labels: nothing of a language model."""

    words: list[str]
    pixels: dict[str, list[np.ndarray]]
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    task_id: int = 0


class WordsPipeline(Pipeline[Sample, WordsExample, Words]):
    nouns = ("turn",)

    def read(self, record: object, *, file: Path, index: int) -> Sample:
        return parse_record(record, file=file, index=index)

    def media_field(self, record: object, number: int) -> str:
        return media_field(record, number)

    def counts(self, sample: Sample) -> dict[str, int]:
        return {"turn": len(sample.turns)}

    def make_example(self, sample: Sample, pixels: Any) -> WordsExample:
        return WordsExample(" ".join(turn.text for turn in sample.turns).split(), dict(pixels))

    def length(self, example: WordsExample) -> int:
        return len(example.words)

    def preview(self, example: WordsExample) -> list[Segment]:
        return [Segment(f"{len(example.words)} words", learned=True)]

    def training_collator(self, options: Any, *, padding_free: bool = False) -> Any:
        raise AssertionError("a check makes no batches")

    eval_collator = training_collator


class WordsOptions(ModelOptions):
    kind: Literal["words"] = "words"


def test_any_kind_of_model_says_itself_how_records_are_read(recipe: Path) -> None:
    text = yaml.safe_load(recipe.read_text()) | {"model": {"kind": "words"}}
    text["data"]["train"][0]["limit"] = 1
    other = recipe.with_name("words.yaml")
    other.write_text(yaml.safe_dump(text))
    record = json.loads((DOCS / "example_finetune.json").read_text())[0]
    count = sum(
        len(turn["value"].replace("<image>", "").split()) for turn in record["conversations"]
    )
    with MODELS.temporary(), PIPELINES.temporary():
        MODELS.add("words", Words, "for the test", options=WordsOptions)
        PIPELINES.add("words", WordsPipeline, "for the test")
        done = medm("data", "check", "--recipe", str(other), "--limit", "1")
        assert done.code == 0, done.out + done.err
        assert f"[x] '{count} words'" in done.out
        estimate = medm("estimate", str(other))
    assert estimate.code == 2
    assert "models of kind 'words' cannot be estimated" in estimate.err


def test_records_longer_than_the_recipe_allows_are_bad(recipe: Path) -> None:
    text = yaml.safe_load(recipe.read_text())
    text["data"]["max_length"] = 60
    shorter = recipe.with_name("shorter.yaml")
    shorter.write_text(yaml.safe_dump(text))
    done = medm("data", "check", "--recipe", str(shorter))
    assert done.code == 1
    assert "60" in done.out


def test_preview_draws_what_the_model_sees(recipe: Path, tmp_path: Path) -> None:
    picture, sheet = DOCS / "examples_media" / "disc_left.png", tmp_path / "new" / "sheet.png"
    done = medm("data", "preview", str(picture), str(sheet), "size=[40,80]")
    assert (done.code, done.out) == (0, f"{sheet}\n")
    plain = Image.open(sheet).size
    done = medm("data", "preview", str(picture), str(sheet), "--recipe", str(recipe))
    assert done.code == 0, done.err
    assert Image.open(sheet).size != plain  # the recipe's model takes square pictures


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["size=[40]"], "size"),
        (["windw=[0,1]"], "did you mean 'window'"),
        (["--branch", "volume", "--recipe", "RECIPE"], "the model has image"),
    ],
)
def test_preview_refuses_what_does_not_fit(
    recipe: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    given = [str(recipe) if argument == "RECIPE" else argument for argument in arguments]
    done = medm(
        "data",
        "preview",
        str(DOCS / "examples_media" / "bars.jpg"),
        str(tmp_path / "sheet.png"),
        *given,
    )
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "sheet.png").exists()


def test_checking_files_alone_loads_no_torch() -> None:
    script = (
        "import sys; from medm.cli import main\n"
        f"try: main(['data', 'check', {str(DOCS / 'example_finetune.json')!r}, '--decode'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_pairs_are_written_into_shards_and_checked(tmp_path: Path) -> None:
    Image.linear_gradient("L").save(tmp_path / "a.png")
    lines = [{"image": "a.png", "caption": f"caption {number}"} for number in range(5)]
    annotations = tmp_path / "pairs.jsonl"
    annotations.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    manifest = tmp_path / "out" / "set.shards.json"
    done = medm("data", "shards", str(manifest), str(annotations), "--samples", "2")
    assert done.code == 0, done.out
    assert "set.shards.json: shards 3, samples 5, bad 0" in done.out.replace("\n", "")
    checking = ("data", "check", str(manifest), "--pipeline", "pairs", "--decode")
    done = medm(*checking)
    assert done.code == 0, done.out
    assert "5 records, 0 bad; 5 captions, 5 images" in done.out
    shard = manifest.with_name("set-000001.tar")
    content = bytearray(shard.read_bytes())
    content[content.index(b"caption 2")] ^= 1
    shard.write_bytes(content)
    done = medm(*checking)
    assert done.code == 1
    assert "its sha256 is not that of the manifest" in done.out.replace("\n", " ")
    assert medm("data", "shards", str(manifest), str(manifest.parent)).code == 0
    assert medm(*checking).code == 0


def test_bad_pairs_stop_the_writing_of_shards_or_are_named(tmp_path: Path) -> None:
    Image.linear_gradient("L").save(tmp_path / "a.png")
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,one\ngone.png,two\n")
    writing = ("data", "shards", str(tmp_path / "set.shards.json"), str(tmp_path / "pairs.csv"))
    done = medm(*writing)
    assert done.code != 0
    done = medm(*writing, "--skip-bad")
    assert done.code == 1
    assert "shards 1, samples 1, bad 1" in done.out.replace("\n", "")
    assert "record 1, field 'image'" in done.out.replace("\n", "")
