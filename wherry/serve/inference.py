"""Open Inference Protocol, version 2: a graph's tensors by name over HTTP, as clients of KServe and Triton speak it.

Source: the protocol's REST specification (github.com/kserve/open-inference-protocol): health, metadata, infer; errors
        are {"error": "..."}. JSON tensors alone, without the binary extension; one model without versions.
Shapes: `data` row by row, flat or nested; free axes are -1 in the metadata. Axes of one name must have one size.
Limits: the body's bound; strings (BYTES), BF16 and numbers that are not finite are refused, in and out.
"""

from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import wherry
from wherry.errors import Diverged, Unsupported
from wherry.serve import openai
from wherry.serve.door import Door
from wherry.serve.openai import BadField
from wherry.session import Signature
from wherry.shelf import suggest

# the protocol's name -> numpy's
DATATYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DATATYPES.items()}
FIELDS = {"id", "parameters", "inputs", "outputs"}


class Inference:
    """The routes below /v2 for what stands behind a Door. Models without a graph answer all but `infer`."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.inputs: Signature = getattr(door.session, "inputs", {})
        self.outputs: Signature = getattr(door.session, "outputs", {})

    def routes(self) -> list[Route]:
        """All below /v2."""
        return [
            Route("/v2", self.server, methods=["GET"]),
            Route("/v2/health/live", self.live, methods=["GET"]),
            Route("/v2/health/ready", self.ready, methods=["GET"]),
            Route("/v2/models/{name}", self.metadata, methods=["GET"]),
            Route("/v2/models/{name}/ready", self.model_ready, methods=["GET"]),
            Route("/v2/models/{name}/infer", self.infer, methods=["POST"]),
        ]

    async def server(self, request: Request) -> Response:
        """GET /v2."""
        return JSONResponse({"name": "wherry", "version": wherry.__version__, "extensions": []})

    async def live(self, request: Request) -> Response:
        """GET /v2/health/live."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """GET /v2/health/ready."""
        return JSONResponse({"ready": self.door.open_now}, 200 if self.door.open_now else 503)

    async def model_ready(self, request: Request) -> Response:
        """GET /v2/models/NAME/ready."""
        self.door.named(request.path_params["name"])
        answer = {"name": self.door.model, "ready": self.door.open_now}
        return JSONResponse(answer, 200 if self.door.open_now else 503)

    async def metadata(self, request: Request) -> Response:
        """GET /v2/models/NAME."""
        self.door.named(request.path_params["name"])
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        told: dict[str, Any] = {
            side: [
                {"name": name, "datatype": NAMES.get(kind, "BYTES"), "shape": [n if known(n) else -1 for n in shape]}
                for name, (kind, shape) in signature.items()
            ]
            for side, signature in sides.items()
        }
        platform = f"{self.door.session.facts.get('runtime', '')}_{self.door.format}"
        return JSONResponse({"name": self.door.model, "versions": [], "platform": platform} | told)

    async def infer(self, request: Request) -> Response:
        """POST /v2/models/NAME/infer."""
        raw = await self.door.raw(request)
        self.door.named(request.path_params["name"])
        if not self.inputs:
            raise Unsupported(
                f"{self.door.model} is not served as a graph: it takes no tensors.\nUse the routes below /v1."
            )
        return JSONResponse(await self.door.work(request, self._infer, raw))

    def _infer(self, raw: bytes) -> dict[str, Any]:
        body = openai.parse(raw)
        feeds, wanted = read(body, self.inputs, self.outputs)
        made = self.door.session.predict(feeds)
        answer = {"model_name": self.door.model} | ({"id": body["id"]} if body.get("id") else {})
        return answer | {"outputs": [tensor(name, made[name]) for name in wanted]}


def known(extent: Any) -> bool:
    """Whether the size of an axis is fixed."""
    return isinstance(extent, int) and extent >= 0


def read(body: dict[str, Any], inputs: Signature, outputs: Signature) -> tuple[dict[str, np.ndarray], list[str]]:
    """A request's arrays by name, and the names of the outputs it wants. Raises BadField naming the field."""
    for name in body:
        if name not in FIELDS:
            raise BadField(f"there is no field '{name}' in this request{suggest(name, FIELDS)}", name)
    if not isinstance(body.get("id", ""), str):
        raise BadField("id must be a string", "id")
    given = entries(body.get("inputs"), "inputs", inputs)
    if absent := [name for name in inputs if name not in given]:
        raise BadField(f"the input '{absent[0]}' is missing; the model takes: {described(inputs)}", "inputs")
    sizes: dict[str, tuple[int, str]] = {}
    feeds = {name: array(entry, *inputs[name], sizes) for name, entry in given.items()}
    wanted = entries(body["outputs"], "outputs", outputs) if body.get("outputs") else outputs
    return feeds, list(wanted)


def entries(given: Any, field: str, signature: Signature) -> dict[str, dict[str, Any]]:
    """The list of tensors of a request by name, each known and there once."""
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        raise BadField(f"{field} must be a list of objects, each with a name", field)
    found: dict[str, dict[str, Any]] = {}
    for i, entry in enumerate(given):
        name = entry.get("name")
        if not isinstance(name, str) or name not in signature:
            near = suggest(f"{name}", signature)
            raise BadField(f"{field}[{i}]: the model has no '{name}'{near}; it has: {described(signature)}", field)
        if name in found:
            raise BadField(f"{field}[{i}]: '{name}' stands there twice", field)
        if any(entry["parameters"].values()) if isinstance(entry.get("parameters"), dict) else entry.get("parameters"):
            raise BadField(f"{field}[{i}]: parameters are not supported (no binary data); leave them out", field)
        found[name] = entry
    return found


def described(signature: Signature) -> str:
    """Names, datatypes and shapes for a message."""
    return ", ".join(
        f"{name} {NAMES.get(kind, kind)} [{', '.join(str(n or '?') for n in shape)}]"
        for name, (kind, shape) in signature.items()
    )


def array(entry: dict[str, Any], kind: str, extents: tuple[Any, ...], sizes: dict[str, tuple[int, str]]) -> np.ndarray:
    """One input of a request as its array. `sizes`: of named axes that were seen, with the input they were seen in."""
    name, shape, dtype = entry["name"], entry.get("shape"), np.dtype(kind)
    wanted = f"{name} must be {NAMES.get(kind, kind)} [{', '.join(str(n or '?') for n in extents)}]"
    if kind not in NAMES:
        raise Unsupported(f"{name} is of type {kind}, which this server does not read from JSON")
    if entry.get("datatype") != NAMES[kind]:
        raise BadField(f"{wanted}, not the datatype {entry.get('datatype')!r:.40}", "datatype")
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise BadField(f"{wanted}: shape must be a list of whole numbers above 0, not {shape!r:.80}", "shape")
    if len(shape) != len(extents) or any(known(e) and e != n for n, e in zip(shape, extents, strict=True)):
        raise BadField(f"{wanted}, not the shape {shape}", "shape")
    for n, axis in zip(shape, extents, strict=True):
        if isinstance(axis, str):
            size, where = sizes.setdefault(axis, (n, name))
            if size != n:
                raise BadField(f"{name} has {n} as its axis '{axis}', {where} has {size}: they must agree", "shape")
    if not isinstance(entry.get("data"), list):
        raise BadField(f"{wanted}: data must be a list of numbers", "data")
    try:
        found = np.array(entry["data"])
    except (ValueError, OverflowError) as error:
        raise BadField(f"{name}: data is ragged, or nested too deeply", "data") from error
    right = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}[dtype.kind]
    if found.dtype.kind not in right or not found.size:
        raise BadField(f"{wanted}: data holds something else than such numbers", "data")
    if found.size != np.prod(shape, dtype=object) or found.ndim > 1 and list(found.shape) != shape:
        raise BadField(f"{name}: data has the shape {list(found.shape)}, but shape says {shape}", "data")
    if dtype.kind in "iu" and not (np.iinfo(dtype).min <= int(found.min()) and int(found.max()) <= np.iinfo(dtype).max):
        raise BadField(f"{name}: data has numbers beyond {NAMES[kind]}", "data")
    with np.errstate(over="ignore"):
        made = found.astype(dtype).reshape(shape)
    if dtype.kind == "f" and not np.isfinite(made).all():
        raise BadField(f"{name}: data has numbers that are not finite, or beyond {NAMES[kind]}", "data")
    return made


def tensor(name: str, found: Any) -> dict[str, Any]:
    """One output as the protocol has it. Raises Diverged for what JSON cannot hold."""
    values = np.asarray(found)
    if str(values.dtype) not in NAMES:
        raise Unsupported(f"the output '{name}' is of type {values.dtype}, which JSON cannot hold here")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise Diverged(f"the output '{name}' has NaN or infinity, which JSON cannot hold; check the inputs")
    shown = values.ravel().tolist()
    return {"name": name, "shape": list(values.shape), "datatype": NAMES[str(values.dtype)], "data": shown}
