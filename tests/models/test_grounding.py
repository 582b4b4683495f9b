"""An LVLM with a mask head: from the state at `[SEG]` to masks, in training and afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medm.config import validate
from medm.data.collator import Collator
from medm.data.turns import parse_record
from medm.errors import RecipeError
from medm.models import build, kind_of, kind_of_config, load, outputs_of, processor_of
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.models.lvlm.options import MASK_OUTPUTS, MASK_PARTS, LVLMOptions
from medm.models.lvlm.processing import LVLMProcessor
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from medm.types import Example, MaskTargets
from tests import tiny
from tests.models import plain_head

VIEW = "image@masks"


@pytest.fixture(autouse=True)
def head() -> Iterator[str]:
    with plain_head.registered() as name:
        yield name


def section(llm: Path, **masks: Any) -> dict[str, Any]:
    given = tiny.lvlm_section(llm)
    given["masks"] = {"head": {"name": plain_head.NAME}, **masks}
    return given


def options_of(given: dict[str, Any]) -> LVLMOptions:
    return validate(LVLMOptions, {"kind": "lvlm", **given}, source="test")


def built(
    llms: dict[str, Path], **masks: Any
) -> tuple[LVLMForConditionalGeneration, LVLMProcessor]:
    torch.manual_seed(0)
    model, processor = build(options_of(section(llms["qwen2.5"], **masks)))
    assert isinstance(model, LVLMForConditionalGeneration)
    assert isinstance(processor, LVLMProcessor)
    return model, processor


def example(processor: LVLMProcessor, masks: int, *, seed: int = 0) -> Example:
    """One image, and a reply with so many masks of it."""
    rng = np.random.default_rng(seed)
    record = {
        "image": "a.png",
        "masks": [f"{number}.png" for number in range(masks)],
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it? [SEG]"},
            {"from": "gpt", "value": "It is" + " here [SEG]" * masks + "."},
        ],
    }
    pixels = {
        "image": [rng.normal(size=(3, 16, 16)).astype(np.float32)],
        VIEW: [rng.normal(size=(3, 16, 16)).astype(np.float32)],
    }
    assert processor.mask_grid is not None
    targets = MaskTargets(
        [rng.integers(0, 2, processor.mask_grid).astype(np.uint8) for _ in range(masks)],
        list(range(masks)),
        [0] * masks,
    )
    return processor.encode(parse_record(record), pixels, masks=targets)


def batch_of(examples: list[Example]) -> dict[str, Any]:
    """A padded batch, with the mask fields that a collator gives."""
    batch: dict[str, Any] = dict(Collator(0, with_mask=False)(examples))
    tokens: list[int] = []
    items: list[int] = []
    seen = images = 0
    for one in examples:
        if one.masks is not None:
            tokens += [seen + token for token in one.masks.tokens]
            items += [images + item for item in one.masks.items]
            seen += len(one.masks.tokens)
            images += 1
    if tokens:
        batch |= {"mask_tokens": torch.tensor(tokens), "mask_items": torch.tensor(items)}
    return batch


def test_the_head_brings_its_token_parts_view_and_outputs(llms: dict[str, Path]) -> None:
    model, processor = built(llms)
    assert processor.control_tokens == ["[SEG]"]
    assert set(MASK_PARTS) <= model.parts().keys()
    assert options_of(section(llms["qwen2.5"])).part_names() == model.parts().keys()
    assert processor.mask_view == VIEW
    assert processor.mask_grid == (8, 8)
    assert kind_of_config(model.config).gives(model.config) == {"text", "masks"}
    without = options_of(tiny.lvlm_section(llms["qwen2.5"]))
    assert outputs_of(options_of(section(llms["qwen2.5"]))) - outputs_of(without) == MASK_OUTPUTS
    assert VIEW in kind_of(without).preprocess(options_of(section(llms["qwen2.5"])))
    assert not MASK_OUTPUTS & outputs_of(without)


def test_targets_on_the_prepared_grid(llms: dict[str, Path]) -> None:
    assert processor_of(options_of(section(llms["qwen2.5"], targets="full"))).mask_grid == (16, 16)


@pytest.mark.parametrize("state", ["at", "before"])
def test_masks_are_those_of_the_head_at_the_state_of_each_token(
    llms: dict[str, Path], state: str
) -> None:
    model, processor = built(llms, state=state)
    assert model.masks is not None
    one = example(processor, 2)
    output = model(**batch_of([one]))
    ids = torch.tensor([one.input_ids])
    embeds, _ = model.embed(ids, {"image": torch.from_numpy(one.pixels["image"][0])[None]})
    hidden = model.language_model.base_model(inputs_embeds=embeds).last_hidden_state[0]
    places = [i for i, t in enumerate(one.input_ids) if t == processor.control_token_ids["[SEG]"]]
    assert len(places) == 2  # not the one that the user typed
    places = [place - (state == "before") for place in places]
    prompts = model.masks.projection(hidden[places])
    pixels = torch.from_numpy(one.pixels[VIEW][0])[None]
    expected = model.masks.head(pixels, prompts, torch.tensor([0, 0]))
    assert torch.allclose(output.mask_logits, expected.logits, atol=1e-5)
    assert torch.allclose(output.mask_quality, expected.quality, atol=1e-5)
    assert torch.allclose(output.mask_presence, expected.presence, atol=1e-5)


def test_a_batch_of_mixed_counts_equals_one_by_one(llms: dict[str, Path]) -> None:
    model, processor = built(llms)
    examples = [example(processor, masks, seed=masks) for masks in (0, 1, 3)]
    together = model(**batch_of(examples)).mask_logits
    assert together.shape == (4, 8, 8)
    apart = [model(**batch_of([one])).mask_logits for one in examples]
    assert [len(masks) for masks in apart] == [0, 1, 3]
    assert torch.allclose(together, torch.cat(apart), atol=1e-5)


def test_an_image_is_encoded_once_whatever_its_masks(llms: dict[str, Path]) -> None:
    model, processor = built(llms)
    assert model.masks is not None
    head = model.masks.head
    assert isinstance(head, plain_head.PlainHead)
    model(**batch_of([example(processor, 3)]))
    assert head.encoded == 1


def gradients(model: LVLMForConditionalGeneration, name: str) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parts()[name].parameters()]


def test_gradients_reach_state_projection_and_decoder_of_a_frozen_encoder(
    llms: dict[str, Path],
) -> None:
    model, processor = built(llms)
    parts = {
        name: PartOptions(tune="full") for name in ("llm", "masks.decoder", "masks.projection")
    }
    apply_parts(model, parts, TrainOptions())
    model.train()
    model(**batch_of([example(processor, 1)])).mask_logits.sum().backward()
    for name in parts:
        assert any(grad is not None and bool(grad.any()) for grad in gradients(model, name)), name
    assert all(grad is None for grad in gradients(model, "masks.encoder"))


def test_a_batch_without_masks_gives_every_weight_a_zero_gradient(llms: dict[str, Path]) -> None:
    model, processor = built(llms)
    model.train()
    output = model(**batch_of([example(processor, 0)]))
    assert output.mask_logits.shape == (0, 8, 8)
    (output.mask_logits.sum() + output.mask_presence.sum()).backward()
    for name in MASK_PARTS:
        assert all(grad is not None and not grad.any() for grad in gradients(model, name)), name


def test_masks_are_left_out_where_no_objective_reads_them(llms: dict[str, Path]) -> None:
    model, processor = built(llms)
    assert model.masks is not None
    output = model(**batch_of([example(processor, 1)]), outputs=frozenset({"loss_sum"}))
    assert output.mask_logits is None
    assert model.masks.head.encoded == 0  # type: ignore[operator]


def test_prompts_of_replies_equal_those_of_training_also_in_a_padded_batch(
    llms: dict[str, Path],
) -> None:
    model, processor = built(llms)
    assert model.masks is not None
    examples = [example(processor, masks, seed=masks) for masks in (2, 0, 1)]
    padded = processor.pad(examples)
    prompts = model.mask_prompts(
        padded["input_ids"], padded["attention_mask"], pixels=padded["pixels"]
    )
    assert prompts.shape == (3, model.masks.head.dim)
    pixels = torch.from_numpy(np.stack([examples[0].pixels[VIEW][0], examples[2].pixels[VIEW][0]]))
    made = model.masks.head(pixels, prompts, torch.tensor([0, 0, 1]))
    expected = model(**batch_of(examples)).mask_logits
    assert torch.allclose(made.logits, expected, atol=1e-5)


def test_a_saved_folder_gives_the_same_masks(llms: dict[str, Path], tmp_path: Path) -> None:
    model, processor = built(llms, preprocess={"mean": [0.1, 0.2, 0.3]}, targets="full")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, saved = load(str(tmp_path))
    assert isinstance(saved, LVLMProcessor)
    assert saved.preprocess[VIEW] == processor.preprocess[VIEW]
    assert (saved.mask_view, saved.mask_grid) == (VIEW, (16, 16))
    batch = batch_of([example(processor, 2)])
    assert torch.equal(again(**batch).mask_logits, model(**batch).mask_logits)


def test_folders_without_a_head_say_nothing_of_masks(llms: dict[str, Path], tmp_path: Path) -> None:
    model, processor = build(options_of(tiny.lvlm_section(llms["qwen2.5"])))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "masks" not in (tmp_path / "config.json").read_text()
    assert "masks" not in (tmp_path / "processor_config.json").read_text()


def test_a_head_joins_a_trained_model_and_stays(llms: dict[str, Path], tmp_path: Path) -> None:
    model, processor = build(options_of(tiny.lvlm_section(llms["qwen2.5"])))
    model.save_pretrained(tmp_path / "text")
    processor.save_pretrained(tmp_path / "text")
    options = options_of(section(llms["qwen2.5"]))
    joined, with_masks = build(options, init_from=str(tmp_path / "text"))
    assert isinstance(joined, LVLMForConditionalGeneration)
    assert joined.masks is not None
    assert with_masks.control_token_ids == joined.config.control_tokens  # type: ignore[attr-defined]
    joined.save_pretrained(tmp_path / "masks")
    with_masks.save_pretrained(tmp_path / "masks")
    again, _ = build(options, init_from=str(tmp_path / "masks"))
    assert isinstance(again, LVLMForConditionalGeneration)
    assert again.masks is not None
    for one, other in zip(joined.masks.parameters(), again.masks.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": None}, "a mask head, and the recipe none"),
        ({"masks": {"head": {"name": plain_head.NAME}, "state": "before"}}, "masks.state 'at'"),
        ({"masks": {"head": {"name": plain_head.NAME}, "projection": {"depth": 3}}}, "depth 2"),
    ],
)
def test_another_head_than_the_folder_holds_is_refused(
    llms: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model, processor = built(llms)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=message):
        build(options_of(section(llms["qwen2.5"]) | change), init_from=str(tmp_path))


def test_a_head_for_another_kind_of_file_is_refused(
    llms: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_head.PlainHead, "kinds", frozenset({"volume"}))
    with pytest.raises(RecipeError, match=r"masks.view: .* reads volume, not image"):
        build(options_of(section(llms["qwen2.5"])))


def test_rows_of_the_token_are_trained_under_lora_and_survive_merging(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    model, processor = built(llms)
    parts = {
        "llm": PartOptions.model_validate({"tune": "lora", "r": 4, "new_tokens": {}}),
        "masks.projection": PartOptions(tune="full"),
    }
    apply_parts(model, parts, TrainOptions())
    model.train()
    one = batch_of([example(processor, 1)])
    before = model(**one).mask_logits.detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    (model(**one).mask_logits ** 2).mean().backward()
    optimizer.step()
    model.eval()
    trained = model(**one).mask_logits.detach()
    assert not torch.allclose(before, trained)
    model.merge_adapters()
    assert torch.allclose(model(**one).mask_logits, trained, atol=1e-5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert torch.allclose(load(str(tmp_path))[0](**one).mask_logits, trained, atol=1e-5)
