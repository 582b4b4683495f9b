"""Greedy decoding of many prompts at once. Knows embeddings and a causal language model; no text, no images.

What `generate` on padded batches does not do: a prompt whose reply is finished leaves the batch and the next one
takes its place; what several prompts begin with (an image, a system turn) is computed once; the key-value cache
grows in blocks instead of being copied at every token; and the head's weight is packed on a CPU. The replies are
those of one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from medm.evaluation.packed_head import PackedHead

BLOCK = 128
"""Tokens by which a cache grows."""

MIN_SHARED = 16
"""Tokens that a common beginning must have to be worth a forward pass of its own."""


@dataclass(slots=True)
class Prompt:
    """One prompt, ready to be decoded."""

    embeds: Tensor
    """(T, D) token embeddings, vision tokens in their places."""
    signature: np.ndarray
    """(T,) int64. Two prompts share what they have equal here: token ids, and for a vision token its content."""
    max_new_tokens: int
    """Longest reply in tokens, the end token included."""


class GreedyDecoder:
    """Decodes prompts on one language model.

    Args:
        language_model: a causal LM of transformers whose layers all attend to everything before them.
        stops: ids that end a reply.
        suppress: ids that are never said.
        slots: prompts that are decoded at the same time.
    """

    def __init__(
        self, language_model: Any, *, stops: Collection[int], suppress: Collection[int] = (), slots: int = 16
    ) -> None:
        self.language_model, self.slots = language_model, slots
        self.stops, self.suppress = frozenset(stops), sorted(suppress)
        self._head = PackedHead(language_model)

    @staticmethod
    def supports(language_model: Any) -> bool:
        """Whether the model keeps one key and one value a token and layer, as this decoder's cache does."""
        config = language_model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        return kinds == {"full_attention"} and not getattr(config, "sliding_window", None)

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The reply to each prompt as token ids, up to and with the end token."""
        with self._head:
            return self._decode(prompts)

    def _decode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        replies: list[list[int]] = [[] for _ in prompts]
        waiting = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row].embeds), row))
        active: _Rows | None = None
        while waiting or active is not None:
            free = self.slots - (0 if active is None else len(active.prompts))
            # Newcomers cost a pass of their own, so they come in groups.
            if waiting and free >= max(1, self.slots // 4):
                newcomers, waiting = self._next(prompts, waiting, free)
                for arrived in self._prefill(prompts, newcomers):
                    active = arrived if active is None else _merge(active, arrived)
            assert active is not None
            tokens = active.tokens.tolist()
            for row, token in zip(active.prompts, tokens, strict=True):
                replies[row].append(token)
            going_on = [
                place
                for place, (row, token) in enumerate(zip(active.prompts, tokens, strict=True))
                if token not in self.stops and len(replies[row]) < prompts[row].max_new_tokens
            ]
            if not going_on:
                active = None
                continue
            if len(going_on) < len(active.prompts):
                active.keep(going_on)
            self._step(active)
        return replies

    def _next(self, prompts: Sequence[Prompt], waiting: list[int], free: int) -> tuple[list[int], list[int]]:
        """The next prompts to start; those that begin like the first of them come along before others."""
        first = prompts[waiting[0]].signature
        alike = [row for row in waiting if shared_length(first, prompts[row].signature) >= MIN_SHARED]
        chosen = (alike + [row for row in waiting if row not in set(alike)])[:free]
        taken = set(chosen)
        return chosen, [row for row in waiting if row not in taken]

    def _prefill(self, prompts: Sequence[Prompt], rows: list[int]) -> list[_Rows]:
        """Run prompts up to their first token; groups with a common beginning run it once."""
        started = []
        alone: list[int] = []
        for length, members in shared_beginnings(rows, [prompts[row].signature for row in rows]):
            if length == 0:
                alone += members
                continue
            cache = _cache()
            beginning = prompts[members[0]].embeds[None, :length]
            self.language_model.base_model(inputs_embeds=beginning, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(members))
            mask = beginning.new_ones((len(members), length), dtype=torch.long)
            started.append(self._start(members, [prompts[row].embeds[length:] for row in members], cache, mask))
        if alone:
            empty = torch.zeros(len(alone), 0, dtype=torch.long, device=prompts[alone[0]].embeds.device)
            started.append(self._start(alone, [prompts[row].embeds for row in alone], _cache(), empty))
        return started

    def _start(self, rows: list[int], embeds: list[Tensor], cache: Cache, before: Tensor) -> _Rows:
        """The rest of each prompt, left-padded behind what the cache holds, and the first token of each reply."""
        width = max(len(one) for one in embeds)
        padded = torch.stack([F.pad(one, (0, 0, width - len(one), 0)) for one in embeds])  # (R, W, D)
        lengths = torch.tensor([len(one) for one in embeds], device=padded.device)
        columns = torch.arange(width, device=padded.device)
        mask = torch.cat([before, (columns >= width - lengths[:, None]).long()], dim=1)  # (R, P + W)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = self.language_model(
            inputs_embeds=padded,
            attention_mask=mask,
            position_ids=positions[:, before.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return _Rows(rows, cache, mask, positions[:, -1], self._choose(output.logits))

    def _step(self, active: _Rows) -> None:
        """One more token for every row."""
        active.mask = F.pad(active.mask, (0, 1), value=1)
        active.positions = active.positions + 1
        output = self.language_model(
            inputs_embeds=self.language_model.get_input_embeddings()(active.tokens[:, None]),
            attention_mask=active.mask,
            position_ids=active.positions[:, None],
            past_key_values=active.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        active.tokens = self._choose(output.logits)

    def _choose(self, logits: Tensor) -> Tensor:
        """(R, 1, V) to (R,)."""
        last = logits[:, -1]
        if self.suppress:
            last[:, self.suppress] = -torch.inf
        return last.argmax(dim=-1)


@dataclass(slots=True)
class _Rows:
    """Prompts that are being answered."""

    prompts: list[int]
    cache: Cache
    mask: Tensor
    """(R, L) over everything in the cache."""
    positions: Tensor
    """(R,), of the last token in the cache."""
    tokens: Tensor
    """(R,), chosen and not yet in the cache."""

    def keep(self, places: list[int]) -> None:
        """Let the other rows go, and with them the columns that only they used."""
        index = torch.tensor(places, device=self.mask.device)
        self.prompts = [self.prompts[place] for place in places]
        self.mask, self.positions, self.tokens = self.mask[index], self.positions[index], self.tokens[index]
        unused = int(self.mask.any(dim=0).long().argmax())
        self.mask = self.mask[:, unused:]
        for layer in self.cache.layers:
            assert isinstance(layer, _BlockLayer)
            layer.replace(layer.keys[index, :, unused:], layer.values[index, :, unused:])


def _merge(one: _Rows, other: _Rows) -> _Rows:
    """Both side by side; the shorter cache is padded on the left."""
    width = max(one.mask.shape[1], other.mask.shape[1])
    pads = [width - rows.mask.shape[1] for rows in (one, other)]
    for layer, second in zip(one.cache.layers, other.cache.layers, strict=True):
        assert isinstance(layer, _BlockLayer)
        assert isinstance(second, _BlockLayer)
        keys, values = (
            torch.cat([F.pad(a, (0, 0, pads[0], 0)), F.pad(b, (0, 0, pads[1], 0))])
            for a, b in ((layer.keys, second.keys), (layer.values, second.values))
        )
        layer.replace(keys, values)
    return _Rows(
        one.prompts + other.prompts,
        one.cache,
        torch.cat([F.pad(rows.mask, (pad, 0)) for rows, pad in zip((one, other), pads, strict=True)]),
        torch.cat([one.positions, other.positions]),
        torch.cat([one.tokens, other.tokens]),
    )


def _cache() -> Cache:
    return Cache(layer_class_to_replicate=_BlockLayer)


class _BlockLayer(DynamicLayer):
    """Keys and values (B, heads, L, head_dim) at the front of a larger tensor: one more token is one small write."""

    keys: Any  # optional in transformers' class, which has none before the first token
    values: Any
    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length = self.get_seq_length()
        needed = length + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < needed:
            self._grow(key_states, value_states, length, needed)
        assert self._room is not None
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, length:needed] = states
        self.keys, self.values = (room[:, :, :needed] for room in self._room)
        return self.keys, self.values

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Other keys and values, of any batch and length."""
        self.keys, self.values, self._room = keys, values, None

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.replace(self.keys.repeat_interleave(repeats, dim=0), self.values.repeat_interleave(repeats, dim=0))

    def _grow(self, key_states: Tensor, value_states: Tensor, length: int, needed: int) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        capacity = -(-needed // BLOCK) * BLOCK
        rooms = []
        for states, held in ((key_states, self.keys), (value_states, self.values)):
            batch, heads, _, dim = states.shape
            room = states.new_empty(batch, heads, capacity, dim)
            if length:
                room[:, :, :length] = held
            rooms.append(room)
        self._room = (rooms[0], rooms[1])


def shared_length(one: np.ndarray, other: np.ndarray) -> int:
    """Leading elements that are equal."""
    width = min(len(one), len(other))
    differing = np.flatnonzero(one[:width] != other[:width])
    return int(differing[0]) if len(differing) else width


def shared_beginnings(rows: Sequence[int], signatures: Sequence[np.ndarray]) -> list[tuple[int, list[int]]]:
    """Groups of rows with the length of what all of a group begin with; 0 for rows that share nothing of note.

    The last token of a prompt is never shared: it has to run to say what comes next.
    """
    order = sorted(range(len(rows)), key=lambda place: signatures[place].tolist())
    groups: list[tuple[int, list[int]]] = []
    group: list[int] = []
    length = 0

    def close() -> None:
        groups.append((length if len(group) > 1 else 0, [rows[place] for place in group]))

    for place in order:
        if group:
            common = min(length, shared_length(signatures[group[0]], signatures[place]), len(signatures[place]) - 1)
            # Joining must not cost the group more shared tokens than the newcomer brings.
            if common >= MIN_SHARED and (len(group) + 1) * common >= len(group) * (
                length if len(group) > 1 else common
            ):
                group.append(place)
                length = common
                continue
            close()
        group, length = [place], len(signatures[place]) - 1
    if group:
        close()
    return groups
