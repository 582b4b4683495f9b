"""The model: what reaches what, what is refused, what survives saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import medm.models
from medm.config import validate
from medm.data.collator import Collator
from medm.errors import CheckpointError, DataError, RecipeError
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.models.lvlm.options import LVLMOptions
from medm.models.lvlm.processing import LVLMProcessor
from medm.models.lvlm.scatter import scatter
from medm.types import IGNORE_INDEX, Example, Media, Sample, Turn
from tests import tiny

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": None}


def build(llm: Path, **changes: Any) -> tuple[LVLMForConditionalGeneration, LVLMProcessor]:
    torch.manual_seed(1)
    section = tiny.lvlm_section(llm, **changes)
    model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    assert isinstance(model, LVLMForConditionalGeneration)
    assert isinstance(processor, LVLMProcessor)
    return model, processor


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, 16, 16)).astype(np.float32)


def example(
    processor: LVLMProcessor,
    text: str = "What?",
    images: int = 1,
    answer: str = "No.",
    seed: int = 0,
) -> Example:
    turns = (Turn("user", (*[Media("image")] * images, text)), Turn("assistant", (answer,)))
    return processor.encode(
        Sample(turns), {"image": [picture(seed + i) for i in range(images)]} if images else {}
    )


def collate(processor: LVLMProcessor, *examples: Example, side: Any = "right") -> dict[str, Any]:
    return Collator(processor.pad_id, padding_side=side)(list(examples))


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family_trains_saves_reloads_and_answers(
    family: str, llms: dict[str, Path], tmp_path: Path
) -> None:
    model, processor = build(llms[family], family=family)
    batch = collate(processor, example(processor), example(processor, "Longer question?", images=2))
    model.train()
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert str(llms[family]) not in (tmp_path / "config.json").read_text(), (
        "where parts came from stays at home"
    )
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is LVLMProcessor
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    answer = again.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > batch["input_ids"].shape[1]
    assert (
        processor.placeholder_ids["image"]
        not in answer[:, batch["input_ids"].shape[1] :].flatten().tolist()
    )


def test_tied_stays_tied_and_untied_stays_untied_after_reload(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    for family in ("llama-3.2", "phi3"):
        model, processor = build(llms[family], family=family)
        model.save_pretrained(tmp_path / family)
        processor.save_pretrained(tmp_path / family)
        again, _ = medm.models.load(str(tmp_path / family))
        head, embedding = (
            again.language_model.lm_head.weight,
            again.language_model.get_input_embeddings().weight,
        )
        assert (head.data_ptr() == embedding.data_ptr()) is tiny.FAMILIES[family]["tied"]


def test_phi_2_keeps_the_bias_of_its_head(llms: dict[str, Path], tmp_path: Path) -> None:
    model, processor = build(llms["phi"], family="phi")
    with torch.no_grad():
        model.language_model.lm_head.bias.normal_()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, saved = medm.models.load(str(tmp_path))
    assert torch.equal(again.language_model.lm_head.bias, model.language_model.lm_head.bias)
    assert saved.chat_template == processor.chat_template
    assert "Instruct: " in saved.chat_template


def test_the_image_changes_the_output_and_the_order_of_images_counts(llms: dict[str, Path]) -> None:
    model, processor = build(llms["qwen2.5"])
    one, other = picture(1), picture(2)
    turns = (Turn("user", (Media("image"), Media("image"), "Compare.")),)
    logits = []
    for images in ([one, other], [other, one], [one, one]):
        batch = collate(
            processor, processor.encode(Sample(turns), {"image": images}, generation=True)
        )
        with torch.no_grad():
            logits.append(model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-5
    assert (logits[0] - logits[2]).abs().max() > 1e-5


def test_images_of_a_batch_reach_their_own_sample(llms: dict[str, Path]) -> None:
    model, processor = build(llms["llama-3.2"], family="llama-3.2")
    alone = [example(processor, images=n, seed=10 * n) for n in (2, 0, 1)]
    model.eval()
    with torch.no_grad():
        together = model(**collate(processor, *alone) | {"labels": None}).logits
        for row, single in enumerate(alone):
            expected = model(**collate(processor, single) | {"labels": None}).logits[0]
            assert torch.allclose(together[row, : len(single.input_ids)], expected, atol=1e-5)


def test_padding_does_not_change_the_loss_and_neither_does_splitting_the_batch(
    llms: dict[str, Path],
) -> None:
    model, processor = build(llms["qwen2.5"])
    short, long = (
        example(processor, "a"),
        example(processor, "a much longer question, " * 4, answer="Yes, there is."),
    )
    labels = sum(sum(label != IGNORE_INDEX for label in e.labels) for e in (short, long))
    with torch.no_grad():
        together = model(**collate(processor, short, long)).loss
        split = sum(
            model(**collate(processor, e), num_items_in_batch=labels).loss for e in (short, long)
        )
        logits = model(**collate(processor, short, long) | {"labels": None}).logits
    batch = collate(processor, short, long)
    full = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    assert torch.allclose(together, split, atol=1e-6)
    assert torch.allclose(together, full, atol=1e-6)


def test_a_text_only_batch_gives_every_trainable_parameter_a_gradient(
    llms: dict[str, Path],
) -> None:
    model, processor = build(llms["qwen2.5"])
    model.train()
    model(**collate(processor, example(processor, images=0))).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    vision = [p.grad.abs().max() for p in model.parts()["image.encoder"].parameters()]
    assert max(vision) == 0


def test_a_batch_without_labels_has_a_loss_of_zero_that_can_be_differentiated(
    llms: dict[str, Path],
) -> None:
    model, processor = build(llms["qwen2.5"])
    batch = collate(processor, example(processor))
    batch["labels"].fill_(IGNORE_INDEX)
    model.train()
    loss = model(**batch).loss
    loss.backward()
    assert loss == 0


def test_batch_and_one_by_one_greedy_generation_agree(llms: dict[str, Path]) -> None:
    model, processor = build(llms["llama-3.2"], family="llama-3.2")
    model.generation_config.eos_token_id = None
    questions = [
        ("Short?", 1),
        ("A longer question about two pictures?", 2),
        ("No picture at all", 0),
    ]
    prompts = []
    for text, images in questions:
        turns = (Turn("user", (*[Media("image")] * images, text)),)
        pixels = {"image": [picture(len(text) + i) for i in range(images)]} if images else {}
        prompts.append(processor.encode(Sample(turns), pixels, generation=True))
    batch = {k: v for k, v in collate(processor, *prompts, side="left").items() if k != "labels"}
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[
        :, batch["input_ids"].shape[1] :
    ]
    for row, prompt in enumerate(prompts):
        single = {k: v for k, v in collate(processor, prompt).items() if k != "labels"}
        alone = model.generate(**single, max_new_tokens=8, do_sample=False)[
            :, len(prompt.input_ids) :
        ]
        assert together[row].tolist() == alone[0].tolist()


def test_beams_and_samples_carry_their_images(llms: dict[str, Path]) -> None:
    model, processor = build(llms["qwen2.5"])
    batch = {k: v for k, v in collate(processor, example(processor)).items() if k != "labels"}
    beams = model.generate(
        **batch, max_new_tokens=3, num_beams=3, num_return_sequences=2, do_sample=False
    )
    samples = model.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=4)
    assert (beams.shape[0], samples.shape[0]) == (2, 4)


def test_counts_that_differ_are_refused_with_both_numbers(llms: dict[str, Path]) -> None:
    model, processor = build(llms["qwen2.5"])
    batch = collate(processor, example(processor, images=2))
    batch["pixels"]["image"] = batch["pixels"]["image"][:1]
    with pytest.raises(
        ValueError, match="32 placeholder tokens in the text, but 1 items of 16 tokens = 16"
    ):
        model(**batch)
    batch.pop("pixels")
    with pytest.raises(ValueError, match="32 placeholder tokens in the text, and no pixels"):
        model(**batch)
    with pytest.raises(DataError, match="differ in number"):
        processor.encode(Sample((Turn("user", (Media("image"), "a")),)), {})
    with pytest.raises(DataError, match="the record holds a 'volume'"):
        processor.encode(Sample((Turn("user", (Media("volume"), "a")),)), {"volume": [picture()]})


def test_scatter_puts_tokens_in_order() -> None:
    ids = torch.tensor([[9, 1, 9], [9, 9, 2]])
    tokens = torch.arange(4.0).reshape(2, 2, 1).repeat(1, 1, 3)
    out = scatter(torch.full((2, 3, 3), -1.0), ids, tokens, placeholder_id=9)
    assert out[..., 0].tolist() == [[0, -1, 1], [2, 3, -1]]


def test_adapters_live_in_the_checkpoint_and_fold_away(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    model, processor = build(llms["qwen2.5"])
    batch = {k: v for k, v in collate(processor, example(processor)).items() if k != "labels"}
    with torch.no_grad():
        plain = model(**batch).logits
        model.add_adapter_to_part("llm", LORA)
        assert torch.equal(model(**batch).logits, plain)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
        adapted = model(**batch).logits
    assert (adapted - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = medm.models.load(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, adapted)
        again.merge_adapters()
        assert torch.allclose(again(**batch).logits, adapted, atol=1e-4)
    assert not any("lora" in name or "base_layer" in name for name in again.state_dict())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_a_tied_head_is_refused_before_training(llms: dict[str, Path]) -> None:
    model, _ = build(llms["llama-3.2"], family="llama-3.2")
    with pytest.raises(
        RecipeError, match=r"LoRA in language_model\.lm_head: language_model\.model\.embed_tokens"
    ):
        model.add_adapter_to_part("llm", {**LORA, "target_modules": ["lm_head"]})
    assert model.config.adapters == {}


def test_init_from_keeps_adapters_and_refuses_other_parts(
    llms: dict[str, Path], tmp_path: Path
) -> None:
    model, processor = build(llms["qwen2.5"])
    model.add_adapter_to_part("llm", LORA)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    section = tiny.lvlm_section(llms["qwen2.5"])
    again, _ = medm.models.build(
        validate(LVLMOptions, section, source="test"), init_from=str(tmp_path)
    )
    assert again.config.adapters == {"llm": LORA}
    section["branches"]["image"]["connector"] = {"name": "mlp", "depth": 3}
    with pytest.raises(RecipeError, match=r"image\.connector\.depth 2, not 3"):
        medm.models.build(validate(LVLMOptions, section, source="test"), init_from=str(tmp_path))


def test_damaged_and_foreign_checkpoints_are_refused(llms: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, processor = build(llms["qwen2.5"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    good = load_file(weights)
    name = "branches.image.connector.layers.0.weight"
    for change, message in (
        ({k: v for k, v in good.items() if k != name}, rf"1 missing: {name}"),
        ({**good, "stranger": torch.zeros(1)}, "1 unexpected: stranger"),
        (
            {**good, name: torch.zeros(2, 2)},
            rf"1 of another shape: {name} \(2, 2\), expected \(32, 24\)",
        ),
    ):
        save_file(change, weights, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            medm.models.load(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be opened"):
        medm.models.load(str(tmp_path))
    with pytest.raises(CheckpointError, match="'qwen2', which medm did not save"):
        medm.models.load(str(llms["qwen2.5"]))
    with pytest.raises(CheckpointError, match="no such model folder"):
        medm.models.load(str(tmp_path / "nowhere"))


def test_parts_that_do_not_belong_together_are_refused(llms: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"family 'phi3' is of type phi3, but .* is 'qwen2'"):
        build(llms["qwen2.5"], family="phi3")
    with pytest.raises(RecipeError, match="has no class token"):
        build(llms["qwen2.5"], tokens="cls")
    with pytest.raises(RecipeError, match="has layers 1 to 3"):
        build(llms["qwen2.5"], layer=-4)


def test_the_layer_and_the_tokens_are_the_ones_asked_for(llms: dict[str, Path]) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    published = CLIPVisionModel(CLIPVisionConfig(**tiny.VIT)).eval()
    states = published(torch.from_numpy(picture())[None], output_hidden_states=True).hidden_states
    for layer, tokens in ((-1, "patch"), (-2, "cls_patch"), (1, "cls"), (-2, "patch")):
        model, _ = build(llms["qwen2.5"], encoder="clip", layer=layer, tokens=tokens)
        encoder = model.parts()["image.encoder"]
        own = encoder.state_dict()
        names = {f"tower.{k}": v for k, v in published.state_dict().items()}
        encoder.load_state_dict({k: names[k] for k in own})
        features = encoder(torch.from_numpy(picture())[None])
        cut = {"patch": slice(1, None), "cls_patch": slice(None), "cls": slice(0, 1)}[tokens]
        assert torch.allclose(features.tokens, states[layer][:, cut], atol=1e-6)


def test_other_image_sizes_interpolate_positions(llms: dict[str, Path]) -> None:
    for encoder in ("clip", "siglip"):
        model, processor = build(llms["qwen2.5"], encoder=encoder, image_size=24)
        assert processor.branches["image"]["num_tokens"] == 36
        assert processor.preprocess["image"].size == [24, 24]
        assert model.branch("image").encoder(torch.zeros(1, 3, 24, 24)).tokens.shape == (1, 36, 24)


def test_the_config_round_trips(llms: dict[str, Path], tmp_path: Path) -> None:
    model, _ = build(llms["qwen3"], family="qwen3")
    model.config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    of_the_file = {"architectures": again.architectures, "_name_or_path": again._name_or_path}
    assert again.to_dict() == model.config.to_dict() | of_the_file


def test_a_misspelt_keyword_of_the_processor_is_refused(llms: dict[str, Path]) -> None:
    _, processor = build(llms["qwen2.5"])
    assert processor("What?", return_tensors="pt")["input_ids"].shape[0] == 1
    with pytest.raises(TypeError, match="image"):
        processor("<image>What?", image=["a.png"])
    with pytest.raises(ValueError, match="expected 'pt', found 'np'"):
        processor("What?", return_tensors="np")
