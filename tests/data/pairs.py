"""The pipeline of docs/add-a-pipeline.md, and records and a processor for it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from medm.data.base import AnyPipeline
from medm.data.pipelines import PIPELINES
from medm.imaging import Preprocess
from tests.data.tiny import PAD, PREPROCESS

PAGE = Path(__file__).parents[2] / "docs" / "add-a-pipeline.md"


def source() -> str:
    """The file that the page says to write."""
    return PAGE.read_text("utf-8").split("```python\n")[1].split("```\n")[0]


def load(folder: Path) -> type[AnyPipeline]:
    """The pipeline, registered by running that file, once and without noting it as a plug-in of
    this process."""
    if "captioned-images" not in PIPELINES:
        (folder / "captioned_images.py").write_text(source(), "utf-8")
        spec = importlib.util.spec_from_file_location(
            "tests_pairs_of_the_page", folder / "captioned_images.py"
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return PIPELINES.get("captioned-images")


def pair(image: Any = "a.png", caption: Any = "Clear.", **fields: Any) -> dict[str, Any]:
    return {"image": image, "caption": caption, **fields}


def processor(preprocess: Mapping[str, Preprocess] = PREPROCESS) -> Any:
    """A character a token; it knows no labels, turns or placeholders."""
    tokenizer = SimpleNamespace(
        encode=lambda text: [ord(c) + 2 for c in text],
        decode=lambda ids: "".join(chr(token - 2) for token in ids),
    )
    return SimpleNamespace(preprocess=dict(preprocess), pad_id=PAD, tokenizer=tokenizer)


def pairs(folder: Path, **settings: Any) -> AnyPipeline:
    """The pipeline with that processor."""
    return load(folder)(processor(), **settings)
