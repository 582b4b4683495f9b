"""Qwen2.5 and Qwen3 (https://huggingface.co/Qwen)."""

from medm.llms.base import LLMFamily

QWEN_2_5 = LLMFamily(model_types=("qwen2",))

# Training data holds no reasoning, so the thinking block is written empty in training and inference
# alike.
QWEN_3 = LLMFamily(model_types=("qwen3",), template_kwargs={"enable_thinking": False})
