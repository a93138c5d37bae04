"""Raw examples out of a request: JSON, one file as the body, or a form of files. Nothing is read from a path or URL.

application/json: {"input": TEXT or [TEXT, ...]}; a pair of texts is [TEXT, TEXT] in that list; pictures and sounds
    are base64. Also "top" and "model".
image/*, audio/*, application/octet-stream, text/plain: the body is one example; `?top=` in the address.
multipart/form-data: each file, and each field "input", is an example; fields "top" and "model".
"""

import base64
import binascii
import io
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from wherry.serve import openai
from wherry.serve.openai import BadField
from wherry.shelf import missing, suggest
from wherry.task import Task

EXAMPLES_MOST = 64  # of one request
SECONDS_MOST = 600  # of one sound; a small file may hold hours of silence
TOP = 5
FIELDS = {"input", "top", "model"}


@dataclass(frozen=True)
class Asked:
    """What a request asks: raw examples as `Task.prepare` takes them, and how many labels of each are wanted."""

    examples: list[Any]
    top: int = TOP
    model: Any = None


async def read(request: Request, raw: bytes, task: Task) -> Asked:
    """The examples of a request whose body is `raw`.

    Raises:
        BadField: wrong JSON, field, or value. HTTPException: 415, a type of content that the task does not take.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = openai.parse(raw)
        for name in body:
            if name not in FIELDS:
                raise BadField(f"there is no field '{name}' in this request{suggest(name, FIELDS)}", name)
        return Asked(_listed(body.get("input"), task), _top(body.get("top")), body.get("model"))
    if kind == "multipart/form-data":
        return await _form(request, raw, task)
    wanted = {"text": "text/plain", "image": "image/*", "audio": "audio/*"}[task.modality]
    same = kind == wanted if task.modality == "text" else kind.startswith(wanted[:-1])
    if not (same or kind == "application/octet-stream" and task.modality != "text"):
        raise HTTPException(
            415,
            f"the content type '{kind[:60]}' does not fit {task.kind}: send {wanted}, multipart/form-data or "
            f"application/json",
        )
    return Asked([_one(raw, task, "body")], _top(request.query_params.get("top")))


def _listed(given: Any, task: Task) -> list[Any]:
    texts = task.modality == "text"
    items = [given] if isinstance(given, str) else given
    if not isinstance(items, list) or not items:
        what = "a text" if texts else "base64 of a file"
        raise BadField(f"input must be {what}, or a list of such", "input")
    _bounded(len(items))
    return [_text(item, task, i) if texts else _decoded(item, task, i) for i, item in enumerate(items)]


def _text(item: Any, task: Task, i: int) -> Any:
    parts = [item] if isinstance(item, str) else item
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) and part.strip() for part in parts):
        raise BadField(f"input[{i}] must be a text that is not empty", "input")
    if task.kind == "token-classification":
        return item.split() if isinstance(item, str) else parts
    if len(parts) > 2:
        raise BadField(f"input[{i}] has {len(parts)} texts: one, or a pair", "input")
    return parts[0] if len(parts) == 1 else tuple(parts)


def _decoded(item: Any, task: Task, i: int) -> bytes:
    try:
        text = item.partition("base64,")[2] if item.startswith("data:") else item
        return _one(base64.b64decode(text, validate=True), task, f"input[{i}]")
    except (AttributeError, TypeError, ValueError, binascii.Error) as error:
        raise BadField(f"input[{i}] must be a file as base64; files can also be sent as they are", "input") from error


def _one(raw: bytes, task: Task, where: str) -> Any:
    """One example from the bytes of a file, or of a text."""
    if task.modality != "text":
        if not raw:
            raise BadField(f"{where} is empty", "input")
        if task.modality == "audio":
            _short(raw, where)
        return raw
    try:
        return _text(raw.decode("utf8"), task, 0)
    except UnicodeDecodeError as error:
        raise BadField(f"{where} is not UTF-8 text: byte {error.start}", "input") from error


def _short(raw: bytes, where: str) -> None:
    """Raises BadField for a sound that cannot be decoded, or is too long to be decoded into memory."""
    try:
        import soundfile
    except ModuleNotFoundError as error:
        raise missing(error, "reading sounds") from error
    try:
        info = soundfile.info(io.BytesIO(raw))
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise BadField(f"{where} is not a sound that can be decoded: {reason}", "input") from error
    seconds = info.frames * info.channels / max(info.samplerate, 1)
    if seconds > SECONDS_MOST:
        raise BadField(f"{where} is {seconds:,.0f} s of sound, {SECONDS_MOST} at most; send it in parts", "input")


async def _form(request: Request, raw: bytes, task: Task) -> Asked:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield raw

    parser = MultiPartParser(request.headers, stream(), max_files=EXAMPLES_MOST, max_fields=EXAMPLES_MOST)
    parser.spool_max_size = len(raw) + 1  # in memory: nothing of a request is written to a disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise BadField(f"the form cannot be read: {error.message}", "body") from error
    found, more = [], {"top": None, "model": None}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            found.append(_one(await value.read(), task, name[:40]))
        elif name in more:
            more[name] = value  # type: ignore[assignment]
        elif name != "input":
            raise BadField(f"there is no field '{name[:40]}' in this form{suggest(name, FIELDS)}", name[:40])
        elif task.modality != "text":
            raise BadField("input must be a file; with curl: -F input=@FILE", "input")
        else:
            found.append(_text(value, task, len(found)))
    await form.close()
    if not found:
        raise BadField("the form holds no example; with curl: -F input=@FILE", "input")
    _bounded(len(found))
    return Asked(found, _top(more["top"]), more["model"])


def _bounded(count: int) -> None:
    if count > EXAMPLES_MOST:
        raise BadField(f"{count} examples; no more than {EXAMPLES_MOST} fit one request", "input")


def _top(given: Any) -> int:
    if given is None:
        return TOP
    if isinstance(given, str) and given.isascii() and given.isdigit() and len(given) < 7:
        given = int(given)
    if type(given) is not int or given < 1:
        raise BadField(f"top must be a whole number from 1, not {given!r:.24}", "top")
    return given


def checked(examples: list[Any], task: Task) -> list[Any]:
    """The same, when no text is longer than the model reads. Raises BadField: nothing is cut unseen."""
    for i, example in enumerate(examples if task.modality == "text" else []):
        parts = example if isinstance(example, tuple) else (example,)
        task.tokenizer.no_truncation()
        count = len(task.tokenizer.encode(*parts, is_pretokenized=isinstance(example, list)).ids)
        if count > task.max_length:
            raise BadField(
                f"input[{i}] has {count} tokens, but the model reads {task.max_length} at most.\n"
                f"Send it in parts, or shortened.",
                "input",
                "context_length_exceeded",
            )
    return examples
