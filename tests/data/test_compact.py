"""Compact sets and lists behave like the built-in ones, at bytes an entry."""

from __future__ import annotations

import pickle
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medm.data import compact
from medm.data.compact import PlacedTexts, SeenTexts

TEXTS = st.text(st.characters(), max_size=4)


@given(st.lists(TEXTS, max_size=60))
def test_a_set_of_texts(texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "_SMALLEST", 2)
        seen, expected = SeenTexts(), set[str]()
    for text in texts:
        assert seen.add(text) is (text not in expected)
        expected.add(text)
        assert len(seen) == len(expected)


@given(st.lists(st.tuples(st.integers(0, 2**40), TEXTS), max_size=30))
def test_a_list_of_texts(entries: list[tuple[int, str]]) -> None:
    placed = PlacedTexts()
    for position, text in entries:
        placed.append(position, text)
    assert list(placed) == list(pickle.loads(pickle.dumps(placed))) == entries
    assert len(placed) == len(entries)


def test_a_hundred_thousand_entries_cost_bytes() -> None:
    tracemalloc.start()
    seen, placed = SeenTexts(), PlacedTexts()
    for number in range(100_000):
        seen.add(f"images/{number:012d}.png")
        placed.append(number, f"{number:012d}")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 80 * 100_000
    assert len(seen) == 100_000
