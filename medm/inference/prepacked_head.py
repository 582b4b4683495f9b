"""The language model's head on a CPU, its weight laid out once for oneDNN's kernels.

A few rows times a vocabulary is most of decoding a small model, and the plain product of such a shape is several times
slower than the machine. It is what torch's compiler does with frozen weights; no compiler is needed for it here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PrepackedLMHead:
    """A context in which the head runs on its packed weight where that can be: a plain float32 layer on a CPU.

    The weight is packed at the first use and kept, since a small batch would not pay for it every time.

    Args:
        language_model: a causal language model of transformers, whose weights do not change any more. The packed
            weight takes as much memory again as the head.
    """

    def __init__(self, language_model: Any) -> None:
        self._head = language_model.get_output_embeddings()
        self._packed: Tensor | None = None

    def __enter__(self) -> bool:
        """Whether it is packed."""
        if not _can_pack(self._head):
            return False
        if self._packed is None:
            with torch.no_grad():
                self._packed = torch.ops.mkldnn._reorder_linear_weight(self._head.weight.detach(), None)
        self._head.forward = self._forward
        return True

    def __exit__(self, *_error: object) -> None:
        vars(self._head).pop("forward", None)

    @torch.compiler.disable  # inductor has no layout for the packed weight
    def _forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._head.bias, "none", [], "")
        return logits.reshape(*hidden.shape[:-1], -1)


def _can_pack(head: Any) -> bool:
    return (
        type(head) is nn.Linear  # an adapted head computes more
        and head.weight.device.type == "cpu"
        and head.weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
