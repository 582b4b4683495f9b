"""Division of samples among the tasks of a job array. Torch-free.

The owner of a sample is a hash of its name, not its position: records that are added, removed or
put in another order leave the owners of the others as they were.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from medm.errors import RecipeError

_FORM = re.compile(r"(\d+)/(\d+)")
_FILE = re.compile(r".*shard-(\d+)-of-(\d+)(?:\.\w+)?")


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """One of several disjoint parts of the samples that together are all of them."""

    index: int
    """From 0."""
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def label(self) -> str:
        """Name in files: `shard-3-of-64`."""
        return f"shard-{self.index}-of-{self.count}"

    def owns(self, name: str) -> bool:
        """Return whether a sample of this name belongs to the shard."""
        digest = hashlib.sha256(name.encode("utf-8", errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index


def parse_shard(text: str) -> Shard:
    """Return the shard that is written as `i/N`.

    Raises:
        RecipeError: it is written in another way, or there is no such shard.
    """
    found = _FORM.fullmatch(text)
    shard = Shard(int(found[1]), int(found[2])) if found else Shard(0, 0)
    if not shard.index < shard.count:
        raise RecipeError(
            f"shard {text!r}: expected i/N with i from 0 to N-1, such as 0/64 (in a job array of "
            "Slurm from 0 on: $SLURM_ARRAY_TASK_ID/64)"
        )
    return shard


def all_shards(
    files: Iterable[Path], *, target: Path, names: Iterable[str] | None = None
) -> list[Shard]:
    """Return the shards of a complete set, in order.

    Args:
        files: one of each shard, named by its label.
        target: that is merged from them, for messages.
        names: of all samples, where a shard that owns none writes no file. It is left out.

    Raises:
        RecipeError: there are none, some are missing, or there are those of several sets.
    """
    found = sorted(
        {
            Shard(int(name[1]), int(name[2]))
            for file in files
            if (name := _FILE.fullmatch(str(file)))
        }
    )
    counts = sorted({shard.count for shard in found})
    if not counts:
        raise RecipeError(f"{target}: has no shards yet; run --shard 0/N to --shard N-1/N first")
    if len(counts) > 1:
        raise RecipeError(
            f"{target}: has shards of {' and of '.join(map(str, counts))}; delete the files of one "
            f"set (*shard-*-of-{counts[0]}*, or *shard-*-of-{counts[1]}*)"
        )
    wanted = [Shard(index, counts[0]) for index in range(counts[0])]
    if names is not None:
        known = list(names)
        wanted = [shard for shard in wanted if shard in found or any(map(shard.owns, known))]
    if missing := sorted(set(wanted) - set(found)):
        listed = ", ".join(str(shard) for shard in missing[:10])
        more = ", ..." if len(missing) > 10 else ""
        raise RecipeError(
            f"{target}: {len(missing)} of {counts[0]} shards are missing ({listed}{more}); run "
            "them with --shard, then merge again"
        )
    return wanted
