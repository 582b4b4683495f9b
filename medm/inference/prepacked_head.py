"""The LM head on a CPU, with its weight prepacked once for oneDNN's kernels.

The product of a few rows and a whole vocabulary is most of the work of decoding a small model, and
the plain layer computes it several times slower than the machine can. torch's compiler prepacks
frozen weights too; no compiler is needed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from medm.llms.lm_head import CausalLM


class PrepackedLMHead:
    """A context in which the weight of the LM head is prepacked; its exit restores the head.

    Only a plain float32 layer on a CPU is replaced. Its weight is prepacked at the first use and
    kept, since a small batch would not pay for it every time. The context may be entered again
    inside itself, by one thread: replacing the head takes as long as a small layer, so a loop of
    decode steps enters it once.

    Args:
        language_model: a causal language model of transformers, whose weights do not change any
            more. The prepacked weight takes as much memory again as the head.
    """

    def __init__(self, language_model: CausalLM) -> None:
        self._language_model = language_model
        self._own: nn.Module | None = None
        self._prepacked: _PrepackedLinear | None = None
        self._depth = 0

    def __enter__(self) -> bool:
        """Return True if the head is prepacked."""
        if self._depth == 0:
            self._replace()
        self._depth += 1
        return self._own is not None

    def __exit__(self, *_error: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._own is not None:
            self._language_model.set_output_embeddings(self._own)
            self._own = None

    def _replace(self) -> None:
        head = self._language_model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or not _can_prepack(head):
            return
        if self._prepacked is None or self._prepacked.packed_from is not head.weight:
            self._prepacked = _PrepackedLinear(head)
        self._own = head
        self._language_model.set_output_embeddings(self._prepacked)


class _PrepackedLinear(nn.Module):
    """A linear layer (R, D) to (R, V) on the prepacked weight of another one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # In tuples: neither is a parameter or a buffer of this module.
        self._source = (linear.weight, linear.bias)
        with torch.no_grad():
            self._packed = (torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None),)

    @property
    def packed_from(self) -> Tensor:
        """The weight that was prepacked."""
        return self._source[0]

    @torch.compiler.disable  # inductor has no layout for the prepacked weight
    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D)."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._packed[0], self._source[1], "none", [], ""
        )
        return logits.reshape(*hidden.shape[:-1], -1)


def _can_prepack(head: nn.Linear) -> bool:
    return (
        type(head) is nn.Linear  # an adapted head computes more
        and head.weight.device.type == "cpu"
        and head.weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
