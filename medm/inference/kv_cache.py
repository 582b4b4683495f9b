"""KV cache of continuous batching: prefilled texts, and the slots of requests being decoded.

Knows keys, values and lengths; no prompts and no settings of requests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

BLOCK = 128
"""Tokens by which the KV cache grows."""

ROWS_PER_GROUP = 8
"""Rows of one attention call on a CPU, which reads the keys of the longest of them; a GPU has one
group."""

LayerKV = tuple[Tensor, Tensor]
"""Keys (1, heads, T, D) and values (1, heads, T, D') of one text in one layer."""

KVCache = list[LayerKV]
"""Keys and values of every layer."""

Step = Callable[[Tensor, Tensor, KVCache, "list[tuple[int, int]] | None"], tuple[Tensor, Tensor]]
"""A decode step: the newest tokens (R,) and the lengths (R,) of R rows, their KV cache and the
`kv_lengths` of `medm.llms.attention.attend_per_document`, to the most probable next tokens (R,) and
the logits (R, V)."""

Choose = Callable[[Tensor, Tensor], Tensor]
"""The next token of each row, (R,), from the most probable ones (R,) and the logits (R, V)."""


class Slots:
    """Slots of continuous batching: the requests being decoded stand in the first of `count` rows.

    Args:
        count: most rows.
        device: of the KV cache.
        static_shapes: every decode step sees the same tensors in full, as CUDA graphs require.
    """

    def __init__(self, count: int, *, device: torch.device, static_shapes: bool) -> None:
        self.count, self.static_shapes = count, static_shapes
        self._lengths: list[int] = []
        self._tokens = torch.zeros(count, dtype=torch.long, device=device)
        self._positions = torch.zeros(count, dtype=torch.long, device=device)
        self._kv_cache: KVCache = []
        """(allocated rows, heads, capacity, D): the keys and values of a row stand at the front."""

    def __len__(self) -> int:
        return len(self._lengths)

    def admit(self, kv_cache: KVCache, first: Tensor, *, expected: int = 1) -> None:
        """Admit a prefilled request to the row behind the last one.

        Args:
            kv_cache: of its prompt.
            first: first token of its reply, (1,).
            expected: rows that will be admitted soon, this one included; memory is allocated for
                them at once.
        """
        place, length = len(self), kv_cache[0][0].shape[2]
        self._reserve(kv_cache, rows=place + 1, expected=place + expected, tokens=length + 1)
        for buffers, states in zip(self._kv_cache, kv_cache, strict=True):
            buffers[0][place, :, :length], buffers[1][place, :, :length] = (
                states[0][0],
                states[1][0],
            )
        self._tokens[place : place + 1] = first
        self._positions[place] = length
        self._lengths.append(length)

    def last_tokens(self) -> list[int]:
        """Return the newest token of each row."""
        tokens: list[int] = self._tokens[: len(self)].tolist()
        return tokens

    def evict(self, place: int) -> None:
        """Evict the request of a row; the last one moves into it."""
        last = len(self) - 1
        if place != last:
            length = self._lengths[last]
            for buffers in self._kv_cache:
                for side in buffers:
                    side[place, :, :length] = side[last, :, :length]
            self._tokens[place], self._positions[place] = self._tokens[last], self._positions[last]
            self._lengths[place] = length
        self._lengths.pop()

    def advance(self, step: Step, choose: Choose | None) -> None:
        """Run one decode step: one more token for each row, without `choose` the most probable."""
        count, kv_length = len(self), max(self._lengths) + 1
        self._reserve(self._kv_cache, rows=count, expected=count, tokens=kv_length)
        if self.static_shapes:
            self._positions[count:] = 0
            tokens, logits = step(self._tokens, self._positions, self._kv_cache, None)
        else:
            kv_cache = [
                (keys[:count, :, :kv_length], values[:count, :, :kv_length])
                for keys, values in self._kv_cache
            ]
            kv_lengths = None
            if count > ROWS_PER_GROUP and not self._tokens.is_cuda:
                groups = [
                    self._lengths[start : start + ROWS_PER_GROUP]
                    for start in range(0, count, ROWS_PER_GROUP)
                ]
                kv_lengths = [(len(group), max(group) + 1) for group in groups]
            tokens, logits = step(
                self._tokens[:count], self._positions[:count], kv_cache, kv_lengths
            )
        if choose is not None:
            tokens = choose(tokens[:count], logits[:count])
        self._tokens[:count] = tokens[:count]
        self._positions += 1
        self._lengths = [length + 1 for length in self._lengths]

    def _reserve(self, like: KVCache, *, rows: int, expected: int, tokens: int) -> None:
        """Allocate more memory if the KV cache has fewer rows or tokens than these."""
        allocated, capacity = (
            (self._kv_cache[0][0].shape[0], self._kv_cache[0][0].shape[2])
            if self._kv_cache
            else (0, 0)
        )
        if allocated >= rows and capacity >= tokens:
            return
        if capacity < tokens:
            blocks = (tokens - 1) // BLOCK
            # A compiled step is recorded anew for each size, so the capacity doubles.
            capacity = BLOCK << blocks.bit_length() if self.static_shapes else (blocks + 1) * BLOCK
        if allocated < rows:
            allocated = (
                self.count if self.static_shapes else min(self.count, max(expected, 2 * allocated))
            )
        used = len(self)
        grown: KVCache = []
        for layer, sides in enumerate(like):
            pair = []
            for side, states in enumerate(sides):
                buffer = states.new_zeros(allocated, states.shape[1], capacity, states.shape[3])
                if self._kv_cache and used:
                    previous = self._kv_cache[layer][side]
                    buffer[:used, :, : previous.shape[2]] = previous[:used]
                if self.static_shapes:
                    torch._dynamo.mark_static_address(buffer)
                pair.append(buffer)
            grown.append((pair[0], pair[1]))
        self._kv_cache = grown


class PrefillCache(Cache):
    """KV cache of several texts that are prefilled in one row, each behind its prefix, if any."""

    def __init__(self, lengths: list[int], prefixes: list[KVCache] | None) -> None:
        super().__init__(layers=[])
        self._lengths, self._prefixes = lengths, prefixes
        self._sides: list[tuple[list[Tensor], list[Tensor]]] = []
        """Per layer the keys and the values of each text."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        keys, values = (
            list(states.split(self._lengths, dim=2)) for states in (key_states, value_states)
        )
        if self._prefixes is not None:
            keys = [
                torch.cat([prefix[layer_idx][0], own], dim=2)
                for prefix, own in zip(self._prefixes, keys, strict=True)
            ]
            values = [
                torch.cat([prefix[layer_idx][1], own], dim=2)
                for prefix, own in zip(self._prefixes, values, strict=True)
            ]
            key_states, value_states = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        self._sides.append((keys, values))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def of(self, text: int) -> KVCache:
        """Return the KV cache of one text, its prefix included."""
        return [(keys[text], values[text]) for keys, values in self._sides]


class SlotCache(Cache):
    """KV cache (R, heads, capacity, D) to which each row appends one token at its length."""

    def __init__(self, kv_cache: KVCache, lengths: Tensor) -> None:
        super().__init__(layers=[])
        self._kv_cache, self._lengths = kv_cache, lengths
        self._rows = torch.arange(len(lengths), device=lengths.device)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._kv_cache[layer_idx]
        keys[self._rows, :, self._lengths] = key_states[:, :, 0]
        values[self._rows, :, self._lengths] = value_states[:, :, 0]
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
