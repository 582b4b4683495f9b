"""Images and volumes in one model: in one batch, in one conversation, several of each, and none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medm.models
from medm.config import validate
from medm.data.collator import Collator
from medm.errors import RecipeError
from medm.models.lvlm.build import resolve
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.models.lvlm.options import LVLMOptions
from medm.models.lvlm.processing import LVLMProcessor
from medm.types import Example, Media, Sample, Turn
from tests import tiny
from tests.encoders.tiny import TINY_ENCODERS

IMAGE, VOLUME = Media("image"), Media("volume")
VOLUMES = sorted(
    name for name, tiny_encoder in TINY_ENCODERS.items() if len(tiny_encoder.pixels) == 4
)
BOTH: dict[str, dict[str, Any]] = {
    "spatial-pooling": {"name": "spatial-pooling", "pool": 2},
    "attention-pooling": {"name": "attention-pooling", "heads": 2},
}


def build(
    llm: Path, *, encoder: str = "m3d-clip", connector: str = "spatial-pooling"
) -> tuple[LVLMForConditionalGeneration, LVLMProcessor]:
    torch.manual_seed(1)
    section = tiny.lvlm_section(llm)
    block = {
        key: value for key, value in TINY_ENCODERS[encoder].block.items() if key != "image_size"
    }
    section["branches"]["volume"] = {
        "encoder": block,
        "connector": BOTH[connector],
        "preprocess": {"size": list(TINY_ENCODERS[encoder].pixels[1:])},
    }
    model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    assert isinstance(model, LVLMForConditionalGeneration)
    assert isinstance(processor, LVLMProcessor)
    return model, processor


def example(processor: LVLMProcessor, *turns: tuple[str | Media, ...], seed: int = 0) -> Example:
    """A conversation with drawn pixels; every second turn is the assistant's."""
    sample = Sample(
        tuple(Turn("assistant" if i % 2 else "user", content) for i, content in enumerate(turns))
    )
    random = np.random.default_rng(seed)
    pixels: dict[str, list[np.ndarray]] = {}
    for media in sample.media:
        described = processor.preprocess[media.branch]
        channels = described.channels if described.kind == "image" else described.num_channels
        shape = (channels, *(described.size or ()))
        pixels.setdefault(media.branch, []).append(random.normal(size=shape).astype(np.float32))
    return processor.encode(sample, pixels)


def collate(processor: LVLMProcessor, *examples: Example) -> dict[str, Any]:
    return Collator(processor.pad_id)(list(examples))


def logits(model: LVLMForConditionalGeneration, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch | {"labels": None}).logits


def test_images_and_volumes_of_a_batch_reach_their_own_sample(llms: dict[str, Path]) -> None:
    model, processor = build(llms["qwen2.5"])
    conversations = [
        example(
            processor,
            (IMAGE, VOLUME, VOLUME, "Compare."),
            ("No.",),
            ("And ", IMAGE, "?"),
            ("Yes.",),
            seed=1,
        ),
        example(processor, ("What is CT?",), ("A scan.",)),
        example(processor, (VOLUME, IMAGE, "Same?"), ("Yes.",), seed=2),
        example(processor, (VOLUME, "?"), ("An effusion.",), seed=3),
        example(processor, (IMAGE, IMAGE, "?"), ("Two.",), seed=4),
    ]
    batch = collate(processor, *conversations)
    assert batch["pixels"]["image"].shape[0] == 2 + 1 + 2
    assert batch["pixels"]["volume"].shape[0] == 2 + 1 + 1
    together = logits(model, batch)
    for row, single in enumerate(conversations):
        alone = logits(model, collate(processor, single))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=0)


def test_which_volume_stands_where_changes_the_output(llms: dict[str, Path]) -> None:
    model, processor = build(llms["qwen2.5"])
    one = example(processor, (IMAGE, VOLUME, VOLUME, "?"), ("A",))
    rows = [one]
    for volumes in ([1, 0], [0, 0]):
        pixels = one.pixels | {"volume": [one.pixels["volume"][i] for i in volumes]}
        rows.append(Example(one.input_ids, one.labels, pixels))
    last = logits(model, collate(processor, *rows))[:, -1]
    assert (last[0] - last[1]).abs().max() > 1e-5
    assert (last[0] - last[2]).abs().max() > 1e-5


@pytest.mark.parametrize("seen", [(), (IMAGE,), (VOLUME,), (IMAGE, VOLUME)])
def test_every_weight_gets_a_gradient_and_that_of_an_absent_branch_is_zero(
    llms: dict[str, Path], seen: tuple[Media, ...]
) -> None:
    model, processor = build(llms["qwen2.5"])
    model.train()
    model(**collate(processor, example(processor, (*seen, "?"), ("Yes.",)))).loss.backward()
    present = {media.branch for media in seen}
    for part, module in model.parts().items():
        gradients = [parameter.grad for parameter in module.parameters()]
        assert all(gradient is not None for gradient in gradients), part
        largest = max(float(gradient.abs().max()) for gradient in gradients)  # type: ignore[union-attr]
        assert (largest > 0) == (part == "llm" or part.split(".")[0] in present), part


def test_it_saves_reloads_and_answers(llms: dict[str, Path], tmp_path: Path) -> None:
    model, processor = build(llms["qwen2.5"], encoder="slices", connector="attention-pooling")
    batch = collate(
        processor,
        example(processor, (VOLUME, IMAGE, "?"), ("A",)),
        example(processor, ("?",), ("A",)),
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, saved = medm.models.load(str(tmp_path))
    assert saved.preprocess == processor.preprocess
    assert saved.branches == processor.branches
    assert torch.equal(logits(again, batch), logits(model, batch))
    answers = again.generate(
        **{key: batch[key] for key in ("input_ids", "attention_mask", "pixels", "task_ids")},
        max_new_tokens=3,
        do_sample=False,
    )
    written = answers[:, batch["input_ids"].shape[1] :].flatten().tolist()
    assert written
    assert not set(written) & set(processor.placeholder_ids.values())


@pytest.mark.parametrize("connector", sorted(BOTH))
@pytest.mark.parametrize("encoder", VOLUMES)
def test_every_volume_encoder_trains_a_step_with_every_pooling_connector(
    llms: dict[str, Path], encoder: str, connector: str
) -> None:
    model, processor = build(llms["qwen2.5"], encoder=encoder, connector=connector)
    parts = model.parts()
    before = {
        part: [value.detach().clone() for value in parts[part].parameters()]
        for part in ("volume.encoder", "volume.connector")
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batch = collate(processor, example(processor, (VOLUME, VOLUME, "?"), ("Yes, on the left.",)))
    model.train()
    losses = []
    for _ in range(2):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    for part, tensors in before.items():
        assert any(
            not torch.equal(old, new)
            for old, new in zip(tensors, parts[part].parameters(), strict=True)
        ), part
    assert (batch["input_ids"] == processor.placeholder_ids["volume"]).sum() == 2 * model.branch(
        "volume"
    ).num_tokens


def test_windows_that_the_encoder_has_no_channels_for_are_refused(llms: dict[str, Path]) -> None:
    section = tiny.lvlm_section(llms["qwen2.5"])
    windows = {"windows": [[-1000, 400], [-160, 240], [-200, 1000]], "size": [8, 16, 16]}
    section["branches"]["volume"] = {
        "encoder": TINY_ENCODERS["m3d-clip"].block,
        "connector": {"name": "mlp"},
        "preprocess": windows,
    }
    with pytest.raises(
        RecipeError, match=r"branches\.volume\.preprocess: gives pixels of 3 channels .* takes 1"
    ):
        resolve(validate(LVLMOptions, section, source="test"))
    section["branches"]["volume"]["encoder"] = TINY_ENCODERS["slices"].block
    config, _ = resolve(validate(LVLMOptions, section, source="test"))
    assert config.branches["volume"]["channels"] == 3


def test_a_volume_where_an_image_belongs_is_refused(llms: dict[str, Path]) -> None:
    model, processor = build(llms["qwen2.5"])
    batch = collate(processor, example(processor, (IMAGE, VOLUME, "?"), ("A",)))
    tokens = {name: model.branch(name).num_tokens for name in ("image", "volume")}
    assert tokens == {"image": 16, "volume": 1}
    batch["pixels"]["volume"] = batch["pixels"]["volume"].repeat(2, 1, 1, 1, 1)
    with pytest.raises(
        ValueError,
        match="branch 'volume': 1 placeholder tokens in the text, but 2 items of 1 tokens",
    ):
        model(**batch)
    del batch["pixels"]["volume"]
    with pytest.raises(
        ValueError, match="branch 'volume': 1 placeholder tokens in the text, and no pixels"
    ):
        model(**batch)
