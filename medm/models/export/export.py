"""Saved models in other forms, each verified before it is handed over.

An export gives the same logits and the same reply, or nothing is written.

`merged` folds adapters into the weights they adapt; `llava` is the layout of transformers' own
LLaVA class, run in a process that cannot import medm; `encoder` is a vision tower for other
recipes.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from medm.encoders.base import VisionEncoder
from medm.errors import ExportError
from medm.files import atomic_directory
from medm.imaging import load_pixels
from medm.models import load, load_config
from medm.models.adapters import adapted
from medm.models.base import MedmModel
from medm.models.export.llava import save_llava
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.models.lvlm.processing import LVLMProcessor
from medm.models.provenance import describe, require_free
from medm.models.published.weights import save_bundle, save_tensors
from medm.models.vision import build_encoder, encoder_options
from medm.types import Media, Processor, Sample, Turn

PROMPT = "Describe the image. Is anything abnormal?"

TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference of a logit, as a fraction of the largest logit, that the rounding of each
precision explains.

A stock export runs the same operations on the same pixels (measured in float32 and bfloat16: 0);
merging rounds once. A norm too many, a wrong layer or a shifted token change logits by more than a
tenth."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Result of the comparison of a model with its export."""

    difference: float
    """Largest difference of a logit between the model and its export."""
    largest: float
    """Largest logit."""
    reply: str | None
    """What both said; None for an encoder, of which features are compared."""
    masks: str = ""
    """How masks compare, or that the export has none; empty for a model without a mask head."""

    def __str__(self) -> str:
        if self.reply is None and not self.difference:
            return "the same features, bit for bit"
        if self.reply is None:
            return f"largest feature difference {self.difference:.2g} (of {self.largest:.3g})"
        masks = f"; {self.masks}" if self.masks else ""
        return (
            f"largest logit difference {self.difference:.2g} (of {self.largest:.3g}), same reply: "
            f"{self.reply!r}{masks}"
        )


def export(
    folder: str,
    out: str,
    *,
    form: str,
    branch: str | None = None,
    image: str | None = None,
    prompt: str = PROMPT,
    max_new_tokens: int = 24,
    without_masks: bool = False,
) -> Proof:
    """Write a saved model in another form.

    Args:
        folder: model folder that medm saved.
        out: folder to write; must not exist, or be empty.
        form: "merged", "llava" or "encoder".
        branch: for "encoder", whose; may be left out where the model has one branch.
        image: image to prove with; a drawn one without it.
        prompt: question to prove with.
        max_new_tokens: length of the reply that is compared.
        without_masks: for "llava", of a model with a mask head: write the words alone.

    Raises:
        ExportError: the form cannot hold this model, or the proof failed. Nothing is left at `out`.
        CheckpointError: the folder cannot be opened.
    """
    if form not in _TITLES:
        raise ExportError(f"unknown form {form!r}; expected one of {', '.join(_TITLES)}")
    place = Path(out).expanduser()
    require_free(place, error=ExportError)
    if image is not None and not Path(image).is_file():
        raise ExportError(f"{image}: no such file; expected an image to compare with")
    if without_masks and form != "llava":
        raise ExportError(
            f"without_masks: for the form llava alone, and this is {form!r}; leave it out"
        )
    if form == "llava" and not without_masks and getattr(load_config(folder), "masks", None):
        raise ExportError(
            f"{folder}: the model has a mask head, and transformers' LlavaForConditionalGeneration "
            "has none: the export would write [SEG] and draw no mask. Export the words alone with "
            "--without-masks, or keep the masks with --format merged"
        )
    if form == "encoder":
        _branch_of(load_config(folder), branch)
        trained = load(folder)
    else:
        whole = _load_lvlm(folder)
    with atomic_directory(place) as target, tempfile.TemporaryDirectory() as scratch:
        if form == "encoder":
            proof = _encoder(target, *trained, branch)
        else:
            question = Question(
                Path(image) if image else draw_test_image(Path(scratch) / "image.png"),
                prompt,
                max_new_tokens,
            )
            proof = (_merged if form == "merged" else _llava)(target, *whole, question)
        source = Path(folder).expanduser()
        made = {"form": form, "source": source.resolve().name, "comparison": str(proof)}
        describe(
            target,
            title=f"{place.name}: {_TITLES[form]}",
            text=f"{_USES[form]}\n\nCompared with the model that it was made from, "
            f"`{made['source']}`: {proof}.",
            metadata={"export": made},
            source=source,
        )
        return proof


def _load_lvlm(folder: str) -> tuple[LVLMForConditionalGeneration, LVLMProcessor]:
    """Raises `ExportError` where the folder holds a model of another kind."""
    model, processor = load(folder)
    if not isinstance(model, LVLMForConditionalGeneration) or not isinstance(
        processor, LVLMProcessor
    ):
        raise ExportError(
            f"{folder}: expected a vision-language model ('kind: lvlm'), found "
            f"{type(model).__name__}; of other kinds, --format encoder alone can be written"
        )
    return model, processor


def _branch_of(config: PreTrainedConfig, branch: str | None) -> str:
    """The branch whose encoder is asked for. Raises `ExportError` where that is not clear."""
    names = sorted(_entries_of(config))
    if branch is None and len(names) == 1:
        return names[0]
    if branch is None or branch not in names:
        raise ExportError(f"the model has branches {names}; say whose encoder with --branch")
    return branch


def _entries_of(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Name and keywords of the vision encoders of a model by branch; none for kinds without."""
    entries = getattr(config, "encoder_entries", None)
    return entries() if callable(entries) else {}


_TITLES = {
    "merged": "a medm model with its adapters merged",
    "llava": "a model for transformers' LlavaForConditionalGeneration",
    "encoder": "a vision encoder of medm",
}
_USES = {
    "merged": "Open it with medm: `medm chat --model FOLDER`, or in Python `medm.load(FOLDER)`.",
    "llava": "Open it with transformers alone, as `LlavaForConditionalGeneration`; medm need not "
    "be installed.",
    "encoder": "Name the folder as `encoder.path` in a recipe of medm.",
}


@dataclass(frozen=True, slots=True)
class Question:
    """Question for both the model and its export."""

    image: Path
    prompt: str
    max_new_tokens: int


def draw_test_image(file: Path) -> Path:
    """Draw an image with edges, gradients and color.

    It is wider than high, so that resizing and cropping show.
    """
    rows, columns = np.mgrid[0:180, 0:240]
    pixels = np.stack([rows * 255 // 180, columns * 255 // 240, (rows + columns) % 256], axis=-1)
    pixels[(rows - 90) ** 2 + (columns - 80) ** 2 < 50**2] = (235, 225, 210)
    pixels[40:70, 150:210] = (20, 60, 30)
    Image.fromarray(pixels.astype(np.uint8)).save(file)
    return file


@dataclass(frozen=True, slots=True)
class _Heard:
    """Output of a model for a question."""

    input_ids: Tensor
    pixels: Tensor
    logits: Tensor
    reply: list[int]
    text: str
    masks: Tensor | None = None
    """(1, *grid), logits of the mask head; None without one."""


@torch.no_grad()
def _ask(
    model: LVLMForConditionalGeneration, processor: LVLMProcessor, question: Question
) -> _Heard:
    """Return the model's own logits (1, T, V) and greedy reply.

    Without an image if the model has no image branch.
    """
    content: tuple[str | Media, ...] = (question.prompt,)
    pixels: dict[str, list[np.ndarray]] = {}
    if "image" in processor.preprocess:
        content = (Media("image"), f"\n{question.prompt}")
        pixels = {"image": [load_pixels(question.image, processor.preprocess["image"])]}
    example = processor.encode(Sample((Turn("user", content),)), pixels, generation=True)
    batch = dict(processor.pad([example]))
    logits = model(**batch).logits
    choice = copy.deepcopy(model.generation_config)
    choice.update(max_new_tokens=question.max_new_tokens, do_sample=False)
    ids = model.generate(**batch, generation_config=choice)
    reply = ids[0, batch["input_ids"].shape[1] :]
    seen = batch["pixels"]["image"] if "pixels" in batch else torch.zeros(0)
    return _Heard(
        batch["input_ids"],
        seen,
        logits.float(),
        reply.tolist(),
        processor.text(reply),
        None if model.masks is None else _draw(model, batch),
    )


def _draw(model: LVLMForConditionalGeneration, batch: dict[str, Any]) -> Tensor:
    """Return the logits (1, *grid) of one mask of noise, for a reply that is `[SEG]` alone.

    Noise, since the head may read volumes, and the compared image is none.
    """
    head = model.masks
    assert head is not None
    mark = torch.full_like(batch["input_ids"][:, :1], head.token_id)
    ids = torch.cat([batch["input_ids"], mark], dim=1)
    prompts = model.mask_prompts(ids, pixels=batch.get("pixels"))
    noise = torch.randn(1, head.channels, *head.spatial, generator=torch.Generator().manual_seed(0))
    items = torch.zeros(len(prompts), dtype=torch.int64)
    return head.head(noise.to(prompts), prompts, items).logits.float()


def _compare(own: _Heard, other: _Heard, *, dtype: torch.dtype, what: str) -> Proof:
    """Raises `ExportError` where two models do not say the same."""
    difference = float((own.logits - other.logits).abs().max())
    largest = float(own.logits.abs().max())
    allowed = TOLERANCES[dtype] * max(1.0, largest)
    if not difference <= allowed:  # not: a NaN differs
        raise ExportError(
            f"{what} computes other logits: they differ by up to {difference:.3g}, and rounding "
            f"in {dtype} explains {allowed:.3g} at most; nothing was written"
        )
    if own.reply != other.reply:
        raise ExportError(
            f"{what} replies {other.text!r} instead of {own.text!r}; nothing was written"
        )
    return Proof(difference, largest, own.text, _compare_masks(own, other, dtype=dtype, what=what))


def _compare_masks(own: _Heard, other: _Heard, *, dtype: torch.dtype, what: str) -> str:
    """Return how the masks compare. Raises `ExportError` where they differ."""
    if own.masks is None:
        return ""
    if other.masks is None:
        return "the masks of its replies are lost: the export has no mask head"
    difference = float((own.masks - other.masks).abs().max())
    largest = float(own.masks.abs().max())
    allowed = TOLERANCES[dtype] * max(1.0, largest)
    if not difference <= allowed:
        raise ExportError(
            f"{what} draws other masks: their logits differ by up to {difference:.3g}, and "
            f"rounding in {dtype} explains {allowed:.3g} at most; nothing was written"
        )
    return f"largest difference of a mask logit {difference:.2g} (of {largest:.3g})"


def _merged(
    target: Path, model: LVLMForConditionalGeneration, processor: LVLMProcessor, question: Question
) -> Proof:
    before = _ask(model, processor, question)
    model.merge_adapters()
    model.save_pretrained(target)
    processor.save_pretrained(target)
    merged, reloaded = _load_lvlm(str(target))
    return _compare(
        before, _ask(merged, reloaded, question), dtype=model.dtype, what="the merged model"
    )


def _llava(
    target: Path, model: LVLMForConditionalGeneration, processor: LVLMProcessor, question: Question
) -> Proof:
    own = _ask(model, processor, question)  # as it was trained: a wrong merge must show
    model.merge_adapters()
    save_llava(model, processor, target)
    dtype, num_tokens = model.dtype, model.branch("image").num_tokens
    del model  # the two of them need not be in memory at once
    gc.collect()
    stock, notes = run_stock(target, question, own.pixels)
    if notes["problems"] != "{}":
        raise ExportError(
            f"the stock class opens the export with {notes['problems']}; nothing was written"
        )
    if own.input_ids.tolist() != stock.input_ids.tolist():
        raise ExportError(
            f"the stock processor makes another prompt of {stock.input_ids.shape[1]} tokens, "
            f"expected {own.input_ids.shape[1]}: the chat template cannot be written without "
            "medm; nothing was written"
        )
    if own.pixels.shape != stock.pixels.shape or float(
        (own.pixels - stock.pixels).abs().max()
    ) > _pixel_step(dtype):
        raise ExportError("the stock image processor makes other pixels; nothing was written")
    if int(notes["num_image_tokens"]) != num_tokens:
        raise ExportError(
            f"the stock processor counts {notes['num_image_tokens']} tokens an image for servers, "
            f"expected {num_tokens}; nothing was written"
        )
    return _compare(own, stock, dtype=dtype, what="transformers' LlavaForConditionalGeneration")


def _pixel_step(dtype: torch.dtype) -> float:
    """Pixels are of the order of 2; the stock process hands them over in the model's precision."""
    return 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def run_stock(folder: Path, question: Question, pixels: Tensor) -> tuple[_Heard, dict[str, str]]:
    """Ask a folder about an image in a fresh process that cannot import medm.

    It gets the pixels that medm made of the image.

    Raises:
        ExportError: the process failed; with the last lines that it wrote.
    """
    with tempfile.TemporaryDirectory() as scratch:
        plan, result = Path(scratch) / "plan.json", Path(scratch) / "result.safetensors"
        save_tensors({"pixels": pixels}, Path(scratch) / "pixels.safetensors")
        with Image.open(question.image) as image:
            size = [image.height, image.width]
        asked = {
            "image": str(question.image.resolve()),
            "image_size": size,
            "pixels": str(Path(scratch) / "pixels.safetensors"),
            "prompt": question.prompt,
            "max_new_tokens": question.max_new_tokens,
        }
        plan.write_text(json.dumps(asked), encoding="utf-8")
        script = Path(__file__).with_name("stock_check.py")
        done = subprocess.run(
            [sys.executable, "-I", str(script), str(folder.resolve()), str(plan), str(result)],
            capture_output=True,
            text=True,
            check=False,
            cwd=scratch,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            tail = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise ExportError(
                f"transformers alone cannot run the export; nothing was written\n{tail}"
            )
        with safe_open(result, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            notes = dict(handle.metadata())
    reply = tensors["reply"][0].tolist()
    return _Heard(
        tensors["input_ids"], tensors["pixels"], tensors["logits"], reply, notes["text"].strip()
    ), notes


def _encoder(target: Path, model: MedmModel, processor: Processor, branch: str | None) -> Proof:
    """A bundle that a recipe can name as `encoder.path`, with the preprocessing that belongs to it.

    Of an encoder around another one (slices) it holds the inner one, which is where the weights
    are.
    """
    branch = _branch_of(model.config, branch)
    vision, entry = model.encoders()[branch], _entries_of(model.config)[branch]
    encoder, channels = vision.encoder, vision.channels
    assert isinstance(encoder, VisionEncoder)
    preprocess = processor.preprocess[branch].model_dump()
    if encoder.inner is not None:
        encoder, entry = encoder.inner, entry["encoder"]
        colors = {key: preprocess[key] for key in ("mean", "std")}
        preprocess = {"size": preprocess["size"][1:], "channels": channels, **colors}
    options = {key: value for key, value in entry.items() if key not in ("name", "architecture")}
    noise = torch.randn(
        1, channels, *preprocess["size"], generator=torch.Generator().manual_seed(0)
    )
    trained = _features(encoder, noise)
    merged = adapted(encoder)
    model.merge_adapters()
    save_bundle(
        target,
        encoder,
        name=entry["name"],
        architecture=entry["architecture"],
        options=options,
        preprocess=preprocess,
    )
    block = {"name": entry["name"], "path": str(target), **options}
    again, _ = build_encoder(encoder_options(block, source="the encoder's own options"))
    return _compare_features(
        trained, _features(again.to(encoder.device_and_dtype["dtype"]), noise), merged=merged
    )


@torch.no_grad()
def _features(encoder: VisionEncoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens (1, N, D) and the pooled vector (1, D) of pixels (1, C, *spatial).

    The vector is empty if the encoder has none.
    """
    features = encoder(pixels.to(**encoder.device_and_dtype))
    return features.tokens, torch.zeros(1, 0) if features.pooled is None else features.pooled


def _compare_features(
    trained: tuple[Tensor, Tensor], exported: tuple[Tensor, Tensor], *, merged: bool
) -> Proof:
    """Raise `ExportError` if an encoder and its export differ by more than a merge's rounding.

    The attention of a pooling head rounds by where its weights lie in memory, so that the pooled
    vector is never expected to the last bit.
    """
    differences = []
    for what, own, other in zip(("tokens", "pooled vector"), trained, exported, strict=True):
        if not own.numel():
            continue
        difference, largest = float((own - other).abs().max()), float(own.abs().max())
        exact = what == "tokens" and not merged
        allowed = 0.0 if exact else TOLERANCES[own.dtype] * max(1.0, largest)
        if not difference <= allowed:
            raise ExportError(
                "the exported encoder computes other features than the trained one: they differ by "
                f"up to {difference:.3g} in the {what}, expected at most {allowed:.3g}; nothing "
                "was written"
            )
        differences.append((difference, largest))
    difference, largest = max(differences)
    return Proof(difference, largest, None)
