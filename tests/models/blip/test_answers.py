"""Questions in the kind `blip`: answers as classes and as texts, in training and afterwards."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from medm.cli.app import app
from medm.config import validate
from medm.errors import RecipeError
from medm.models.blip.answers import AnswerLogits, QuestionMLP, QuestionPooling, choose
from medm.models.blip.modeling import MedmBlip
from medm.models.blip.options import AnswerOptions, BlipOptions
from medm.objectives.answers import AnswerClasses
from medm.training.recipe import Recipe, load_recipe
from medm.training.run import train
from tests.models.blip.tiny import ANSWERS, IDS, MASK, make, section, studies
from tests.models.dual_encoder.tiny import save_tokenizer

OBJECTIVE = AnswerClasses()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def answering(tokenizer: str, heads: tuple[str, ...] = ("answers",), **changes: Any) -> Any:
    answers = {**ANSWERS, "dim": 16, **changes}
    content = section(tokenizer, heads=list(heads), labels=[], answers=answers)
    return make(content)


# -- the head --------------------------------------------------------------------------------------


def test_pooling_by_hand_and_without_padding() -> None:
    """Scores are tanh(1) sigmoid(word) of one number; the third token is padding."""
    pooling = QuestionPooling(1, 1)
    with torch.no_grad():
        for part in (pooling.tanh, pooling.sigmoid, pooling.score):
            part.weight.zero_()
            part.bias.zero_()
        pooling.tanh.bias.fill_(1.0)
        pooling.sigmoid.weight[0, 0] = 1.0  # reads the word, not the state
        pooling.score.weight.fill_(2.0)
    words = torch.tensor([[[0.0], [math.log(3)], [9.0]]])
    states = torch.tensor([[[10.0], [20.0], [1000.0]]])
    first, second = (math.exp(2 * math.tanh(1) * gate) for gate in (0.5, 0.75))
    expected = (10 * first + 20 * second) / (first + second)
    found = pooling(words, states, torch.tensor([[1, 1, 0]]))
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gate", ["cls", "projected", "none"])
@pytest.mark.parametrize("encoders", ["shared", "separate"])
def test_scores_are_those_of_a_straight_computation(
    tokenizer: str, gate: str, encoders: str
) -> None:
    model = answering(tokenizer, gate=gate, encoders=encoders)[0].eval()
    if model.answer_encoder is not None:  # a copy at first
        for own, copy in zip(
            model.text.parameters(), model.answer_encoder.parameters(), strict=True
        ):
            torch.testing.assert_close(own, copy)
        with torch.no_grad():
            for weight in model.answer_encoder.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
    batch = studies()
    output = model(**batch)
    ids, mask = batch["question_ids"], batch["question_mask"]
    images, head = model.encode_images(batch["pixels"]), model.answers
    begun = torch.cat([torch.full((4, 1), model.ids.encoder_id), ids[:, 1:]], dim=1)
    for name, encoder in (("closed", model.text), ("open", model.answer_encoder or model.text)):
        fused = encoder(begun, mask, images.tokens, images.mask)[:, 0]
        words, states = encoder.embed(ids), encoder(ids, mask)
        if gate == "cls":
            vector = head.projection(fused * head.gate(words, states, mask))
        elif gate == "projected":
            vector = head.projection(fused)
            vector = vector * head.gate(words, head.state_projection(states), mask)
        else:
            vector = head.projection(fused)
        expected = head.classifiers[name](vector)
        torch.testing.assert_close(output[f"answer_logits_{name}"], expected)
    types = head.question_type(model.text.embed(ids), model.text(ids, mask), mask)
    torch.testing.assert_close(output.answer_logits_type, types)
    assert output.loss_sum is None
    assert not torch.allclose(
        output.answer_logits_closed,
        model(**batch | {"pixels": {"image": -batch["pixels"]["image"]}}).answer_logits_closed,
    )


def test_the_gate_has_three_layers_of_the_published_widths() -> None:
    gate = QuestionMLP(8, 8, (16, 8, 8), 0.5)
    assert [tuple(w.shape) for w in gate.layers.parameters() if w.ndim == 2] == [
        (16, 8), (8, 16), (8, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [(0, 3), (3, 4), (0, 0)])
def test_batches_without_a_type_of_question_give_every_weight_a_gradient(
    tokenizer: str, rows: tuple[int, int]
) -> None:
    """Closed questions alone, open ones alone, no study at all."""
    model = answering(tokenizer, encoders="separate")[0].train()
    batch = studies(*rows)
    OBJECTIVE.loss(model(**batch), batch).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        if rows == (0, 3) and name.startswith("answers.classifiers.open"):
            assert not weight.grad.any()


def test_padding_of_questions_changes_nothing(tokenizer: str) -> None:
    model = answering(tokenizer)[0].eval()
    batch = studies()
    padded = {name: F.pad(batch[name], (0, 3)) for name in ("question_ids", "question_mask")}
    first, second = model(**batch), model(**batch | padded)
    for name in ("answer_logits_closed", "answer_logits_open", "answer_logits_type"):
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-4)


def test_the_branch_is_the_predicted_one_or_the_gold_one(tokenizer: str) -> None:
    logits = AnswerLogits(
        closed=torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, 1.0]]),
        open=torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, math.log(3), 0.0]]),
        type=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
    )
    found = choose(logits, None)
    assert found.branches.tolist() == [0, 1, 1]
    assert found.classes.tolist() == [1, 2, 1], "a high score in the other branch does not count"
    assert found.scores[2].item() == pytest.approx(0.75)
    assert choose(logits, torch.tensor([1, 0, 0])).classes.tolist() == [0, 0, 1]
    with pytest.raises(RecipeError, match="a question has no answer_type"):
        choose(logits, torch.tensor([1, 0, -100]))

    model, processor = answering(tokenizer, route="gold")
    batch = studies()
    asked = (batch["pixels"], None, batch["question_ids"], batch["question_mask"])
    chosen = model.eval().answer(*asked, torch.tensor([1, 1, 0, 0]))
    assert chosen.branches.tolist() == [1, 1, 0, 0]
    texts = processor.decode_answers(chosen)
    assert [text in ANSWERS["open"] for text in texts] == [True, True, False, False]
    with pytest.raises(RecipeError, match="a question has no answer_type"):
        model.answer(*asked)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({}, "closed: the list is empty"),
        ({"closed": ["yes"], "open": []}, "open: the list is empty"),
        ({"closed": ["yes", "yes"], "open": ["a"]}, "closed: expected different answers"),
        ({"closed": ["yes", " "], "open": ["a"]}, "none of them blank"),
        ({"file": "a.json", "open": ["a"]}, "either the file"),
    ],
)
def test_lists_that_are_unusable_are_refused(answers: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        validate(AnswerOptions, answers, source="test")


def test_head_and_lists_belong_together(tokenizer: str, tmp_path: Path) -> None:
    for changes in ({"answers": ANSWERS}, {"heads": ["answers"], "labels": []}):
        with pytest.raises(RecipeError, match="belong together"):
            validate(BlipOptions, section("t", **changes), source="test")
    file = tmp_path / "answers.json"
    for content, reason in (("[", "cannot be read"), ("[]", "expected an object of the lists")):
        file.write_text(content)
        with pytest.raises(RecipeError, match=reason):
            make(section(tokenizer, heads=["answers"], labels=[], answers={"file": str(file)}))
    file.write_text(json.dumps(ANSWERS))
    content = section(tokenizer, heads=["answers"], labels=[], answers={"file": str(file)})
    model, processor = make(content)
    assert processor.answers == ANSWERS
    assert "file" not in model.config.answers
    model.check_same_parts(validate(BlipOptions, content, source="test"), source="folder")
    file.write_text(json.dumps(ANSWERS | {"open": ["left"]}))
    with pytest.raises(RecipeError, match="other lists of answers"):
        model.check_same_parts(validate(BlipOptions, content, source="test"), source="folder")


# -- answers as texts ------------------------------------------------------------------------------

ASKED = ("mass of the left", "effusion", "the right brain", "a mass")
SAID = ("normal", "a mass", "left", "the brain")


def test_answers_are_learned_behind_questions_and_written_in_a_batch(tokenizer: str) -> None:
    """Questions of different lengths: each text is the one that the question has alone."""
    model, processor = make(section(tokenizer, heads=["lm"], labels=[]))
    pixels = torch.zeros(4, 3, 16, 16)  # one image: the question decides
    rows = [processor.encode_target(said, asked) for said, asked in zip(SAID, ASKED, strict=True)]
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows])
    batch = {"pixels": {"image": pixels}, "input_ids": ids, "attention_mask": (ids != 0).long()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(35):
        optimizer.zero_grad()
        loss = model.train()(**batch, labels=labels).loss_sum
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]

    model.eval()
    prompts = processor.encode_prompts(ASKED)
    settings: dict[str, Any] = {"num_beams": 2, "max_length": 12, "min_length": 1}
    found = model.generate(pixels, None, *prompts.values(), **settings)
    for row, (asked, said) in enumerate(zip(ASKED, SAID, strict=True)):
        prompt = processor.encode_prompt(asked)
        alone = model.generate(pixels[:1], None, prompt, **settings)[0]
        assert found[row, : len(alone)].tolist() == alone.tolist()
        assert not found[row, len(alone) :].any()
        assert processor.decode(found[row, prompt.shape[1] :]) == said


# -- a recipe --------------------------------------------------------------------------------------

QUESTIONS = (
    ("normal chest", "closed", {"answer": "normal"}),
    ("mass of the knee", "CLOSED", {"answer": "A mass."}),
    ("left of the brain", "OPEN", {"answer_scores": {"left": 1.0, "right": 0.25}}),
    ("effusion of the chest", "open", {"answer": "knee"}),
)
"""The third has two right answers; the answer of the fourth is in no list."""


def write_world(folder: Path) -> Path:
    """Eight questions about images, and a tokenizer."""
    save_tokenizer(folder / "tokenizer")
    records = []
    for index in range(8):
        noise = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
        question, kind, fields = QUESTIONS[index % 4]
        asked = {"question": question, "answer_type": kind, **fields}
        records.append({"id": f"q{index}", "images": [f"{index}.png"], **asked})
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "answers.json").write_text(json.dumps(ANSWERS))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("questions"))


def recipe(world: Path, out: Path, *changes: str) -> Recipe:
    answers = {"file": str(world / "answers.json"), "encoders": "separate", "dim": 16}
    content: dict[str, Any] = {
        "model": section(
            str(world / "tokenizer"), heads=["lm", "answers"], labels=[], answers=answers
        ),
        "data": {"train": [{"path": str(world / "train.json"), "root": str(world)}]},
        "objective": {
            "terms": {
                "text": {"objective": "language-modeling"},
                **{
                    part: {"objective": {"name": "answers", "part": part}}
                    for part in ("closed", "open", "type")
                },
            }
        },
        "parts": {
            part: {"tune": "full", "lr": 1e-3}
            for part in (
                "image.encoder", "text.encoder", "text.decoder", "answers", "answers.encoder",
            )
        },
        "train": {
            "use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 4,
            "save_steps": 2, "logging_steps": 1,
        },
        "output_dir": str(out),
    }  # fmt: skip
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(content))
    return load_recipe(file, changes)


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    outcome = train(recipe(world, world / "trained"))
    assert outcome.finished
    return world / "trained"


def test_a_killed_run_continues_bit_for_bit(world: Path, trained: Path) -> None:
    given = recipe(world, world / "resumed")
    assert train(given).finished
    out = world / "resumed"
    for path in [*out.glob("*.safetensors"), out / "config.json"]:
        path.unlink()
    shutil.rmtree(out / "checkpoint-4")
    assert train(given, resume=True).steps == 4
    expected, found = (load_file(folder / "model.safetensors") for folder in (trained, out))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    first = load_file(next(trained.glob("checkpoint-2/*.safetensors")))
    for part in ("answers.question_type", "answers.gate", "classifiers.open", "answer_encoder"):
        assert any(not torch.equal(first[k], expected[k]) for k in expected if part in k), part


def test_a_trained_folder_answers(world: Path, trained: Path) -> None:
    model, processor = AutoModel.from_pretrained(trained).eval(), AutoProcessor.from_pretrained(
        trained
    )  # fmt: skip
    assert isinstance(model, MedmBlip)
    inputs = processor(images=[str(world / f"{n}.png") for n in range(3)])
    asked = processor.encode_text(["normal chest", "a mass", "left"])
    chosen = model.answer(inputs["pixels"], None, *asked.values())
    lists = [ANSWERS["closed" if branch == 0 else "open"] for branch in chosen.branches.tolist()]
    for text, listed in zip(processor.decode_answers(chosen), lists, strict=True):
        assert text in listed
    alone = model.answer(inputs["pixels"]["image"][1:2], None, IDS[:1, :2], MASK[:1, :2])
    assert alone.scores.shape == (1,)


def test_the_check_counts_answers_in_no_list_and_shows_what_is_learned(
    world: Path, trained: Path
) -> None:
    command = ["data", "check", str(world / "train.json"), "--root", str(world)]
    result = CliRunner().invoke(app, [*command, "--model", str(trained)])
    assert result.exit_code == 0, result.output
    assert "2 unlisted answers" in result.output
    assert "closed: normal (1)" in result.output


def test_medm_infer_writes_answers_with_type_and_score(world: Path, trained: Path) -> None:
    output = world / "replies.jsonl"
    command = ["infer", "--model", str(trained), "--data", str(world / "train.json")]
    settings = ["--root", str(world), "--output", str(output), "--device", "cpu", "--workers", "0"]
    result = CliRunner().invoke(app, [*command, *settings])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert line["reply"] in ANSWERS[line["answer_type"]]
        assert 0 < line["answer_score"] < 1
