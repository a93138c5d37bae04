"""What runs an ONNX file here, as functions of inputs by name: ONNX Runtime, and OpenVINO where installed."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from field import Feeds, Outputs, session

ENGINES = ("onnxruntime", "openvino")


def available(engine: str) -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec(engine) is not None


def load(engine: str, file: Path, threads: int) -> Callable[[Feeds], Outputs]:
    """An ONNX file, loaded."""
    return session(file, threads) if engine == "onnxruntime" else _openvino(file, threads)


def _openvino(file: Path, threads: int) -> Callable[[Feeds], Outputs]:
    import openvino

    from wherry.runtimes.openvino import name_of

    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    request = compiled.create_infer_request()
    wanted = {name for given in compiled.inputs for name in given.names}
    names = [name_of(output) for output in compiled.outputs]

    def run(feeds: Feeds) -> Outputs:
        request.infer({name: value for name, value in feeds.items() if name in wanted}, share_inputs=True)
        return {name: request.get_tensor(name).data.copy() for name in names}

    return run
