"""`medm chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medm.cli.console import err, note, out, report
from medm.errors import MedmError

if TYPE_CHECKING:
    from medm.inference.chat import Conversation
    from medm.inference.mask_writing import MaskWriter

HELP = (
    "/image FILE   /volume FILE   add one to the next question;   /reset   start over;   /quit   "
    "leave"
)


def chat(
    model: Annotated[str, typer.Option(help="Model folder that medm saved.")],
    image: Annotated[
        list[str] | None, typer.Option(help="Image before the first question; may be repeated.")
    ] = None,
    volume: Annotated[
        list[str] | None, typer.Option(help="Volume before the first question.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Task name, for models whose experts are chosen by the task.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply in tokens.")] = 512,
    temperature: Annotated[
        float, typer.Option(help="0 for greedy decoding; above 0, replies are sampled.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens of this total probability.")
    ] = 1.0,
    masks: Annotated[
        str | None,
        typer.Option(
            help="Folder for the masks of replies, of a model with a mask head. Default: a new "
            "folder medm-chat-DATE-TIME."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        Literal["saved", "float32", "bfloat16", "float16"],
        typer.Option(help="Precision of the weights."),
    ] = "saved",
) -> None:
    """Chat with a model about images and volumes, in several turns. Not for clinical use."""
    from medm.config import validate
    from medm.inference.chat import Conversation
    from medm.inference.generator import load_engine, pick_device
    from medm.inference.mask_writing import MaskWriter, series_choice
    from medm.inference.options import GenerationOptions
    from medm.inference.segmenter import Segmenter

    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    options = validate(GenerationOptions, given, source="medm chat")
    engine, processor = load_engine(model, options, device=pick_device(device), dtype=dtype)
    segmenter = writer = None
    if engine.model.masks is not None:
        segmenter = Segmenter(engine)
        folder = Path(masks or time.strftime("medm-chat-%Y%m%d-%H%M%S"))
        several = series_choice(segmenter.preprocess)
        writer = MaskWriter(folder, beside=folder, overlays=True, several=several)
    conversation = Conversation(engine, processor, system=system, task=task, segmenter=segmenter)
    for branch, files in (("image", image), ("volume", volume)):
        for file in files or []:
            conversation.show(branch, file)
    note("Not for clinical use: replies can be wrong in every way.")
    note(HELP)
    for line in _lines():
        if line in ("/quit", "/exit"):
            return
        try:
            respond(conversation, line, writer)
        except MedmError as error:
            report(str(error))
        except KeyboardInterrupt:  # ends the reply, not the conversation
            out.print()


def _lines() -> Iterator[str]:
    """Yield the lines that are typed or come through a pipe, without empty ones."""
    while True:
        if sys.stdin.isatty():
            err.print("> ", end="", style="bold")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def respond(conversation: Conversation, line: str, writer: MaskWriter | None = None) -> None:
    """One line of the person: a command, or a question whose reply is printed as it comes.

    Masks of the reply are saved by `writer`, and their files named.
    """
    command, _, rest = line.partition(" ")
    if command in ("/image", "/volume"):
        conversation.show(command.removeprefix("/"), rest.strip())
        note(f"{rest.strip()} goes with the next question")
    elif command == "/reset":
        conversation.reset()
        note("the conversation starts over")
    elif command.startswith("/"):
        note(HELP)
    else:
        for piece in conversation.ask(line):
            out.print(piece, end="", markup=False)
        out.print()
        if writer is not None and conversation.grounded is not None:
            name = f"reply-{conversation.replies:02d}"
            written = writer.spans_of(name, conversation.grounded, conversation.sources)
            for span in written:
                if span["mask"] is not None:
                    file = writer.folder / span["mask"]
                    note(f"{span['phrase'] or 'mask'}: {span['voxels']} voxels  {file}")
