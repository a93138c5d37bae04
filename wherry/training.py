"""The verbs that train, on the command line: train, distill, heal, launch."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from wherry.board import bar, show
from wherry.errors import BadInput
from wherry.options import DryRun, Json, Model, Out

app = typer.Typer()
BESIDE = ("ranks", "max_restarts", "more", "dry_run", "json", "out", "against", "tune")  # flags that are no fields
Text = Annotated[str, typer.Option("--data", help="Text, table, folder; several: a.txt*0.7;b.txt", show_default=False)]
Teacher = Annotated[str, typer.Option(help="The model to learn from.", show_default=False)]
HeldOut = Annotated[str, typer.Option(help="Data to judge on, before and after.", show_default=False)]
Steps = Annotated[int, typer.Option(help="Updates.", min=0)]
Epochs = Annotated[float, typer.Option(help="Passes over the data, in place of --steps.", min=0)]
Batch = Annotated[int, typer.Option(help="Samples of an update, over all ranks.", min=1)]
Rate = Annotated[float, typer.Option(help="Peak of the learning rate.")]
Ranks = Annotated[int, typer.Option(help="Processes on this machine.", min=1)]
Restarts = Annotated[int, typer.Option(help="Restarts of all ranks when one dies.", min=0)]
Trials = Annotated[
    str, typer.Option("--tune", help="Search the settings: trials=20,only=learning_rate;batch", show_default=False)
]
Start = Annotated[
    str, typer.Option(help="teacher, teacher:layers=N: begin with the teacher's layers.", show_default=False)
]
More = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other field of the job: --set clip=0.5 --set precision=bf16", show_default=False),
]


def made(fields: dict[str, Any], more: list[str] | None) -> Any:
    """The job of named fields and of `--set name=value`. Raises BadInput."""
    from typing import get_args, get_type_hints

    from wherry.knobs import coerce
    from wherry.train.job import Job

    hints = get_type_hints(Job)
    for item in more or ():
        name, equals, value = item.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise BadInput(f"--set {item}: NAME=VALUE is wanted")
        kind = hints.get(name, str)
        fields[name] = value if get_args(kind) else coerce("--set", name, value, kind)
    return Job.from_dict(fields)


def ran(job: Any, ranks: int, restarts: int, dry_run: bool, json: bool, tune: str = "") -> None:
    """Run a job here, in place or with torchrun, or search its settings, and show its report."""
    from wherry.train import launch, loop, watch

    if dry_run:
        show(planned(job, ranks), json)
        return
    if tune:
        if ranks > 1:
            raise BadInput("--tune runs each trial on one process; --tune trials=N,ray=true runs many trials at once")
        from wherry.train import trials

        wanted = trials.Tune.parse(tune)
        with bar() as progress:
            show(trials.search(job, wanted, progress), json)
        return
    if ranks == 1 and not restarts:
        with bar() as progress:
            result = loop.run(job, progress)
    else:
        result = launch.here(job, ranks, restarts)
    show(watch.report(result, []), json)


def planned(job: Any, ranks: int) -> Any:
    """What a run would do: its fields, the layout of its ranks, the student's size. Reads no data."""
    from wherry.objective import Objective
    from wherry.report import Report
    from wherry.train import mesh

    report = Report(f"plan: {Objective.parse(job.recipe)}")
    sizes = mesh.layout(job, ranks)
    report.add("ranks", "", ranks, note=" x ".join(f"{name} {size}" for name, size in sizes.items()))
    report.add("samples of a rank", "", job.batch // (sizes["dp"] * sizes["fsdp"]), note="in each update")
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if value != field.default:
            report.add(field.name, "", value)
    return report


@app.command()
def train(
    model: Model, out: Out, data: Text, recipe: Annotated[str, typer.Option(help="Steps, joined by ' | '.")] = "ce",
    teacher: Teacher = "", held_out: HeldOut = "", steps: Steps = 0, epochs: Epochs = 0.0, batch: Batch = 8,
    micro_batch: Annotated[int, typer.Option(help="Samples at once on a rank; 0 = its share.", min=0)] = 0,
    length: Annotated[int, typer.Option(help="Tokens of a sample; 0 = 512 or the model's.", min=0)] = 0,
    learning_rate: Rate = 1e-4, optimizer: Annotated[str, typer.Option(help="adamw, sgd, muon.")] = "adamw",
    warmup: Annotated[int, typer.Option(help="Updates until the peak.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the order of the data, and of dropout.", min=0)] = 0,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32", ranks: Ranks = 1,
    dp: Annotated[int, typer.Option(help="Data-parallel ranks; 0 = what is left.", min=0)] = 0,
    fsdp: Annotated[int, typer.Option(help="Ranks that share weights (FSDP2).", min=1)] = 1,
    tp: Annotated[int, typer.Option(help="Ranks that share layers (tensor parallel).", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages (1F1B).", min=1)] = 1,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints; 0 = ten minutes.", min=0)] = 0,
    max_restarts: Restarts = 0, tune: Trials = "", more: More = None, dry_run: DryRun = False, json: Json = False,
) -> None:  # fmt: skip
    """Train a language model, a classifier or an ONNX graph, on one process or many."""
    fields = {k: v for k, v in locals().items() if k not in BESIDE}
    ran(made(fields | {"out": str(out)}, more), ranks, max_restarts, dry_run, json, tune)


@app.command()
def distill(
    model: Model, out: Out, data: Text, teacher: Teacher,
    recipe: Annotated[str, typer.Option(help="Steps, joined by ' | '.")] = "kl",
    init_from: Start = "",
    held_out: HeldOut = "", steps: Steps = 0, epochs: Epochs = 0.0, batch: Batch = 8, learning_rate: Rate = 1e-4,
    ranks: Ranks = 1, max_restarts: Restarts = 0, tune: Trials = "", more: More = None, dry_run: DryRun = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Teach a student by a teacher's logits (and more: see `--recipe`)."""
    fields = {k: v for k, v in locals().items() if k not in BESIDE}
    ran(made(fields | {"out": str(out)}, more), ranks, max_restarts, dry_run, json, tune)


@app.command()
def heal(
    model: Model, out: Out, data: Text,
    against: Annotated[str, typer.Option(help="The model that it was made from.", show_default=False)],
    recipe: Annotated[str, typer.Option(help="Steps, joined by ' | '.")] = "kl",
    held_out: HeldOut = "", steps: Steps = 200, batch: Batch = 8, learning_rate: Rate = 1e-4,
    ranks: Ranks = 1, max_restarts: Restarts = 0, tune: Trials = "", more: More = None, dry_run: DryRun = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Train a pruned or rounded model against its original, for a short while."""
    fields = {k: v for k, v in locals().items() if k not in BESIDE}
    ran(made(fields | {"out": str(out), "teacher": against}, more), ranks, max_restarts, dry_run, json, tune)


@app.command()
def launch(
    job: Annotated[Path, typer.Argument(help="A job.json, as the nodes will see it.", show_default=False)],
    on: Annotated[str, typer.Option(help="slurm, kubeflow, ray.", show_default=False)],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write; else printed.")] = None,
    name: Annotated[str, typer.Option(help="Of the run.")] = "wherry",
    nodes: Annotated[int, typer.Option(help="Machines.", min=1)] = 1,
    ranks: Annotated[int, typer.Option(help="Processes on each.", min=1)] = 8,
    image: Annotated[str, typer.Option(help="Container with wherry, for kubeflow and ray.")] = "",
    max_restarts: Restarts = 3,
    hours: Annotated[float, typer.Option(help="Longest time, for slurm.")] = 24.0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Without GPUs.")] = False,
) -> None:
    """Write the file that SLURM, Kubeflow or Ray takes, to run a job with torchrun on many nodes."""
    from wherry.journal import vacant
    from wherry.report import write_atomic
    from wherry.train import launch as files
    from wherry.train import mesh
    from wherry.train.job import Job

    if job.is_file():  # here too: then the layout can be checked
        mesh.layout(Job.load(job), nodes * ranks)
    text = files.file(
        str(job), on, name, nodes, ranks, image=image, restarts=max_restarts, hours=hours, gpus=not cpu
    )  # fmt: skip
    if out is None:
        print(text, end="")
        return
    vacant(out)
    write_atomic(out, text)
