"""Job: everything that makes a run a run. Frozen; JSON in and out; its fingerprint names the run's working folder."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from wherry.errors import BadInput
from wherry.report import read_object, write_atomic
from wherry.shelf import suggest

LAYOUT = ("dp", "fsdp", "tp", "pp", "micro_batch", "recompute", "save_every", "keep", "eval_every", "threads",
          "timeout", "device", "cache")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run.

    model: folder, file or hub id of the student. out: what the run makes. teacher: a model, or the folder of a cache.
    top: the teacher's k likeliest classes are asked once and kept on disk; 0: the teacher stays in memory.
    data, held_out: text, table, folder or array file; several joined by `;`, each with `*WEIGHT` for its share.
    order: an array file of sample ids [updates, batch], what each update sees; "": shuffled, see `order`.
    recipe: the steps of `objective`. steps: updates, or 0 and epochs.
    batch: samples per update, over all ranks. micro_batch: samples at once on a rank; 0 = all of its share.
    length: tokens of a sample; 0 = 512, or less where the model has less.
    packing: "stream" cuts windows from the running text; "documents" packs whole documents, each blind to the others.
    stride: tokens from the start of a window to the next one's; 0 = length. overlap: tokens of a held-out window that
    are only context, so that each token is judged once; 0: windows side by side, the last tokens left out.
    augment: "", "flip", "crop" or "flip,crop"; pictures alone.
    learning_rate: of AdamW and SGD; Muon's matrices take it too, the rest `outer_rate` (0: the same).
    weight_decay: of weights with two axes or more; what Muon leaves to AdamW takes `outer_decay` (-1: the same).
    compile: forward and backward pass by torch.compile; language models, one process or dp. use_cache: keys and values
    are kept in the forward pass, as transformers does unless told; for nothing but the last bits of such a run.
    warmup, cooldown: updates; cooldown: of the schedule "trapezoid". clip: largest norm of the gradient, 0: none.
    norms: batch norms of a graph keep their statistics ("frozen") or gather them ("trained").
    dp, fsdp, tp, pp: ranks of each kind; dp 0: what is left over. recompute: activations again in the backward pass.
    save_every, keep: updates between checkpoints, and how many are kept. eval_every: updates between looks at held_out.
    timeout: seconds that a rank waits for the others. seed: order of the data, dropout. init_from: see `distill`.
    """

    model: str
    out: str
    data: str
    teacher: str = ""
    top: int = 0
    held_out: str = ""
    recipe: str = "ce"
    steps: int = 0
    epochs: float = 0.0
    batch: int = 8
    micro_batch: int = 0
    order: str = ""
    length: int = 0
    stride: int = 0
    overlap: int = 0
    packing: Literal["stream", "documents"] = "stream"
    augment: str = ""
    learning_rate: float = 1e-4
    outer_rate: float = 0.0
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    betas: str = "0.9,0.95"
    momentum: float = 0.9
    schedule: Literal["cosine", "linear", "constant", "trapezoid"] = "cosine"
    warmup: int = 0
    cooldown: int = 0
    weight_decay: float = 0.0
    outer_decay: float = -1.0
    clip: float = 1.0
    seed: int = 0
    norms: Literal["frozen", "trained"] = "frozen"
    dp: int = 0
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: bool = False
    compile: bool = False
    use_cache: bool = False
    save_every: int = 0
    keep: int = 2
    eval_every: int = 0
    init_from: str = ""
    resume: str = ""
    cache: str = ""
    device: str = "auto"
    threads: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value, kind = getattr(self, item.name), hints[item.name]
            options = get_args(kind)
            if options and value not in options:
                near = suggest(str(value), options)
                raise BadInput(f"{item.name}: '{value}' is none of {', '.join(options)}{near}")
        for name in ("batch", "fsdp", "tp", "pp", "keep"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("steps", "epochs", "micro_batch", "length", "stride", "overlap", "learning_rate", "outer_rate",
                     "warmup", "cooldown", "weight_decay", "clip", "dp", "save_every", "eval_every",
                     "seed"):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadInput(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.use_cache and self.packing == "documents":
            raise BadInput("use_cache=true would let packed documents see each other: packing=stream")
        if bool(self.steps) == bool(self.epochs):
            raise BadInput("give steps or epochs: how long to train")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Job":
        """Raises BadInput for a field that a job has not, or one that it lacks."""
        known = [item.name for item in dataclasses.fields(cls)]
        for name in data:
            if name not in known:
                raise BadInput(f"a job has no field '{name}'{suggest(name, known)}")
        for name in ("model", "out", "data"):
            if not isinstance(data.get(name), str):
                raise BadInput(f"a job needs '{name}'")
        hints = get_type_hints(cls)
        for name, value in data.items():
            kind = str if get_args(hints[name]) else hints[name]
            if not isinstance(value, (int, float) if kind is float else kind) or (kind is not bool and value is True):
                raise BadInput(f"the job's {name} must be {kind.__name__}, not {value!r}")
        return cls(**data)

    @classmethod
    def load(cls, path: str | Path) -> "Job":
        """Read what `save` wrote."""
        if not Path(path).is_file():
            raise BadInput(f"no such job: {path}")
        return cls.from_dict(read_object(Path(path)))

    def save(self, path: str | Path) -> None:
        """Write as JSON; a temporary name first."""
        write_atomic(Path(path), json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides the weights: not how many ranks there are, nor where things are written."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in (*LAYOUT, "out", "resume")}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
