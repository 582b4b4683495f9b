"""`model.llm.attention`: what a recipe names is what runs, or it is refused before weights are
read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, PreTrainedModel

import medm.models.lvlm.build
from medm.config import validate
from medm.errors import RecipeError
from medm.llms import attention as llm_attention
from medm.models import build, kind_of, load
from medm.models.lvlm.options import LVLMOptions
from tests import tiny


def options(llm: Path, attention: str, *, published: bool = True) -> LVLMOptions:
    section = tiny.lvlm_section(llm)
    if not published:
        del section["llm"]["path"]
        section["llm"] |= {"architecture": tiny.llm_architecture("qwen2.5"), "tokenizer": str(llm)}
    section["llm"]["attention"] = attention
    return validate(LVLMOptions, section, source="test")


def levels(model: Any) -> set[str]:
    """Every config and module of the language model that says how it attends."""
    modules = [module for module in model.language_model.modules() if hasattr(module, "config")]
    assert len(modules) > 3
    configs = [model.config, model.config.get_text_config(), *(module.config for module in modules)]
    return {config._attn_implementation for config in configs}


@pytest.fixture(scope="module")
def saved(llms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model, processor = build(options(llms["qwen2.5"], "eager"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("start", ["published", "random", "init_from"])
def test_it_takes_effect_at_every_level(
    attention: str, start: str, llms: dict[str, Path], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.accelerator, "is_available", lambda: True
    )  # for flex_attention, which is not run here
    model, _ = build(
        options(llms["qwen2.5"], attention, published=start != "random"),
        init_from=str(saved) if start == "init_from" else None,
    )
    assert levels(model) == {attention}


def test_it_is_what_computes(llms: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The function of that name is called, in each layer, and no other."""
    called: list[str] = []
    for name in ("sdpa", "eager"):
        monkeypatch.setattr(
            f"torch.nn.functional.{'scaled_dot_product_attention' if name == 'sdpa' else 'softmax'}",
            _counted(called, name, name == "sdpa"),
        )
    for attention in ("eager", "sdpa"):
        model, _ = build(options(llms["qwen2.5"], attention))
        called.clear()
        model.language_model(torch.tensor([[1, 2, 3]]))
        assert called == [attention] * model.config.get_text_config().num_hidden_layers


def _counted(called: list[str], name: str, fused: bool) -> Any:
    function = (
        torch.nn.functional.scaled_dot_product_attention if fused else torch.nn.functional.softmax
    )

    def count(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return function(*args, **kwargs)

    return count


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ("flash_attention_2", "the package flash-attn"),
        ("flash_attention_3", "the package flash-attn-3"),
        ("flex_attention", "a GPU"),
    ],
)
@pytest.mark.parametrize("start", ["published", "init_from"])
def test_what_this_machine_cannot_run_is_refused_before_weights_are_read(
    attention: str,
    expected: str,
    start: str,
    llms: dict[str, Path],
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(llm_attention.import_utils, name, lambda: False)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", read)
    monkeypatch.setattr(AutoModel, "from_pretrained", read)
    monkeypatch.setattr(medm.models.lvlm.build, "_language_model", read)
    wanted = options(llms["qwen2.5"], attention)
    with pytest.raises(
        RecipeError, match=rf"model\.llm\.attention: '{attention}' needs .*{expected}.*=sdpa"
    ):
        build(wanted, init_from=str(saved) if start == "init_from" else None)
    # An estimate and a check of the data are for other machines too.
    assert kind_of(wanted).skeleton(wanted).width == 32
    assert kind_of(wanted).processor(wanted).pad_id >= 0


def test_a_language_model_that_lacks_it_is_refused(
    llms: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2PreTrainedModel

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(Qwen2PreTrainedModel, "_supports_flex_attn", False)
    with pytest.raises(
        RecipeError, match=r"model\.llm\.attention: 'flex_attention' cannot be used"
    ):
        build(options(llms["qwen2.5"], "flex_attention"))


def test_a_folder_that_names_a_kernel_of_the_hub_is_opened_without_it(
    saved: Path, tmp_path: Path
) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config["text_config"]):
        part |= {
            "_attn_implementation": "someone/kernel",
            "_experts_implementation": "someone/other",
        }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = load(str(tmp_path))
    assert levels(model) == {"sdpa"}
