"""The shapes of the OpenAI API: requests read strictly, answers written as its stock clients expect them.

What this server cannot do is refused by name, never ignored: a client that asks for tools, log-probabilities or
penalties is told so. Fields without influence on the answer (user, metadata, ...) are accepted and not used.
Source: the request and response objects of the OpenAI API reference, as the `openai` package types them.
"""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wherry.errors import BadInput, Unsupported
from wherry.serve.pieces import Finish
from wherry.shelf import suggest

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# accepted and without influence on the answer
UNUSED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
TEXT = {
    "model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n",
} | UNUSED  # fmt: skip
# name -> values that mean "not asked for"; anything else is refused
CANNOT: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False), "top_logprobs": (None, 0), "echo": (None, False), "best_of": (None, 1),
    "suffix": (None, ""), "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "logit_bias": (None, {}),
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []),
    "function_call": (None, "none", "auto"), "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]), "audio": (None,), "prediction": (None,), "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"), "web_search_options": (None,), "dimensions": (None,),
}  # fmt: skip


class BadField(BadInput):
    """A field of a request is wrong; `param` names it, `word` is the API's code for it."""

    def __init__(self, message: str, param: str, word: str | None = None) -> None:
        super().__init__(message)
        self.param, self.word = param, word


class CannotDo(Unsupported):
    """A field asks for what this server does not do; `param` names it."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param, self.word = param, "unsupported_parameter"


@dataclass(frozen=True)
class TextRequest:
    """A request for text, checked. `prompt` is a string, token ids, or (for a chat) a list of messages."""

    prompt: str | list[int] | list[dict[str, str]]
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # a last chunk with the counts
    every: bool  # counts in every chunk (vLLM's continuous_usage_stats)


def parse(raw: bytes) -> dict[str, Any]:
    """A request body as an object. Raises BadField when it is not JSON, not an object, or not Unicode."""
    try:
        body = json.loads(raw)
        json.dumps(body, ensure_ascii=False).encode("utf8")
    except RecursionError:
        raise BadField("the body is nested too deeply", "body") from None
    except UnicodeError:
        raise BadField("the body is not valid Unicode text; send JSON in UTF-8", "body") from None
    except ValueError as error:
        raise BadField(f"the body is not JSON: {error}", "body") from None
    if not isinstance(body, dict):
        raise BadField(f"the body must be a JSON object, not {_kind(body)}", "body")
    return body


def text_request(body: dict[str, Any], chat: bool) -> TextRequest:
    """Read and check a body of /v1/chat/completions or /v1/completions.

    Raises:
        BadField: a value of a wrong type or range, or a field that does not exist.
        CannotDo: a well-formed wish that this server cannot fulfil.
    """
    own = {"messages", "max_completion_tokens"} if chat else {"prompt"}
    _known(body, TEXT | own)
    if _number(body, "n", 1, whole=True, low=1) != 1:
        raise CannotDo("n must be 1: one answer per request; send the request again for another answer", "n")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadField(f"stream_options must be an object, not {_kind(options)}", "stream_options")
    limits = [_number(body, name, None, whole=True, low=1) for name in ("max_completion_tokens", "max_tokens")]
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > 16 or not all(isinstance(word, str) and word for word in stops):
        raise BadField("stop must be a string or a list of up to 16 strings, none of them empty", "stop")
    return TextRequest(
        prompt=_messages(body) if chat else _prompt(body),
        max_tokens=next((int(limit) for limit in limits if limit is not None), None),
        temperature=_number(body, "temperature", None, low=0, high=2),
        top_p=_number(body, "top_p", None, low=0, high=1),
        top_k=int(_number(body, "top_k", 0, whole=True, low=0) or 0),
        seed=_number(body, "seed", None, whole=True),  # type: ignore[arg-type]
        stop=tuple(stops),
        stream=_flag(body, "stream"),
        usage=_flag(options, "include_usage"),
        every=_flag(options, "continuous_usage_stats"),
    )


def embedding_request(body: dict[str, Any]) -> tuple[list[str] | list[list[int]], bool]:
    """Read and check a body of /v1/embeddings: the inputs, and whether the vectors are wanted as base64."""
    _known(body, {"model", "input", "encoding_format"} | UNUSED)
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise BadField(f"encoding_format must be 'float' or 'base64', not {encoding!r}", "encoding_format")
    given = body.get("input")
    if isinstance(given, str) or _ids(given):
        given = [given]
    if not isinstance(given, list) or not given:
        raise BadField("input must be a string, a list of strings, a list of token ids, or a list of these", "input")
    if len(given) > 2048:
        raise BadField(f"input has {len(given)} texts; no more than 2048 fit one request", "input")
    if not (all(isinstance(item, str) for item in given) or all(_ids(item) for item in given)):
        raise BadField("input must hold only strings, or only lists of token ids, none of them empty", "input")
    return given, encoding == "base64"


def answer(id: str, created: int, model: str, chat: bool, text: str, finish: Finish, usage: dict) -> dict[str, Any]:
    """A whole answer, for stream=false."""
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
    choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    kind = "chat.completion" if chat else "text_completion"
    return {"id": id, "object": kind, "created": created, "model": model, "choices": [choice], "usage": usage}


def chunk(
    id: str, created: int, model: str, chat: bool, text: str | None, finish: Finish | None, usage: dict | None
) -> dict[str, Any]:
    """One event of a stream. Empty text opens an answer; text None: the counts alone, without choices."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    choices: list[dict[str, Any]] = []
    if text is not None:
        delta = {"content": text} if text else {} if finish else {"role": "assistant", "content": ""}
        choices = [{"index": 0, "logprobs": None, "finish_reason": finish}]
        choices[0] |= {"delta": delta} if chat else {"text": text}
    return {"id": id, "object": kind, "created": created, "model": model, "choices": choices, "usage": usage}


def usage(read: int, written: int | None = None) -> dict[str, int]:
    """Counts of tokens read and, for text, written."""
    counts = {"prompt_tokens": read} | ({} if written is None else {"completion_tokens": written})
    return counts | {"total_tokens": read + (written or 0)}


def embeddings(model: str, vectors: Sequence[np.ndarray], packed: bool, read: int) -> dict[str, Any]:
    """Vectors [width] as a list object; packed: base64 of little-endian float32, what stock clients ask for."""
    rows = [np.asarray(vector, dtype="<f4") for vector in vectors]
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(row.tobytes()).decode() if packed else row.tolist(),
        }
        for i, row in enumerate(rows)
    ]
    return {"object": "list", "data": data, "model": model, "usage": usage(read)}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _known(body: dict[str, Any], fields: set[str]) -> None:
    for name, value in body.items():
        if name in CANNOT and name not in fields:
            if value not in CANNOT[name]:
                raise CannotDo(f"{name} is not supported by this server; leave it out", name)
        elif name not in fields:
            near = suggest(name, fields - UNUSED)
            raise BadField(f"there is no field '{name}' in this request{near}", name, "unknown_parameter")


def _messages(body: dict[str, Any]) -> list[dict[str, str]]:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise BadField("messages must be a list of at least one message", "messages")
    out = []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise BadField(f"{where} must be an object with role and content", where)
        role = message.get("role")
        if role not in ROLES:
            raise BadField(f"{where}.role must be one of {', '.join(ROLES)}, not {role!r}", f"{where}.role")
        content = message.get("content")
        if content is None and role == "assistant":
            content = ""
        if isinstance(content, list):
            content = "".join(_part(part, f"{where}.content[{j}]") for j, part in enumerate(content))
        if not isinstance(content, str):
            raise BadField(f"{where}.content must be text, not {_kind(content)}", f"{where}.content")
        out.append({"role": ROLES[role], "content": content})
    return out


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise BadField(f"{where} must be an object with a type", where)
    if part["type"] != "text":
        raise CannotDo(f"{where} is of type {part['type']}; this model reads text only", where)
    if not isinstance(part.get("text"), str):
        raise BadField(f"{where}.text must be a string", where)
    return part["text"]


def _prompt(body: dict[str, Any]) -> str | list[int]:
    prompt: Any = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str) or _ids(prompt):
        return prompt
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        raise CannotDo("one prompt per request; send several requests, they wait in line", "prompt")
    raise BadField("prompt must be a string or a list of token ids, not empty", "prompt")


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


def _number(
    body: dict[str, Any], name: str, default: float | None, *, whole: bool = False, low: float = -math.inf,
    high: float = math.inf,
) -> float | None:  # fmt: skip
    value = body.get(name)
    if value is None:
        return default
    bounds = f" from {low:g} to {high:g}" if high < math.inf else f" of at least {low:g}" if low > -math.inf else ""
    right = type(value) is int or (not whole and type(value) is float)
    if not right or not low <= value <= high:
        shown = _kind(value) if isinstance(value, str | list | dict) else f"{value}"[:24]
        raise BadField(f"{name} must be a {'whole ' if whole else ''}number{bounds}, not {shown}", name)
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadField(f"{name} must be true or false, not {_kind(value)}", name)
    return bool(value)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
