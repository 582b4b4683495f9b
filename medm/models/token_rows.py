"""Rows of new tokens: their first values, and training them without the rest of the vocabulary.

A token that is added to a tokenizer (`[SEG]`) has a row in the token embeddings and one in the LM
head. `hold_apart` gives these rows parameters of their own beside the two matrices, so that
gradients, optimizer state and communication are of a few rows instead of a vocabulary; `merge_rows`
writes them back. The model computes the same either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from medm.errors import RecipeError

Vocabulary: TypeAlias = nn.Embedding | nn.Linear

NAME = "new_rows"
"""Name of the module inside the token embeddings, and inside the head where that is not tied."""


class HeldRows(TypedDict):
    """Rows of a part that are held apart, as its config says."""

    ids: list[int]
    """Tokens of the rows."""
    tied: bool
    """The LM head uses the matrix of the token embeddings."""


class TokenRows(nn.Module):
    """Rows of a vocabulary matrix with a parameter of their own.

    A module, so that ZeRO-3 gathers the parameter where it is used; tied layers call the same one.

    Args:
        weight: (V, D), the matrix; its rows are the first values.
        ids: tokens of the K rows, in increasing order.
    """

    def __init__(self, weight: Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        self.ids = tuple(ids)
        self.weight = nn.Parameter(weight.detach()[list(ids)].clone())  # (K, D)
        self._hooks: list[RemovableHandle] = []

    def forward(self, inputs: Tensor) -> Tensor:
        """Return token rows or logits.

        Rows (..., D) of positions in `ids` (...); logits (..., K) of states (..., D).
        """
        if inputs.is_floating_point():
            return F.linear(inputs, self.weight.to(inputs.dtype))
        return F.embedding(inputs, self.weight)

    def attach(self, layer: nn.Module) -> None:
        """Put the rows in the place of those that token embeddings or an LM head have."""
        hook = self._replace_embeddings if isinstance(layer, nn.Embedding) else self._replace_logits
        self._hooks.append(layer.register_forward_hook(hook))

    def detach(self) -> None:
        """Let every layer use its own rows again."""
        while self._hooks:
            self._hooks.pop().remove()

    def _replace_embeddings(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        ids = inputs[0]  # (B, T)
        positions = torch.zeros_like(ids)
        is_new = torch.zeros_like(ids, dtype=torch.bool)
        for position, token in enumerate(self.ids):  # compared with numbers: no GPU is waited for
            found = ids == token
            positions = positions.masked_fill(found, position)
            is_new = is_new | found
        rows = self(positions).to(output.dtype)  # (B, T, D)
        if (scale := getattr(layer, "embed_scale", None)) is not None:  # Gemma
            rows = rows * scale
        return torch.where(is_new[..., None], rows.to(output.dtype), output)

    def _replace_logits(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        logits = self(inputs[0]).to(output.dtype)  # (..., K)
        bias = getattr(layer, "bias", None)
        for first, position, count in _runs(self.ids):
            own = logits[..., position : position + count]
            columns = slice(first, first + count)
            # In place: a copy of (..., V) would be the largest tensor of the step.
            output[..., columns] = own if bias is None else own + bias[columns].to(output.dtype)
        return output


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first id, its position, length) of each run of consecutive ids."""
    start = 0
    for position in range(1, len(ids) + 1):
        if position == len(ids) or ids[position] != ids[position - 1] + 1:
            yield ids[start], start, position - start
            start = position


def vocabulary(part: nn.Module) -> list[Vocabulary]:
    """Return the token embeddings and the LM head of a part.

    Raises:
        RecipeError: the part is no language model.
    """
    layers: list[nn.Module | None] = []
    if isinstance(part, PreTrainedModel):
        layers = [part.get_input_embeddings(), part.get_output_embeddings()]
    if not layers or not hasattr(layers[0], "weight"):
        raise RecipeError(
            f"new_tokens: {type(part).__name__} has no token embeddings whose rows could be trained"
        )
    return [cast(Vocabulary, layer) for layer in layers if layer is not None]


def is_tied(part: nn.Module) -> bool:
    """Return whether the LM head of a part uses the matrix of its token embeddings."""
    first, *others = vocabulary(part)
    return any(other.weight is first.weight for other in others)


def token_rows(part: nn.Module) -> list[TokenRows]:
    """Return the rows of a part that are held apart."""
    return [module for module in part.modules() if isinstance(module, TokenRows)]


def hold_apart(part: nn.Module, ids: Sequence[int], *, tied: bool) -> None:
    """Give the rows of some tokens parameters of their own, in place.

    Args:
        part: a language model.
        ids: the tokens.
        tied: the head uses the matrix of the embeddings. A model that is built before its weights
            are loaded cannot tell.

    Raises:
        RecipeError: the part is no language model, or its embeddings or head hold a LoRA adapter.
    """
    embeddings, *heads = vocabulary(part)
    for layer in (embeddings, *heads):
        if type(layer).__module__.startswith("peft."):
            raise RecipeError(
                "new_tokens and a LoRA adapter in the same layer exclude each other: leave the "
                "token embeddings and the LM head out of targets"
            )
    ids = sorted(ids)
    rows = TokenRows(embeddings.weight, ids)
    embeddings.add_module(NAME, rows)
    rows.attach(embeddings)
    for head in heads:
        if not tied:
            rows = TokenRows(head.weight, ids)
            head.add_module(NAME, rows)
        rows.attach(head)


@torch.no_grad()
def merge_rows(part: nn.Module) -> None:
    """Write rows that are held apart back into the matrices, in place."""
    for layer in vocabulary(part):
        if isinstance(rows := getattr(layer, NAME, None), TokenRows):
            layer.weight[list(rows.ids)] = rows.weight.to(layer.weight)
            rows.detach()
            delattr(layer, NAME)


@torch.no_grad()
def start_rows(part: nn.Module, ids: Sequence[int]) -> None:
    """Set the rows of tokens that were just added to the mean of those before them, in place.

    A mean row is as probable as an average token. A random row can have the largest logit of all,
    and an unused row of a published model was never trained.
    """
    if not ids:
        return
    first, *others = vocabulary(part)
    layers = [first, *(other for other in others if other.weight is not first.weight)]
    for layer in layers:
        layer.weight[list(ids)] = layer.weight[: min(ids)].float().mean(dim=0).to(layer.weight)
    for layer in others:
        if (bias := getattr(layer, "bias", None)) is not None:
            bias[list(ids)] = bias[: min(ids)].float().mean().to(bias)
