"""Tokens to text: stop strings that are cut anywhere, whole characters, numbers that fit."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quantkit.runtime.tokenizer import Tokenizer
from quantkit.serve.answer import Piece, Writer
from quantkit.serve.engine import Token

TEXTS = st.text(st.sampled_from("ab日本🐟。\n "), min_size=1, max_size=30)
STOPS = st.lists(st.text(st.sampled_from("ab日本🐟。"), min_size=1, max_size=4), max_size=3)


def written(tokenizer, text: str, stop: list[str]) -> list[Piece]:
    writer, pieces = Writer(Tokenizer(tokenizer).decode, stop), []
    for token in tokenizer.encode(text, add_special_tokens=False):
        pieces.append(writer.push(Token(token, -1.0)))
        if pieces[-1].finish:
            return pieces
    return [*pieces, writer.rest("length")]


@given(text=TEXTS, stop=STOPS)
@example("aab日本", ["ab日"])
@example("aaab", ["aab"])
@example("🐟本", ["本", "🐟本"])
@example("ab", ["ba", "b"])
def test_the_text_ends_before_the_first_stop_string(tokenizer, text, stop):
    """The first that is complete: one that begins earlier may end later."""
    pieces = written(tokenizer, text, stop)
    found = "".join(piece.text for piece in pieces)
    assert text.startswith(found)
    assert not any(one in found for one in stop)
    if any(one in text for one in stop):
        assert pieces[-1].finish == "stop"
        assert text[len(found) :].startswith(tuple(stop))
    else:
        assert (found, pieces[-1].finish) == (text, "length")
    assert all(piece.finish is None for piece in pieces[:-1])


@given(text=TEXTS, stop=STOPS)
def test_numbers_belong_to_text_that_was_given_out(tokenizer, text, stop):
    pieces = written(tokenizer, text, stop)
    found = "".join(piece.text for piece in pieces)
    ids = tokenizer.encode(text, add_special_tokens=False)
    told = [token.id for piece in pieces for token in piece.tokens]
    assert told == ids[: len(told)]
    offsets = [offset for piece in pieces for offset in piece.offsets]
    assert offsets == sorted(offsets)
    assert all(offset < len(found) for offset in offsets)
    if pieces[-1].finish == "length":
        assert told == ids


def test_nothing_is_held_back_for_longer_than_needed(tokenizer):
    writer = Writer(Tokenizer(tokenizer).decode, ["###"])
    ids = tokenizer.encode("The history of", add_special_tokens=False)
    assert [writer.push(Token(token)).text for token in ids] == [
        tokenizer.decode([token]) for token in ids
    ]


@pytest.mark.parametrize("cut", [1, 2])
def test_a_character_that_is_cut_off_is_not_shown(tokenizer, cut):
    ids = tokenizer.encode("鰯", add_special_tokens=False)[:cut]
    writer = Writer(Tokenizer(tokenizer).decode)
    assert [writer.push(Token(token)).text for token in ids] == [""] * cut
    assert writer.rest("length") == Piece("", finish="length")
