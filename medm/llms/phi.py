"""Phi-2 and Phi-3 (https://huggingface.co/microsoft)."""

from medm.llms.base import LLMFamily

# Phi-2 has no template; "Instruct: ... Output: ..." is the question format of its model card.
PHI_2 = LLMFamily(model_types=("phi",), template="phi-2")

PHI_3 = LLMFamily(model_types=("phi3",))
