"""Run a model folder with transformers alone, without medm, and write down its outputs.

Started by path in a fresh process (`python -I stock_check.py FOLDER PLAN RESULT`), in which medm
cannot be imported: what works here works without it. `PLAN` is JSON with image, prompt, length and
the pixels that medm made of the image; `RESULT` a safetensors file. Logits and reply come from
medm's pixels, so that the two models are compared and not the last bits of two image processors;
the stock processor's pixels are written beside, to be compared with medm's.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any


class NoMedm(importlib.abc.MetaPathFinder):
    """Makes `import medm` fail, also where it is installed."""

    def find_spec(self, fullname: str, *_arguments: object) -> None:
        """Raises `ImportError` for medm and everything in it."""
        if fullname.partition(".")[0] == "medm":
            raise ImportError("medm is hidden from this process")


def run(folder: str, plan: dict[str, Any], result: Path) -> None:
    """Open the folder by the Auto classes and ask about one image.

    Writes ids, pixels, logits and the reply.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText, AutoProcessor

    opened: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", output_loading_info=True, trust_remote_code=False
    )
    model, report = opened
    processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    content = [{"type": "image", "path": plan["image"]}, {"type": "text", "text": plan["prompt"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.dtype)
    pixels = inputs["pixel_values"].float()
    given = load_file(plan["pixels"])["pixels"]
    if given.shape == pixels.shape:
        inputs["pixel_values"] = given.to(model.dtype)
    with torch.no_grad():
        logits = model(**inputs).logits
        reply = model.generate(**inputs, max_new_tokens=plan["max_new_tokens"], do_sample=False)
    reply = reply[:, inputs["input_ids"].shape[1] :]
    counted = processor._get_num_multimodal_tokens(image_sizes=[plan["image_size"]])[
        "num_image_tokens"
    ]
    notes = {
        "class": type(model).__name__,
        "problems": json.dumps(
            {k: sorted(map(str, v)) for k, v in report.items() if v and "keys" in k}
        ),
        "num_image_tokens": str(counted[0]),
        "text": processor.batch_decode(reply, skip_special_tokens=True)[0],
    }
    tensors = {
        "input_ids": inputs["input_ids"],
        "pixels": pixels,
        "logits": logits.float(),
        "reply": reply,
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, result, metadata=notes
    )


if __name__ == "__main__":
    sys.meta_path.insert(0, NoMedm())
    run(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Path(sys.argv[3]))
