"""LLM families: the differences between causal language models.

The models are those of transformers.

To add one, write a file with an `LLMFamily` and a line here. Families do not depend on images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from medm.config import Options
from medm.registry import Registry

if TYPE_CHECKING:
    from medm.llms.base import LLMFamily


class LLMOptions(Options):
    """The LLM block of a recipe."""

    name: str
    """Registered family, or `auto` for any other causal LM of transformers."""
    path: str | None = None
    """Hugging Face id or folder with weights, config and tokenizer. Without it the weights are
    random."""
    architecture: dict[str, Any] = {}
    """Config values that replace the published ones, or all of them (with `model_type`) when there
    is no `path`."""
    tokenizer: str | None = None
    """Tokenizer folder or id. Default: `path`."""
    chat_template: str | None = None
    """A Jinja file, or one of medm's templates by name (`chatml`, `internvl-2.5`, `phi-3`,
    `vicuna`, `plain` ...). Default: the model's own template; with `init_from` the saved one."""
    attention: Literal[
        "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "sdpa"
    """Attention implementation in training, by its transformers name. One that this machine cannot
    run is refused."""


LLMS: Registry[LLMFamily] = Registry("LLM", group="medm.llms", options=LLMOptions)

LLMS.add("auto", "medm.llms.base:AUTO", "any causal LM of transformers that brings a chat template")
LLMS.add(
    "llama-2",
    "medm.llms.llama:LLAMA_2",
    "Llama 2 Chat (7B, 13B); [INST] layout, also where the tokenizer brings no template",
)
LLMS.add("llama-3.2", "medm.llms.llama:LLAMA_3", "Llama 3, 3.1 and 3.2 Instruct (1B, 3B, 8B)")
LLMS.add(
    "phi",
    "medm.llms.phi:PHI_2",
    "Phi-2 (2.7B); a base model without a chat template, medm brings one",
)
LLMS.add("phi3", "medm.llms.phi:PHI_3", "Phi-3 and Phi-3.5 mini Instruct (3.8B)")
LLMS.add("qwen2.5", "medm.llms.qwen:QWEN_2_5", "Qwen2.5 Instruct (0.5B, 1.5B, 3B, 7B)")
LLMS.add(
    "qwen3", "medm.llms.qwen:QWEN_3", "Qwen3 (0.6B, 1.7B, 4B), answering without a thinking block"
)
LLMS.add("smollm2", "medm.llms.smollm:SMOLLM2", "SmolLM2 Instruct (135M, 360M, 1.7B)")
