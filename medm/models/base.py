"""What every model of medm is, whatever it computes: named parts, adapters in them, a config that says both."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from medm.config import Options
from medm.models.adapters import inject, merge


class MedmModel(PreTrainedModel):
    """A transformers model whose parts a recipe can freeze, train or adapt one by one."""

    base_model_prefix = ""
    supports_gradient_checkpointing = True

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialise themselves when they are constructed."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The units that a recipe freezes, trains or adapts, by name."""

    def encoders(self) -> dict[str, Any]:
        """By branch a module with `encoder`, `encode(pixels)` and `features_only`, where features can be kept."""
        return {}

    @abstractmethod
    def check_same_parts(self, options: Options, *, source: str) -> None:
        """Raises `RecipeError` when a recipe's `model` section names other parts than this model has."""

    def follow(self, options: Options, processor: Any) -> Any:
        """The processor of `init_from`, with what a recipe writes in the place of what was saved."""
        return processor

    def complete(self, processor: Any) -> None:
        """Tell a processor that an earlier medm saved what it could not say then, and the model knows."""

    def separate_samples(self) -> bool:
        """Prepare for batches that are one row of samples with their beginnings; False where the model cannot."""
        return False

    def inject_adapters(self) -> None:
        """Build the LoRA layers that the config speaks of; the last step of a constructor before `post_init`."""
        for part, spec in self.config.adapters.items():
            inject(self.parts()[part], spec)

    def add_adapter_to_part(self, part: str, spec: Mapping[str, Any]) -> None:
        """Put LoRA layers into a part and note them in the config, so that a checkpoint holds both."""
        inject(self.parts()[part], spec)
        self.config.adapters = {**self.config.adapters, part: dict(spec)}

    def merge_adapters(self) -> None:
        """Fold every adapter into the weights it adapts; the model computes the same with plain layers."""
        for part in self.config.adapters:
            merge(self.parts()[part])
        self.config.adapters = {}
