"""Attention within each sample of a row of packed samples.

No mask over the whole row is made or read.

Registered with transformers under `PER_DOCUMENT`, so that any language model can be switched to it.
A call that does not say where samples begin (padded batches, steps of decoding) goes to
transformers' own "sdpa".
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import import_utils

from medm.errors import RecipeError

if TYPE_CHECKING:
    from medm.llms.lm_head import CausalLM

PER_DOCUMENT = "per-document"
_FLASH = {
    "flash_attention_2": ("flash-attn", "is_flash_attn_2_available"),
    "flash_attention_3": ("flash-attn-3", "is_flash_attn_3_available"),
}
"""Required package of each implementation, and transformers' test of package and device."""
_KERNEL_TYPES = (torch.float16, torch.bfloat16)


def attend_per_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_k: int | None = None,
    kv_lengths: list[tuple[int, int]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sample of one row.

    There may be more keys than queries; the last query sees all keys of its sample.

    Args:
        module: the attention layer, which holds the number of query heads per key head.
        query: (1, H, T, D).
        key: (1, K, S, D), K dividing H; S is T where no sample has keys of its own.
        value: (1, K, S, D).
        attention_mask: read only where `cu_seq_lens_q` is absent.
        dropout: of the attention weights.
        scaling: of the scores; 1 / sqrt(D) without it.
        cu_seq_lens_q: (samples + 1,) int32: where each sample begins, and the end of the row.
        max_length_q: tokens of the longest sample.
        cu_seq_lens_k: the same for the keys.
        max_length_k: keys of the sample that has most.
        kv_lengths: in a decode step, for each group of consecutive rows the number of rows and the
            most keys of one of them; keys beyond are not read.
        kwargs: for "sdpa", if a call goes there.

    Returns:
        (1, T, H, D), and no weights.
    """
    if kv_lengths is not None:
        assert attention_mask is not None
        rows = [count for count, _ in kv_lengths]
        parts = [
            sdpa_attention_forward(
                module,
                q,
                k[:, :, :kv_length],
                v[:, :, :kv_length],
                mask[..., :kv_length],
                scaling=scaling,
            )[0]
            for (_, kv_length), q, k, v, mask in zip(
                kv_lengths,
                *(tensor.split(rows) for tensor in (query, key, value, attention_mask)),
                strict=True,
            )
        ]
        return torch.cat(parts), None
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    dtype = _computed_in(query)
    if _on_gpu(query) and dropout == 0.0 and dtype in _KERNEL_TYPES and _varlen_options():
        q, k, v = (
            tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value)
        )  # (T, H or K, D)
        ends = (cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
        longest = (int(max_length_q or 0), int(max_length_k or max_length_q or 0))
        return _varlen(q, k, v, ends, longest, scaling)[None], None
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    queries = cu_seq_lens_q.diff().tolist()
    keys = queries if cu_seq_lens_k is None else cu_seq_lens_k.diff().tolist()
    # Split, not sliced: the gradients of slices are added up over the whole row, one sample after
    # another.
    samples = zip(
        query.split(queries, dim=2), key.split(keys, dim=2), value.split(keys, dim=2), strict=True
    )
    attended = [_causal(q, k, v, dropout, scaling) for q, k, v in samples]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """Causal attention of one sample; the last query sees every key."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling
        )
    mask = causal_lower_right(queries, keys)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )


def enable_padding_free(model: CausalLM) -> bool:
    """Prepare a language model for padding-free packing.

    It is switched to `PER_DOCUMENT` where that helps.

    Args:
        model: a causal language model of transformers.

    Returns:
        True: a batch may be one row with the beginning of each sample. False: rows have to be
            short, since their
        attention runs over the whole of a row (a window, soft caps, "eager" and "flex_attention").
    """
    attention = str(model.config.get_text_config()._attn_implementation)
    if attention.startswith("flash"):
        return True
    if attention not in ("sdpa", PER_DOCUMENT) or not attends_to_all(model):
        return False
    model.set_attn_implementation(PER_DOCUMENT)
    return True


def check_usable(attention: str) -> None:
    """Refuse an attention implementation that this machine cannot train with.

    The kernels that transformers would fetch from the hub in the place of a missing package do not
    count.

    Raises:
        RecipeError: its package or its device is missing.
    """
    missing = None
    if attention in _FLASH:
        package, available = _FLASH[attention]
        if not getattr(import_utils, available)():
            missing = f"a GPU and the package {package}"
    elif attention == "flex_attention":
        if not import_utils.is_torch_flex_attn_available():
            missing = "a later PyTorch"
        elif not torch.accelerator.is_available():
            missing = "a GPU (PyTorch has no gradients of it on a CPU)"
    if missing is not None:
        raise RecipeError(
            f"model.llm.attention: {attention!r} needs {missing}, which this machine does not "
            "have; set model.llm.attention=sdpa"
        )


def attends_to_all(model: CausalLM) -> bool:
    """Return whether each token of a language model attends to all tokens before it.

    Only layers that look up their attention by name are considered.

    Not so: windows, layers of other kinds, soft caps on the scores, code that calls its attention
    itself.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        kinds == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and not getattr(config, "attn_logit_softcapping", None)
        and bool(getattr(model, "_supports_attention_backend", False))
    )


def in_one_kernel(model: CausalLM, *, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the samples of a row are attended to in a single kernel call.

    This holds for any lengths, so that the compiler can trace it.
    """
    dropout = getattr(model.config.get_text_config(), "attention_dropout", 0.0)
    return (
        device.type == "cuda" and dtype in _KERNEL_TYPES and not dropout and bool(_varlen_options())
    )


def no_mask(model: CausalLM, row: Tensor) -> Tensor | None:
    """Return the attention mask to pass with a row that holds the starts of its samples.

    Four dimensions keep transformers from making a mask of T x T, which is never read.
    """
    return row.new_zeros(1, 1, 1, 1) if model.config._attn_implementation == PER_DOCUMENT else None


def _computed_in(query: Tensor) -> torch.dtype:
    """Return the precision of the attention.

    Rotary embeddings in float32 promote the activations of a lower-precision layer to float32.
    """
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _on_gpu(query: Tensor) -> bool:
    return query.is_cuda


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scaling: float | None,
) -> Tensor:
    """Variable-length attention: (T, H, D), (S, K, D), (S, K, D) to (T, H, D).

    Starts and lengths of the samples are given for queries and for keys.
    """
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _varlen_options():
            options["enable_gqa"] = True
        else:
            key, value = (
                t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value)
            )
    return cast(Tensor, varlen_attn(query, key, value, *starts, *longest, scale=scaling, **options))


@cache
def _varlen_options() -> frozenset[str]:
    """Return the options of torch's kernel for packed samples; empty without such a kernel.

    Causal attention is requested through `window_size`: torch 2.11 and later.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    names = frozenset(inspect.signature(varlen_attn).parameters)
    return names if {"window_size", "scale"} <= names else frozenset()


ALL_ATTENTION_FUNCTIONS.register(PER_DOCUMENT, attend_per_document)
ALL_MASK_ATTENTION_FUNCTIONS.register(PER_DOCUMENT, sdpa_mask)
