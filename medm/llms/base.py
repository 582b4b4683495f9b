"""Description of an LLM family, beyond its config and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medm.errors import RecipeError, suggest

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class LLMFamily:
    """One family of causal LMs."""

    model_types: tuple[str, ...] = ()
    """`model_type` of the configs that belong to it; empty for any."""
    template: str | None = None
    """Name of a template in `templates/`, used when the tokenizer brings none."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Fixed variables of the chat template, saved in every checkpoint, so that a prompt does not
    depend on the day or on a library's default."""


AUTO = LLMFamily()


def read_template(name_or_path: str) -> str:
    """Read a chat template of medm by name, or any Jinja file.

    Raises:
        RecipeError: neither a file nor a known name.
    """
    shipped = TEMPLATES / f"{name_or_path}.jinja"
    file = shipped if shipped.is_file() else Path(name_or_path)
    if not file.is_file():
        names = [path.stem for path in TEMPLATES.glob("*.jinja")]
        raise RecipeError(
            f"chat_template {name_or_path!r}: no such file, and no template of "
            f"medm{suggest(name_or_path, names)}"
        )
    return file.read_text(encoding="utf-8")
