"""The smallest things that are still real: tokenizers, language models and vision towers built in a
second.

The tokenizers are byte-level BPE without merges (any text, exact round trip) or SentencePiece-like,
with the control tokens and template shapes of the published families.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' "
    "}}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif "
    "-%}"
)
# What Qwen3's own template writes where there are no tools: a reply after the last question opens
# with its reasoning, be it empty; of earlier replies the reasoning is cut off; without thinking a
# prompt opens the reply the same way.
QWEN3 = (
    "{%- set ns = namespace(searching=true, question=messages|length - 1) -%}{%- for m in "
    "messages[::-1] -%}{%- if ns.searching and m.role == 'user' -%}{%- set ns.searching = false "
    "-%}{%- set ns.question = messages|length - 1 - loop.index0 -%}{%- endif -%}{%- endfor "
    "-%}{%- for m in messages -%}{%- set content = m.content -%}{%- set reasoning = '' -%}{%- if "
    "m.role == 'assistant' and '</think>' in content -%}{%- set reasoning = "
    "content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}{%- set "
    "content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}{{ '<|im_start|>' + "
    "m.role + '\\n' }}{%- if m.role == 'assistant' and loop.index0 > ns.question and (loop.last "
    "or reasoning) -%}{{ '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + "
    "content.lstrip('\\n') }}{%- else -%}{{ content }}{%- endif -%}{{ '<|im_end|>\\n' }}{%- "
    "endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- if "
    "enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' "
    "}}{%- endif -%}{%- endif -%}"
)
LLAMA3 = (
    "{{ bos_token }}{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content "
    "| trim -%}{%- set messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- endif "
    "-%}{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + "
    "'\\n\\n' + system + '<|eot_id|>' }}{%- for m in messages -%}{{ '<|start_header_id|>' + "
    "m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{%- endfor -%}{%- if "
    "add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- "
    "endif -%}"
)
PHI3 = (
    "{%- for m in messages -%}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor "
    "-%}{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2.5": {"model_type": "qwen2", "template": CHATML, "control": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
                "eos": "<|im_end|>", "pad": "<|endoftext|>", "tied": True},
    "qwen3": {"model_type": "qwen3", "template": QWEN3, "control": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
              "eos": "<|im_end|>", "pad": "<|endoftext|>", "tied": False, "words": ["<think>", "</think>"]},
    "llama-2": {"model_type": "llama", "template": None, "bos": "<s>", "eos": "</s>", "control": ["<s>", "</s>"], "tied": False},
    "llama-3.2": {"model_type": "llama", "template": LLAMA3, "bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "tied": True,
                  "control": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]},
    "smollm2": {"model_type": "llama", "template": CHATML, "control": ["<|im_start|>", "<|im_end|>"],
                "eos": "<|im_end|>", "pad": "<|im_end|>", "tied": True},
    "phi3": {"model_type": "phi3", "template": PHI3, "eos": "<|endoftext|>", "pad": "<|endoftext|>", "tied": False,
             "control": ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "strip_right": True},
    "phi": {"model_type": "phi", "template": None, "control": ["<|endoftext|>"], "eos": "<|endoftext|>", "tied": False},
}  # fmt: skip
"""Per family: config type, template shape, control tokens, and the traits that need care."""


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 bytes plus the family's control tokens."""
    traits = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    strip = traits.get("strip_right", False)
    backend.add_special_tokens(
        [AddedToken(token, rstrip=strip, special=True) for token in traits["control"]]
    )
    # Tokens of their own that are no control tokens: Qwen3 lists them with special = false.
    backend.add_tokens(
        [AddedToken(word, normalized=False, special=False) for word in traits.get("words", ())]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=traits["eos"],
        bos_token=traits.get("bos"),
        pad_token=traits.get("pad"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = traits["template"]
    return tokenizer


def llm_architecture(family: str, **changes: Any) -> dict[str, Any]:
    """Config fields of a two-layer language model of the family."""
    sizes: dict[str, Any] = {
        "model_type": FAMILIES[family]["model_type"], "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": FAMILIES[family]["tied"], "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if family == "qwen3":
        sizes["head_dim"] = 8
    return sizes | changes


def save_llm(family: str, folder: Path, **changes: Any) -> Path:
    """A random language model and its tokenizer, saved in the published layout."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(family)
    changes.setdefault("eos_token_id", tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**llm_architecture(family, **changes))
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


VIT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
"""A three-block ViT on 16 x 16 pixels: a grid of 4 x 4."""


def lvlm_section(
    llm: Path, *, family: str = "qwen2.5", encoder: str = "siglip", **encoder_options: Any
) -> dict[str, Any]:
    """The `model` section of a recipe with one image branch."""
    return {
        "llm": {"name": family, "path": str(llm)},
        "branches": {
            "image": {
                "encoder": {"name": encoder, "architecture": dict(VIT), **encoder_options},
                "connector": {"name": "mlp", "depth": 2},
            }
        },
    }
