"""Stop sequences across pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medm.serving.stops import StopText


@pytest.mark.parametrize(
    ("pieces", "stops", "given"),
    [
        (["a lu", "ng."], [], ["a lu", "ng.", ""]),
        (["a lu", "ng. Next"], ["ng."], ["a lu", "", ""]),
        (["one\n", "\ntwo"], ["\n\n"], ["one", "", ""]),
        (["one\n", "two"], ["\n\n"], ["one", "\ntwo", ""]),
        (["ab", "c"], ["bcd", "c"], ["a", "b", ""]),
        (["ab"], ["bcd"], ["a", "b"]),
    ],
)
def test_pieces(pieces: list[str], stops: list[str], given: list[str]) -> None:
    text = StopText(stops)
    found = [text.add(piece) for piece in pieces]
    assert [*found, text.end()] == given


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=1),
)
def test_all_pieces_are_the_text_before_the_stop(pieces: list[str], stops: list[str]) -> None:
    text = StopText(stops)
    found = "".join([*(text.add(piece) for piece in pieces), text.end()])
    whole = "".join(pieces)
    places = [at for stop in stops if (at := whole.find(stop)) >= 0]
    assert text.found is bool(places)
    assert found == whole[: min(places, default=len(whole))]
