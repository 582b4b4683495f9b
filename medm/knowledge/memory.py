"""A first-in first-out memory of texts, retrieved by features."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from medm.errors import DeviceError, RecipeError
from medm.knowledge import EXACT_LIMIT, Combine, Search
from medm.knowledge.base import Embed, Knowledge, KnowledgeQuery, KnowledgeTokens


class Retrieved(NamedTuple):
    """Entries for each sample, best first."""

    indices: Tensor
    """(B, k) int64, -1 where no entry is left."""
    weights: Tensor
    """(B, k), softmax of the scores over the entries; 0 where there is none."""


class Memory(Knowledge):
    """Texts under keys; the k of the highest scores are encoded and combined.

    The score of an entry is the dot product of its key with the features of a sample. As the
    specific knowledge of MOTOR (arXiv 2304.14204). Its buffers are state of training: the
    composition says whether a saved model has them. A score sends a gradient to the features, not
    to the keys.

    Args:
        key_dim: width of the keys.
        length: word pieces of a text, at most.
        word_dim: width of the encoded texts.

    Raises:
        RecipeError: more entries than exact search takes.
        DeviceError: faiss is asked for and not installed.
    """

    needs_query: ClassVar[bool] = True

    keys: Tensor
    """(Q, key_dim)."""
    ids: Tensor
    """(Q, length) int64."""
    mask: Tensor
    """(Q, length) bool."""
    owners: Tensor
    """(Q,) int64, number of the report of each entry; negative for none."""
    filled: Tensor
    """Number of entries, int64 scalar."""
    next: Tensor
    """Place of the next entry, int64 scalar."""

    def __init__(
        self,
        *,
        key_dim: int,
        length: int,
        word_dim: int,
        size: int = 65536,
        k: int = 3,
        combine: Combine = "sum",
        exclude_own: bool = True,
        search: Search = "exact",
    ) -> None:
        super().__init__()
        if search == "exact" and size > EXACT_LIMIT:
            raise RecipeError(
                f"knowledge memory: exact search takes up to {EXACT_LIMIT} entries, found {size}; "
                "set search: faiss"
            )
        self.dim, self.size, self.k, self.length = word_dim, size, k, length
        self.combine, self.exclude_own = combine, exclude_own
        self._faiss = _import_faiss() if search == "faiss" else None
        self.register_buffer("keys", torch.zeros(size, key_dim))
        self.register_buffer("ids", torch.zeros(size, length, dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(size, length, dtype=torch.bool))
        self.register_buffer("owners", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def clear(self) -> None:
        """Remove all entries."""
        self.owners.fill_(-1)
        self.mask.zero_()
        self.filled.zero_()
        self.next.zero_()

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor, mask: Tensor, owners: Tensor) -> None:
        """Add entries in order; the oldest are replaced. Any number of them wraps around.

        On several ranks each has to give the same rows: those of all ranks.

        Args:
            keys: (n, key_dim).
            ids: (n, T) int64, T up to `length`.
            mask: (n, T) bool.
            owners: (n,) int64.

        Raises:
            ValueError: tensors that differ in length, or texts that are too long.
        """
        number, longest = len(keys), ids.shape[1]
        if not (len(ids) == len(mask) == len(owners) == number) or ids.shape != mask.shape:
            raise ValueError(
                f"expected keys, ids, mask and owners of {number} entries, found {tuple(ids.shape)}"
                f", {tuple(mask.shape)} and {tuple(owners.shape)}"
            )
        if longest > self.length:
            raise ValueError(
                f"expected texts of at most {self.length} word pieces, found {longest}"
            )
        last = slice(max(0, number - self.size), None)  # more than fit: the newest stay
        steps = torch.arange(number, device=self.keys.device)[last]
        places = (self.next + steps) % self.size
        self.keys[places] = keys[last].to(self.keys)
        self.ids[places] = 0
        self.mask[places] = False
        self.ids[places, :longest] = ids[last].to(self.ids)
        self.mask[places, :longest] = mask[last].to(self.mask)
        self.owners[places] = owners[last].to(self.owners)
        self.next.copy_((self.next + number) % self.size)
        self.filled.copy_((self.filled + number).clamp(max=self.size))

    def retrieve(self, query: Tensor, owners: Tensor, k: int | None = None) -> Retrieved:
        """Return the entries of the highest scores.

        Args:
            query: (B, key_dim).
            owners: (B,) int64, of each sample the number of its report. Entries of the same owner
                are left out; a negative number leaves out none.
            k: number of entries. Default: that of the options.
        """
        k = self.k if k is None else k
        with torch.no_grad():
            places = (
                self._exact(query, owners, k)
                if self._faiss is None
                else self._with_faiss(query, owners, k)
            )
        found = places >= 0
        keys = self.keys[places.clamp(min=0)].to(query.dtype)  # (B, k, E)
        scores = torch.einsum("be,bke->bk", query, keys).masked_fill(~found, -torch.inf)
        some = found.any(dim=1, keepdim=True)
        weights = scores.masked_fill(~some, 0.0).softmax(dim=1) * found
        return Retrieved(places, weights)

    def forward(self, embed: Embed, query: KnowledgeQuery | None = None) -> KnowledgeTokens:
        """Return (B, length, word_dim) with `combine: sum`, (B, k * length, word_dim) with concat.

        Positions that no retrieved text has are padding, and all of them where the memory has
        nothing for a sample.
        """
        if query is None:
            raise ValueError("a knowledge memory needs a query: features and owners of the samples")
        places, weights = self.retrieve(query.features, query.owners)
        found = (places >= 0).unsqueeze(-1)
        safe = places.clamp(min=0)
        ids, mask = self.ids[safe], self.mask[safe] & found  # (B, k, T)
        readable = mask.clone()
        readable[..., 0] = True  # a text encoder attends to something
        encoded = embed(ids.flatten(0, 1), readable.flatten(0, 1)).unflatten(0, places.shape)
        # (B, k, T, W)
        weighed = encoded * (weights.unsqueeze(-1) * mask).unsqueeze(-1).to(encoded.dtype)
        if self.combine == "sum":
            return KnowledgeTokens(weighed.sum(dim=1), mask.any(dim=1))
        return KnowledgeTokens(weighed.flatten(1, 2), mask.flatten(1, 2))

    def _open(self, owners: Tensor, entries: Tensor, filled: Tensor) -> Tensor:
        """Return which entries (B, n) a sample may get.

        Args:
            owners: (B,).
            entries: (n,) or (B, n), owners of the entries.
            filled: bool of the same shape, False for places without an entry.
        """
        if not self.exclude_own:
            return filled.expand(len(owners), -1)
        own = (entries == owners.unsqueeze(1)) & (owners >= 0).unsqueeze(1)
        return filled & ~own

    def _exact(self, query: Tensor, owners: Tensor, k: int) -> Tensor:
        """Return the places of the k best entries, (B, k); -1 for none."""
        filled = torch.arange(self.size, device=query.device) < self.filled
        allowed = self._open(owners, self.owners, filled)  # (B, Q)
        scores = query.float() @ self.keys.float().T
        best = scores.masked_fill(~allowed, -torch.inf).topk(min(k, self.size), dim=1)
        return best.indices.masked_fill(~allowed.gather(1, best.indices), -1)

    def _with_faiss(self, query: Tensor, owners: Tensor, k: int) -> Tensor:
        """Return what `_exact` returns. Nothing of the size of the memory is held per sample."""
        faiss: Any = self._faiss
        filled = int(self.filled)
        places = torch.full((len(query), k), -1, dtype=torch.int64, device=query.device)
        if filled == 0:
            return places
        keys = self.keys[:filled].float().cpu().numpy()
        asked = query.float().cpu().contiguous().numpy()
        wanted, owned = min(2 * k, filled), self.owners[:filled].cpu()
        while True:  # more are asked for until enough are left without those of the own report
            _, found = faiss.knn(asked, keys, wanted, metric=faiss.METRIC_INNER_PRODUCT)
            near = torch.from_numpy(found).long()
            allowed = self._open(owners.cpu(), owned[near], torch.ones_like(near, dtype=torch.bool))
            if wanted == filled or bool((allowed.sum(dim=1) >= k).all()):
                break
            wanted = min(4 * wanted, filled)
        for row, (entries, usable) in enumerate(zip(near, allowed, strict=True)):
            best = entries[usable][:k]
            places[row, : len(best)] = best.to(places.device)
        return places


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise DeviceError(
            "knowledge memory: search: faiss needs the library faiss; install it with "
            "`pip install medm[retrieval]`, or set search: exact and at most "
            f"{EXACT_LIMIT} entries"
        ) from None
    return faiss
