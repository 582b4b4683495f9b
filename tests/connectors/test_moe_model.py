"""The mixture of experts inside a model: tasks come from the recipe, text-only batches train, its
loss is reported."""

import json
import logging

import pytest
import torch

import medm.models
from medm.config import validate
from medm.connectors import MoEOptions, _warn_older_mode
from medm.errors import RecipeError
from medm.models.lvlm.options import LVLMOptions
from tests import tiny


def section(tmp_path, **connector):
    model = tiny.lvlm_section(tiny.save_llm("qwen2.5", tmp_path / "llm"))
    model["branches"]["image"]["connector"] = {
        "name": "moe",
        "num_experts": 3,
        "router_dim": 8,
        **connector,
    }
    return model


def batch(model, tokens, task):
    placeholder = model.config.branches["image"]["placeholder_id"]
    ids = torch.tensor([[1] + [placeholder] * tokens + [2, 3, 4]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clone(),
        "pixels": {"image": torch.randn(1, 3, 16, 16)},
        "task_ids": {"image": torch.tensor([task])},
    }


def test_tasks_are_those_of_the_model_and_route(tmp_path):
    recipe = section(tmp_path, route_by="task+token", gate="sparse") | {"tasks": ["vqa", "cls"]}
    model, processor = medm.models.build(validate(LVLMOptions, recipe, source="test"))
    connector = model.branch("image").connector
    assert connector.tasks == ("vqa", "cls") == tuple(processor.tasks)
    torch.manual_seed(0)
    inputs = batch(model, connector.num_tokens, 1)
    output = model.train()(**inputs)
    assert set(output.losses) == {"image.load_balance"}
    (output.loss + output.losses["image.load_balance"]).backward()
    silent = [
        n for n, p in connector.named_parameters() if n.startswith("router") and not p.grad.any()
    ]
    assert silent == []
    with pytest.raises(ValueError, match="a task that the router does not know"):
        model(**inputs | {"task_ids": {"image": torch.tensor([2])}})


def test_a_text_only_batch_touches_every_expert_and_counts_for_no_task(tmp_path):
    recipe = section(tmp_path, gate="hard") | {"tasks": ["vqa", "cls"]}
    model, _ = medm.models.build(validate(LVLMOptions, recipe, source="test"))
    ids = torch.tensor([[1, 2, 3, 4]])
    model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    connector = model.branch("image").connector
    assert all(
        parameter.grad is not None and not parameter.grad.any()
        for parameter in connector.parameters()
    )
    assert connector.routing_weights() == {}


def test_another_list_of_tasks_is_refused(tmp_path):
    recipe = section(tmp_path, gate="hard", tasks=["cls", "vqa"]) | {"tasks": ["vqa", "cls"]}
    with pytest.raises(
        RecipeError, match=r"\['cls', 'vqa'\] are not the model's tasks \['vqa', 'cls'\]"
    ):
        medm.models.build(validate(LVLMOptions, recipe, source="test"))


OLDER_MODES = [("published", "paper"), ("sound", "corrected")]


@pytest.mark.parametrize(("older", "mode"), OLDER_MODES)
def test_the_older_name_of_a_mode_in_a_recipe_is_read_with_a_warning(older, mode, caplog):
    _warn_older_mode.cache_clear()
    with caplog.at_level(logging.WARNING, logger="medm"):
        options = MoEOptions.model_validate({"name": "moe", "mode": older})
        assert MoEOptions.model_validate({"name": "moe", "mode": older}) == options
    assert options.mode == mode
    assert caplog.messages == [
        f"moe: mode {older!r} is now called {mode!r}; the older name still works"
    ]
    with pytest.raises(RecipeError, match="mode: expected 'corrected' or 'paper', found 'other'"):
        validate(MoEOptions, {"name": "moe", "mode": "other"}, source="test")


@pytest.mark.parametrize(("older", "mode"), OLDER_MODES)
def test_a_folder_with_the_older_name_of_a_mode_gives_the_same_outputs(tmp_path, older, mode):
    recipe = section(tmp_path, mode=mode, depth=1)
    recipe["branches"]["image"]["connector"].pop("router_dim")  # the mode decides it
    options = validate(LVLMOptions, recipe, source="test")
    model, processor = medm.models.build(options)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["branches"]["image"]["connector"]["mode"] == mode
    config["branches"]["image"]["connector"]["mode"] = older
    (folder / "config.json").write_text(json.dumps(config))

    opened, _ = medm.models.load(str(folder))
    inputs = batch(model, model.branch("image").connector.num_tokens, 0)
    del inputs["labels"]
    with torch.no_grad():
        assert torch.equal(opened.eval()(**inputs).logits, model.eval()(**inputs).logits)
    assert opened.branch("image").connector.router.mode == mode
    assert opened.config.to_dict()["branches"]["image"]["connector"]["mode"] == mode
    opened.check_same_parts(options, source=str(folder))
    recipe["branches"]["image"]["connector"]["mode"] = older
    opened.check_same_parts(validate(LVLMOptions, recipe, source="test"), source=str(folder))
