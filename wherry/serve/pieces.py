"""Ids that a session yields, one by one, to pieces of text that may be shown at once and never taken back.

Two things are held back until they are decided: the bytes of a character that is not whole yet (an emoji often
spans several tokens), and the beginning of what may become a stop string.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wherry.session import Sampling, Session

Finish = Literal["stop", "length"]
TAIL = 8  # tokens of the prompt that are decoded along, so that a word's leading space is not lost
HOLD = 16  # tokens after which text is let go although it ends inside a character: it never was one
LOST = "\ufffd"  # what a decoder writes for bytes that are not a whole character


@dataclass(frozen=True)
class Piece:
    """Text that one more token made certain (perhaps none), the tokens so far, and why the answer ended."""

    text: str
    tokens: int
    finish: Finish | None = None


class Detokenizer:
    """Ids to text, id by id. What it returns, put together, is the decoded text of all ids.

    Idea: decode a short window twice, without and with the new ids; the difference is the new text. The window
    is needed because many decoders treat the first token of a text otherwise than the same token further on.
    Cost: two decodings of a few tokens per id.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        before: ids that stand before the text, when it continues them (a completion, not a chat answer).
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before[-TAIL:])
        self.shown = len(self.ids)  # ids[:shown] are already text

    def push(self, token: int) -> str:
        """The text that became certain with this id; empty while a character is incomplete."""
        self.ids.append(token)
        text = self._rest()
        if text.endswith(LOST) and len(self.ids) - self.shown < HOLD:
            return ""
        if text:
            self.ids = self.ids[self.shown :]
            self.shown = len(self.ids)
        return text

    def flush(self) -> str:
        """What was held back, with U+FFFD in the place of a character that never became whole."""
        text = self._rest()
        self.shown = len(self.ids)
        return text

    def _rest(self) -> str:
        before = self.tokenizer.decode(self.ids[: self.shown], skip_special_tokens=True)
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)[len(before) :]


class Cut:
    """Cuts a stream of text before the first stop string, also one that spans several pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain to stand before every stop string; sets `found` at the first one."""
        self.held += text
        places = [at for word in self.stop if (at := self.held.find(word)) >= 0]
        if places:
            self.found = True
            return self._let(min(places))
        return self._let(len(self.held) - self._begun())

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        return self._let(len(self.held))

    def _begun(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        longest = max((len(word) for word in self.stop), default=1) - 1
        for size in range(min(longest, len(self.held)), 0, -1):
            if any(word.startswith(self.held[-size:]) for word in self.stop):
                return size
        return 0

    def _let(self, size: int) -> str:
        out, self.held = self.held[:size], self.held[size:]
        return out


def pieces(
    session: Session,
    tokenizer: Any,
    tokens: Sequence[int],
    sampling: Sampling,
    stop: Sequence[str] = (),
    *,
    continues: bool = False,
    halted: Callable[[], bool] = lambda: False,
) -> Generator[Piece, None, None]:
    """Generate, and yield one Piece per token; the last one says why it ended. Frees the session however it ends.

    Args:
        session: generates the ids; its stop ids are in `sampling`.
        tokenizer: a `tokenizers.Tokenizer`.
        tokens: ids of the prompt.
        sampling: how to draw.
        stop: strings that end the answer and are not part of it.
        continues: the text goes on where the prompt ends, so a leading space counts.
        halted: asked after every token; True ends the generation without a last piece.
    """
    text, cut, count = Detokenizer(tokenizer, tokens if continues else ()), Cut(stop), 0
    ids = session.generate(tokens, sampling)
    try:
        for token in ids:
            count += 1
            out = cut.push(text.push(token))
            if cut.found:
                yield Piece(out, count, "stop")
                return
            if halted():
                return
            yield Piece(out, count)
        out = cut.push(text.flush())
        out += "" if cut.found else cut.flush()
        yield Piece(out, count, "length" if count >= sampling.max_tokens and not cut.found else "stop")
    finally:
        if close := getattr(ids, "close", None):
            close()
