"""Records beside the weights of a trained model: model card, resolved recipe, versions, hashes of
the data.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import medm
from medm.models.base import CardText
from medm.models.provenance import CARD, CONCEPTS, NOT_CLINICAL
from medm.training.parts import PartTable
from medm.training.recipe import dump

RECIPE, RUN = "recipe.yaml", "run.json"

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "safetensors",
    "tokenizers",
    "monai",
    "SimpleITK",
)


def versions() -> dict[str, str]:
    """Return the versions of medm, Python and the libraries behind a run; the commit, in a git
    checkout.
    """
    found = {"medm": medm.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | ({"commit": commit} if (commit := _commit()) else {})


def data_hashes(paths: Iterable[str | Path]) -> dict[str, str]:
    """Return the sha256 of every annotation file."""
    hashes = {}
    for path in paths:
        with Path(path).open("rb") as file:
            hashes[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def write_record(
    folder: Path,
    *,
    recipe: Mapping[str, Any],
    text: CardText,
    table: PartTable,
    hashes: Mapping[str, str],
    history: Sequence[Mapping[str, float]],
    counts: Mapping[str, int],
    device: str = "cpu",
    fallback: Mapping[str, str] | None = None,
    concepts: Mapping[str, Any] | None = None,
) -> None:
    """Write `recipe.yaml`, `run.json`, `README.md` and `concepts.json` into a model's folder.

    Args:
        folder: folder of the weights.
        recipe: resolved.
        text: sentences of the kind of model.
        table: trained parts.
        hashes: of the annotation files.
        history: log entries; the card shows the last training and evaluation loss.
        counts: records that were skipped or shortened.
        device: device of the training.
        fallback: keys of the recipe that this machine could not follow, and their replacements.
        concepts: what the model was trained to name (`medm.data.concepts`); None without masks.
    """
    last = _last(history)
    run = {
        "versions": versions(), "data": dict(hashes), "records": dict(counts), "scores": last,
        "parameters": table.parameters, "trainable": table.trainable, "device": device,
        "instead_of_the_recipe": dict(fallback or {}),
    }  # fmt: skip
    (folder / RECIPE).write_text(dump(recipe), encoding="utf-8")
    (folder / RUN).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    if concepts is not None:
        text_of_concepts = json.dumps(concepts, indent=1, ensure_ascii=False) + "\n"
        (folder / CONCEPTS).write_text(text_of_concepts, encoding="utf-8")
    (folder / CARD).write_text(_card(recipe, text, table, run), encoding="utf-8")


def _card(
    recipe: Mapping[str, Any], text: CardText, table: PartTable, run: Mapping[str, Any]
) -> str:
    name = Path(str(recipe["output_dir"])).name
    scores = (
        "\n".join(f"| {key} | {value:.4f} |" for key, value in run["scores"].items())
        or "| none | |"
    )
    data = (
        "\n".join(f"- `{path}`, sha256 `{digest}`" for path, digest in run["data"].items())
        or "- none"
    )
    left_out = (
        ", ".join(f"{key} {count}" for key, count in run["records"].items() if count) or "none"
    )
    used = ", ".join(f"{package} {number}" for package, number in run["versions"].items())
    use = f"## Use\n\n```python\n{text.example}```\n\n" if text.example else ""
    return f"""---
library_name: medm
tags: [{", ".join(text.tags)}]
---
# {name}

{NOT_CLINICAL}

{text.summary}

{use}## Training

```
{table}
```

Losses at the end (no task was scored during training; `medm eval` does that):

| | |
|---|---|
{scores}

The whole recipe is in `{RECIPE}`; versions and hashes are in `{RUN}` too.

## Data

{data}

Records left out or shortened: {left_out}.

## Made with

{used}
"""


def _last(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the newest value of every logged loss."""
    found: dict[str, float] = {}
    for entry in history:
        found |= {key: float(entry[key]) for key in ("loss", "eval_loss") if key in entry}
    return {
        "training loss" if key == "loss" else "held-out loss": value for key, value in found.items()
    }


def _commit() -> str | None:
    """Return the commit of a git checkout, marked when files were changed; None for an installed
    package.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + (
            "+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
