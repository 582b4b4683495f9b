"""What sources of predictions give is matched with what tasks need, before anything is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medm.config import validate
from medm.errors import CheckpointError, DataError, RecipeError
from medm.evaluation.options import EvalOptions
from medm.evaluation.prediction_files import PredictionsFile, fields_given
from medm.evaluation.predictors import FIELDS, PREDICTORS
from medm.evaluation.runner import evaluate
from medm.inference.batch import infer
from medm.inference.options import InferOptions
from medm.models import MODELS
from medm.tasks import TASKS
from tests.cli.runner import medm
from tests.tasks import layouts

PLUGIN = Path(__file__).with_name("grade_plugin.py")


@pytest.fixture(scope="module")
def plugin() -> Iterator[None]:
    """The parts of the plug-in, for this module."""
    from medm.registry import load_plugin

    with ExitStack() as stack:
        for registry in (MODELS, PREDICTORS, TASKS):
            stack.enter_context(registry.temporary())
        load_plugin(PLUGIN)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, two of them bright."""
    folder = tmp_path_factory.mktemp("images")
    labels = {}
    for index, value in enumerate((20, 200, 60, 240)):
        Image.fromarray(np.full((10, 10, 3), value, np.uint8)).save(folder / f"{index}.png")
        labels[f"{index}.png"] = int(value > 100)
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


def grade_model(folder: Path, **config: Any) -> str:
    """A folder of the plug-in's kind."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "medm-grade", **config}))
    (folder / "processor_config.json").write_text("{}")
    return str(folder)


def run(task: str, data: Path, out: Path, **content: Any) -> Any:
    block = {"task": {"name": task, "rounds": 5}, "data": str(data)}
    block |= {key: content.pop(key) for key in ("predictions", "against") if key in content}
    section = {"tasks": [block], "output_dir": str(out), "cases": 1, **content}
    reports = evaluate(validate(EvalOptions, section, source="test"))
    assert reports is not None
    return reports[0]


def test_scores_of_a_plugin_go_through_the_runner(
    plugin: None, images: Path, tmp_path: Path
) -> None:
    report = run("bright-or-dark", images, tmp_path / "a", model=grade_model(tmp_path / "m"))
    assert (report.scores.results[0].name, report.scores.results[0].value) == ("auroc", 1.0)
    assert report.answered == 4
    assert report.metadata["model"] == str(tmp_path / "m")
    report = run(
        "bright-or-dark", images, tmp_path / "b", model=grade_model(tmp_path / "n", invert=True)
    )
    assert report.scores.results[0].value == 0.0
    results = json.loads((tmp_path / "b" / "bright-or-dark" / "results.json").read_text())
    assert results["scores"][0]["value"] == 0.0
    assert [case.images for case in report.random] == [["cases/000.png"]]


def test_the_command_line_needs_nothing_but_the_plugin(
    plugin: None, images: Path, tmp_path: Path
) -> None:
    model = grade_model(tmp_path / "m")
    done = medm(
        "--plugin",
        str(PLUGIN),
        "eval",
        "--task",
        "bright-or-dark",
        "--data",
        str(images),
        "--model",
        model,
        "--output",
        str(tmp_path / "out"),
        "--cases",
        "0",
    )
    assert done.code == 0, done.err
    assert "auroc" in done.out


def test_a_plugin_without_scores_is_refused_before_its_images_are_read(
    plugin: None, images: Path, tmp_path: Path
) -> None:
    model = grade_model(tmp_path / "m", confident=False)
    with pytest.raises(
        RecipeError, match=r"bright-or-dark: needs scores; model \S+/m gives embeddings\. Give"
    ):
        run("bright-or-dark", tmp_path / "no-such-folder", tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_infer_refuses_a_model_that_writes_no_text(
    plugin: None, images: Path, tmp_path: Path
) -> None:
    records = tmp_path / "in.json"
    records.write_text('[{"conversations": [{"from": "human", "value": "?"}]}]')
    content = {
        "model": grade_model(tmp_path / "m"),
        "data": str(records),
        "output": str(tmp_path / "out.jsonl"),
        "device": "cpu",
    }
    with pytest.raises(RecipeError, match=r"medm infer writes text; model \S+/m gives scores"):
        infer(validate(InferOptions, content, source="test"))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_folder_of_an_unknown_kind_is_named(tmp_path: Path, images: Path) -> None:
    folder = Path(grade_model(tmp_path / "m"))
    (folder / "config.json").write_text('{"model_type": "medm-unheard-of"}')
    with pytest.raises(CheckpointError, match="medm-unheard-of"):
        run("slake", images, tmp_path / "out", model=str(folder))


TEXT, SCORES, MASK = (
    '{"id": "a", "text": "x"}\n',
    '{"id": "a", "scores": [0.1, 0.9]}\n',
    '{"id": "a", "mask": "m.npy"}\n',
)


@pytest.mark.parametrize(
    ("content", "given"),
    [
        (TEXT, {"text"}),
        (SCORES, {"scores"}),
        ('{"id": "a", "scores": 0.7, "text": "yes"}\n', {"text", "scores"}),
        (MASK, {"masks"}),
        ('{"id": "a", "reply": "It is [SEG].", "dice": 0.5}\n', {"text", "masks"}),
        (TEXT + SCORES.replace('"a"', '"b"'), {"text", "scores"}),
        ('{"id": "a", "reply": ""}\n', {"text"}),
        ('{"a": "x", "b": "y"}', {"text"}),
        ('["x", "y"]', {"text"}),
        ('{"id": "a", "error": "the file is cut"}\n', set(FIELDS)),
        ('{"id": "a", "error": "the file is cut"}\n{"id": "b", "mask": "m.npy"}\n', {"masks"}),
    ],
)
def test_fields_of_a_file_say_what_it_gives(content: str, given: set[str], tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    assert fields_given(file) == given


@pytest.mark.parametrize(
    ("metrics", "content", "words"),
    [
        (
            ["auroc"],
            TEXT,
            "custom: needs scores; predictions FILE gives text. Give --predictions with lines with",
        ),
        (["exact-match"], SCORES, "custom: needs text; predictions FILE gives scores"),
        (
            ["exact-match", "auroc"],
            MASK,
            "custom: needs text and scores; predictions FILE gives masks",
        ),
    ],
)
@pytest.mark.parametrize("place", ["predictions", "against"])
def test_a_file_that_lacks_a_field_is_refused_by_name(
    metrics: list[str], content: str, words: str, place: str, tmp_path: Path
) -> None:
    file, whole = tmp_path / "p.jsonl", tmp_path / "whole.jsonl"
    file.write_text(content)
    whole.write_text('{"id": "a", "text": "x", "scores": 0.5}\n')
    block = {"name": "custom", "path": "none.json", "metrics": metrics}
    tasks = [{"task": block, "data": str(tmp_path), "predictions": str(whole), place: str(file)}]
    with pytest.raises(RecipeError) as caught:
        evaluate(
            validate(
                EvalOptions, {"tasks": tasks, "output_dir": str(tmp_path / "out")}, source="test"
            )
        )
    assert str(caught.value).replace(str(file), "FILE").startswith(words)


def test_masks_are_not_scored_from_texts(tmp_path: Path) -> None:
    layouts.m3d_seg(tmp_path / "data")
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "0000/1/masks/mask_0.npy", "text": "It is [SEG]."}\n')
    with pytest.raises(RecipeError, match=r"m3d-seg: needs masks; predictions \S+ gives text"):
        run("m3d-seg", tmp_path / "data", tmp_path / "out", predictions=str(file))


def test_a_file_that_cannot_be_read_says_where(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "a", "text": "x"}\n{"id": "b", "score": 1}\n')
    options = validate(
        EvalOptions, {"tasks": [{"task": "slake", "data": "d", "predictions": "p"}]}, source="test"
    )
    with pytest.raises(DataError, match=r"p\.jsonl.*record 1.*no answer in it"):
        PredictionsFile(str(file), options)


@pytest.mark.parametrize("name", TASKS.names())
def test_every_task_says_what_it_needs(name: str) -> None:
    task = TASKS.get(name)(**layouts.LAYOUTS[name].options)
    assert task.needs
    assert task.needs <= set(FIELDS)
    quick = task.without_models()
    assert (quick.resampling.rounds, task.resampling.rounds) == (0, 1000)
    assert quick.needs == task.needs
