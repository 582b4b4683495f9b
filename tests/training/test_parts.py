from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medm.errors import RecipeError, UnknownNameError
from medm.models.adapters import adapted
from medm.models.token_rows import token_rows
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts, frozen_modules, parameter_groups
from tests.training.toys import FULL, LORA, ROWS, Towers, Toy, ToyConfig

TRAIN = TrainOptions(learning_rate=5e-4, weight_decay=0.02)


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy(ToyConfig())


def test_the_table_counts(toy: Toy) -> None:
    connector = 16 * 32 + 32 + 32 * 32 + 32
    encoder = 6 * 16 + 16 + 2 * 16
    table = apply_parts(toy, {"image.connector": PartOptions(tune="full", lr=1e-2)}, TRAIN)
    rows = {row.name: row for row in table.rows}
    assert (rows["image.connector"].parameters, rows["image.connector"].trainable) == (
        connector,
        connector,
    )
    assert (rows["image.encoder"].parameters, rows["image.encoder"].trainable) == (encoder, 0)
    assert rows["image.connector"].lr == 1e-2
    assert rows["llm"].tune == "frozen"
    assert (
        table.trainable == connector == sum(p.numel() for p in toy.parameters() if p.requires_grad)
    )
    assert table.parameters == sum(p.numel() for p in toy.parameters())
    assert f"{connector:,}" in str(table)


def test_lora_trains_adapters_alone_and_skips_the_head(toy: Toy) -> None:
    apply_parts(toy, LORA, TRAIN)
    trained = {name for name, p in toy.llm.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert {name.split(".")[4] for name in trained} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert all(p.requires_grad for p in toy.connector.parameters())
    assert set(toy.config.adapters) == {"llm"}


def test_targets_by_pattern(toy: Toy) -> None:
    apply_parts(toy, {"llm": PartOptions(tune="lora", targets=r".*layers\.1\..*v_proj")}, TRAIN)
    trained = [name for name, p in toy.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    assert all("layers.1." in name and "v_proj" in name for name in trained)


def test_a_pattern_that_fits_nothing_is_an_error(toy: Toy) -> None:
    with pytest.raises(RecipeError, match="nothing_like_this"):
        apply_parts(toy, {"llm": PartOptions(tune="lora", targets="nothing_like_this")}, TRAIN)


def test_unknown_part(toy: Toy) -> None:
    with pytest.raises(
        UnknownNameError, match=r"image\.connecter.*did you mean 'image\.connector'"
    ):
        apply_parts(toy, {"image.connecter": PartOptions(tune="full")}, TRAIN)


def test_groups_have_their_own_rates_and_decay_matrices_alone(toy: Toy) -> None:
    apply_parts(toy, LORA, TRAIN)
    groups = {group["name"]: group for group in parameter_groups(toy, LORA, TRAIN)}
    assert set(groups) == {"llm.matrices", "image.connector.matrices", "image.connector.vectors"}
    assert groups["llm.matrices"]["lr"] == 3e-3
    assert groups["llm.matrices"]["weight_decay"] == 0.02
    assert groups["image.connector.matrices"]["weight_decay"] == 0.1
    assert groups["image.connector.vectors"]["weight_decay"] == 0.0
    assert all(p.dim() < 2 for p in groups["image.connector.vectors"]["params"])
    members = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in toy.parameters() if p.requires_grad)


def test_new_rows_have_a_rate_of_their_own_and_no_decay(toy: Toy) -> None:
    apply_parts(toy, ROWS, TRAIN)
    groups = {group["name"]: group for group in parameter_groups(toy, ROWS, TRAIN)}
    assert (groups["llm.new_tokens"]["lr"], groups["llm.new_tokens"]["weight_decay"]) == (2e-2, 0.0)
    assert [tuple(p.shape) for p in groups["llm.new_tokens"]["params"]] == [(3, 32)] * 2
    assert groups["llm.matrices"]["lr"] == 3e-3
    members = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in toy.parameters() if p.requires_grad)
    alone = {"llm": PartOptions(tune="frozen", new_tokens="train")}
    table = apply_parts(toy, alone, TRAIN)
    assert [(row.tune, row.lr) for row in table.rows if row.name == "llm"] == [
        ("frozen, new tokens", 5e-4)
    ]


def test_new_rows_of_an_earlier_stage_are_written_back_first(toy: Toy) -> None:
    apply_parts(toy, {"llm": PartOptions(tune="frozen", new_tokens="train")}, TRAIN)
    for rows in token_rows(toy.llm):
        nn.init.ones_(rows.weight)
    copied = copy.deepcopy(toy)
    for rows in token_rows(toy.llm):
        nn.init.zeros_(rows.weight)
    ids = torch.tensor([[1, 60, 5, 3]])
    logits = copied.eval().llm(input_ids=ids).logits
    assert not torch.allclose(toy.eval().llm(input_ids=ids).logits, logits), (
        "a copy has rows of its own"
    )
    for parts in (
        {"llm": PartOptions(tune="full")},
        {},
        {"llm": PartOptions(tune="frozen", new_tokens="train")},
    ):
        model = copy.deepcopy(copied)
        apply_parts(model, parts, TRAIN)
        assert len(token_rows(model.llm)) == (2 if parts and parts["llm"].new_tokens else 0)
        assert bool(model.config.new_rows) == bool(token_rows(model.llm))
        assert torch.equal(model.llm.get_input_embeddings().weight[60], torch.ones(32))
        torch.testing.assert_close(model.llm(input_ids=ids).logits, logits, atol=1e-5, rtol=1e-5)


def test_new_tokens_of_a_part_without_any_are_refused(toy: Toy) -> None:
    with pytest.raises(
        RecipeError, match=r"parts\.image\.connector\.new_tokens: the part has no new tokens"
    ):
        apply_parts(toy, {"image.connector": PartOptions(tune="full", new_tokens="train")}, TRAIN)
    for layer in ("lm_head", "embed_tokens"):
        adapter = {"llm": PartOptions(tune="lora", targets=[layer], new_tokens="train")}
        with pytest.raises(RecipeError, match="LoRA adapter in the same layer exclude each other"):
            apply_parts(Toy(ToyConfig()), adapter, TRAIN)


def test_shared_weights_are_optimised_once_and_tuned_alike() -> None:
    model = Towers()
    model.second[2].weight = nn.Parameter(torch.zeros(8, 32))
    model.first[2].weight = model.second[2].weight
    parts = {"image.encoder": PartOptions(tune="full"), "text.encoder": PartOptions(tune="full")}
    apply_parts(model, parts, TRAIN)
    members = [id(p) for group in parameter_groups(model, parts, TRAIN) for p in group["params"]]
    assert len(members) == len(set(members))
    with pytest.raises(RecipeError, match="shares weights"):
        apply_parts(model, {"image.encoder": PartOptions(tune="full")}, TRAIN)


def test_a_parameter_outside_every_part_is_an_error() -> None:
    model = Towers()
    model.stray = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="stray"):
        apply_parts(model, {"scale": PartOptions(tune="full")}, TRAIN)


def test_trained_weights_are_held_in_float32(toy: Toy) -> None:
    toy.to(torch.bfloat16)
    apply_parts(toy, LORA, TRAIN)
    assert {p.dtype for p in toy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in toy.encoder.parameters()} == {torch.bfloat16}


def test_an_adapter_that_weights_bring_is_kept_merged_or_refused(toy: Toy) -> None:
    apply_parts(toy, LORA, TRAIN)
    for name, parameter in toy.llm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(8)[None]
    toy.eval()
    expected = toy.llm(input_ids=ids).logits

    kept = copy.deepcopy(toy)
    apply_parts(kept, LORA, TRAIN)  # the same adapter: training goes on
    torch.testing.assert_close(kept.eval().llm(input_ids=ids).logits, expected)
    with pytest.raises(RecipeError, match=r"another adapter .*r is 4, the recipe says 8"):
        apply_parts(kept, {"llm": PartOptions(tune="lora", r=8, alpha=8)}, TRAIN)
    with pytest.raises(RecipeError, match="adapter: merge"):
        apply_parts(kept, FULL, TRAIN)

    merged = copy.deepcopy(toy)
    apply_parts(merged, {"llm": PartOptions(tune="full", adapter="merge")}, TRAIN)
    assert not adapted(merged.llm)
    assert merged.config.adapters == {}
    torch.testing.assert_close(
        merged.eval().llm(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4
    )
    assert all(p.requires_grad for p in merged.llm.parameters())


def test_frozen_modules_are_those_without_any_trained_weight(toy: Toy) -> None:
    apply_parts(toy, LORA, TRAIN)
    assert frozen_modules(toy) == [toy.encoder]


def test_checkpointing_changes_memory_not_gradients(toy: Toy) -> None:
    for module in toy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    other = copy.deepcopy(toy)
    ids = torch.randint(0, 64, (2, 8))
    batch = {"input_ids": ids, "labels": ids, "vision": torch.randn(2, 6)}
    apply_parts(toy, FULL, TRAIN)
    apply_parts(
        other, {**FULL, "llm": PartOptions(tune="full", gradient_checkpointing=True)}, TRAIN
    )
    calls = []
    layer = other.llm.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (toy.train(), other.train()):
        model(**batch).loss_sum.backward()
    assert len(calls) == 2  # once forward, once again in the backward pass
    for (name, a), (_, b) in zip(toy.named_parameters(), other.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    with pytest.raises(RecipeError, match="has no layers that support it"):
        apply_parts(
            toy, {"image.connector": PartOptions(tune="full", gradient_checkpointing=True)}, TRAIN
        )
