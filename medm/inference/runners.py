"""Prefill and decode steps of a language model.

Knows embeddings and rows; no requests and no settings of theirs.

`BatchedRunner` decodes all rows in one call, on a KV cache in slots. `SeparateRunner` serves the
language models whose cache does not fit slots (sliding-window attention, linear attention): a row
at a time, on a cache of transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from medm.inference.kv_cache import Choose, KVCache, PrefillCache, SlotCache, Slots
from medm.llms.attention import PER_DOCUMENT, attends_to_all, no_mask
from medm.llms.cache import cache_argument

if TYPE_CHECKING:
    from medm.llms.lm_head import CausalLM

MIN_PREFIX = 16
"""Fewest tokens of a shared prefix for which a prefill of its own pays."""

MAX_PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Most tokens that are prefilled in one row, by device; a longer prompt is prefilled alone. More
would not fit the cache of a CPU, fewer would leave a GPU idle."""

COMPILE_MODE: str | None = "reduce-overhead"
"""Mode of `torch.compile`, as transformers compiles decoding: CUDA graphs; without effect on a
CPU."""


@dataclass(slots=True)
class Text:
    """Tokens to prefill."""

    embeds: Tensor
    """(T, D) token embeddings, vision tokens in their places."""
    signature: np.ndarray
    """(T,) int64: token ids, and for a vision token a hash of its content. A shared prefix is equal
    here."""


@dataclass(slots=True)
class Prefilled:
    """A text with its KV cache and its next token."""

    cache: KVCache | Cache
    token: Tensor
    """(1,), the most probable next token."""
    logits: Tensor
    """(1, V), of the next token."""


class Runner(Protocol):
    """Runs a language model on rows, each of which is the request of one place.

    `evict` moves the last row into the place of the one that is evicted.
    """

    shares_prefixes: bool
    """Texts with a shared prefix are cheaper together."""

    def __len__(self) -> int: ...

    def prefill(self, texts: Sequence[Text]) -> Iterator[tuple[int, Prefilled]]:
        """Yield the position in `texts` of each text, in any order, with its state."""
        ...

    def admit(self, prefilled: Prefilled, first: Tensor, *, expected: int) -> None:
        """See `Slots.admit`."""
        ...

    def last_tokens(self) -> list[int]:
        """Return the newest token of each row."""
        ...

    def evict(self, place: int) -> None:
        """Evict one row."""
        ...

    def advance(self, choose: Choose | None) -> None:
        """See `Slots.advance`."""
        ...

    def release(self) -> None:
        """Evict every row and release the memory of the KV cache."""
        ...


class BatchedRunner:
    """Runner of continuous batching: a decode step runs all rows at once.

    It writes one token of each row to the KV cache in place.

    Args:
        language_model: one in which each token attends to all before it; its attention becomes
            `PER_DOCUMENT`.
        suppress: ids that are never generated.
        slots: most rows.
        compiled: compile decode steps, on a GPU to CUDA graphs. All slots then take part in every
            step.
    """

    shares_prefixes = True

    def __init__(
        self, language_model: CausalLM, *, suppress: Collection[int], slots: int, compiled: bool
    ) -> None:
        self.language_model, self.compiled = language_model, compiled
        language_model.set_attn_implementation(PER_DOCUMENT)
        self._count = slots
        self._suppress = torch.tensor(
            sorted(suppress), dtype=torch.long, device=language_model.device
        )
        self._cache_argument = cache_argument(language_model.forward)
        self._run = torch.compile(self._step, mode=COMPILE_MODE) if compiled else self._step
        self._slots = self._new_slots()

    def _new_slots(self) -> Slots:
        return Slots(self._count, device=self.language_model.device, static_shapes=self.compiled)

    def __len__(self) -> int:
        return len(self._slots)

    def prefill(self, texts: Sequence[Text]) -> Iterator[tuple[int, Prefilled]]:
        groups = shared_prefixes(range(len(texts)), [text.signature for text in texts])
        shared = [(length, members) for length, members in groups if length]
        prefixes = [
            kv_cache
            for kv_cache, _, _ in self._prefill_texts(
                [texts[m[0]].embeds[:n] for n, m in shared], None
            )
        ]
        prefix_of = {
            row: prefix
            for prefix, (_, members) in zip(prefixes, shared, strict=True)
            for row in members
        }
        lengths = {row: length for length, members in shared for row in members}
        rows = range(len(texts))
        # Texts with a shared prefix run apart: only they have more keys than queries.
        for part in (
            [row for row in rows if row in prefix_of],
            [row for row in rows if row not in prefix_of],
        ):
            own = [texts[row].embeds[lengths.get(row, 0) :] for row in part]
            own_prefixes = (
                [prefix_of[row] for row in part] if part and part[0] in prefix_of else None
            )
            for row, (kv_cache, token, logits) in zip(
                part, self._prefill_texts(own, own_prefixes), strict=True
            ):
                yield row, Prefilled(kv_cache, token, logits)

    def _prefill_texts(
        self, texts: list[Tensor], prefixes: list[KVCache] | None
    ) -> Iterator[tuple[KVCache, Tensor, Tensor]]:
        """Yield KV cache, next token (1,) and its logits (1, V) of each text (T, D).

        Each text continues its prefix, if it has one.
        """
        capacity = MAX_PREFILL_TOKENS["cuda" if texts and texts[0].is_cuda else "cpu"]
        for chosen in _bins([len(text) for text in texts], capacity):
            own_prefixes = None if prefixes is None else [prefixes[i] for i in chosen]
            yield from self._prefill_row([texts[i] for i in chosen], own_prefixes)

    def _prefill_row(
        self, texts: list[Tensor], prefixes: list[KVCache] | None
    ) -> Iterator[tuple[KVCache, Tensor, Tensor]]:
        device = texts[0].device
        lengths = [len(text) for text in texts]
        starts = (
            [0] * len(texts) if prefixes is None else [prefix[0][0].shape[2] for prefix in prefixes]
        )
        ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        kv_lengths = [length + start for length, start in zip(lengths, starts, strict=True)]
        row = torch.cat(texts)[None]
        positions = torch.cat([torch.arange(a, b) for a, b in zip(starts, kv_lengths, strict=True)])
        cache = PrefillCache(lengths, prefixes)
        output = self.language_model(
            inputs_embeds=row,
            attention_mask=no_mask(self.language_model, row),
            position_ids=positions[None].to(device),
            **{self._cache_argument: cache},
            use_cache=True,
            logits_to_keep=(ends[1:] - 1).to(device),
            cu_seq_lens_q=ends.to(device),
            max_length_q=max(lengths),
            cu_seq_lens_k=torch.tensor([0, *np.cumsum(kv_lengths)], dtype=torch.int32).to(device),
            max_length_k=max(kv_lengths),
        )
        tokens, logits = _most_probable(output.logits[0], self._suppress)
        for number in range(len(texts)):
            here = slice(number, number + 1)
            yield cache.of(number), tokens[here], logits[here]

    def admit(self, prefilled: Prefilled, first: Tensor, *, expected: int) -> None:
        assert isinstance(prefilled.cache, list)
        self._slots.admit(prefilled.cache, first, expected=expected)

    def last_tokens(self) -> list[int]:
        return self._slots.last_tokens()

    def evict(self, place: int) -> None:
        self._slots.evict(place)

    def advance(self, choose: Choose | None) -> None:
        self._slots.advance(self._run, choose)

    def release(self) -> None:
        self._slots = self._new_slots()

    def _step(
        self,
        tokens: Tensor,
        lengths: Tensor,
        kv_cache: KVCache,
        kv_lengths: list[tuple[int, int]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens after `tokens` (R,) and their logits.

        Keys and values are written to the KV cache at `lengths`.
        """
        kv_length = kv_cache[0][0].shape[2]
        mask = torch.arange(kv_length, device=tokens.device) <= lengths[:, None]
        output = self.language_model(
            inputs_embeds=self.language_model.get_input_embeddings()(tokens[:, None]),
            attention_mask=mask[:, None, None],  # (R, 1, 1, kv_length)
            position_ids=lengths[:, None],
            **{self._cache_argument: SlotCache(kv_cache, lengths)},
            use_cache=True,
            logits_to_keep=1,
            kv_lengths=kv_lengths,
        )
        return _most_probable(output.logits[:, -1], self._suppress)


class SeparateRunner:
    """Runner that decodes a row at a time, as `generate` decodes a single prompt.

    It serves every language model with a KV cache.

    Args:
        language_model: a causal language model of transformers.
        suppress: ids that are never generated.
    """

    shares_prefixes = False

    def __init__(self, language_model: CausalLM, *, suppress: Collection[int]) -> None:
        self.language_model = language_model
        self._suppress = torch.tensor(
            sorted(suppress), dtype=torch.long, device=language_model.device
        )
        self._cache_argument = cache_argument(language_model.forward)
        self._caches: list[Cache] = []
        self._tokens: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._caches)

    def prefill(self, texts: Sequence[Text]) -> Iterator[tuple[int, Prefilled]]:
        for position, text in enumerate(texts):
            output = self.language_model(
                inputs_embeds=text.embeds[None], use_cache=True, logits_to_keep=1
            )
            token, logits = _most_probable(output.logits[:, -1], self._suppress)
            yield position, Prefilled(output[self._cache_argument], token, logits)

    def admit(self, prefilled: Prefilled, first: Tensor, *, expected: int) -> None:
        assert isinstance(prefilled.cache, Cache)
        self._caches.append(prefilled.cache)
        self._tokens.append(first)

    def last_tokens(self) -> list[int]:
        return [int(token) for token in self._tokens]

    def evict(self, place: int) -> None:
        self._caches[place], self._tokens[place] = self._caches[-1], self._tokens[-1]
        self._caches.pop()
        self._tokens.pop()

    def advance(self, choose: Choose | None) -> None:
        steps = []
        for token, cache in zip(self._tokens, self._caches, strict=True):
            output = self.language_model(
                input_ids=token[:, None],
                **{self._cache_argument: cache},
                use_cache=True,
                logits_to_keep=1,
            )
            steps.append(_most_probable(output.logits[:, -1], self._suppress))
        tokens, logits = (torch.cat(side) for side in zip(*steps, strict=True))
        self._tokens = list((choose(tokens, logits) if choose else tokens).split(1))

    def release(self) -> None:
        self._caches, self._tokens = [], []


def pick_runner(
    language_model: CausalLM, *, suppress: Collection[int], slots: int, compiled: bool
) -> BatchedRunner | SeparateRunner:
    """Return the runner for a language model.

    Slots require that each token attends to all before it.
    """
    if attends_to_all(language_model):
        return BatchedRunner(language_model, suppress=suppress, slots=slots, compiled=compiled)
    return SeparateRunner(language_model, suppress=suppress)


def _most_probable(logits: Tensor, suppress: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most probable token of each row, (R,), and the logits without suppressed ids."""
    if len(suppress):
        logits = logits.index_fill(1, suppress, -torch.inf)
    return logits.argmax(dim=-1), logits


def _bins(lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Yield positions of texts in order, as many at a time as fit into `capacity` tokens."""
    chosen: list[int] = []
    left = capacity
    for place, length in enumerate(lengths):
        if chosen and length > left:
            yield chosen
            chosen, left = [], capacity
        chosen.append(place)
        left -= length
    if chosen:
        yield chosen


def shared_length(one: np.ndarray, other: np.ndarray) -> int:
    """Return the number of leading elements that are equal."""
    width = min(len(one), len(other))
    differing = np.flatnonzero(one[:width] != other[:width])
    return int(differing[0]) if len(differing) else width


def shared_prefixes(
    rows: Sequence[int], signatures: Sequence[np.ndarray]
) -> list[tuple[int, list[int]]]:
    """Return groups of rows with the length of their shared prefix; 0 for rows without one.

    The last token of a prompt is never shared: its logits give the first token of the reply.
    """
    order = sorted(range(len(rows)), key=lambda place: signatures[place].tolist())
    groups: list[tuple[int, list[int]]] = []
    group: list[int] = []
    length = 0

    def close() -> None:
        groups.append((length if len(group) > 1 else 0, [rows[place] for place in group]))

    for place in order:
        if group:
            common = min(
                length,
                shared_length(signatures[group[0]], signatures[place]),
                len(signatures[place]) - 1,
            )
            # Joining must not cost the group more shared tokens than the newcomer brings.
            if common >= MIN_PREFIX and (len(group) + 1) * common >= len(group) * (
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
