"""The mixture of experts inside a model: tasks come from the recipe, text-only batches train, its
loss is reported."""

import pytest
import torch

import medm.models
from medm.config import validate
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
