"""The server over real HTTP: uvicorn in a thread, the stock openai client, httpx for the rest."""

import asyncio
import base64
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from wherry.errors import BadInput
from wherry.report import Report
from wherry.serve.app import check_port, create_app, run, serving
from wherry.shelf import find

BOAT, CARRY = "Where does the boat go?", "What does it carry?"
ENDLESS = "Row,"  # the tiny writer goes on with this for ever
LONG = {"prompt": ENDLESS, "max_tokens": 300, "temperature": 0}


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def report():
    proof = Report("proof of tiny-writer")
    proof.add("perplexity", "original", 12.5, low=12.1, high=12.9)
    proof.add("perplexity", "safetensors", 12.75, low=12.2, high=13.1)
    proof.add("kl", "safetensors", 0.0123, "nats/token", low=0.011, high=0.014)
    proof.add("kl", "other", 9.9)  # another export of the same checkpoint
    proof.add("kl to the checkpoint", "safetensors", 0.0001)
    proof.add("grade", "safetensors", "A", note="full logits")
    proof.add("fact: runtime", "safetensors", "torch")
    proof.add("verdict", "", "PASS", note="9 checks passed")
    proof.add("weight error", "model.layers.0.mlp.up_proj.weight", 0.01)
    return proof


@pytest.fixture(scope="module")
def url(writer, report):
    session, artifact = writer
    with serving(create_app(session, artifact, report)) as url:
        yield url


@pytest.fixture(scope="module")
def vectors_url(encoder):
    session, artifact = encoder
    with serving(create_app(session, artifact)) as url:
        yield url


def wait_for(what, seconds=60.0):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


# -- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [BOAT, CARRY])
def test_chat_with_the_stock_client(url, writer, learnt, question):
    """Greedy, so it must be what transformers' own generate() says."""
    import torch

    session, artifact = writer
    task = artifact.task
    tokens = task.tokenizer.encode(task.chat([{"role": "user", "content": question}]), add_special_tokens=False).ids
    with torch.inference_mode():
        out = session.session.module.generate(
            torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), do_sample=False, max_new_tokens=200,
            eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
    ours = client(url).chat.completions.create(
        model="tiny-writer", messages=[{"role": "user", "content": question}], temperature=0
    )
    written = out[0, len(tokens) : -1].tolist()
    assert ours.choices[0].message.content == task.tokenizer.decode(written) == learnt[question]
    assert ours.choices[0].finish_reason == "stop"
    assert ours.usage.prompt_tokens == len(tokens)
    assert ours.usage.completion_tokens == len(written)
    assert ours.usage.total_tokens == len(tokens) + len(written)
    assert ours.model == "tiny-writer"


def test_chat_streams_whole_characters(url, learnt):
    stream = client(url).chat.completions.create(
        model="tiny-writer",
        messages=[{"role": "user", "content": [{"type": "text", "text": BOAT}]}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(parts) == learnt[BOAT]
    assert len(parts) > 20
    assert not any("\ufffd" in part for part in parts)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > len(parts)  # the emoji took several tokens per part
    assert len({chunk.id for chunk in chunks}) == 1


def test_events_on_the_wire(url):
    body = {"messages": [{"role": "user", "content": CARRY}], "stream": True, "temperature": 0}
    body["stream_options"] = {"continuous_usage_stats": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    data = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    counts = [d["usage"]["completion_tokens"] for d in data[1:]]
    assert counts == sorted(counts)
    assert {d["object"] for d in data} == {"chat.completion.chunk"}


def test_completions(url, writer):
    tokenizer = writer[1].task.tokenizer
    api = client(url).completions
    whole = api.create(model="tiny-writer", prompt=ENDLESS, max_tokens=20, temperature=0)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 20
    assert whole.choices[0].text.startswith(" row, row,")  # with the space
    tokens = tokenizer.encode(ENDLESS).ids
    assert api.create(model="tiny-writer", prompt=tokens, max_tokens=20, temperature=0).choices == whole.choices
    stream = api.create(model="tiny-writer", prompt=ENDLESS, max_tokens=20, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


@pytest.mark.parametrize("stop", ["STOP", ["never", "TOP, it"], "n S"])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_across_tokens(url, learnt, stop, stream):
    api = client(url).chat.completions
    messages = [{"role": "user", "content": BOAT}]
    answer = api.create(model="tiny-writer", messages=messages, temperature=0, stop=stop, stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        text, finish = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    word = stop if isinstance(stop, str) else stop[1]
    assert text == learnt[BOAT][: learnt[BOAT].index(word)]
    assert finish == "stop"


def test_seed_repeats_and_no_seed_does_not(url):
    def ask(**more):
        api = client(url).completions
        return api.create(model="tiny-writer", prompt="x", max_tokens=30, temperature=2, **more).choices[0].text

    assert ask(seed=7) == ask(seed=7) != ask(seed=8)
    assert ask() != ask()


def test_sampling_arrives_at_the_session(url, writer):
    session, _ = writer
    body = {"prompt": "x", "max_completion_tokens": 3}
    more = {"messages": [{"role": "user", "content": "x"}], "temperature": 0.5, "top_p": 0.9, "seed": 3, "top_k": 40}
    httpx.post(f"{url}/v1/chat/completions", json=more | {"max_completion_tokens": 3}).raise_for_status()
    drawn = session.calls[-1][1]
    assert (drawn.max_tokens, drawn.temperature, drawn.top_p, drawn.top_k, drawn.seed) == (3, 0.5, 0.9, 40, 3)
    assert drawn.stop == (1,)
    httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}).raise_for_status()
    assert session.calls[-1][1].temperature == 1.0  # the API's default
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 400


def test_eight_at_once_are_all_right(url, learnt):
    def ask(i):
        question = list(learnt)[i % 2]
        messages = [{"role": "user", "content": question}]
        got = client(url).chat.completions.create(
            model="tiny-writer", messages=messages, temperature=0, stream=i % 3 == 0
        )
        if i % 3 == 0:
            return "".join(chunk.choices[0].delta.content or "" for chunk in got) == learnt[question]
        return got.choices[0].message.content == learnt[question]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


def test_llamacpp_says_the_same_without_torch(writer, learnt, tmp_path):
    """The same weights as a GGUF file: another runtime, the same answers over HTTP."""
    pytest.importorskip("xllamacpp", reason="the llama.cpp wheel is not installed")
    from wherry.checkpoint import Checkpoint

    exported = find("formats", "gguf").save(Checkpoint.open(writer[1].path), tmp_path, lambda *told: None)
    session = find("runtimes", "llamacpp").load(exported, threads=1)
    try:
        with serving(create_app(session, exported)) as url:
            for question, answer in learnt.items():
                messages = [{"role": "user", "content": question}]
                got = client(url).chat.completions.create(
                    model=exported.name, messages=messages, temperature=0, stream=True
                )
                assert "".join(chunk.choices[0].delta.content or "" for chunk in got) == answer
            body = {"prompt": ENDLESS, "max_tokens": 12, "temperature": 0}
            assert httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"].startswith(" row, row,")
    finally:
        session.close()


# -- errors ---------------------------------------------------------------------------------------------------------


USER = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "messages", "at least one"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "system"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "text only"),
        ({"messages": USER, "n": 2}, "n", "one answer"),
        ({"messages": USER, "logprobs": True}, "logprobs", "not supported"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"messages": USER, "presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"messages": USER, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"messages": USER, "temperature": 3}, "temperature", "from 0 to 2"),
        ({"messages": USER, "temperature": "hot"}, "temperature", "a string"),
        ({"messages": USER, "temperature": True}, "temperature", "number"),
        ({"messages": USER, "top_p": -1}, "top_p", "from 0 to 1"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"messages": USER, "max_tokens": 2.5}, "max_tokens", "whole"),
        ({"messages": USER, "stop": [""]}, "stop", "none of them empty"),
        ({"messages": USER, "stream": "yes"}, "stream", "true or false"),
        ({"messages": USER, "temprature": 1}, "temprature", "did you mean 'temperature'?"),
    ],
)
def test_wrong_fields_are_named(url, body, param, says):
    with pytest.raises(openai.BadRequestError) as caught:
        client(url).post("/chat/completions", body=body, cast_to=object)
    error = caught.value.response.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"].splitlines()) <= 3


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object, not a list"),
        (b'{"prompt": "\xff"}', "Unicode"),
        (b'{"prompt": "\\ud800"}', "Unicode"),
        (b"[" * 100_000, "too deeply"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": ""}', "empty"),
        (b'{"prompt": ["a", "b"]}', "one prompt"),
        (b'{"prompt": [1, 99999]}', "tokens 0 to"),
        (b'{"prompt": "x", "echo": true}', "echo is not supported"),
    ],
)
def test_malformed_bodies(url, raw, says):
    answer = httpx.post(f"{url}/v1/completions", content=raw)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_a_prompt_beyond_the_context_says_both_numbers(url):
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "river " * 600})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["code"] == "context_length_exceeded"
    told = [int(n) for n in re.findall(r"\d+", error["message"])]
    assert told[0] > 512
    assert told[1] == 512


def test_an_answer_ends_at_the_context(url):
    answer = client(url).completions.create(model="tiny-writer", prompt=ENDLESS, max_tokens=5000, temperature=0)
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_unknown_model_path_and_method(url):
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny-writer'") as caught:
        client(url).chat.completions.create(model="gpt-4o", messages=USER)
    assert caught.value.code == "model_not_found"
    lost = httpx.get(f"{url}/v3/models")
    assert (lost.status_code, lost.json()["error"]["type"]) == (404, "invalid_request_error")
    wrong = httpx.get(f"{url}/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "use POST" in wrong.json()["error"]["message"]


def test_a_body_over_the_limit(writer):
    with serving(create_app(*writer, max_body=1000)) as url:
        for size in (1001, 7000, 100_000):
            try:
                answer = httpx.post(f"{url}/v1/completions", content=b"x" * size)
            except httpx.TransportError:
                assert size == 100_000  # far beyond the limit the connection may be cut before the answer is read
                continue
            assert answer.status_code == 413
            assert "1000 bytes" in answer.json()["error"]["message"]
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_chat_on_an_encoder_and_vectors_from_a_writer(url, vectors_url):
    with pytest.raises(openai.BadRequestError, match=r"encoder.*\n?.*/v1/embeddings"):
        client(vectors_url).chat.completions.create(model="tiny-encoder", messages=USER)
    with pytest.raises(openai.BadRequestError, match=r"/v1/chat/completions"):
        client(url).embeddings.create(model="tiny-writer", input="x")


def test_an_error_inside_says_nothing_of_the_prompt(writer, capsys, caplog):
    session, artifact = writer
    held = "".join(["sec", "ret"])

    class Broken:
        grade, facts = session.grade, session.facts

        def generate(self, tokens, sampling):
            if len(tokens) > 20:
                yield from (10, 11, 12)
            raise RuntimeError(f"{held} prompt inside")

    with serving(create_app(Broken(), artifact)) as url:
        early = httpx.post(f"{url}/v1/completions", json={"prompt": "secret", "stream": True})
        assert early.status_code == 500
        assert early.json()["error"]["type"] == "server_error"
        with pytest.raises(openai.APIError, match="RuntimeError"):
            list(client(url).completions.create(model="tiny-writer", prompt="secret" * 20, stream=True))
    everything = early.text + caplog.text + "".join(capsys.readouterr())
    assert "secret" not in everything
    assert "RuntimeError" in caplog.text


# -- load, clients that leave, the end ------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_the_session(url, writer):
    session, _ = writer
    with session.slow(0.02):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}) as answer:
            next(answer.iter_lines())
            assert session.open == 1
        wait_for(lambda: session.open == 0, 2)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=LONG, timeout=0.2)
        wait_for(lambda: session.open == 0, 2)
    wait_for(lambda: 'status="499"' in httpx.get(f"{url}/metrics").text, 2)


def test_one_who_leaves_while_waiting_never_reaches_the_session(url, writer):
    session, _ = writer
    with session.slow(0.02), httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        before = len(session.calls)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={"prompt": "waits", "max_tokens": 2}, timeout=0.2)
    wait_for(lambda: session.open == 0, 2)
    httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}).raise_for_status()
    assert len(session.calls) == before + 1


def test_a_full_line_is_refused_with_a_time(writer):
    session, artifact = writer
    with serving(create_app(session, artifact, queue=2)) as url, session.slow(0.01):

        def ask(i):
            return httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 60}, timeout=30)

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, range(6)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 4
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        assert ask(0).status_code == 200  # the places are free again
        assert metric(url, "wherry_queue_length") == 0
        assert metric(url, "wherry_queue_places") == 2


def run_beside(writer, client, grace_s=20.0):
    """Serve from this very thread, which hears signals, with `client(url)` in another: (what was said, result)."""
    said, result = [], []
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def say(line):
        said.append(line)
        if len(said) == 1:
            url = re.search(r"http://\S+", line).group()
            thread = threading.Thread(target=lambda: result.append(client(url)))
            thread.start()
            said.append(thread)

    session, artifact = writer
    with session.slow(0.03):
        run(create_app(session, artifact), port=0, grace_s=grace_s, say=say)
    thread = said.pop(1)
    thread.join(10)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert session.open == 0
    return said, result[0]


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(writer, which):
    def talk(url):
        body = LONG | {"stream": True, "max_tokens": 40}
        with httpx.Client() as other, httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            seen = [other.get(f"{url}/health/ready").status_code]
            os.kill(os.getpid(), which)
            wait_for(lambda: other.get(f"{url}/health/ready").status_code == 503, 1)
            seen.append(other.get(f"{url}/health/live").status_code)
            seen.append(other.post(f"{url}/v1/completions", json=LONG).status_code)
            return seen, list(lines)

    said, (seen, lines) = run_beside(writer, talk)
    assert seen == [200, 200, 503]
    assert lines[-2] == "data: [DONE]"  # the running answer is whole
    assert len(said) == 2
    assert "ending 1 running requests" in said[1]


def test_a_second_signal_and_the_end_of_grace_cut(writer):
    def talk(url, again):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}) as answer:
            lines, start = answer.iter_lines(), time.monotonic()
            next(lines)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
            if again:
                os.kill(os.getpid(), signal.SIGINT)
            rest = list(lines)
            return time.monotonic() - start, rest

    for again, grace_s in ((True, 20.0), (False, 1.0)):
        _, (took_s, rest) = run_beside(writer, lambda url, again=again: talk(url, again), grace_s)
        assert took_s < 5
        assert "the server shut down before the answer was complete" in rest[-2]


def test_port_in_use_and_other_bad_addresses():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=rf"port {port} on 127.0.0.1 is in use.*\n.*--port (\d+)") as caught:
            check_port("127.0.0.1", port)
        other = int(re.search(r"--port (\d+)", str(caught.value)).group(1))
        check_port("127.0.0.1", other)
    check_port("127.0.0.1", port)
    check_port("localhost", 0)
    with pytest.raises(BadInput, match="not an address of this machine"):
        check_port("203.0.113.1", 8000)
    with pytest.raises(BadInput, match="not known"):
        check_port("no.such.host.invalid", 8000)
    with pytest.raises(BadInput, match="0 to 65535"):
        check_port("127.0.0.1", 70000)


# -- embeddings -----------------------------------------------------------------------------------------------------


def vector(session, artifact, text):
    """The sentence vector by transformers alone: one sentence, no padding, mean over tokens, unit length."""
    import torch

    ids = torch.tensor([artifact.task.tokenizer.encode(text).ids])
    with torch.inference_mode():
        mean = session.session.module(input_ids=ids).last_hidden_state[0].mean(0).numpy()
    return mean / np.linalg.norm(mean)


TEXTS = ["boat", "a much longer text about rivers", "cargo", "x"]


def test_vectors_equal_those_of_transformers_alone(vectors_url, encoder):
    want = np.stack([vector(*encoder, text) for text in TEXTS])
    got = client(vectors_url).embeddings.create(model="tiny-encoder", input=TEXTS)  # asks for base64
    assert np.allclose([item.embedding for item in got.data], want, atol=1e-5)
    assert [item.index for item in got.data] == [0, 1, 2, 3]
    assert got.usage.prompt_tokens == got.usage.total_tokens == sum(len(text) + 2 for text in TEXTS)
    plain = client(vectors_url).embeddings.create(model="tiny-encoder", input=TEXTS[1], encoding_format="float")
    assert np.allclose(plain.data[0].embedding, want[1], atol=1e-5)
    tokens = [encoder[1].task.tokenizer.encode(text).ids for text in TEXTS]
    by_ids = client(vectors_url).embeddings.create(model="tiny-encoder", input=tokens)
    assert np.allclose([item.embedding for item in by_ids.data], want, atol=1e-5)
    one = client(vectors_url).embeddings.create(model="tiny-encoder", input=tokens[0])
    assert np.allclose(one.data[0].embedding, want[0], atol=1e-5)


def test_base64_is_little_endian_float32(vectors_url, encoder):
    body = {"input": "boat", "encoding_format": "base64", "user": "me"}
    data = httpx.post(f"{vectors_url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(data), "<f4"), vector(*encoder, "boat"), atol=1e-5)


def test_concurrent_requests_share_batches(vectors_url, encoder):
    session, _ = encoder
    texts = [f"{TEXTS[i % 4]} {'abcdefgh'[i // 4 % 8]}" for i in range(40)]
    want = [vector(*encoder, text) for text in texts]
    session.sizes.clear()
    session.pace_s = 0.02

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{vectors_url}/v1", api_key="none", max_retries=2) as api:
            return await asyncio.gather(
                *(api.embeddings.create(model="tiny-encoder", input=text) for text in texts[:30])
            )

    try:
        got = asyncio.run(ask())
    finally:
        session.pace_s = 0.0
    for answer, vec in zip(got, want[:30], strict=True):
        assert np.allclose(answer.data[0].embedding, vec, atol=1e-5)
    assert sum(session.sizes) == 30
    assert len(session.sizes) < 20
    assert max(session.sizes) <= 16
    session.sizes.clear()
    many = client(vectors_url).embeddings.create(model="tiny-encoder", input=texts)
    assert np.allclose([item.embedding for item in many.data], want, atol=1e-5)
    assert session.sizes == [16, 16, 8]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input": []}, "input must be"),
        ({}, "input must be"),
        ({"input": ["x", 3]}, "only strings"),
        ({"input": [[1], []]}, "only strings"),
        ({"input": "x", "dimensions": 8}, "dimensions is not supported"),
        ({"input": "x", "encoding_format": "hex"}, "'float' or 'base64'"),
        ({"input": "x" * 100}, "102 tokens, but the model reads 64"),
        ({"input": [[5000]]}, "token 5000"),
        ({"input": ["x"] * 3000}, "3000 texts"),
    ],
)
def test_wrong_inputs(vectors_url, body, says):
    answer = httpx.post(f"{vectors_url}/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_a_model_that_says_nan(encoder):
    session, artifact = encoder

    class Sick:
        grade, facts = "A", session.facts

        def predict(self, inputs):
            return {"embedding": np.full((len(inputs["input_ids"]), 4), np.nan, np.float32)}

    with serving(create_app(Sick(), artifact)) as url:
        answer = httpx.post(f"{url}/v1/embeddings", json={"input": ["a", "b"]})
        assert answer.status_code == 500
        assert "NaN" in answer.json()["error"]["message"]


# -- the rest -------------------------------------------------------------------------------------------------------


def metric(url, name, **labels):
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_metrics_count(writer):
    session, artifact = writer
    with serving(create_app(session, artifact)) as url:
        for _ in range(3):
            answer = httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 12}).json()
        httpx.post(f"{url}/v1/completions", json={"prompt": 5})
        httpx.get(f"{url}/secret/path")
        assert metric(url, "wherry_requests_total", route="/v1/completions", status="200") == 3
        assert metric(url, "wherry_requests_total", route="/v1/completions", status="400") == 1
        assert metric(url, "wherry_requests_total", route="other", status="404") == 1
        assert metric(url, "wherry_request_seconds_count", route="/v1/completions") == 4
        assert metric(url, "wherry_tokens_total", direction="out") == 36
        assert metric(url, "wherry_tokens_total", direction="in") == 3 * answer["usage"]["prompt_tokens"]
        assert metric(url, "wherry_first_token_seconds_count") == 3
        assert metric(url, "wherry_decode_tokens_per_second") > 1
        text = httpx.get(f"{url}/metrics").text
        assert 'model="tiny-writer"' in text
        assert "secret" not in text


def test_models_health_facts(url, writer):
    api = client(url)
    assert [model.id for model in api.models.list()] == ["tiny-writer"]
    assert api.models.retrieve("tiny-writer").owned_by == "wherry"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("other")
    assert httpx.get(f"{url}/health/live").json() == {"status": "live"}
    assert httpx.get(f"{url}/health/ready").status_code == 200
    answer = httpx.get(f"{url}/v1/wherry/facts")
    known = answer.json()
    assert known["model"]["name"] == "tiny-writer"
    assert known["model"]["context"] == 512
    assert known["model"]["bytes"] == writer[1].bytes
    assert known["model"]["schemes"] == [{"scheme": "W4A16,group_size=32", "tensors": 1}]
    assert known["runtime"]["runtime"] == "torch"
    assert known["grade"]["grade"] == "A"
    rows = known["proof"]["rows"]
    assert [(row["what"], row["where"]) for row in rows] == [
        ("perplexity", "original"), ("perplexity", "safetensors"), ("kl", "safetensors"),
    ]  # fmt: skip
    proof = known["proof"]
    assert (proof["here"], proof["runtime"], proof["grade"]) == ("safetensors", "torch", "A, full logits")
    assert proof["verdict"] == {"value": "PASS", "note": "9 checks passed"}
    assert rows[2]["text"] == "0.0123 nats/token [0.011, 0.014]"
    assert str(writer[1].path) not in answer.text  # no path of this machine


@pytest.mark.parametrize("kind", ["writer", "encoder"])
def test_the_page_loads_nothing_from_elsewhere(url, vectors_url, kind):
    home = url if kind == "writer" else vectors_url
    page = httpx.get(home)
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert page.headers["x-content-type-options"] == "nosniff"
    seen = page.text + httpx.get(f"{home}/web/facts.js").text
    links = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert len(links) >= 3
    for link in links:
        assert link.startswith("/"), link
        file = httpx.get(home + link)
        assert file.status_code == 200
        seen += file.text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", seen)
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=|innerHTML|insertAdjacentHTML|@import", seen)
    assert httpx.get(f"{home}/web/../app.py").status_code == 404
    assert httpx.get(f"{home}/web/%2e%2e/app.py").status_code == 404


def test_serve_needs_neither_torch_nor_a_runtime():
    code = (
        "import sys, wherry.serve.app, wherry.serve.chat;"
        "bad = {'torch', 'transformers', 'onnx', 'onnxruntime', 'xllamacpp', 'gguf', 'openai'} & set(sys.modules);"
        "bad |= {m for m in sys.modules if m.startswith(('wherry.runtimes', 'wherry.engine', 'wherry.quant'))};"
        "sys.exit(str(bad) if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_two_servers_in_one_process_do_not_mix(url, writer):
    with serving(create_app(*writer)) as other:
        assert other != url
        assert metric(other, "wherry_tokens_total", direction="out") == 0
    assert threading.active_count() < 50


def test_log_handlers_of_the_process_live_on(writer):
    """A server inside of a program, or of a test, ends nobody else's log."""
    ended = []

    class Handler(logging.Handler):
        def close(self):
            ended.append(self)
            super().close()

    handler = Handler()
    logging.getLogger("somebody").addHandler(handler)
    with serving(create_app(*writer)) as url:
        assert httpx.get(f"{url}/health/ready").status_code == 200
    assert ended == []
    logging.getLogger("somebody").removeHandler(handler)
