"""A cache of the Hugging Face hub that holds tiny models under the names of published ones, in
their layouts.

Commands that name published weights run unchanged: in this process, where the cache is set by
`opened`, and in others, through the variables of `ENVIRONMENT`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipConfig, SiglipModel

from tests.models.published import medm_vl
from tests.models.published.test_towers import save_vlm
from tests.tiny import VIT, save_llm

COMMIT = "0" * 40
CT_SIZE = (16, 64, 64)
"""Voxels of the tiny MedM-VL-CT: enough vision tokens, 32, that a reply depends on them."""
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 30,
}
"""The text tower of a SigLIP, which nothing here runs."""


def medm_vl_ct(folder: Path) -> None:
    """MedM-VL-CT-3B-en: Llama 3.2, M3D-CLIP, spatial pooling; two shards."""
    llm = language_model("llama-3.2", folder.parent / "llm")
    _, connector = medm_vl.mlp("connector_image3d.connector", 24)
    tower = medm_vl.volume_names(medm_vl.m3d_tower(CT_SIZE))
    medm_vl.write(folder, llm, medm_vl.config_ct(llm, CT_SIZE), tower | connector)
    cut_in_two(folder)


def medm_vl_2d(folder: Path) -> None:
    """MedM-VL-2D-3B-en: Qwen2.5, SigLIP, an MLP; the parts at places of the authors' machine."""
    llm = language_model("qwen2.5", folder.parent / "llm")
    _, connector = medm_vl.mlp("connector_image.connector", 24)
    tower = medm_vl.vision_names(medm_vl.siglip())
    config = medm_vl.config_2d(llm="/somewhere/Qwen2.5-3B-Instruct", encoder="/somewhere/siglip")
    medm_vl.write(folder, llm, config, tower | connector)
    cut_in_two(folder)


def qwen(folder: Path) -> None:
    """A Qwen2.5."""
    language_model("qwen2.5", folder)


def language_model(family: str, folder: Path) -> Path:
    """A tiny one that writes printable ASCII alone: consoles show other bytes in their own ways.

    Embeddings, to which the LM head is tied, of other tokens are 0, so that their logits are.
    """
    save_llm(family, folder, max_position_embeddings=2048)
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    other = [i for word, i in vocabulary.items() if len(word) > 1 or not "!" <= word <= "~"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[other] = 0
        rows[len(vocabulary) :] = 0
    model.save_pretrained(folder)
    return folder


def siglip(folder: Path) -> None:
    """A SigLIP with both towers and the file of its preprocessing."""
    SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VIT)).save_pretrained(folder)
    write_preprocessor(folder, side=VIT["image_size"])


def medgemma(folder: Path) -> None:
    """MedGemma: a Gemma 3 with a SigLIP of 8 x 8 patches, in two shards or more."""
    save_vlm("medgemma", folder, vision={"image_size": 64})
    write_preprocessor(folder, side=64)


def write_preprocessor(folder: Path, *, side: int) -> None:
    """The file of the preprocessing, as SigLIP and Gemma 3 publish it."""
    half = [0.5, 0.5, 0.5]
    content = {
        "size": {"height": side, "width": side},
        "image_mean": half,
        "image_std": half,
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def cut_in_two(folder: Path) -> None:
    """Two shards and their index in place of one file."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (folder / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": index}))
    whole.unlink()


PUBLISHED: dict[str, Callable[[Path], None]] = {
    "shiym2000/MedM-VL-CT-3B-en": medm_vl_ct,
    "shiym2000/MedM-VL-2D-3B-en": medm_vl_2d,
    "Qwen/Qwen2.5-3B-Instruct": qwen,
    "Qwen/Qwen2.5-0.5B-Instruct": qwen,
    "google/siglip-base-patch16-256-multilingual": siglip,
    "google/medgemma-4b-it": medgemma,
}
"""Models by their ids, and what writes each of them."""


def fill(cache: Path) -> dict[str, str]:
    """Write every model into a cache; returns the environment of processes that use it."""
    for name, write in PUBLISHED.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        write(snapshot)
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


@contextmanager
def opened(cache: Path) -> Iterator[None]:
    """Make this process use a cache, and no network."""
    with (
        patch.object(constants, "HF_HUB_CACHE", str(cache)),
        patch.object(constants, "HF_HUB_OFFLINE", True),
    ):
        yield
