"""Mask heads: pixels and prompts to masks. The table at the end has one line per member.

To add one, write a file with a `MaskHead` and a line here. Its options stand above the table and
are torch-free. A prompt is a vector, such as the projected state of an LLM at `[SEG]`; a head
depends on no data set, token or loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from medm.config import Options
from medm.registry import Registry
from medm.types import MASK_TOKEN

if TYPE_CHECKING:
    from medm.heads.base import MaskHead


class HeadOptions(Options):
    """Options of every mask head."""

    control_tokens: ClassVar[tuple[str, ...]] = (MASK_TOKEN,)
    """Tokens of replies whose states prompt the head."""

    name: str
    """Registered name of the head."""
    path: str | None = None
    """Published weights: a Hugging Face id, a folder or a file. Default: random weights."""
    architecture: dict[str, Any] = {}
    """Sizes that replace those of the published config, or all of them when there is no `path`."""


HEADS: Registry[type[MaskHead]] = Registry("mask head", group="medm.heads", options=HeadOptions)
