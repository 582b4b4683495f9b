"""The language model's head on a CPU, its weight laid out once for oneDNN's kernels.

A few rows times a vocabulary is most of decoding a small model, and the plain product of such a shape is several times
slower than the machine. It is what torch's compiler does with frozen weights; no compiler is needed for it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def packed_head(language_model: Any) -> Iterator[bool]:
    """Within it the head runs on the packed weight where that can be: a plain float32 layer on a CPU.

    Args:
        language_model: a causal language model of transformers, whose weights do not change meanwhile. The packed
            weight takes as much memory again as the head.

    Yields:
        Whether it is so.
    """
    head = language_model.get_output_embeddings()
    if not _can_pack(head):
        yield False
        return
    bias = head.bias
    with torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(head.weight.detach(), None)

    def forward(hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
        return logits.reshape(*hidden.shape[:-1], -1)

    head.forward = forward
    try:
        yield True
    finally:
        del head.forward


def _can_pack(head: Any) -> bool:
    return (
        type(head) is nn.Linear  # an adapted head computes more
        and head.weight.device.type == "cpu"
        and head.weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
