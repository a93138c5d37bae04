"""Random users for a while: unequal lengths, cancellations, scores, a cache that is too small. Not collected by pytest.

    python tests/native/soak.py FILE.gguf --seconds 3600
    LD_PRELOAD=$(gcc -print-file-name=libtsan.so) WHERRY_NATIVE_LIBRARY=BUILD/libwherry_native.so python tests/native/soak.py ...

Ends with an error when an answer is not the one that the same request got alone, when something is left running, or
when memory grows. A build with a sanitizer: `cmake -S native -B BUILD -DSANITIZE=thread` (or address,undefined).
"""  # noqa: E501

import argparse
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from wherry.artifact import Artifact
from wherry.runtimes import native
from wherry.session import Sampling

REQUESTS = 40  # different ones


def requests(vocab: int) -> list[tuple[list[int], Sampling]]:
    random = np.random.default_rng(0)
    start = random.integers(3, vocab, 90).tolist()
    made = []
    for i in range(REQUESTS):
        own = random.integers(3, vocab, int(random.integers(1, 120))).tolist()
        prompt = start[: int(random.integers(0, 90))] + own
        most = int(random.integers(1, 40))
        made.append((prompt[:200], Sampling(max_tokens=most, temperature=0.9 * (i % 2), top_p=0.9, seed=i)))
    return made


def user(session: Any, seed: int, until: float, alone: list[list[int]], count: list[int], wrong: list[str]) -> None:
    random = np.random.default_rng(seed)
    made = requests(session.shape.vocab)
    while time.monotonic() < until and not wrong:
        i = int(random.integers(REQUESTS))
        prompt, how = made[i]
        kind = random.random()
        if kind < 0.05:
            session.score(prompt if len(prompt) > 1 else [*prompt, 5])
        else:
            answer = session.generate(prompt, how)
            wanted = int(random.integers(1, 10)) if kind < 0.5 else 1000
            found = [token for token, _ in zip(answer, range(wanted), strict=False)]
            answer.close()
            if found != alone[i][: len(found)] or (wanted > len(alone[i]) and len(found) != len(alone[i])):
                wrong.append(f"request {i}: {found} is not the beginning of {alone[i]}")
        count[0] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--isa", default="")
    parser.add_argument("--threads", type=int, default=2, help="more than cores: each is off its core at any point")
    given = parser.parse_args()
    session = native.load(Artifact.open(given.file), threads=given.threads, isa=given.isa, cache_tokens=1024)
    alone = [list(session.generate(prompt, how)) for prompt, how in requests(session.shape.vocab)]
    begin, count, wrong, until = 0, [0], [], time.monotonic() + given.seconds
    args = (until, alone, count, wrong)
    users = [threading.Thread(target=user, args=(session, i, *args)) for i in range(given.users)]
    for thread in users:
        thread.start()
    while any(thread.is_alive() for thread in users):
        time.sleep(min(given.seconds / 20, 10))
        memory = psutil.Process().memory_info().rss
        begin = begin or (memory if time.monotonic() > until - given.seconds * 0.7 else 0)
        print(f"{count[0]} requests, {memory / 1e6:.0f} MB, {session.stats()}", flush=True)
    while session.stats()["running"] + session.stats()["waiting"]:
        time.sleep(0.05)
    stats = session.stats()
    session.close()
    assert not wrong, wrong[0]
    assert stats["idle_pages"] == stats["pages"], stats
    assert memory < begin * 1.03 + 4e6, f"memory grew from {begin / 1e6:.0f} to {memory / 1e6:.0f} MB"
    print(f"{count[0]} requests of {given.users} users: all right")


if __name__ == "__main__":
    main()
