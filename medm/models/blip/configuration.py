"""Config of a model of kind `blip`, with every size: it is built without other files."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from medm.config import Options, validate
from medm.models.blip.options import (
    AnswerOptions,
    Fusion,
    Head,
    LabelHead,
    LMHead,
    Negatives,
    SameReport,
)
from medm.types import Config


class ImageEntry(Options):
    """The image tower of a checkpoint. A field that is added later needs a default."""

    encoder: Config
    """Name and keywords of the vision encoder."""
    channels: int
    """Channels of the input."""
    spatial: list[int]
    """Size of the input, (height, width)."""
    views: int
    fusion: Fusion
    """See `StudyImageOptions`."""
    norm_eps: float = 1e-6
    """Summand in the norm behind the encoder."""


class TextEntry(Options):
    """The text tower of a checkpoint."""

    architecture: Config
    """Fields of `BertConfig`."""
    decoder_id: int
    """Token that a text begins with in the decoder."""
    encoder_id: int
    """Token that a text begins with where it attends to an image."""
    end_id: int
    """Token that ends a text."""
    lm_head: LMHead = "tied"
    """See `StudyTextOptions`."""
    label_ids: list[list[int]] = []
    """Tokens of the name of each finding."""


class MedmBlipConfig(PreTrainedConfig):
    """Config of a checkpoint. Fields without a docstring are those of `BlipOptions`."""

    model_type = "medm-blip"

    image: dict[str, Any] = field(default_factory=dict)
    """Fields of an `ImageEntry`."""
    text: dict[str, Any] = field(default_factory=dict)
    """Fields of a `TextEntry`."""
    embed_dim: int = 256
    heads: list[Head] = field(default_factory=list)
    momentum: float = 0.995
    queue: int = 65536
    alpha: float = 0.4
    alpha_steps: int = 0
    temperature: float = 0.07
    same_report: SameReport = "positive"
    negatives: Negatives = "all"
    label_smoothing: float = 0.1
    labels: list[str] = field(default_factory=list)
    label_head: LabelHead = "prototype"
    answers: Config = field(default_factory=dict)
    """Fields of `AnswerOptions` with both lists; empty without the head `answers`."""
    knowledge: list[Config] = field(default_factory=list)
    """Sources of knowledge with every size (`medm.models.knowledge_files.described_knowledge`)."""
    keep_memory: bool = False
    memory_length: int = 90
    """Tokens of a text in the memory, at most."""
    adapters: dict[str, Config] = field(default_factory=dict)
    """Part name to the LoRA that sits in it, in peft's field names."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.tie_word_embeddings = False
        super().__post_init__(**kwargs)

    def image_entry(self) -> ImageEntry:
        """Return the image tower, checked. Raises `RecipeError` with every problem."""
        return validate(ImageEntry, self.image, source="image of config.json")

    def text_entry(self) -> TextEntry:
        """Return the text tower, checked. Raises `RecipeError` with every problem."""
        return validate(TextEntry, self.text, source="text of config.json")

    def answers_entry(self) -> AnswerOptions | None:
        """Return the classes of answers, checked. Raises `RecipeError` with every problem."""
        if not self.answers:
            return None
        return validate(AnswerOptions, self.answers, source="answers of config.json")

    def encoder_entries(self) -> dict[str, Config]:
        """Return name and keywords of the vision encoder by branch."""
        return {"image": self.image["encoder"]}

    def to_dict(self) -> Config:
        content = super().to_dict()
        content.pop("use_cache", None)  # transformers' Trainer writes it into any config
        return content
