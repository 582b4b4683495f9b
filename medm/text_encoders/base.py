"""The interface of text encoders. They know nothing of images, files or learning rates."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig


class TextFeatures(NamedTuple):
    """Output of a text encoder. A tuple, so that ZeRO-3 finds its tensors."""

    tokens: Tensor
    """(B, T, D), one vector per token, padding included."""
    pooled: Tensor
    """(B, D), one vector per text."""


class TextEncoder(nn.Module, metaclass=ABCMeta):
    """Token ids (B, T) to a vector per token and one per text.

    A subclass without one of the abstract methods raises `TypeError` when it is constructed. It is
    built from plain values alone: `architecture`, a JSON-able mapping of sizes, and the fields of
    its options class other than `name`, `path` and `architecture`. Building is offline and random.

    Reading published weights (`medm.models.published.weights`) uses `key_map`, `ignored_keys` and
    `architecture_from`, as for a `medm.encoders.base.VisionEncoder`.
    """

    config_class: ClassVar[type[PreTrainedConfig]]
    """Config of the transformers model; its fields are those of `architecture`."""
    key_map: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(regular expression, replacement): published tensor names to own names; the first that
    matches is used."""
    ignored_keys: tuple[str, ...] = ()
    """Regular expressions of published tensors that the encoder does not use."""

    pads_to_max_length: ClassVar[bool] = False
    """Whether every text is padded to `max_length`, as the published weights were trained."""

    dim: int
    """Width of the pooled vector."""
    max_length: int
    """Number of positions: the longest text in tokens."""

    @classmethod
    def architecture_from(cls, published: Mapping[str, Any]) -> dict[str, Any]:
        """Return `architecture` from a published `config.json`, of the encoder or a dual one."""
        text = dict(published.get("text_config", published))
        unused = {"model_type", "transformers_version", "architectures", "dtype"}
        known = set(cls.config_class().to_dict()) - unused
        return {key: value for key, value in text.items() if key in known}

    @abstractmethod
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        """Encode texts.

        Args:
            input_ids: (B, T) int64, padded on the right.
            attention_mask: (B, T) int64 or bool, 0 for padding.
        """
