"""Published weights: the layouts they come in, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import medm.models
from medm.config import validate
from medm.errors import CheckpointError
from medm.models.lvlm.options import LVLMOptions
from medm.models.published.weights import (
    LoadReport,
    PretrainedSource,
    load_module,
    read_tensors,
    rename,
)
from tests import tiny

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 8,
}
PREPROCESSOR = {
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.5, 0.6],
    "resample": 2,
    "do_center_crop": False,
}


def published_layout(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names in the files on the hub, whatever this transformers writes: `vision_model.` in
    front, once."""
    known = ("vision_model.", "text_model.", "logit", "text_proj", "visual_proj")
    return {
        n if n.startswith(known) else f"vision_model.{n}": tensor for n, tensor in tensors.items()
    }


def save_tower(kind: str, folder: Path, *, shards: int = 1) -> Any:
    torch.manual_seed(3)
    folder.mkdir()
    if kind == "clip":
        model: Any = CLIPModel(
            CLIPConfig(vision_config=dict(tiny.VIT), text_config=dict(TEXT), projection_dim=8)
        )
        tower = model.vision_model
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(vision_config=dict(tiny.VIT), text_config=dict(TEXT)))
        tower = model.vision_model
    else:
        model = tower = SiglipVisionModel(SiglipVisionConfig(**tiny.VIT))
    model.config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    tensors = {
        name: tensor.contiguous() for name, tensor in published_layout(model.state_dict()).items()
    }
    names = sorted(tensors)
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        file = (
            "model.safetensors"
            if shards == 1
            else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        )
        save_file(part, folder / file)
    if shards > 1:
        files = {
            name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
            for i, name in enumerate(names)
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return tower.eval()


@pytest.mark.parametrize(("kind", "shards"), [("clip", 1), ("siglip", 3), ("siglip-vision", 1)])
def test_a_published_tower_loads_and_computes_the_same(
    kind: str, shards: int, llms: dict[str, Path], tmp_path: Path
) -> None:
    tower = save_tower(kind, tmp_path / "tower", shards=shards)
    section = tiny.lvlm_section(
        llms["qwen2.5"], encoder=kind.partition("-")[0], layer=-2, path=str(tmp_path / "tower")
    )
    section["branches"]["image"]["encoder"]["architecture"] = {}
    model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states[-2]
        found = model.parts()["image.encoder"](pixels).tokens
    assert torch.allclose(found, expected[:, expected.shape[1] - 16 :], atol=1e-6)
    preprocess = processor.preprocess["image"]
    assert (preprocess.mean, preprocess.interpolation, preprocess.fit) == (
        [0.1, 0.2, 0.3],
        "bilinear",
        "squash",
    )


def test_the_language_model_starts_from_its_published_weights(llms: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    published = AutoModelForCausalLM.from_pretrained(llms["llama-3.2"])
    section = tiny.lvlm_section(llms["llama-3.2"], family="llama-3.2")
    model, _ = medm.models.build(validate(LVLMOptions, section, source="test"))
    for name, tensor in published.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[name][: len(tensor)], tensor), name


def test_a_vocabulary_that_is_full_grows_by_the_placeholders(tmp_path: Path) -> None:
    folder = tiny.save_llm("qwen2.5", tmp_path / "full", vocab_size=259)
    model, processor = medm.models.build(
        validate(LVLMOptions, tiny.lvlm_section(folder), source="test")
    )
    assert processor.placeholder_ids["image"] == 259
    assert model.get_input_embeddings().num_embeddings == 320
    assert model.language_model.lm_head.out_features == 320
    assert model.config.text_config.vocab_size == 320


class _Payload:
    def __reduce__(self) -> Any:
        return (open, (str(Path("planted")), "w"))


def test_pickles_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.bin", {"w": torch.zeros(1), "x": _Payload()}), ("b.pth", _Payload())):
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match="could run any code"):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "planted").exists()


def test_torch_files_in_common_wrappings_open(tmp_path: Path) -> None:
    weights = {"a": torch.arange(3.0)}
    for i, content in enumerate(
        (weights, {"state_dict": weights}, {"model": {"module.a": weights["a"]}, "epoch": 3})
    ):
        torch.save(content, tmp_path / f"{i}.bin")
        assert read_tensors(tmp_path / f"{i}.bin")["a"].tolist() == [0, 1, 2]
    torch.save({"a": 1}, tmp_path / "numbers.bin")
    with pytest.raises(CheckpointError, match="expected a mapping of names to tensors"):
        read_tensors(tmp_path / "numbers.bin")


def test_damaged_files_and_empty_folders_say_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header at all")
    with pytest.raises(CheckpointError, match="damaged safetensors"):
        PretrainedSource(str(tmp_path)).tensors()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights; expected one of model"):
        PretrainedSource(str(tmp_path / "empty")).tensors()
    (tmp_path / "empty" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match=r"names gone\.safetensors, which is missing"):
        PretrainedSource(str(tmp_path / "empty")).tensors()


def test_loading_is_all_or_nothing() -> None:
    module = torch.nn.Linear(2, 2)
    before = module.weight.clone()
    good = {"x.weight": torch.ones(2, 2), "x.bias": torch.ones(2), "text.weight": torch.ones(1)}
    key_map, ignored = [(r"^x\.", "")], [r"^text\."]
    for change, message in (
        ({"x.bias": torch.ones(3)}, r"1 of another shape: bias \(3,\), expected \(2,\)"),
        ({"y": torch.ones(1)}, "1 unexpected: y"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_module(module, good | change, source="f", key_map=key_map, ignored=ignored)
        assert torch.equal(module.weight, before)
    with pytest.raises(CheckpointError, match="1 missing: bias"):
        load_module(module, {"x.weight": torch.ones(2, 2)}, source="f", key_map=key_map)
    report = load_module(module, good, source="f", key_map=key_map, ignored=ignored)
    assert (sorted(report.loaded), report.ignored) == (["x.bias", "x.weight"], ["text.weight"])
    assert str(report).endswith(": 2 tensors loaded, 1 unused")
    assert module.weight.sum() == 4


def test_two_tensors_under_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match="two tensors become 'w'"):
        rename(
            {"a.w": torch.ones(1), "b.w": torch.ones(1)},
            key_map=[(r"^[ab]\.", "")],
            ignored=[],
            report=LoadReport("f"),
        )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object at the top, found list"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": {"a": 1}}', "expected a weight_map"),
        (
            '{"weight_map": {"a": "../other/model.safetensors"}}',
            "expected the name of a file beside it",
        ),
    ],
)
def test_an_index_of_a_stranger_is_refused_in_words(
    tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        PretrainedSource(str(tmp_path)).tensors()


def test_a_broken_config_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        PretrainedSource(str(tmp_path)).config()


def test_code_that_lies_in_a_folder_is_neither_run_nor_asked_about(
    llms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(llms["qwen2.5"], folder)
    (folder / "theirs.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is there to answer"))
    section = validate(LVLMOptions, tiny.lvlm_section(folder), source="test")
    (folder / "config.json").write_text(json.dumps(config))
    medm.models.build(section)  # of a type that transformers knows itself
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "theirs"}))
    with pytest.raises(
        CheckpointError, match=r"model\.llm\.path: .*no such folder|no usable config"
    ):
        medm.models.build(section)
    assert not (tmp_path / "mark").exists()
