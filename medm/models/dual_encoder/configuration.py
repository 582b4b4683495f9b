"""Config of a dual encoder: every size resolved, so that it can be built without other files."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from medm.config import Options, validate
from medm.models.dual_encoder.options import ImageProjection, Pool, TextProjection
from medm.types import Config


class ImageEntry(Options):
    """The image tower of a checkpoint. A field that is added later needs a default, so that older
    folders open.
    """

    encoder: Config
    """Name and keywords of the vision encoder."""
    pool: Pool
    norm: bool
    projection: ImageProjection
    """See `ImageTowerOptions`."""
    channels: int
    """Channels of the input."""
    spatial: list[int]
    """Size of the input, (height, width) or (depth, height, width)."""


class TextEntry(Options):
    """The text tower of a checkpoint."""

    encoder: Config
    """Name and keywords of the text encoder."""
    projection: TextProjection
    """See `TextTowerOptions`."""


class DualEncoderConfig(PreTrainedConfig):
    """Config of a checkpoint."""

    model_type = "medm-dual-encoder"

    branch: str = "image"
    """What the vision encoder reads, "image" or "volume"."""
    image: dict[str, Any] = field(default_factory=dict)
    """Fields of an `ImageEntry`."""
    text: dict[str, Any] = field(default_factory=dict)
    """Fields of a `TextEntry`."""
    embed_dim: int = 512
    logit_scale: float = 1 / 0.07
    """Factor of the scores at the start."""
    logit_bias: float | None = None
    """Summand of the scores at the start; None for models without one."""
    adapters: dict[str, Config] = field(default_factory=dict)
    """Part name to the LoRA that sits in it, in peft's field names."""
    chunk: int | None = None
    """Pairs that are encoded at a time in training. Not saved: a recipe says it."""
    patch_dropout: float = 0.0
    """Fraction of the patches that are left out in training. Not saved: a recipe says it."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.tie_word_embeddings = False
        super().__post_init__(**kwargs)

    def image_entry(self) -> ImageEntry:
        """Return the image tower, checked. Raises `RecipeError` with every problem."""
        return validate(ImageEntry, self.image, source="image of config.json")

    def text_entry(self) -> TextEntry:
        """Return the text tower, checked. Raises `RecipeError` with every problem."""
        return validate(TextEntry, self.text, source="text of config.json")

    def encoder_entries(self) -> dict[str, Config]:
        """Return name and keywords of the vision encoder by branch."""
        return {self.branch: self.image["encoder"]}

    def to_dict(self) -> Config:
        content = super().to_dict()
        # Two are options of a run; transformers' Trainer writes the third into any config.
        for name in ("chunk", "patch_dropout", "use_cache"):
            content.pop(name, None)
        return content
