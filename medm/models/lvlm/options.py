"""The `model` section of a recipe for a vision-language model. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from medm.config import Options
from medm.connectors import CONNECTORS, Activation, ConnectorOptions
from medm.encoders import ENCODERS, EncoderOptions
from medm.heads import HEADS, HeadOptions
from medm.knowledge import KNOWLEDGE, KnowledgeOptions
from medm.llms import LLMS, LLMOptions
from medm.models.options import ModelOptions
from medm.registry import NamedBlock
from medm.types import MASK_TOKEN, PHRASE_TOKENS, Kind, PredictionField, parse_view

MASK_OUTPUTS = frozenset({"mask_logits", "mask_quality", "mask_presence"})
"""Fields of the output of a model with a mask head."""

MASK_PARTS = ("masks.encoder", "masks.decoder", "masks.projection")
"""Parts of a model with a mask head, beside its other ones."""


class BranchOptions(Options):
    """One way for vision to come in: an encoder and the connector that leads to the LLM."""

    encoder: Annotated[EncoderOptions, NamedBlock(ENCODERS)]
    """The encoder, by name, and its options."""
    connector: Annotated[ConnectorOptions, NamedBlock(CONNECTORS)]
    """The connector, by name, and its options."""
    preprocess: dict[str, Any] = {}
    """Fields of the preprocessing that replace what the encoder was published with (size, window,
    fit ...)."""
    wrap: list[str] | None = Field(default=None, min_length=2, max_length=2)
    """Texts before and after the vision tokens of an image or volume, all its tiles included:
    InternVL has ["<img>", "</img>"]. They are special tokens where the tokenizer has them, else
    plain text. Default: none; of a saved model, what it was saved with."""
    knowledge: Annotated[KnowledgeOptions, NamedBlock(KNOWLEDGE)] | None = None
    """Knowledge that the connector's tokens attend to, by name (docs/knowledge.md): `{name: graph,
    file: chest}`. Its names are read with the word embeddings of the language model. Default:
    none."""

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out knowledge where there is none, so that other recipes resolve as before."""
        values: dict[str, object] = serialize(self)
        return {
            key: value for key, value in values.items() if key != "knowledge" or value is not None
        }


class MaskProjectionOptions(Options):
    """From the state of the language model to the prompt of a mask head."""

    depth: int = Field(default=2, ge=1)
    """Number of linear layers; all but the last keep the width of the language model."""
    activation: Activation = "relu"
    """Activation between the layers, by its transformers name."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after the last layer (M3D-LaMed takes 0.1)."""


class _EncoderOfHead(Options):
    encoder: Annotated[EncoderOptions, NamedBlock(ENCODERS)]


class MaskOptions(Options):
    """A mask head: each `[SEG]` of a reply becomes a mask of an image or volume."""

    view: Kind = "image"
    """Kind of file that the head reads. Its pixels are prepared apart from those of the branch."""
    head: Annotated[HeadOptions, NamedBlock(HEADS)]
    """The head, by name, and its options."""
    preprocess: dict[str, Any] = {}
    """Fields of the preprocessing that replace what the head was published with."""
    projection: MaskProjectionOptions = MaskProjectionOptions()
    """From the state of the language model to the prompt of the head."""
    state: Literal["at", "before"] = "at"
    """State of the language model that becomes the prompt: `at` the token (LISA, Sa2VA, UniBiomed),
    or at the position `before` it, from which it is predicted (M3D-LaMed)."""
    targets: Literal["head", "full"] = "head"
    """Grid on which masks are learned: that of the head's logits, or of the prepared pixels."""

    @field_validator("head")
    @classmethod
    def _known_encoder(cls, head: HeadOptions) -> HeadOptions:
        block = getattr(head, "encoder", None)
        if block is None:
            return head
        checked = _EncoderOfHead.model_validate({"encoder": block}).encoder
        return head.model_copy(update={"encoder": checked.model_dump()})


class LVLMOptions(ModelOptions):
    """A vision-language model, put together from parts by name."""

    outputs: ClassVar[frozenset[str]] = frozenset({"loss", "loss_sum", "losses"}) | MASK_OUTPUTS

    longest_reply: ClassVar[int | None] = 256  # as `generation.max_new_tokens` of inference

    kind: Literal["lvlm"] = "lvlm"
    """Kind of model."""
    llm: Annotated[LLMOptions, NamedBlock(LLMS)]
    """The language model."""
    branches: dict[str, BranchOptions] = {}
    """Vision branches: `image` reads 2-D images, `volume` reads 3-D volumes. Each has an encoder of
    its own."""
    masks: MaskOptions | None = None
    """Mask head, for answers with masks; null for text alone."""
    tasks: list[str] = []
    """Names of the tasks that records carry, in the order of their ids; needed by connectors that
    route by task."""
    control_tokens: list[str] | None = None
    """Tokens that replies hold where a record has masks: `[SEG]`, and `<p>`, `</p>` around the
    words that a mask belongs to (docs/data-format.md). They are added to the tokenizer, and their
    rows start as the mean of the others; `parts.llm.new_tokens` trains them. A mask head brings
    its own (`[SEG]`)."""
    regions: Literal["draw", "text"] | None = None
    """How regions of records are read (docs/data-format.md): `draw` marks them on the image, `text`
    writes their coordinates. None refuses records with regions."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the weights are held. Mixed precision in training is `train.bf16`,
    whatever stands here."""

    def part_names(self) -> frozenset[str]:
        """See `ModelOptions`."""
        return frozenset(
            {
                "llm",
                *(f"{name}.{part}" for name in self.branches for part in ("encoder", "connector")),
                *(
                    f"{name}.knowledge"
                    for name, branch in self.branches.items()
                    if branch.knowledge
                ),
                *(MASK_PARTS if self.masks is not None else ()),
            }
        )

    def output_fields(self) -> frozenset[str]:
        return self.outputs if self.masks is not None else self.outputs - MASK_OUTPUTS

    def predicted_fields(self) -> frozenset[PredictionField]:
        """See `ModelOptions`."""
        return frozenset({"text"})

    def untaught_parts(self, read: frozenset[str]) -> dict[str, str]:
        if MASK_OUTPUTS & read:
            return {}
        return dict.fromkeys(
            MASK_PARTS, "no objective reads masks; add the term 'segmentation', or freeze the part"
        )

    def missing_fields_advice(self, missing: frozenset[str]) -> str:
        return "give the model a mask head (model.masks)" if missing <= MASK_OUTPUTS else ""

    @property
    def reply_tokens(self) -> list[str]:
        """Control tokens of replies: those of `control_tokens`, and those of the mask head."""
        brought = self.masks.head.control_tokens if self.masks is not None else ()
        return list(dict.fromkeys([*(self.control_tokens or []), *brought]))

    @field_validator("control_tokens")
    @classmethod
    def _known_control_tokens(cls, tokens: list[str] | None) -> list[str] | None:
        if unknown := sorted(set(tokens or []) - {MASK_TOKEN, *PHRASE_TOKENS}):
            raise ValueError(
                f"expected {', '.join((MASK_TOKEN, *PHRASE_TOKENS))}, the control tokens that "
                f"records hold, found {unknown}"
            )
        return tokens

    @field_validator("branches")
    @classmethod
    def _known_branches(cls, branches: dict[str, BranchOptions]) -> dict[str, BranchOptions]:
        for name in branches:
            view = parse_view(name)
            if view.variant is not None:
                raise ValueError(
                    f"branch {name!r}: a language model reads each file once, for the placeholder "
                    f"{view.placeholder}; name the branch {view.kind!r}"
                )
        return branches
