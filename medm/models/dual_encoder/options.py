"""The `model` section of a recipe for a dual encoder. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from medm.config import Options, ResumeSafe
from medm.encoders import ENCODERS, EncoderOptions
from medm.models.options import ModelOptions
from medm.registry import NamedBlock
from medm.text_encoders import TEXT_ENCODERS, TextEncoderOptions

Pool: TypeAlias = Literal["cls", "mean", "attention", "encoder"]
ImageProjection: TypeAlias = Literal["linear", "none"]
TextProjection: TypeAlias = Literal["linear", "mlp", "none"]


class ImageTowerOptions(Options):
    """From pixels to one vector."""

    encoder: Annotated[EncoderOptions, NamedBlock(ENCODERS)]
    """The vision encoder, by name, and its options."""
    preprocess: dict[str, Any] = {}
    """Fields of the preprocessing that replace what the encoder was published with (size, window,
    fit ...)."""
    pool: Pool = "cls"
    """Vector of an image: the class token (CLIP), the mean over the grid, a learned query that
    attends to the tokens (SigLIP), or the pooled vector of the encoder itself (CNNs)."""
    norm: bool = True
    """Layer norm before the pooling, as published towers have after their last block."""
    projection: ImageProjection = "linear"
    """From the vector to `embed_dim`: a matrix without bias, or none where the widths are equal."""
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of an image's patches that a ViT leaves out in training, drawn anew each time (FLIP,
    arXiv 2212.00794). A frozen encoder sees all of them."""

    @model_validator(mode="after")
    def _class_token_is_kept(self) -> ImageTowerOptions:
        """Encoders leave the class token out unless asked; pooling by it asks."""
        encoder = self.encoder
        unset = "tokens" not in encoder.model_fields_set
        if self.pool == "cls" and unset and "tokens" in type(encoder).model_fields:
            return self.model_copy(
                update={"encoder": encoder.model_copy(update={"tokens": "cls_patch"})}
            )
        return self


class TextTowerOptions(Options):
    """From token ids to one vector."""

    encoder: Annotated[TextEncoderOptions, NamedBlock(TEXT_ENCODERS)]
    """The text encoder, by name, and its options."""
    tokenizer: str | None = None
    """Tokenizer folder or id, where it is not the one at the encoder's `path`."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of a text; longer ones are cut. Default: 256, or the positions that the encoder has
    where they are fewer."""
    projection: TextProjection = "linear"
    """From the vector to `embed_dim`: a matrix without bias; two with a GELU between, of half the
    summed widths (BiomedCLIP, UniMed-CLIP); or none where the widths are equal (SigLIP)."""


class DualEncoderOptions(ModelOptions):
    """An image and a text encoder that meet in one space."""

    outputs: ClassVar[frozenset[str]] = frozenset(
        {"image_embeds", "text_embeds", "logit_scale", "logit_bias"}
    )

    scores_texts: ClassVar[bool] = True

    kind: Literal["dual-encoder"] = "dual-encoder"
    """Kind of model."""
    branch: Literal["image", "volume"] = "image"
    """What the vision encoder reads: 2-D images or 3-D volumes."""
    path: str | None = None
    """Published dual encoder whose weights are the start, all of them: a Hugging Face id, a folder
    or a file in the layout of CLIP, SigLIP, OpenAI / MetaCLIP, UniMed-CLIP or BiomedCLIP. Without
    it, each encoder may name weights of its own."""
    image: ImageTowerOptions
    """The image tower."""
    text: TextTowerOptions
    """The text tower."""
    embed_dim: int = Field(default=512, ge=1)
    """Width of the common space."""
    logit_scale: float = Field(default=1 / 0.07, ge=1.0, le=100.0)
    """Factor of the scores at the start. It is trained as a logarithm and held within 1 and 100."""
    logit_bias: float | None = None
    """Summand of the scores at the start, which is trained (SigLIP: -10); null for none."""
    chunk: ResumeSafe[int | None] = Field(default=None, ge=1)
    """Pairs that are encoded at a time in training; the backward pass encodes each chunk again.
    Memory of the towers is that of one chunk, and the contrast is over the whole batch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the weights are held. Mixed precision in training is `train.bf16`,
    whatever stands here."""

    def part_names(self) -> frozenset[str]:
        """See `ModelOptions`."""
        names = {"image.encoder", "text.encoder", "scale"}
        names |= {"image.projection"} if self.image.projection != "none" else set()
        names |= {"text.projection"} if self.text.projection != "none" else set()
        return frozenset(names)

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> DualEncoderOptions:
        for tower, encoder in (("image", self.image.encoder), ("text", self.text.encoder)):
            if self.path is not None and encoder.path is not None:
                raise ValueError(
                    f"path holds the weights of both towers, and {tower}.encoder.path names "
                    "others; keep one of the two"
                )
        return self
