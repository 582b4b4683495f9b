"""Text encoders: token ids in, a vector per token and per text out. One line of the table a member.

Adding one is a new file with a `TextEncoder` and a line here; its own options stand above the
table, torch-free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from medm.config import Options
from medm.registry import Registry

if TYPE_CHECKING:
    from medm.text_encoders.base import TextEncoder


class TextEncoderOptions(Options):
    """Options of every text encoder block of a recipe."""

    name: str
    """Registered name of the text encoder."""
    path: str | None = None
    """Published weights and tokenizer: a Hugging Face id, a folder or a file. Without it the
    encoder starts from random weights."""
    architecture: dict[str, Any] = {}
    """Sizes that replace those of the published config, or all of them when there is no `path`."""


class BertOptions(TextEncoderOptions):
    """BERT and its medical descendants."""

    pool: Literal["cls", "mean", "pooler"] = "cls"
    """Vector of a text: state of the first token, mean over the tokens, or BERT's own pooling layer
    on the first token."""


TEXT_ENCODERS: Registry[type[TextEncoder]] = Registry(
    "text encoder", group="medm.text_encoders", options=TextEncoderOptions
)

TEXT_ENCODERS.add(
    "bert",
    "medm.text_encoders.bert:BertTextEncoder",
    "BERT: BiomedBERT / PubMedBERT, SciBERT, ClinicalBERT, MiniLM",
    options=BertOptions,
)
TEXT_ENCODERS.add(
    "clip-text",
    "medm.text_encoders.clip_text:CLIPTextEncoder",
    "text tower of CLIP: causal, pooled at the end token",
)
TEXT_ENCODERS.add(
    "siglip-text",
    "medm.text_encoders.siglip_text:SiglipTextEncoder",
    "text tower of SigLIP: bidirectional, pooled at the last position",
)
