"""Seeded mutations of the bytes of a file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from campaign.harness import Case

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, -(2**64), 1e308, 0.5, "", "x", "\u0000", "\u202e",
    "<image>", "../../etc/passwd", "/dev/zero", [], {}, [None], [[]], {"a": 1},
]  # fmt: skip
"""What takes the place of a value of a JSON file."""
TOKENS = [
    b"\x00", b"\xff" * 4, b"\x7f\xff\xff\xff", b"-1", b"1e999", b"NaN", b'"', b"{", b"[" * 50,
    b"\n", b"\r", b",", b":", b"\xed\xa0\x80", b"\xe2\x80\xae", b"&a [*a]", b"!!python/object:os.x ",
]  # fmt: skip
"""What is put somewhere into a file."""


def mutated(whole: bytes, rng: random.Random, *, text: bool = False) -> bytes:
    """Return a file with some bytes changed, cut, repeated, inserted or moved.

    Half of the changes meet the first 1,500 bytes, where headers are. With `text`, one in two
    mutations of a JSON file changes a value or a key instead.
    """
    if text and rng.random() < 0.5 and (changed := _json_mutated(whole, rng)) is not None:
        return changed
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if not data:
            break
        reach = len(data) if rng.random() < 0.5 else min(len(data), 1500)
        at, kind = rng.randrange(reach), rng.randrange(10)
        if kind < 4:
            data[at] = rng.randrange(256)
        elif kind < 6:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 6:
            del data[at : at + rng.choice((1, 2, 4, 64))]
        elif kind == 7:
            data[at:at] = rng.choice(TOKENS)
        elif kind == 8:
            size = rng.choice((1, 4, 32, 512))
            data[at:at] = data[at : at + size]
        else:
            size, start = rng.choice((2, 4, 16)), rng.randrange(len(data))
            data[at : at + size] = data[start : start + size]
    if rng.random() < 0.15:
        del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


def _json_mutated(whole: bytes, rng: random.Random) -> bytes | None:
    """Return a JSON text with one value or key replaced; None if it is no JSON."""
    lines = whole.splitlines(keepends=True)
    number = rng.randrange(len(lines)) if len(lines) > 1 else 0
    try:
        content, before, after = json.loads(whole), b"", b""
    except ValueError:
        try:  # a line of JSONL
            content = json.loads(lines[number])
        except (ValueError, IndexError):
            return None
        before, after = b"".join(lines[:number]), b"\n" + b"".join(lines[number + 1 :])
    holder: Any = [content]
    node: Any = holder
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        kind = rng.randrange(6)
        if kind == 0 and isinstance(node, dict):
            node[rng.choice(["x", "__class__", "", "auto_map", "\u202e"])] = node.pop(key)
        elif kind == 1 and node is not holder:
            del node[key]
        else:
            node[key] = rng.choice(VALUES)
        return before + json.dumps(holder[0]).encode() + after


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of file that is mutated."""

    name: str
    make: Callable[[Path], Path]
    """Writes the whole file, and what belongs to it, into an empty folder; returns the file."""
    read: Callable[[Path], object]
    """Reads the mutated file as the product does. Raises `MedmError`, or `WrongResultError`."""
    text: bool = False
    """Whether it is JSON, whose values are changed, too."""


def prepare(targets: Sequence[Target], folder: Path) -> None:
    """Write the whole file of each target, note where it is, and read it once.

    Raises:
        MedmError: a whole file is refused: its mutations would show nothing.
    """
    for target in targets:
        place = folder / target.name
        place.mkdir(parents=True)
        file = target.make(place)
        (place / "FILE").write_text(str(file), encoding="utf-8")
        target.read(file)


def mutation_cases(
    targets: Sequence[Target], folder: Path, count: int, seed: int
) -> Sequence[Case]:
    """Return `count` mutations of each target."""
    return [
        Case(f"{target.name} {number}", partial(_run, target, folder, number, seed), target.name)
        for target in targets
        for number in range(count)
    ]


def _run(target: Target, folder: Path, number: int, seed: int) -> None:
    file = Path((folder / target.name / "FILE").read_text(encoding="utf-8"))
    whole = file.read_bytes()
    rng = random.Random(f"{seed} {target.name} {number}")
    # Written under another name first: a kill in the middle leaves the whole file.
    kept = file.parent / f"{file.name}.whole"
    if kept.exists():
        whole = kept.read_bytes()
    else:
        kept.write_bytes(whole)
    file.write_bytes(mutated(whole, rng, text=target.text))
    try:
        target.read(file)
    finally:
        if not file.is_dir():
            file.write_bytes(whole)
