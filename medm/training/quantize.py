"""Frozen weights in 4 bits (NF4, arXiv 2305.14314) under trained adapters.

Needs bitsandbytes, an optional package.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medm.errors import DeviceError


def to_4bit(part: nn.Module, *, name: str) -> None:
    """Replace the linear layers of a part except its output head, in place.

    Args:
        part: its weights are replaced by rounded ones.
        name: of the part, for messages.

    Raises:
        DeviceError: bitsandbytes is not installed.
    """
    require_4bit(name=name)
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = part.get_output_embeddings() if isinstance(part, PreTrainedModel) else None
    for layer_name, layer in list(part.named_modules()):
        if type(layer) is not nn.Linear or layer is head:
            continue
        small = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=small)
        small.weight = weight.to(layer.weight.device)  # rounding happens on the way to a device
        small.bias = layer.bias
        parent, _, child = layer_name.rpartition(".")
        setattr(part.get_submodule(parent), child, small)
    part.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft chooses the adapter layer by it


def require_4bit(*, name: str) -> None:
    """Raise `DeviceError` if bitsandbytes, which holds a part in 4 bits, is not installed."""
    if find_spec("bitsandbytes") is None:
        raise DeviceError(
            f"parts.{name}.quantize: 4bit needs bitsandbytes, which is not installed (pip install "
            "'medm[quant]')"
        )


def four_bit_weights(model: nn.Module) -> dict[str, Any]:
    """Return the parameters in 4 bits, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if getattr(parameter, "quant_state", None) is not None
    }


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the same model with plain layers.

    4-bit weights are dequantized.
    """
    small = four_bit_weights(model)
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{weight}.") for weight in small)
    }
    if small:
        from bitsandbytes.functional import dequantize_4bit

        with torch.no_grad():
            tensors |= {
                name: dequantize_4bit(weight.data, weight.quant_state)
                for name, weight in small.items()
            }
    return tensors
