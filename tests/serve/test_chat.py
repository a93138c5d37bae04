"""Chat in a terminal (a real pseudo-terminal) and with lines from a pipe."""

import io
import os
import pty
import signal
import sys
import threading
import time

import pytest

from wherry.errors import Unsupported
from wherry.serve.chat import chat

BOAT, CARRY = "Where does the boat go?", "What does it carry?"


def test_lines_from_a_pipe(writer, learnt, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{BOAT}\n\n  \n"))
    chat(*writer, temperature=0)
    out, err = capsys.readouterr()
    assert out == learnt[BOAT] + "\n"
    assert "tokens/s" in err


def test_the_conversation_is_kept_and_starts_anew_beyond_the_context(writer, monkeypatch, capsys):
    session, _ = writer
    session.calls.clear()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{BOAT}\n{CARRY}\n{'river ' * 500}\n{CARRY}\n"))
    chat(*writer, max_tokens=20)
    first, second, third = (tokens for tokens, _ in session.calls)
    assert len(second) > len(first) + 20
    assert len(third) < len(second)
    err = capsys.readouterr().err
    assert "the model's context 512. It starts anew." in err
    assert "cut at its longest" in err


def test_an_encoder_does_not_chat(encoder):
    with pytest.raises(Unsupported, match="does not write text.*\n.*wherry serve"):
        chat(*encoder)


def test_a_terminal_stops_at_ctrl_c_and_leaves_at_ctrl_d(writer, monkeypatch):
    session, artifact = writer
    master, slave = pty.openpty()
    seen, problems = bytearray(), []

    def shown(text, seconds=120.0, times=1):
        until = time.monotonic() + seconds
        while seen.decode(errors="replace").count(text) < times:
            if time.monotonic() > until:
                problems.append(f"never shown: {text!r}")
                os.write(master, b"\x04")
                return
            time.sleep(0.01)

    def read():
        while True:
            try:
                seen.extend(os.read(master, 4096))
            except OSError:
                return

    def person():
        shown("> ")
        os.write(master, f"{BOAT}\n".encode())
        shown("Up the")
        os.kill(os.getpid(), signal.SIGINT)
        shown(", stopped]")
        shown("> ", times=2)  # the next prompt
        time.sleep(0.2)
        session.pace_s = 0.0
        os.kill(os.getpid(), signal.SIGINT)  # at the prompt it does not leave
        shown("To leave: Ctrl-D.")
        seen.clear()
        os.write(master, f"{CARRY}\n".encode())
        shown("tokens/s")
        os.write(master, b"\x04")

    threads = [threading.Thread(target=read, daemon=True), threading.Thread(target=person)]
    with open(slave, closefd=False) as stdin, open(slave, "w", closefd=False) as stdout, session.slow(0.05):
        for name, file in (("stdin", stdin), ("stdout", stdout), ("stderr", stdout)):
            monkeypatch.setattr(sys, name, file)
        for thread in threads:
            thread.start()
        chat(session, artifact, max_tokens=60, temperature=0)
        threads[1].join(130)
    os.close(slave)
    threads[0].join(5)
    os.close(master)
    assert not problems
    assert session.open == 0
