"""`medm zero-shot` and `medm embed`: dual encoders from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from medm.cli.console import note, out, report, rows
from medm.cli.infer import CalmProgress
from medm.cli.option_flags import Flag, Typed, flags_of


def zero_shot(
    files: Annotated[list[str], typer.Argument(help="Images, or volumes for a 3-D model.")],
    model: Annotated[str, typer.Option(help="Folder of a dual encoder that medm saved.")],
    labels: Annotated[str, typer.Option(help='Two or more labels, separated by ";": "a; b".')],
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="Sentence with {} for the label; several, each with its own --template, are an "
            "ensemble. Default: the label alone."
        ),
    ] = None,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Print a JSON object a file in place of a table.")
    ] = False,
    heatmap: Annotated[
        Path | None,
        typer.Option(
            help="Folder for images that show how similar each patch is to each label.",
            metavar="DIR",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        Literal["saved", "float32", "bfloat16", "float16"],
        typer.Option(help="Precision of the weights."),
    ] = "saved",
) -> None:
    """Give the probability of each label for images or volumes. Not for clinical use.

    Probabilities are over the labels that are named, and no other possibility exists for them; a
    model with a bias (SigLIP) judges each label by itself. They are not calibrated. The exit status
    is 1 where a file cannot be read.
    """
    from medm.errors import MedmError
    from medm.inference.embedder import load_embedder
    from medm.inference.generator import pick_device
    from medm.inference.zero_shot import judge, split_labels

    names = split_labels(labels)
    embedder = load_embedder(model, device=pick_device(device), dtype=dtype)
    failed = 0
    for found in judge(embedder, files, names, template or ("{}",), heatmaps=heatmap):
        if json_lines:
            line = {"file": found.file, "probabilities": found.probabilities}
            maps = {label: str(path) for label, path in found.maps.items()}
            line |= {"heatmaps": maps} if maps else {}
            line |= {"error": found.error} if found.error is not None else {}
            out.print(json.dumps(line, ensure_ascii=False), markup=False, soft_wrap=True)
        elif found.error is None:
            out.print(found.file, style="bold", markup=False)
            ranked = sorted(found.probabilities.items(), key=lambda item: -item[1])
            rows([(f"  {label}", f"{probability:.4f}") for label, probability in ranked])
            for path in found.maps.values():
                note(f"  {path}")
        if found.error is not None:
            failed += 1
            report(found.error)
    note("Not for clinical use: probabilities are over these labels alone, and not calibrated.")
    if failed:
        raise MedmError(f"{failed} of {len(files)} files could not be read")


def flags() -> list[Flag]:
    """Return the flags of `medm embed`: the fields of its options."""
    from medm.inference.options import EmbedOptions

    return flags_of(EmbedOptions, leave_out=_LEFT_OUT)


_LEFT_OUT = (
    "data", "vectors", "class_texts",
    "studies.answers", "studies.beams", "studies.max_length", "studies.min_length",
)  # fmt: skip


def embed(
    typed: Typed,
    data: Annotated[
        str,
        typer.Argument(
            help="Annotation file of pairs (JSON, JSONL, CSV, TSV; captions may be missing), or a "
            "folder of images or volumes."
        ),
    ],
) -> None:
    """Write the vectors of images or volumes: JSONL, NPZ or Parquet by the ending of --output.

    Vectors have length 1. A run that was stopped resumes with the same command, which also tries
    every file again that could not be read. Not for clinical use.
    """
    from medm.config import validate
    from medm.errors import MedmError
    from medm.inference.embedding_files import embed as run
    from medm.inference.options import EmbedOptions

    section = typed.under({"data": data})
    options = validate(EmbedOptions, section, source="medm embed", shown=typed.shown)
    summary = run(options, progress=CalmProgress())
    if summary is None:
        return
    out.print(
        f"{summary.records} records: {summary.answered} with a vector, {summary.errors} without"
    )
    if summary.resumed:
        note(f"{summary.resumed} of them by earlier runs")
    note(f"{options.output}. Not for clinical use.")
    if summary.errors:
        raise MedmError(
            f"no vector of {summary.errors} of {summary.records} records; the 'error' of their "
            "lines says why. Correct the cause and run the same command again"
        )
