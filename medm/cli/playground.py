"""`medm playground`: a web page for a model from the command line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from medm.cli.console import note, out
from medm.cli.option_flags import Flag, Typed, flags_of


def flags() -> list[Flag]:
    """Return the flags of the command: every field of its options but the models."""
    from medm.serving.playground_options import PlaygroundOptions

    return flags_of(PlaygroundOptions, leave_out={"models"})


def playground(
    typed: Typed,
    *,
    model: Annotated[
        list[Path],
        typer.Option(help="Model folder that medm saved; given twice, two stand side by side."),
    ],
) -> None:
    """Serve a web page for one model or two: chat, masks, zero-shot. Not for clinical use.

    The page is for this machine alone; an address that other machines can reach needs --auth-file.
    Ctrl-C ends it and deletes the uploaded files.
    """
    from medm.config import validate
    from medm.errors import DeviceError
    from medm.serving.playground_options import PlaygroundOptions

    given = typed.under({"models": [str(folder) for folder in model]})
    shown = {**typed.shown, "models": "--model"}
    options = validate(PlaygroundOptions, given, source="medm playground", shown=shown)
    if find_spec("gradio") is None:
        raise DeviceError("medm playground needs gradio; pip install 'medm[playground]'")
    from medm.serving.playground import playground as run

    def listening(address: str) -> None:
        out.print(address, markup=False)
        note("Open this address in a browser of this machine. Ctrl-C ends the page.")
        note("Not for clinical use: replies can be wrong in every way.")

    run(options, on_listening=listening)
