"""SAM 2 behind an LVLM: LoRA in its decoder, with and without its memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medm.config import validate
from medm.models import build, load
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.models.lvlm.options import LVLMOptions
from medm.models.lvlm.processing import LVLMProcessor
from medm.objectives.segmentation import Segmentation
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from tests import tiny
from tests.heads.tiny import TINY_HEADS
from tests.models.test_grounding import VIEW, batch_of, example


@pytest.mark.parametrize("memory", [False, True])
def test_lora_in_the_decoder_is_trained_saved_and_merged(
    llms: dict[str, Path], tmp_path: Path, memory: bool
) -> None:
    section = tiny.lvlm_section(llms["qwen2.5"])
    head = {"name": "sam2", **TINY_HEADS["sam2"].block, "memory": memory}
    section["masks"] = {"head": head, "preprocess": {"size": [128, 128]}}
    torch.manual_seed(0)
    model, processor = build(validate(LVLMOptions, {"kind": "lvlm", **section}, source="test"))
    assert isinstance(model, LVLMForConditionalGeneration)
    assert isinstance(processor, LVLMProcessor)
    parts = {"masks.decoder": PartOptions.model_validate({"tune": "lora", "r": 2})}
    apply_parts(model, parts, TrainOptions())
    model.train()
    one = example(processor, 2)
    one.pixels[VIEW] = [torch.zeros(3, 128, 128).numpy()]
    batch = batch_of([one]) | {"mask_targets": torch.ones(2, 32, 32, dtype=torch.uint8)}
    objective = Segmentation(points=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the second factor of an adapter begins at zero
        optimizer.zero_grad()
        objective.loss(model(**batch), batch).backward()
        optimizer.step()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    model.eval()
    trained = model(**batch).mask_logits
    model.merge_adapters()
    assert torch.allclose(model(**batch).mask_logits, trained, atol=1e-4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert torch.allclose(load(str(tmp_path))[0](**batch).mask_logits, trained, atol=1e-4)
