"""The `model` section of a recipe for a vision-language model. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from medm.config import Options
from medm.connectors import CONNECTORS, ConnectorOptions
from medm.encoders import ENCODERS, EncoderOptions
from medm.llms import LLMS, LLMOptions
from medm.models.options import ModelOptions
from medm.registry import NamedBlock
from medm.types import MASK_TOKEN, parse_view


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


class LVLMOptions(ModelOptions):
    """A vision-language model, put together from parts by name."""

    outputs: ClassVar[frozenset[str]] = frozenset({"loss", "loss_sum", "losses"})

    kind: Literal["lvlm"] = "lvlm"
    """Kind of model."""
    llm: Annotated[LLMOptions, NamedBlock(LLMS)]
    """The language model."""
    branches: dict[str, BranchOptions] = {}
    """Vision branches: `image` reads 2-D images, `volume` reads 3-D volumes. Each has an encoder of
    its own."""
    tasks: list[str] = []
    """Names of the tasks that records carry, in the order of their ids; needed by connectors that
    route by task."""
    control_tokens: list[str] | None = None
    """Tokens that replies hold where a record has masks: `[SEG]` (docs/data-format.md). They are
    added to the tokenizer, and their rows start as the mean of the others; `parts.llm.new_tokens`
    trains them."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the weights are held. Mixed precision in training is `train.bf16`,
    whatever stands here."""

    def part_names(self) -> frozenset[str]:
        """See `ModelOptions`."""
        return frozenset(
            {
                "llm",
                *(f"{name}.{part}" for name in self.branches for part in ("encoder", "connector")),
            }
        )

    @field_validator("control_tokens")
    @classmethod
    def _known_control_tokens(cls, tokens: list[str] | None) -> list[str] | None:
        if unknown := sorted(set(tokens or []) - {MASK_TOKEN}):
            raise ValueError(
                f"expected {MASK_TOKEN}, the control token that records hold, found {unknown}"
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
