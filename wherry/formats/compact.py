"""compact: the smallest folder: weights without loss as palettes, bitmaps and entropy-coded streams.

One file, model.compact, in place of the weight files of a Hugging Face folder or of a graph; the rest is copied.
    magic "wherry-c", length of the header, header (JSON under lzma), streams one after the other
    header: files, each with what is left when its tensors are taken out, and for each tensor where its streams lie
For disk and transport: no runtime computes on it. It is unpacked when it is loaded, to the very bytes of each tensor,
and `wherry export COMPACT -o OUT --format safetensors | onnx | compressed_tensors` writes the stock folder again.
compressed-tensors had a layout for this, sparse-bitmask: it is legacy there, without code that reads it, and stock
transformers does not load it. Source: Han et al. 2016, Deep Compression, arXiv:1510.00149, sections 2 to 4.
"""

import json
import lzma
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wherry import cargo, shelf, tensorfile
from wherry.artifact import MANIFEST, Artifact, sha256
from wherry.errors import Corrupt, Missing, Unsupported
from wherry.ops import entropy

if TYPE_CHECKING:
    from wherry.checkpoint import Checkpoint
    from wherry.recipe import Plan, Progress

MAIN, MAGIC = "model.compact", b"wherry-c"
GRAPH = "model.onnx"
HEADER_MOST = 100 << 20
SMALL = 64  # bytes of a graph's constant that stays where it is
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4}]
KINDS = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}


def check(plan: "Plan") -> dict[str, str]:
    """No notes. Raises Missing without the coder's package."""
    package()
    return {}


def package() -> None:
    """Raise Missing, with the pip line, when the entropy coder is not installed."""
    try:
        import constriction  # noqa: F401
    except ModuleNotFoundError as error:
        raise Missing("compact codes with constriction, not installed.\npip install 'wherry[compact]'") from error


def save(checkpoint: "Checkpoint", out: Path, progress: "Progress") -> Artifact:
    """Write the checkpoint's folder as it lies, its weight files squeezed into one, into the empty folder `out`.

    Unpacks what was written, and compares it with the files, before it seals. Raises Unsupported for a source that is
    no such folder (GGUF, an adapter), Diverged never: Corrupt when a byte came back otherwise.
    """
    package()
    graph = checkpoint.graph is not None
    files = [checkpoint.graph.path] if graph else sorted(checkpoint.path.glob("*.safetensors"))
    if not files or (checkpoint.path / "adapter_config.json").exists():
        raise Unsupported(f"compact takes a Hugging Face folder or a graph, and {checkpoint.path} is neither")
    inner = {"format": "onnx" if graph else "safetensors", "main": files[0].name}
    if not graph and any(checkpoint.scheme(name) is not None for name in checkpoint.names()):
        inner["format"] = "compressed_tensors"
    if not graph and len(files) > 1 and (checkpoint.path / "model.safetensors.index.json").exists():
        inner["main"] = "model.safetensors.index.json"
    cargo.beside(checkpoint.path, checkpoint.task, out)
    for name in ("config.json", "model.safetensors.index.json", "preprocessor_config.json"):
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, out / name)
    parts = [(taken_graph if graph else taken_folder)(file) for file in files]
    total = sum(len(tensors) for _, tensors in parts)
    streams: list[bytes] = []
    header: list[dict[str, Any]] = []
    at = done = 0
    for file, (rest, tensors) in zip(files, parts, strict=True):
        entry: dict[str, Any] = {"name": GRAPH if graph else file.name, "tensors": []}
        skeleton = np.frombuffer(lzma.compress(rest, lzma.FORMAT_RAW, filters=FILTERS), np.uint8)
        for name, array in [("", skeleton), *tensors]:
            progress(done, total, name)
            how, found = entropy.squeeze(array) if name else ("", [array.tobytes()])
            sizes = [len(stream) for stream in found]
            entry["tensors"].append([how, at, sizes, array.size, array.dtype.itemsize])
            streams += found
            at, done = at + sum(sizes), done + bool(name)
        header.append(entry)
    text = lzma.compress(json.dumps(header, separators=(",", ":")).encode(), lzma.FORMAT_RAW, filters=FILTERS)
    tensorfile.write_pieces(out / MAIN, [MAGIC, len(text).to_bytes(8, "little"), text, *streams])
    with tempfile.TemporaryDirectory() as folder:
        unpack(out / MAIN, Path(folder))
        again = [(taken_graph if graph else taken_folder)(Path(folder) / entry["name"]) for entry in header]
        for (rest, tensors), (rest_, tensors_) in zip(parts, again, strict=True):
            same = all(a == b and np.array_equal(x, y) for (a, x), (b, y) in zip(tensors, tensors_, strict=True))
            if not same or (rest != rest_ and not graph):
                raise Corrupt(f"{out / MAIN} does not give back what was written: report this")
        inner["sha256"] = {} if graph else {file.name: sha256(file) for file in files}
    facts = cargo.facts(checkpoint, "compact", MAIN)
    if graph:
        from wherry.graph import whole as graphs

        facts = graphs.manifest(checkpoint, checkpoint.plan, [], "compact", MAIN)
    return Artifact.seal(out, **facts | {"inner": inner})


def taken_folder(file: Path) -> tuple[bytes, list[tuple[str, np.ndarray]]]:
    """What is left of a safetensors file without its data (its header), and the data of each tensor as integers."""
    source = tensorfile.TensorFile(file)
    with open(file, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        rest = length.to_bytes(8, "little") + raw.read(length)
    order = sorted(source.entries.items(), key=lambda item: item[1].begin)
    return rest, [(name, np.frombuffer(b"".join(source.chunks(name)), KINDS[entry.dtype.itemsize]))
                  for name, entry in order]  # fmt: skip


def taken_graph(file: Path) -> tuple[bytes, list[tuple[str, np.ndarray]]]:
    """The same of an ONNX file and its data: the graph with the large constants' bytes cut out."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_model

    proto = onnx.load(file, load_external_data=False)
    load_external_data_for_model(proto, str(file.parent))
    tensors = []
    for tensor in proto.graph.initializer:
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if len(tensor.raw_data) > SMALL and len(tensor.raw_data) == size * int(np.prod(tensor.dims)):
            tensors.append((tensor.name, np.frombuffer(tensor.raw_data, KINDS[size])))
            tensor.raw_data = b""
    return proto.SerializeToString(deterministic=True), tensors


def unpack(file: Path, out: Path) -> None:
    """Write the weight files that model.compact holds into the folder `out`. Raises Corrupt, naming the file."""
    import onnx

    if not file.is_file():
        raise Missing(f"no such file: {file}")
    data = file.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    if data[:8] != MAGIC or length > min(HEADER_MOST, len(data) - 16):
        raise Corrupt(f"{file} is not a compact file, or it is cut off")
    try:
        header = json.loads(lzma.decompress(data[16 : 16 + length], lzma.FORMAT_RAW, filters=FILTERS))
        for entry in header:
            arrays = [tensor(data, 16 + length, *told) for told in entry["tensors"]]
            rest = lzma.decompress(arrays[0].tobytes(), lzma.FORMAT_RAW, filters=FILTERS)
            name = Path(entry["name"]).name
            if name != entry["name"]:
                raise ValueError(f"it names a file outside of the folder: {entry['name']}")
            if name != GRAPH:
                tensorfile.write_pieces(out / name, [rest, *(array.tobytes() for array in arrays[1:])])
                continue
            proto, left = onnx.ModelProto.FromString(rest), iter(arrays[1:])
            for item in proto.graph.initializer:
                if not item.raw_data and np.prod(item.dims) and not whole(item):
                    item.raw_data = next(left).tobytes()
            large = sum(array.nbytes for array in arrays) > 1 << 30
            onnx.save_model(proto, out / name, save_as_external_data=large, location=f"{name}.data")
    except (ValueError, LookupError, TypeError, StopIteration, lzma.LZMAError) as error:
        raise Corrupt(f"{file} is damaged: {' '.join(str(error).split())[:120]}") from error
    except Exception as error:  # protobuf's own kinds of error
        if isinstance(error, Corrupt):
            raise Corrupt(f"{file} is damaged: {error}") from error
        if "protobuf" not in type(error).__module__:
            raise
        raise Corrupt(f"{file} is damaged: its graph cannot be read") from error


def whole(item: Any) -> bool:
    """Whether a constant carries its numbers in a typed field."""
    fields = (item.float_data, item.int32_data, item.int64_data, item.double_data, item.uint64_data, item.string_data)
    return any(len(field) for field in fields)


def tensor(data: bytes, base: int, how: str, at: int, sizes: list[int], count: int, size: int) -> np.ndarray:
    """One tensor's items, from its entry in the header."""
    streams, place = [], base + at
    for length in sizes:
        if length < 0 or place + length > len(data):
            raise ValueError("a stream lies beyond its end")
        streams.append(data[place : place + length])
        place += length
    return entropy.restore(how, streams, count, size) if how else np.frombuffer(streams[0], np.uint8)


def restore(artifact: Artifact, out: Path) -> Artifact:
    """Write the stock folder that the artifact was made of into the folder `out`; an artifact of its own format."""
    inner = artifact.manifest["inner"]
    for name in artifact.manifest["files"]:
        if name != MAIN:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.path / name, out / name)
    unpack(artifact.main, out)
    facts = {key: value for key, value in artifact.manifest.items() if key not in ("inner", "files")}
    return Artifact.seal(out, **facts | {"format": inner["format"], "main": inner["main"]})


def load(path: Path) -> "Checkpoint":
    """Open the folder as a Checkpoint: unpacked beside the system's temporary files while it is in use."""
    from wherry.checkpoint import Checkpoint

    folder = Path(tempfile.mkdtemp(prefix="wherry-compact-"))
    try:
        restore(Artifact.open(path), folder)
        found = Checkpoint.open(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(found.source, shutil.rmtree, folder, ignore_errors=True)
    return found


def decode(artifact: Artifact) -> Iterator[tuple[str, Any]]:
    """Every weight in float32, by the format that it was made of."""
    with tempfile.TemporaryDirectory() as folder:
        inner = restore(artifact, Path(folder))
        yield from shelf.find("formats", inner.format).decode(inner)


def command(artifact: Artifact) -> list[str]:
    """Copy-paste lines that load the result."""
    return [f"wherry export {artifact.path} -o OUT --format {artifact.manifest['inner']['format']}",
            f"wherry serve {artifact.path}"]  # fmt: skip


__all__ = ["MANIFEST", "check", "command", "decode", "load", "restore", "save"]
