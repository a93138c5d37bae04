"""Roles: what each tensor of a model is, found from the structure without memory: linear, embedding, norm ..."""

import torch

from wherry.checkpoint import Checkpoint, stack

MULTIPLIED = ("linear", "convolution", "recurrent")
QUANTIZABLE = (*MULTIPLIED, "embedding", "head")
OUTSIDE = "outside of the blocks"
QUANTIZED = "already quantized"


def roles(checkpoint: Checkpoint) -> list[tuple[str, str, str]]:
    """(name, role, reason to leave it alone or "") of every tensor, found from the module's structure on meta."""
    if checkpoint.graph is not None:
        return checkpoint.graph.roles()
    module = checkpoint.skeleton()
    inside = stack(module) + "."
    places = checkpoint.places(module, some=checkpoint.apart)
    role: dict[str, tuple[str, str]] = {}
    find_head = getattr(module, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    tables = [m for m in module.modules() if isinstance(m, torch.nn.Embedding)]
    vocabulary = max((m.num_embeddings for m in tables), default=0)
    for path, child in module.named_modules():
        for leaf, _ in child.named_parameters(recurse=False):
            name = places.get(f"{path}.{leaf}" if path else leaf)
            if name is None:
                continue
            if isinstance(child, torch.nn.Embedding):
                large = child.num_embeddings == vocabulary
                found = ("embedding", "") if large else ("other", "a small table of positions or types")
            elif child is head:
                found = ("head", "") if leaf == "weight" else ("bias", "biases stay float")
            elif isinstance(child, torch.nn.Linear) and leaf == "weight":
                found = ("linear", "" if path.startswith(inside) else OUTSIDE)
            elif leaf == "bias":
                found = ("bias", "biases stay float")
            elif "norm" in type(child).__name__.lower():
                found = ("norm", "norms stay float")
            else:
                found = ("other", f"a parameter of {type(child).__name__}: only Linear and Embedding are quantized")
            if name not in role or role[name][0] == "head":
                role[name] = found
    out = []
    for name in checkpoint.names():
        alone = "one expert, which transformers computes with the others" if ".experts." in name else ""
        kind, why = role.get(name, ("other", alone or "not a parameter of the module"))
        if kind in QUANTIZABLE and checkpoint.scheme(name) is not None:
            why = QUANTIZED
        if "pooler" in name and kind == "linear":
            kind, why = "other", "the pooler is not used by this task"
        out.append((name, kind, why))
    return out
