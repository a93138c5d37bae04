"""Served users: a model behind HTTP, 1, 4 and 16 users who come at random; tokens/s and the wait for the first token.

    python bench/serving.py run FILE.gguf --servers native,llama-server --llama-server PATH/llama-server --seconds 60
    python bench/serving.py table

Each server is started alone with the same threads, asked the same questions at the same moments (one seed), and
measured from outside by what its stream says: `/v1/completions` with stream=true. A user thinks (exponential, mean
--think seconds), asks with a prompt of 16 to 256 words of the shipped text, and reads up to 16 to 128 tokens of the
greedy answer. Prompts differ, so what is found again is chance alone. Servers take turns over the rounds. OpenVINO
GenAI has no server of its own: its ContinuousBatchingPipeline is given the same users in one process, without HTTP.
Every answer that does not come is counted as lost.
"""

import argparse
import asyncio
import datetime
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

RESULTS = Path(__file__).parent / "results" / "serving.json"
USERS = (1, 4, 16)


@dataclass
class Seen:
    """What the users of one run saw."""

    tokens: int = 0
    answers: int = 0
    lost: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first token
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """Figures."""
        p50, p99 = np.percentile(self.first, [50, 99]) if self.first else (float("nan"),) * 2
        return {
            "tokens_s": round(self.tokens / self.seconds, 1), "first_p50_ms": round(1e3 * p50), "answers": self.answers,
            "first_p99_ms": round(1e3 * p99), "lost": self.lost, "seconds": round(self.seconds, 1),
        }  # fmt: skip


def asked(user: int, seed: int) -> Iterator[tuple[float, str, int]]:
    """(thinking time as a share of the mean, prompt, longest answer) of a user's questions, without end."""
    from wherry.data import shipped

    words = shipped("evaluation").read_text(encoding="utf8").split()
    random = np.random.default_rng((seed, user))
    while True:
        count = int(random.integers(16, 257))
        at = int(random.integers(0, len(words) - count))
        yield float(random.exponential()), " ".join(words[at : at + count]), int(random.integers(16, 129))


# ---- servers behind HTTP


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def served(name: str, a: argparse.Namespace) -> Iterator[str]:
    """The address of a server that has answered once."""
    port = free_port()
    if name == "llama-server":
        command = [str(a.llama_server), "-m", str(a.file), "-t", str(a.threads), "-tb", str(a.threads), "-np", "16"]
        command += ["-c", str(16 * 1024), "--port", str(port), "--no-webui"]
    else:
        command = [sys.executable, "-m", "wherry", "serve", str(a.file), "--runtime", name, "--port", str(port)]
        command += ["--threads", str(a.threads)]
    made = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if made.poll() is not None:
                raise SystemExit(f"{name} ended: {made.stderr.read()[-500:] if made.stderr else ''}")
            try:
                body = {"prompt": "The boat", "max_tokens": 4, "temperature": 0}
                if httpx.post(f"{address}/v1/completions", json=body, timeout=60).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        yield address
    finally:
        made.terminate()
        try:
            made.wait(20)
        except subprocess.TimeoutExpired:
            made.kill()


async def user(client: httpx.AsyncClient, number: int, until: float, seen: Seen, a: argparse.Namespace) -> None:
    """One user: thinks, asks, reads."""
    for think, prompt, most in asked(number, a.seed):
        await asyncio.sleep(think * a.think)
        if time.perf_counter() > until:
            return
        body = {
            "prompt": prompt, "max_tokens": most, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        start, first, count = time.perf_counter(), 0.0, 0
        try:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    found = json.loads(line[6:])
                    if not first and found["choices"] and found["choices"][0].get("text"):
                        first = time.perf_counter() - start
                    count = (found.get("usage") or {}).get("completion_tokens", count)
        except httpx.HTTPError:
            seen.lost += 1
            continue
        seen.answers, seen.tokens = seen.answers + 1, seen.tokens + count
        if first:
            seen.first.append(first)


async def over_http(address: str, users: int, a: argparse.Namespace) -> Seen:
    """Users of a server; answers that are begun are read to their end, and their time counts."""
    seen, start = Seen(), time.perf_counter()
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=httpx.Limits(max_connections=64)) as client:
        await asyncio.gather(*(user(client, n, start + a.seconds, seen, a) for n in range(users)))
    seen.seconds = time.perf_counter() - start
    return seen


# ---- OpenVINO GenAI, in this process


class Openvino:
    """Its continuous batching over the same file."""

    def __init__(self, a: argparse.Namespace) -> None:
        import openvino_genai as genai

        how = genai.SchedulerConfig()
        how.cache_size, how.max_num_seqs = 1, 16  # GB
        self.genai = genai
        self.pipe = genai.ContinuousBatchingPipeline(str(a.file), how, "CPU", {"INFERENCE_NUM_THREADS": a.threads})

    def run(self, users: int, a: argparse.Namespace) -> Seen:
        """Steps of the pipeline, and between them what users do."""
        seen, start, ids = Seen(), time.perf_counter(), 0
        lines = [asked(n, a.seed) for n in range(users)]
        nexts: list[Any] = [next(line) for line in lines]
        due = [start + what[0] * a.think for what in nexts]
        live: dict[int, tuple[Any, float, bool]] = {}
        while True:
            now = time.perf_counter()
            for n in range(users):
                if n not in live and now >= due[n] and now < start + a.seconds:
                    how = self.genai.GenerationConfig()
                    how.max_new_tokens, how.do_sample = nexts[n][2], False
                    ids += 1
                    live[n] = (self.pipe.add_request(ids, nexts[n][1], how), due[n], False)
            if not live and now >= start + a.seconds:
                break
            if not self.pipe.has_non_finished_requests():
                time.sleep(0.001)
            else:
                self.pipe.step()
            for n, (handle, began, told) in list(live.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        seen.tokens += len(output.generated_ids)
                    if not told:
                        seen.first.append(time.perf_counter() - began)
                        told = True
                live[n] = (handle, began, told)
                if handle.get_status() != self.genai.GenerationStatus.RUNNING and not handle.can_read():
                    del live[n]
                    seen.answers += 1
                    nexts[n] = next(lines[n])
                    due[n] = time.perf_counter() + nexts[n][0] * a.think
        seen.seconds = time.perf_counter() - start
        return seen


# ---- runs and table


def measure(server: str, users: int, a: argparse.Namespace) -> dict[str, Any]:
    """One server, so many users."""
    if server == "openvino":
        return Openvino(a).run(users, a).row()
    with served(server, a) as address:
        return asyncio.run(over_http(address, users, a)).row()


def run(a: argparse.Namespace) -> None:
    """Servers in turns; a row for each with the median of the rounds."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for turn in range(a.rounds):
        for users in a.users:
            for server in a.servers.split(",")[:: -1 if turn % 2 else 1]:
                row = measure(server, users, a)
                found.setdefault((server, users), []).append(row)
                print(f"{server}, {users} users: {row}", file=sys.stderr)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for (server, users), each in found.items():
        key = {"model": a.file.stem, "server": server, "users": users, "threads": a.threads}
        rows = [r for r in rows if any(r[k] != v for k, v in key.items())]
        middle = {name: float(np.median([row[name] for row in each])) for name in each[0]}
        spread = [min(row["tokens_s"] for row in each), max(row["tokens_s"] for row in each)]
        rows.append(key | middle | {"spread": spread, "rounds": len(each), "date": str(datetime.date.today())})
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    table(rows)


def table(rows: list[dict[str, Any]]) -> None:
    """A line for each server and number of users; behind ours, its ratio to the best other one."""
    print("| model | users | server | tokens/s | first token p50 | p99 | lost |\n|---|---:|---|---:|---:|---:|---:|")
    for r in sorted(rows, key=lambda r: (r["model"], r["users"], r["server"])):
        same = [o for o in rows if all(o[k] == r[k] for k in ("model", "users", "threads"))]
        peers = [o["tokens_s"] for o in same if not o["server"].startswith("native")]
        ratio = f" ({r['tokens_s'] / max(peers):.2f}x)" if peers and r["server"].startswith("native") else ""
        told = f"{r['tokens_s']:.0f}{ratio} | {r['first_p50_ms']:.0f} ms | {r['first_p99_ms']:.0f} ms | {r['lost']:.0f}"
        print(f"| {r['model']} | {r['users']} | {r['server']} | {told} |")


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("file", type=Path, nargs="?", help="a GGUF file")
    parser.add_argument("--servers", default="native,llama-server,openvino", help="also any runtime of wherry")
    parser.add_argument("--llama-server", type=Path, default=Path("llama-server"), help="its program")
    parser.add_argument("--users", type=int, nargs="+", default=list(USERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--think", type=float, default=0.5, help="mean seconds between an answer and the next question")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.what == "table":
        table(json.loads(RESULTS.read_text()))
    else:
        run(a)


if __name__ == "__main__":
    main()
