"""Config of an LVLM: every size resolved, so that it can be built from the config alone."""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer
from transformers import AutoConfig, PreTrainedConfig

from medm.config import Options, validate
from medm.connectors import upgrade_config
from medm.models.lvlm.options import MaskProjectionOptions
from medm.types import Config


class BranchEntry(Options):
    """One branch of a checkpoint.

    A field that a later medm adds needs a default, so that older folders open.
    """

    encoder: Config
    """Such as `{"name": "siglip", "architecture": {...}, "layer": -1, "tokens": "patch"}`."""
    connector: Config
    """Such as `{"name": "mlp", "depth": 2, "activation": "gelu"}`."""
    channels: int
    """Channels of the input."""
    spatial: list[int]
    """Size of the input, (height, width) or (depth, height, width)."""
    placeholder_id: int
    """Token that stands for one vision token in `input_ids`."""
    knowledge: Config | None = None
    """Such as `{"name": "graph", "graph": {...}, "node_ids": [...], "fusion": {...}}`."""

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> Config:
        """Leave out knowledge where there is none: an earlier medm opens such folders."""
        values: Config = serialize(self)
        return {
            key: value for key, value in values.items() if key != "knowledge" or value is not None
        }


class MaskEntry(Options):
    """Mask head of a checkpoint.

    A field that a later medm adds needs a default, so that older folders open.
    """

    view: str
    """View that it reads: `image@masks` or `volume@masks`."""
    head: Config
    """Such as `{"name": "sam2", "architecture": {...}}`."""
    projection: MaskProjectionOptions
    """From the state of the language model to the prompt of the head."""
    channels: int
    """Channels of the input."""
    spatial: list[int]
    """Size of the input."""
    token_id: int
    """Token whose state is the prompt."""
    state: Literal["at", "before"] = "at"
    """Position of the state: at the token, or before it."""


def _upgraded(entry: Any) -> Any:
    """Return the entry of a branch with current option values.

    Anything else is returned unchanged; `LVLMConfig.branch` refuses it.
    """
    if isinstance(entry, dict) and isinstance(entry.get("connector"), dict):
        return {**entry, "connector": upgrade_config(entry["connector"])}
    return entry


class LVLMConfig(PreTrainedConfig):
    """Config of a checkpoint.

    `branches` maps a branch name to the fields of a `BranchEntry`. Widths, grids and token counts
    are derived from these when the model is built and stand nowhere twice.
    """

    model_type = "medm-lvlm"
    sub_configs = {"text_config": AutoConfig}
    attribute_map: ClassVar[dict[str, str]] = {"full_logits": "loss_on_full_logits"}
    """Older names in config.json to those of the fields below."""

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    """Config of the language model."""
    llm: str = "auto"
    """Family of the language model, a name of `medm.llms`."""
    branches: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, Config] = field(default_factory=dict)
    """Part name to the LoRA that sits in it, in peft's field names; the layers are built with the
    model."""
    control_tokens: dict[str, int] = field(default_factory=dict)
    """Control tokens of replies and their ids (`[SEG]`)."""
    masks: dict[str, Any] = field(default_factory=dict)
    """Fields of the `MaskEntry` of its mask head; empty without one."""
    new_rows: dict[str, Config] = field(default_factory=dict)
    """Part name to `ids` of the tokens whose rows are held apart (`medm.models.token_rows`), and
    `tied`: whether the LM head shares them."""
    end_sequence: list[int] = field(default_factory=list)
    """Ids that end a reply together, where the chat template ends it with text and no token."""
    loss_on_full_logits: bool = False
    """Train on logits that the language model computes itself, at every position: what it does
    behind its head is not known here."""
    tasks: list[str] = field(default_factory=list)
    """Names of the tasks, in the order of their ids."""
    use_cache: bool = True
    """Not saved: transformers' Trainer switches it off while it trains, and generation reads
    `text_config`."""

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        elif self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        self.branches = {name: _upgraded(entry) for name, entry in self.branches.items()}
        # Tying is the language model's own affair: it holds both its embeddings and its head.
        self.tie_word_embeddings = False
        super().__post_init__(**kwargs)

    def branch(self, name: str) -> BranchEntry:
        """Return the entry of a branch, checked. Raises `RecipeError` with every problem."""
        return validate(BranchEntry, self.branches[name], source="a branch of config.json")

    def mask_entry(self) -> MaskEntry | None:
        """Return the entry of the mask head, checked; None without one."""
        return (
            validate(MaskEntry, self.masks, source="masks of config.json") if self.masks else None
        )

    def encoder_entries(self) -> dict[str, Config]:
        """Return name and keywords of the vision encoder of each branch."""
        return {name: branch["encoder"] for name, branch in self.branches.items()}

    def to_dict(self) -> Config:
        content = super().to_dict()
        content.pop("use_cache", None)
        # An earlier medm opens the folders of models that have none.
        return {
            key: value
            for key, value in content.items()
            if value or key not in ("control_tokens", "end_sequence", "masks", "new_rows")
        }

    def get_text_config(self, *_args: object, **_kwargs: object) -> PreTrainedConfig:
        """The language model's config, which generation reads for its cache."""
        assert isinstance(self.text_config, PreTrainedConfig)
        return self.text_config
