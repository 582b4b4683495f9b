"""medm's classes in transformers' Auto registries, so that no remote code is needed to open a checkpoint."""

from __future__ import annotations


def register() -> None:
    """Make transformers' Auto classes know medm: those for configs, models and processors.

    `import medm` has this done when transformers first meets a folder of medm. medm's own functions that
    open a folder call it too, so that they need no hook in transformers.
    """
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
