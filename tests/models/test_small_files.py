"""Small files of a model folder: damage is named before anything is built."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import medm.models
from medm.errors import CheckpointError, MedmError
from medm.models.manifest import MANIFEST, read_manifest, write_manifest
from tests.inference.tiny import save_tiny

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "processor_config.json")  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("small"))
    write_manifest(folder, {})
    return folder


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("layers", [2**63, 10**6])
def test_row_37_a_config_of_endless_layers_is_refused(model: Path, layers: int) -> None:
    def deepen(config: dict[str, Any]) -> None:
        config["text_config"]["num_hidden_layers"] = layers

    edit(model / "config.json", deepen)
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"config\.json: .*num_hidden_layers: expected at m"):
        medm.models.load(str(model))
    assert time.process_time() - started < 5


def test_row_37_a_config_of_another_size_allocates_nothing(model: Path) -> None:
    """Without `text_config` the defaults of transformers describe a model of seven billion."""
    edit(model / "config.json", lambda config: config.pop("text_config"))
    with pytest.raises(CheckpointError, match=r"describes a model of \d{9,} parameters, and the"):
        medm.models.load(str(model))


def test_row_37_a_token_id_of_ten_digits_is_refused(model: Path) -> None:
    def enlarge(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"] = {
            key: 2**31 if number == 5 else value
            for number, (key, value) in enumerate(tokenizer["model"]["vocab"].items())
        }

    edit(model / "tokenizer.json", enlarge)
    for opening in (medm.models.load, medm.models.load_processor):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*expected an id of at most"):
            opening(str(model))


@pytest.mark.parametrize("has_manifest", [True, False])
def test_row_40_a_missing_tokenizer_is_named(model: Path, has_manifest: bool) -> None:
    (model / "tokenizer.json").unlink()
    if not has_manifest:
        (model / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        medm.models.load(str(model))


@pytest.mark.parametrize("name", ["chat_template.jinja", "processor_config.json", "config.json"])
def test_row_41_a_changed_small_file_is_a_warning(
    model: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    medm.models.load(str(model))
    assert "changed since" not in caplog.text
    (model / name).write_text((model / name).read_text() + "\n")
    medm.models.load(str(model))
    assert f"{name} changed since the model was written" in caplog.text


def test_row_36_damage_of_any_small_file_is_a_message(model: Path) -> None:
    rng = random.Random(0)
    for name in FILES:
        whole = (model / name).read_bytes()
        for _ in range(4):
            (model / name).write_bytes(_damaged(whole, rng))
            try:
                medm.models.load(str(model))
            except MedmError as error:
                assert str(model) in str(error)
        (model / name).write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_brackets_deeper_than_the_parser_are_a_message(model: Path, name: str) -> None:
    (model / name).write_text('{"a":' * 10_000 + "1" + "}" * 10_000)
    for opening in (medm.models.load, medm.models.load_processor):
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            opening(str(model))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("generation_config.json", "eos_token_id", [[]]),
        ("generation_config.json", "eos_token_id", "x"),
        ("generation_config.json", "eos_token_id", [2, None]),
        ("generation_config.json", "eos_token_id", 2**63),
        ("generation_config.json", "suppress_tokens", ["x"]),
        ("generation_config.json", "suppress_tokens", -1),
        ("generation_config.json", "suppress_tokens", 3),
        ("tokenizer_config.json", "model_max_length", "x"),
    ],
)
def test_values_that_the_first_question_would_meet_are_refused(
    model: Path, name: str, field: str, value: object
) -> None:
    edit(model / name, lambda content: content.update({field: value}))
    with pytest.raises(CheckpointError, match=f"{field}: expected"):
        medm.models.load(str(model))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("branches", {}, "branches none; the model of config.json has image"),
        ("processor_class", "CLIPProcessor", "processor_config.json"),
        ("processor_class", "DualEncoderProcessor", "processor_config.json"),
    ],
)
def test_a_processor_of_another_model_is_refused(
    model: Path, field: str, value: object, expected: str
) -> None:
    edit(model / "processor_config.json", lambda content: content.update({field: value}))
    with pytest.raises(CheckpointError, match=expected):
        medm.models.load(str(model))


def test_a_placeholder_with_another_id_is_refused(model: Path) -> None:
    edit(model / "config.json", lambda c: c["branches"]["image"].update(placeholder_id=1))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the placeholder of the branch i"):
        medm.models.load(str(model))


def test_outputs_have_names_whatever_the_config_says(model: Path) -> None:
    def switch_off(config: dict[str, Any]) -> None:
        config["return_dict"] = config["text_config"]["return_dict"] = False

    edit(model / "config.json", switch_off)
    opened, _ = medm.models.load(str(model))
    assert opened.language_model(torch.tensor([[1, 2]])).logits.shape[:2] == (1, 2)


def _damaged(whole: bytes, rng: random.Random) -> bytes:
    content, values = json.loads(whole), [None, True, -1, "x", [], {}, 1.5, [None], {"a": 1}]
    node = content
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        node[key] = rng.choice(values)
        return json.dumps(content).encode()


def test_row_19_any_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x")
    write_manifest(tmp_path, {"step": 3, "recipe": {"lr": 1e-3, "name": "a"}, "world_size": 1})
    file = tmp_path / MANIFEST
    whole, record = file.read_bytes(), read_manifest(tmp_path)
    for at in range(len(whole)):
        for bit in (0, 3):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                found = read_manifest(tmp_path)
            except CheckpointError:
                continue
            # White space between the fields, or the name of the checksum itself.
            assert {key: found[key] for key in record} == record
    file.write_bytes(whole)
    edit(file, lambda content: content.pop("sha256"))  # an earlier medm wrote it
    assert read_manifest(tmp_path) == record
