"""medm's classes in transformers' Auto registries, so that no remote code is needed to open a checkpoint."""

from __future__ import annotations


def register() -> None:
    """Make `AutoConfig`, `AutoModelForImageTextToText`, `AutoModelForCausalLM` and `AutoProcessor` know medm."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    from medm.models.lvlm.configuration import LVLMConfig
    from medm.models.lvlm.modeling import LVLMForConditionalGeneration
    from medm.models.lvlm.processing import LVLMProcessor

    AutoConfig.register(LVLMConfig.model_type, LVLMConfig, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto.register(LVLMConfig, LVLMForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LVLMConfig, LVLMProcessor, exist_ok=True)
