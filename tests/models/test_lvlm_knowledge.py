"""An LVLM whose connector's tokens attend to a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medm.config import validate
from medm.errors import ExportError, RecipeError
from medm.models import build, load
from medm.models.estimate import estimate
from medm.models.export.llava import refuse_what_differs
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.models.lvlm.options import LVLMOptions
from medm.models.lvlm.processing import LVLMProcessor
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from tests import tiny

GRAPH = {"name": "graph", "file": "chest", "feed_forward": 32, "fusion": {"feed_forward": 32}}


def options_of(llms: dict[str, Path], knowledge: dict[str, Any] | str | None) -> LVLMOptions:
    section = tiny.lvlm_section(llms["qwen2.5"])
    if knowledge is not None:
        section["branches"]["image"]["knowledge"] = knowledge
    return validate(LVLMOptions, {"kind": "lvlm", **section}, source="test")


def built(
    llms: dict[str, Path], knowledge: dict[str, Any] | str | None
) -> tuple[LVLMForConditionalGeneration, LVLMProcessor]:
    torch.manual_seed(0)
    model, processor = build(options_of(llms, knowledge))
    assert isinstance(model, LVLMForConditionalGeneration)
    assert isinstance(processor, LVLMProcessor)
    return model, processor


def save(model: LVLMForConditionalGeneration, processor: LVLMProcessor, folder: Path) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def batch(model: LVLMForConditionalGeneration, *, with_image: bool = True) -> dict[str, Any]:
    branch = model.branch("image")
    ids = [branch.placeholder_id] * branch.num_tokens * with_image + [5, 6, 7]
    torch.manual_seed(1)
    pixels = {"image": torch.randn(1, 3, 16, 16)} if with_image else {}
    row = torch.tensor([ids])
    return {"input_ids": row, "labels": row, "pixels": pixels}


def loss(model: LVLMForConditionalGeneration) -> Tensor:
    return model(**batch(model)).loss.detach()


def test_without_knowledge_a_model_is_the_plain_one(llms: dict[str, Path], tmp_path: Path) -> None:
    model, processor = built(llms, None)
    assert options_of(llms, None).part_names() == model.parts().keys()
    assert "image.knowledge" not in model.parts()
    folder = save(model, processor, tmp_path)
    assert "knowledge" not in (tmp_path / "config.json").read_text()
    assert "knowledge" not in str(options_of(llms, None).model_dump())
    assert not any("knowledge" in name for name in load(folder)[0].state_dict())


def test_an_identity_start_equals_the_plain_model(llms: dict[str, Path]) -> None:
    plain, _ = built(llms, None)
    model, _ = built(llms, GRAPH | {"fusion": {"feed_forward": 32, "start": "identity"}})
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.startswith("branches.image.knowledge.") for name in missing)
    assert torch.equal(loss(model), loss(plain))


def test_knowledge_is_a_part_that_changes_the_reply(llms: dict[str, Path]) -> None:
    plain, _ = built(llms, None)
    model, _ = built(llms, GRAPH)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert options_of(llms, GRAPH).part_names() == model.parts().keys()
    assert "image.knowledge" in model.parts()
    assert not torch.allclose(loss(model), loss(plain))


def test_the_tokens_attend_to_nodes_of_the_models_own_word_embeddings(
    llms: dict[str, Path],
) -> None:
    model, processor = built(llms, GRAPH)
    branch = model.branch("image")
    assert branch.knowledge is not None
    seen = branch.encode(batch(model)["pixels"]["image"])
    names = model.config.branches["image"]["knowledge"]["graph"]["nodes"]
    table = model.get_input_embeddings().weight
    means = torch.stack(
        [
            table[processor.tokenizer(name, add_special_tokens=False)["input_ids"]].mean(0)
            for name in names
        ]
    )
    torch.testing.assert_close(branch.knowledge.source.features(model._words), means)  # type: ignore[operator]
    nodes = branch.knowledge.source.encode(model._words)
    expected = branch.knowledge.fusion.fuse(branch.connector(seen), nodes)
    torch.testing.assert_close(branch.connect(seen, None, model._words), expected)


def test_a_shuffled_graph_changes_the_reply(llms: dict[str, Path]) -> None:
    model, _ = built(llms, GRAPH)
    control, _ = built(llms, GRAPH | {"shuffle": 0})
    own = {
        name: value
        for name, value in control.state_dict().items()
        if name.endswith(("node_ids", "node_mask"))
    }
    control.load_state_dict(model.state_dict() | own)
    assert not torch.equal(loss(control), loss(model))


def test_a_saved_folder_holds_the_graph(llms: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "graph.csv"
    file.write_text("name,groups,edges\nlung,,\nlung opacity,,lung\n")
    model, processor = built(llms, GRAPH | {"file": str(file)})
    folder = save(model, processor, tmp_path / "model")
    file.unlink()
    again, _ = load(folder)
    assert isinstance(again, LVLMForConditionalGeneration)
    assert torch.equal(loss(again), loss(model))
    assert str(file) not in (tmp_path / "model" / "config.json").read_text()


def test_knowledge_alone_can_be_trained(llms: dict[str, Path]) -> None:
    model, _ = built(llms, GRAPH)
    apply_parts(model, {"image.knowledge": PartOptions(tune="full")}, TrainOptions())
    model.train()
    model(**batch(model)).loss.backward()
    trained = dict(model.parts()["image.knowledge"].named_parameters())
    assert trained
    # A softmax does not depend on a number that is added to all scores, such as that of a key bias.
    assert [
        name
        for name, weight in trained.items()
        if not name.endswith("key.bias") and (weight.grad is None or not weight.grad.any())
    ] == []
    assert all(weight.grad is None for weight in model.language_model.parameters())


def test_a_batch_without_images_gives_every_weight_a_zero_gradient(llms: dict[str, Path]) -> None:
    model, _ = built(llms, GRAPH)
    model.train()
    model(**batch(model, with_image=False)).loss.backward()
    weights = list(model.parts()["image.knowledge"].parameters())
    assert all(weight.grad is not None and not weight.grad.any() for weight in weights)


def test_a_batch_without_images_calls_the_same_modules_in_the_same_order(
    llms: dict[str, Path],
) -> None:
    """ZeRO-3 compares what the ranks call."""
    model, _ = built(llms, GRAPH)
    model.train()
    called: list[str] = []
    for name, module in model.named_modules():
        if name.startswith("branches") or module is model.get_input_embeddings():
            module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    orders = []
    for with_image in (True, False):
        called.clear()
        model(**batch(model, with_image=with_image))
        orders.append(list(called))
    assert orders[0] == orders[1]
    assert sum(name.startswith("branches.image.knowledge") for name in orders[0]) > 10


def test_an_export_to_llava_refuses_it(llms: dict[str, Path]) -> None:
    with pytest.raises(ExportError, match="it has no knowledge; this model's vision tokens attend"):
        refuse_what_differs(*built(llms, GRAPH))


def test_knowledge_joins_a_trained_model_and_stays(llms: dict[str, Path], tmp_path: Path) -> None:
    plain, processor = built(llms, None)
    folder = save(plain, processor, tmp_path / "plain")
    options = options_of(llms, GRAPH | {"fusion": {"feed_forward": 32, "start": "identity"}})
    joined, with_knowledge = build(options, init_from=folder)
    assert isinstance(joined, LVLMForConditionalGeneration)
    assert isinstance(with_knowledge, LVLMProcessor)
    assert torch.equal(loss(joined), loss(plain))
    assert options.part_names() == joined.parts().keys()
    with torch.no_grad():
        for weight in joined.parts()["image.knowledge"].parameters():
            weight.add_(0.05)
    again, _ = build(options, init_from=save(joined, with_knowledge, tmp_path / "joined"))
    assert isinstance(again, LVLMForConditionalGeneration)
    assert torch.equal(loss(again), loss(joined))
    assert not torch.equal(loss(again), loss(plain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "image.knowledge 'graph', and the recipe none"),
        (GRAPH | {"layers": 1}, "image.knowledge.layers 2, not 1"),
        (GRAPH | {"shuffle": 3}, "image.knowledge.graph of other nodes or edges than 'chest'"),
    ],
)
def test_other_knowledge_than_the_folder_holds_is_refused(
    llms: dict[str, Path], tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    folder = save(*built(llms, GRAPH), tmp_path)
    with pytest.raises(RecipeError, match=message):
        build(options_of(llms, change), init_from=folder)


def test_what_an_lvlm_cannot_use_is_refused(llms: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"model.branches.image.knowledge: 'memory' is retrieved"):
        build(options_of(llms, "memory"))
    with pytest.raises(RecipeError, match=r"model.branches.image.knowledge.file: .*'chets'"):
        build(options_of(llms, {"name": "graph", "file": "chets"}))
    with pytest.raises(RecipeError, match=r"branches.image.knowledge.*unknown knowledge 'grph'"):
        options_of(llms, "grph")


def test_an_estimate_counts_it(llms: dict[str, Path]) -> None:
    model, _ = built(llms, GRAPH)
    sizes = {
        part.name: part.parameters
        for part in estimate(options_of(llms, GRAPH), choose=lambda model: None).parts
    }
    expected = sum(weight.numel() for weight in model.parts()["image.knowledge"].parameters())
    assert sizes["image.knowledge"] == expected > 0
