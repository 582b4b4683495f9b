"""`medm export`, `medm import`, `medm estimate`: models in other forms, and what they cost."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from medm.cli.console import note, out


def export(
    target: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    model: Annotated[str, typer.Option(help="Model folder that medm saved.")],
    form: Annotated[
        Literal["merged", "llava", "encoder"],
        typer.Option(
            "--format",
            help="merged: adapters folded in. llava: transformers' LlavaForConditionalGeneration. "
            "encoder: a vision tower for other recipes.",
        ),
    ],
    branch: Annotated[str | None, typer.Option(help="Whose encoder, where the model has several branches.")] = None,
    image: Annotated[str | None, typer.Option(help="Picture to prove with; a drawn one without it.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Question to prove with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the reply that is compared.")] = 24,
) -> None:
    """Write a model in another form, and prove it: the same logits and the same reply, or nothing is written.

    A llava export is run in a process that cannot import medm.
    """
    from medm.models.export import PROMPT
    from medm.models.export import export as run

    proof = run(
        model, target, form=form, branch=branch, image=image, prompt=prompt or PROMPT, max_new_tokens=max_new_tokens
    )
    out.print(f"{target}: {proof}", markup=False)
    note("Not for clinical use.")
