"""Ids to text that is never taken back: whole characters only, and cut at stop strings across tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from wherry.serve.pieces import Cut, Detokenizer, pieces
from wherry.session import Sampling


def by_bytes():
    """Every byte is a token: the hardest case for characters of several bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def by_pieces():
    """Words with a leading mark for the space, bytes for what is not in the vocabulary: as SentencePiece does."""
    words = ["<unk>", "▁up", "▁the", "▁river", "s", ".", "▁"] + [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES, PIECES = by_bytes(), by_pieces()


def spoken(tokenizer, ids, before=()):
    """(pieces as shown, what was left at the end)."""
    text = Detokenizer(tokenizer, before)
    return [text.push(token) for token in ids], text.flush()


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_comes_back_and_no_piece_has_half_a_character(text):
    shown, rest = spoken(BYTES, BYTES.encode(text).ids)
    assert "".join(shown) + rest == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("text", ["👩🏽‍🚀 rows 🚣, naïve 漢字!", "🇳🇱🇳🇱", "e\u0301"])
def test_an_emoji_of_many_tokens(text):
    ids = BYTES.encode(text).ids
    assert len(ids) > len(text)
    shown, rest = spoken(BYTES, ids)
    assert "".join(shown) == text
    assert rest == ""


def test_half_a_character_at_the_end_is_said():
    shown, rest = spoken(BYTES, BYTES.encode("a🚣").ids[:-1])
    assert "".join(shown) == "a"
    assert rest == "\ufffd"


def test_bytes_that_never_become_a_character_do_not_stop_the_stream():
    lead = BYTES.encode("🚣").ids[0]
    shown, rest = spoken(BYTES, [lead] * 100 + BYTES.encode("ok").ids)
    assert any(shown[:40])
    assert ("".join(shown) + rest).endswith("ok")


def test_leading_spaces_of_sentencepiece():
    up, the, river, s, dot = (PIECES.token_to_id(w) for w in ("▁up", "▁the", "▁river", "s", "."))
    boat = [PIECES.token_to_id(f"<0x{byte:02X}>") for byte in "🚣".encode()]
    ids = [up, the, river, s, *boat, dot]
    shown, rest = spoken(PIECES, ids)
    assert "".join(shown) + rest == "up the rivers🚣." == PIECES.decode(ids)
    shown, _ = spoken(PIECES, [the, river], before=[up])
    assert "".join(shown) == " the river"  # goes on after a prompt, so the space counts


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_cut_equals_cutting_the_whole_text(text, stop, data):
    cut, out, rest = Cut(stop), "", text
    while rest and not cut.found:
        size = data.draw(st.integers(1, len(rest)))
        out += cut.push(rest[:size])
        rest = rest[size:]
    out += "" if cut.found else cut.flush()
    ends = [at for word in stop if (at := text.find(word)) >= 0]
    assert cut.found == bool(ends)
    if not ends:
        assert out == text
    else:  # of several stop strings the one that is complete first counts, so the place depends on the pieces
        assert text.startswith(out)
        assert len(out) in ends


def test_cut_holds_back_only_what_may_become_a_stop_string():
    cut = Cut(["STOP"])
    assert [cut.push(piece) for piece in ("go S", "T", "x S", "TO", "P!")] == ["go ", "", "STx ", "", ""]
    assert cut.found


class Counted:
    """An iterator of ids that knows whether it was closed."""

    def __init__(self, ids):
        self.ids, self.closed = iter(ids), False

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.ids)

    def close(self):
        self.closed = True


class Saying:
    def __init__(self, text):
        self.ids = Counted(BYTES.encode(text).ids)

    def generate(self, tokens, sampling):
        return self.ids


def test_pieces_end_and_free_the_session():
    session = Saying("up the river. STOP and more")
    made = list(pieces(session, BYTES, [1], Sampling(100), ["STOP"]))
    assert "".join(piece.text for piece in made) == "up the river. "
    assert made[-1].finish == "stop"
    assert made[-1].tokens == len("up the river. STOP")
    assert session.ids.closed

    session = Saying("abcd")
    made = list(pieces(session, BYTES, [1], Sampling(4)))
    assert [piece.finish for piece in made] == [None] * 4 + ["length"]
    session = Saying("abcd")
    assert list(pieces(session, BYTES, [1], Sampling(5)))[-1].finish == "stop"

    session = Saying("abcd")
    made = list(pieces(session, BYTES, [1], Sampling(9), halted=lambda: True))
    assert made == []
    assert session.ids.closed
