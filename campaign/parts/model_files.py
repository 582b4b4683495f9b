"""Mutated small files of a model folder: the model opens and answers, or a message comes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import medm.models
from campaign.harness import Part, WrongResultError
from campaign.mutate import Target, mutation_cases, prepare
from medm.inference.generator import load_engine
from medm.inference.generator import prepare as prepare_requests
from medm.inference.options import GenerationOptions
from medm.models.manifest import MANIFEST, write_manifest
from medm.types import Sample, Turn
from tests.inference.tiny import save_tiny
from tests.models.test_small_files import FILES

OPTIONS = GenerationOptions(max_new_tokens=2)


def model_file(name: str) -> Callable[[Path], Path]:
    """Return a maker of a model folder; the file is one of it."""

    def make(folder: Path) -> Path:
        model = save_tiny(folder)
        write_manifest(model, {})
        return model / name

    return make


def read(file: Path) -> None:
    """Open the model as `medm infer` does, and let it answer one question."""
    engine, _ = load_engine(str(file.parent), OPTIONS, device="cpu", dtype="saved")
    sample = Sample((Turn("user", ("What is seen?",)),))
    example = engine.processor.encode(sample, {}, generation=True)
    [reply] = engine.generate(prepare_requests([example]), OPTIONS)
    if not isinstance(reply.text, str):
        raise WrongResultError(f"a reply of type {type(reply.text).__name__}")


def read_weights(file: Path) -> None:
    """Weights are compared with their checksum: nothing but the whole file opens."""
    whole = file.parent / f"{file.name}.whole"
    changed = whole.exists() and whole.read_bytes() != file.read_bytes()
    medm.models.load(str(file.parent))
    if changed:
        raise WrongResultError("changed weights were opened")


TARGETS = [
    *(Target(name, model_file(name), read, text=name.endswith(".json")) for name in FILES),
    Target("chat_template.jinja", model_file("chat_template.jinja"), read),
    Target(MANIFEST, model_file(MANIFEST), read, text=True),
    Target("model.safetensors", model_file("model.safetensors"), read_weights),
]
PART = Part(
    "model_files",
    "Mutated files of a model folder",
    partial(prepare, TARGETS),
    partial(mutation_cases, TARGETS),
    1000,
)
