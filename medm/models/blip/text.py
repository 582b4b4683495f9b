"""Text encoder of BLIP: BERT's layers with cross-attention, and a decoder on the same layers.

The encoder and the decoder differ in self-attention alone (arXiv 2201.12086): bidirectional in the
one, causal with weights of its own in the other. Names of tensors are those of BERT.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertIntermediate,
    BertOutput,
    BertPredictionHeadTransform,
    BertSelfOutput,
)


class KeyValues(NamedTuple):
    """Keys and values of a layer's self-attention, kept while a text is generated."""

    keys: Tensor
    """(B, heads, T, width of a head)."""
    values: Tensor
    """(B, heads, T, width of a head)."""


class Projections(nn.Module):
    """Queries, keys and values of an attention.

    Args:
        config: of BERT.
        memory_dim: width of what is attended to.
    """

    def __init__(self, config: BertConfig, memory_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(memory_dim, config.hidden_size)
        self.value = nn.Linear(memory_dim, config.hidden_size)


class Attention(nn.Module):
    """Attention with residual and norm behind it, under BERT's names.

    Args:
        config: of BERT.
        memory_dim: width of what is attended to; default that of the states themselves.
    """

    def __init__(self, config: BertConfig, memory_dim: int | None = None) -> None:
        super().__init__()
        self.heads = int(config.num_attention_heads)
        self.dropout = float(config.attention_probs_dropout_prob)
        self.self = Projections(config, memory_dim or config.hidden_size)
        self.output = BertSelfOutput(config)

    def project(self, memory: Tensor) -> KeyValues:
        """Return keys and values of (B, T, memory_dim)."""
        return KeyValues(self._split(self.self.key(memory)), self._split(self.self.value(memory)))

    def forward(
        self, states: Tensor, key_values: KeyValues, mask: Tensor | None, causal: bool = False
    ) -> Tensor:
        """Return states (B, T, D).

        Args:
            states: (B, T, D).
            key_values: of what is attended to.
            mask: bool, broadcast to (B, heads, T, T of the memory), False where nothing is seen;
                None sees everything.
            causal: a position sees none behind it; needs no mask.
        """
        mixed = F.scaled_dot_product_attention(
            self._split(self.self.query(states)),
            key_values.keys,
            key_values.values,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        return self.output(mixed.transpose(1, 2).flatten(2), states)

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(2, (self.heads, -1)).transpose(1, 2)


class TextLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention where there is an image, feed-forward network.

    Args:
        config: of BERT.
        image_dim: width of image tokens; None for a layer without cross-attention.
    """

    def __init__(self, config: BertConfig, image_dim: int | None) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.crossattention = None if image_dim is None else Attention(config, image_dim)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        states: Tensor,
        mask: Tensor,
        image: Tensor | None = None,
        image_mask: Tensor | None = None,
        causal: Attention | None = None,
    ) -> Tensor:
        """Return states (B, T, D).

        Args:
            states: (B, T, D).
            mask: (B, 1, 1, T) bool, of the text.
            image: (B, N, image_dim); None for a text alone.
            image_mask: (B, 1, 1, N) bool; None where every token is seen.
            causal: the decoder's self-attention, in place of the layer's own. Padding lies behind
                every token that is learned, so it needs no mask.
        """
        if causal is None:
            states = self.attention(states, self.attention.project(states), mask)
        else:
            states = causal(states, causal.project(states), None, causal=True)
        if image is not None:
            across = self.across()
            states = across(states, across.project(image), image_mask)
        return self.feed_forward(states)

    def across(self) -> Attention:
        """Return the cross-attention. Raises `ValueError` for a layer of texts alone."""
        if self.crossattention is None:
            raise ValueError("this text encoder reads texts alone; it was built without image_dim")
        return self.crossattention

    def feed_forward(self, states: Tensor) -> Tensor:
        """Return (B, T, D)."""
        return self.output(self.intermediate(states), states)


class StudyTextEncoder(nn.Module):
    """BERT whose layers may attend to an image.

    Args:
        config: of BERT.
        image_dim: width of image tokens; None for texts alone, as a momentum copy has it.
    """

    def __init__(self, config: BertConfig, image_dim: int | None) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(
            TextLayer(config, image_dim) for _ in range(config.num_hidden_layers)
        )
        _initialise(self, config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the states of every token, (B, T, D).

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 0 at padding.
            image: (B, N, image_dim); None for texts alone.
            image_mask: (B, N) bool, False at padding.
        """
        states = self.embed(input_ids)
        mask, seen = _mask(attention_mask), None if image_mask is None else _mask(image_mask)
        for layer in self.blocks():
            states = layer(states, mask, image, seen)
        return states

    def embed(self, input_ids: Tensor, position: int = 0) -> Tensor:
        """Return (B, T, D) of tokens, the first of which has this position."""
        places = torch.arange(position, position + input_ids.shape[1], device=input_ids.device)
        # Given in full: BERT's own are buffers that no checkpoint holds.
        states: Tensor = self.embeddings(
            input_ids,
            token_type_ids=torch.zeros_like(input_ids),
            position_ids=places.unsqueeze(0).expand_as(input_ids),
        )
        return states

    def blocks(self) -> list[TextLayer]:
        """Return the layers."""
        return cast(list[TextLayer], list(self.layers))


class Decoder(nn.Module):
    """Causal self-attention of its own and an LM head; all other weights are the encoder's.

    Args:
        config: of BERT.
        own_words: the matrix of the LM head is one of its own, as in BLIP's pretraining, and not
            that of the word embeddings.
    """

    def __init__(self, config: BertConfig, *, own_words: bool = False) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention(config) for _ in range(config.num_hidden_layers))
        self.transform = BertPredictionHeadTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.words: nn.Parameter | None = None
        if own_words:
            shape = (config.vocab_size, config.hidden_size)
            self.words = nn.Parameter(torch.randn(shape) * config.initializer_range)
        _initialise(self, config)

    def forward(
        self,
        encoder: StudyTextEncoder,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: Tensor,
        image_mask: Tensor | None,
    ) -> Tensor:
        """Return the states of every token, (B, T, D); arguments as those of the encoder."""
        states = encoder.embed(input_ids)
        mask, seen = _mask(attention_mask), None if image_mask is None else _mask(image_mask)
        for layer, attention in zip(encoder.blocks(), self.attentions(), strict=True):
            states = layer(states, mask, image, seen, attention)
        return states

    def attentions(self) -> list[Attention]:
        """Return the self-attention of each layer."""
        return cast(list[Attention], list(self.attention))

    def logits(self, encoder: StudyTextEncoder, states: Tensor) -> Tensor:
        """Return (..., vocabulary): the last layer is the word embeddings, or an own matrix."""
        words = encoder.embeddings.word_embeddings.weight if self.words is None else self.words
        return F.linear(self.transform(states), words, self.bias)

    def image_memory(self, encoder: StudyTextEncoder, image: Tensor) -> list[KeyValues]:
        """Return keys and values of image tokens (B, N, image_dim) by layer."""
        return [layer.across().project(image) for layer in encoder.blocks()]

    def step(
        self,
        encoder: StudyTextEncoder,
        input_ids: Tensor,
        position: int,
        past: list[KeyValues],
        image: list[KeyValues],
        image_mask: Tensor | None,
    ) -> tuple[Tensor, list[KeyValues]]:
        """Return the logits (B, vocabulary) behind some tokens, and the grown memory of the text.

        Args:
            encoder: whose weights the decoder shares.
            input_ids: (B, T), the tokens that `past` does not hold.
            position: of the first of them.
            past: by layer; empty at the beginning.
            image: `image_memory`.
            image_mask: (B, N) bool.
        """
        places = torch.arange(position, position + input_ids.shape[1], device=input_ids.device)
        states = encoder.embed(input_ids, position)
        seen = None if image_mask is None else _mask(image_mask)
        # A token sees itself and all before it.
        every = torch.arange(position + input_ids.shape[1], device=input_ids.device)
        mask = (every <= places.unsqueeze(1))[None, None]  # (1, 1, T, position + T)
        grown: list[KeyValues] = []
        for number, (layer, attention) in enumerate(
            zip(encoder.blocks(), self.attentions(), strict=True)
        ):
            memory = attention.project(states)
            if past:
                memory = KeyValues(
                    *(
                        torch.cat([before, now], dim=2)
                        for before, now in zip(past[number], memory, strict=True)
                    )
                )
            grown.append(memory)
            states = attention(states, memory, mask)
            states = layer.across()(states, image[number], seen)
            states = layer.feed_forward(states)
        return self.logits(encoder, states[:, -1]), grown


def _mask(mask: Tensor) -> Tensor:
    """(B, T) to a bool mask of attention, (B, 1, 1, T)."""
    return mask.bool()[:, None, None]


def _initialise(module: nn.Module, config: BertConfig) -> None:
    """Draw new weights as BERT does."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=config.initializer_range)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
