"""Llama 2, and Llama 3 to 3.2 (https://huggingface.co/meta-llama)."""

from medm.llms.base import LLMFamily

LLAMA_2 = LLMFamily(model_types=("llama",), template="llama-2")

# The published template writes today's date into the system turn; this is the date it falls back
# to.
LLAMA_3 = LLMFamily(model_types=("llama",), template_kwargs={"date_string": "26 Jul 2024"})
