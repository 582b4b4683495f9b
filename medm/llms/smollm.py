"""SmolLM2 (https://huggingface.co/HuggingFaceTB)."""

from medm.llms.base import LLMFamily

SMOLLM2 = LLMFamily(model_types=("llama",))
