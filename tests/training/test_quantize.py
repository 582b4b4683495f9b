from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from medm.errors import DeviceError
from medm.training.options import PartOptions, TrainOptions
from medm.training.parts import apply_parts
from tests.training.toys import Toy, ToyConfig, trainer, weights

PARTS = {"llm": PartOptions(tune="lora", r=4, quantize="4bit", lr=1e-2)}
INSTALLED = find_spec("bitsandbytes") is not None


@pytest.mark.skipif(INSTALLED, reason="bitsandbytes is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(DeviceError, match=r"medm\[quant\]"):
        apply_parts(Toy(ToyConfig()), PARTS, TrainOptions())


@pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
def test_4bit_base_trains_saves_plain_weights_and_resumes(tmp_path: Path) -> None:
    plain = Toy(ToyConfig())
    count = apply_parts(plain, {"llm": PartOptions(tune="lora", r=4)}, TrainOptions()).parameters
    whole = trainer(tmp_path / "whole", parts=PARTS)
    assert type(whole.model.llm.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert (
        apply_parts(whole.model, {"llm": PartOptions(tune="lora", r=4)}, TrainOptions()).parameters
        == count
    )
    before = {name: tensor for name, tensor in weights(whole.model).items() if "lora_B" in name}
    whole.fit()
    after = weights(whole.model)
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())

    opened = Toy.from_pretrained(tmp_path / "whole" / "checkpoint-12").eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = whole.model.eval().llm(input_ids=ids).logits
        torch.testing.assert_close(opened.llm(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-3)

    first = trainer(tmp_path / "cut", parts=PARTS, max_steps=12, save_total_limit=None)
    first.fit()
    for folder in (tmp_path / "cut").glob("checkpoint-12"):
        folder.rename(tmp_path / "gone")
    resumed = trainer(tmp_path / "cut", parts=PARTS)
    resumed.fit(resume=True)
    again = weights(resumed.model)
    assert [name for name in after if not torch.equal(after[name], again[name])] == []
