"""Options: the arguments of the command line that several verbs share, by name."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(help="A folder with config.json or model.onnx, a .gguf or .onnx file, hub id.", show_default=False),
]
ArtifactPath = Annotated[Path, typer.Argument(help="A folder that wherry wrote, or a .gguf file.", show_default=False)]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to make; it must not exist.", show_default=False)]
RecipeText = Annotated[
    str | None,
    typer.Option(
        "--recipe", help='"METHOD:knob=value,..." (several joined by " | "), or a YAML file.', show_default=False
    ),
]
Samples = Annotated[int, typer.Option("--samples", help="Calibration windows or examples.")]
Length = Annotated[int, typer.Option("--length", help="Tokens of a window.")]
Seed = Annotated[int, typer.Option("--seed", help="How windows are drawn.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and the forecast; write nothing.")]
MaxKl = Annotated[float, typer.Option("--max-kl", help="Fail beyond this KL from the original, in nats per token.")]
MaxRatio = Annotated[float, typer.Option("--max-ratio", help="Fail beyond this perplexity, times the original's.")]
DataFile = Annotated[
    Path | None,
    typer.Option(
        "--data", help="A table, text, .npy, .npz, video; a folder of pictures or sounds.", show_default=False
    ),
]
Against = Annotated[
    str | None, typer.Option("--against", help="The original, to compare with.", show_default=False)
]
MaxBad = Annotated[float, typer.Option("--max-bad", help="Share of pictures or sounds that may be undecodable.")]
Runtime = Annotated[
    str, typer.Option("--runtime", help="A name of `wherry list runtimes` [:knob=value], or auto: the fastest here.")
]
Threads = Annotated[int, typer.Option("--threads", help="0 = all cores.")]
Json = Annotated[bool, typer.Option("--json", help="Print rows of what, where, value, unit as JSON, and nothing else.")]
