"""Pieces of a reply are never taken back, and together are the reply."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from medm.inference.streaming import ReplyText

TEXTS = [
    "plain words, and more",
    "größer ≥ 3 µm",
    "結節は右肺",
    "a🫁b",
    "e\u0301 🏥\u200d",
    "  spaces   kept\n\n- list\n",
    "",
]


def of_bytes(ids: list[int]) -> str:
    """One token per byte, as byte-level tokenizers split what they do not know."""
    return bytes(ids).decode(errors="replace").strip()


def pieces(text: ReplyText, ids: list[int]) -> list[str]:
    return [*(text.add(token) for token in ids), text.end()]


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_of_several_tokens_comes_whole(text: str) -> None:
    given = pieces(ReplyText(of_bytes), list(text.encode()))
    assert "".join(given) == text.strip()
    assert "\ufffd" not in "".join(given)
    assert len([piece for piece in given if piece]) >= len(text.strip()) / 2


@given(st.lists(st.integers(0, 255), max_size=30))
def test_pieces_are_the_reply_whatever_the_bytes(ids: list[int]) -> None:
    assert "".join(pieces(ReplyText(of_bytes), ids)) == of_bytes(ids)


def test_tokenizers_that_look_at_neighbors() -> None:
    """SentencePiece drops the space before the first word; WordPiece closes the one before a full
    stop."""
    words = [
        "\u2581No",
        "\u2581effusion",
        ".",
        "\u2581Heart",
        "<0xE2>",
        "<0x89>",
        "<0xA5>",
        "\u25815",
    ]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    ids = list(range(len(words)))
    given = pieces(ReplyText(tokenizer.decode), ids)
    assert "".join(given) == tokenizer.decode(ids) == "No effusion. Heart≥ 5"
    assert given[0] == ""
    assert "No" in given[:2]

    words = ["the", "heart", "is", "n", "'", "t", "large", ".", "##r"]
    tokenizer = Tokenizer(
        models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="the")
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    ids = [0, 1, 2, 3, 4, 5, 6, 8, 7]
    assert "".join(pieces(ReplyText(tokenizer.decode), ids)) == tokenizer.decode(ids)


def test_the_beginning_of_the_text_that_ends_a_reply_is_held_back() -> None:
    def decode(tokens: list[int]) -> str:
        return "".join(map(chr, tokens)).removesuffix("<|end|>")

    for reply, shown in (("a < b<|end|>", "a < b"), ("a<|en", "a<|en"), ("<|end|>", "")):
        text = ReplyText(decode, end="<|end|>")
        pieces = [text.add(ord(letter)) for letter in reply]
        assert not any("<|" in piece for piece in pieces)
        assert "".join([*pieces, text.end()]) == shown
