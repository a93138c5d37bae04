"""Talk with a model in a terminal: plain text, streamed; Ctrl-C stops an answer, Ctrl-D leaves.

When standard input is not a terminal each line of it is one message, and only answers go to standard output.
"""

import secrets
import sys
import time
from collections.abc import Generator

from wherry.artifact import Artifact
from wherry.errors import Unsupported
from wherry.serve.facts import own_sampling
from wherry.serve.pieces import Piece, pieces
from wherry.session import Sampling, Session


def chat(
    session: Session,
    artifact: Artifact,
    *,
    max_tokens: int = 1024,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> None:
    """Read messages, stream answers, say tokens per second after each; returns at the end of the input.

    Args:
        session: the artifact, loaded by a runtime; stays open.
        artifact: a model of the task text-generation.
        max_tokens: longest answer.
        temperature: 0 takes the likeliest token each time; None: what the model asks for, else 0.3.
        top_p: draw from the likeliest tokens that together have this probability; None: likewise, else 0.9.
        seed: of the drawing; None takes another one for every answer.

    Raises:
        Unsupported: the model does not write text.
        BadInput: the model's chat template refuses the conversation.
    """
    task = artifact.task
    if task.kind != "text-generation":
        raise Unsupported(
            f"{artifact.name} does not write text ({task.kind}).\nCompare sentences: wherry serve {artifact.path}"
        )
    own = {"temperature": 0.3, "top_p": 0.9} | own_sampling(task)
    warm = own["temperature"] if temperature is None else temperature
    share = own["top_p"] if top_p is None else top_p
    context = min(task.max_length, int(session.facts.get("context", task.max_length)))
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        _note(f"{artifact.name} on {session.facts.get('runtime', '?')}. Ctrl-C stops an answer, Ctrl-D leaves.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = _line(terminal)
            if line is None:
                return
            messages.append({"role": "user", "content": line})
            tokens = task.tokenizer.encode(task.chat(messages), add_special_tokens=False).ids
            if len(tokens) >= context:
                what, way = ("The conversation", "It starts anew.") if messages[1:] else ("This", "Send a shorter one.")
                _note(f"{what} has {len(tokens):,} tokens, the model's context {context:,}. {way}")
                messages = []
                continue
            drawn = secrets.randbits(31) if seed is None else seed
            sampling = Sampling(min(max_tokens, context - len(tokens)), warm, share, 0, drawn, task.stop)
            answer = _show(pieces(session, task.tokenizer, tokens, sampling), terminal)
            messages.append({"role": "assistant", "content": answer})
        except KeyboardInterrupt:
            if not terminal:
                raise
            _note("\nTo leave: Ctrl-D.")


def _show(answer: Generator[Piece, None, None], terminal: bool) -> str:
    """Print an answer as it comes and its speed after it; Ctrl-C ends it. Returns what was printed of it."""
    text, start, first, count, end = "", time.perf_counter(), 0.0, 0, ""
    try:
        for piece in answer:
            first = first or time.perf_counter()
            text, count = text + piece.text, piece.tokens
            print(piece.text, end="", flush=True)
            if piece.finish == "length":
                end = ", cut at its longest"
    except KeyboardInterrupt:
        if not terminal:
            raise
        end = ", stopped"
    finally:
        answer.close()
    took_s = time.perf_counter() - first
    print(flush=True)
    speed = f"{(count - 1) / took_s:.1f} tokens/s, " if count > 1 else ""
    _note(f"[{speed}{count} tokens, first after {max(first - start, 0):.2f} s{end}]")
    return text


def _line(terminal: bool) -> str | None:
    """The next message that is not empty; None when the input has ended."""
    while True:
        try:
            line = input("\n> ") if terminal else next(sys.stdin)
        except (EOFError, StopIteration):
            if terminal:
                print()
            return None
        if line.strip():
            return line.strip()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
