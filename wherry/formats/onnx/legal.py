"""What a plan may ask of ONNX Runtime on a CPU: found before any work, with the nearest that works."""

import math

from wherry.cargo import unread
from wherry.errors import Unsupported
from wherry.graph.blocks import block_size, container
from wherry.recipe import Plan, PlanRow
from wherry.scheme import Row, Scheme, Tensor, Token

# architectures whose graph onnxruntime-genai's builder draws and our tests have run -> its class
DECODERS = {
    "LlamaForCausalLM": "LlamaModel",
    "MistralForCausalLM": "MistralModel",
    "Qwen2ForCausalLM": "QwenModel",
    "Qwen3ForCausalLM": "Qwen3Model",
    "SmolLM3ForCausalLM": "SmolLM3Model",
    "GraniteForCausalLM": "GraniteModel",
}


def check(plan: Plan) -> dict[str, str]:
    """Notes per tensor name.

    Raises:
        Unsupported: an architecture, or a tensor's scheme, that cannot be written; names the nearest that can.
    """
    generator = plan.task.kind == "text-generation"
    if generator:
        architecture(plan.config)
    notes = {row.name: note for row in plan.taken() if (note := tensor(row, generator))}
    if said := unread(plan.config, "ONNX Runtime"):
        name = plan.rows[0].name
        notes[name] = "; ".join(filter(None, [notes.get(name, ""), said]))
    return notes


def graph(plan: Plan) -> dict[str, str]:
    """Notes on the weights of an ONNX graph. Raises Unsupported for a scheme that its operators cannot hold."""
    notes = {}
    for row in plan.taken():
        assert row.scheme
        try:
            if row.role != "linear" or row.scheme.activations is not None:
                small = row.role == "convolution" and row.scheme.activations is None and row.scheme.bits == 2
                fits = row.scheme.bits == 8 or small
                if not fits or not isinstance(row.scheme.grain, Row) or not row.scheme.symmetric:
                    raise Unsupported(
                        f"{row.scheme}: a {row.role} weight takes 8 bits, symmetric, a scale per row; "
                        "use W8A8_STATIC, W8A8, or W8A16"
                    )
                continue
            if isinstance(row.scheme.grain, Row) and row.scheme.bits == 8 and row.scheme.symmetric:
                continue
            bits = container(row.scheme)
            block_size(row.scheme, row.shape[-1])
            if bits != row.scheme.bits:
                notes[row.name] = f"{row.scheme.bits}-bit codes live in {bits}-bit blocks: no bytes saved"
        except Unsupported as error:
            raise Unsupported(f"onnx, {row.name}: {error}") from error
    return notes


def architecture(config: dict) -> str:
    """Name of the builder's class that draws this language model.

    Raises Unsupported when none was tried, and for attention in windows: the builder cuts them otherwise.
    """
    name = (config.get("architectures") or ["?"])[0]
    if name not in DECODERS:
        known = ", ".join(DECODERS)
        raise Unsupported(
            f"{name} is not exported to ONNX; these are: {known}.\nWrite GGUF or compressed-tensors instead."
        )
    tokens = config.get("vocab_size")
    if tokens is not None and tokens in (config.get("intermediate_size"), config.get("hidden_size")):
        raise Unsupported(
            f"{name} has as many tokens as a layer has outputs, {tokens}: the builder of the graph would "
            "take that layer for the head.\nWrite GGUF or compressed-tensors instead."
        )
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and window < config.get("max_position_embeddings", 0):
        raise Unsupported(
            f"{name} attends in windows of {window}: beyond them the graph gives other logits (KL 5e-3 measured).\n"
            f"Write GGUF, or set sliding_window to null in config.json for texts of up to {window} tokens."
        )
    return DECODERS[name]


def tensor(row: PlanRow, generator: bool) -> str:
    """The note of one planned tensor, or an empty string. Raises Unsupported."""
    assert row.scheme
    scheme = row.scheme
    try:
        if scheme.activations is not None:
            return integer(scheme, scheme.activations, generator)
        if len(row.shape) != 2:
            raise Unsupported(f"a weight of shape {row.shape} has no ONNX operator: only matrices have")
        bits, size = container(scheme), block_size(scheme, row.shape[-1])
    except Unsupported as error:
        raise Unsupported(f"onnx, {row.name}: {error}") from error
    notes = [f"its correction of rank {scheme.rank} is two MatMuls in float"] if scheme.rank else []
    if bits != scheme.bits:
        notes.append(f"{scheme.bits}-bit codes live in {bits}-bit blocks: no bytes saved")
    if isinstance(scheme.grain, Row):
        notes.append(f"the scale of a row is written once for each block of {size}")
    return "; ".join(notes)


def bytes_of(plan: Plan, row: PlanRow) -> int:
    """Bytes of one tensor in the file: blocks with float32 scales, int8 rows of integer products, float32."""
    n, k = math.prod(row.shape[:-1]), row.shape[-1]
    if row.scheme is None:
        return 4 * n * k
    scheme = row.scheme.by_rows
    if scheme.activations is not None:
        return n * (k + 4)
    bits, groups = container(scheme), k // block_size(scheme, k)
    zeros = 0 if scheme.symmetric else n * -(-groups * bits // 8)
    return n * (k * bits // 8 + 4 * groups) + zeros + 4 * scheme.rank * (n + k)


def besides(plan: Plan) -> int:
    """Bytes of the file that are no weight, at most: the graph, sines and cosines of positions, padding to 64 KiB."""
    config = plan.config
    width = config.get("head_dim") or config.get("hidden_size", 0) // max(config.get("num_attention_heads", 1), 1)
    positions = 4 * width * config.get("max_position_embeddings", 0)
    padding = sum(65536 for row in plan.rows if bytes_of(plan, row) > 1 << 20)
    return 50_000 + 3000 * len(plan.rows) + positions + padding


def integer(scheme: Scheme, activations: Scheme, generator: bool) -> str:
    """The note of a weight that is multiplied in integers. Raises Unsupported."""
    if generator:
        raise Unsupported(f"{scheme}: language models keep float activations in ONNX; use W8A16 or W4A16")
    if scheme.bits != 8 or activations.bits != 8:
        raise Unsupported(f"{scheme}: integer products are 8 bits by 8 bits; use W8A8_STATIC or W8A8")
    if not isinstance(scheme.grain, Row) or not scheme.symmetric:
        raise Unsupported(f"{scheme}: integer products want one symmetric scale per row; use W8A8_STATIC or W8A8")
    if not isinstance(activations.grain, Token if activations.dynamic else Tensor):
        raise Unsupported(
            f"{scheme}: activations are scaled per token (dynamic) or per tensor (static); use W8A8_STATIC or W8A8"
        )
    if activations.dynamic and not activations.symmetric:
        raise Unsupported(f"{scheme}: dynamic activations are symmetric; use W8A8")
    return ""
