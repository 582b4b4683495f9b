"""A kind of model as another package brings it: loaded as a plug-in file or by an entry point,
never imported."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.modeling_outputs import ModelOutput

from medm.config import Options
from medm.models import MODELS
from medm.models.base import MedmModel, ModelKind


class CountConfig(PreTrainedConfig):
    model_type = "medm-count"

    width: int = 4
    adapters: dict[str, Any] | None = None


class CountModel(MedmModel):
    config_class = CountConfig

    def __init__(self, config: CountConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.width, 1)
        self.post_init()

    def parts(self) -> dict[str, nn.Module]:
        return {"linear": self.linear}

    def check_same_parts(self, options: Options, *, source: str) -> None: ...

    def forward(self, inputs: Tensor) -> ModelOutput:
        return ModelOutput(logits=self.linear(inputs))


class CountProcessor(ProcessorMixin):
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None = None, unit: str = "cells", **kwargs: Any
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        self.unit = unit


class Count(ModelKind):
    config_class = CountConfig
    model_class = CountModel
    processor_class = CountProcessor

    def build(self, options: Any) -> tuple[CountModel, CountProcessor]:
        raise NotImplementedError("the test saves the model that it makes itself")


if __name__.startswith("medm_plugin_"):
    MODELS.add("count", Count, "for the test")
