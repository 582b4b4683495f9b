"""`medm export`, `medm import`, `medm estimate`: models in other forms, and what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medm.cli.console import note, out, rows

if TYPE_CHECKING:
    from medm.models.estimate import Estimate


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


def estimate(
    recipe: Annotated[str, typer.Argument(help="A file, or a name that `medm list recipes` prints.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value ...")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the training state.")] = 1,
) -> None:
    """Print what a recipe costs: parameters, trainable share, memory per ZeRO stage, vision tokens.

    No weights are read; published configs and tokenizers come from local folders, the cache, or the hub.
    """
    from medm.cli.recipes import find
    from medm.models.estimate import estimate as run
    from medm.training.parts import apply_parts
    from medm.training.recipe import load_recipe

    read = load_recipe(find(recipe), overrides or [])
    # On the meta device there is nothing to quantise; the sizes are counted all the same.
    parts = {name: part.model_copy(update={"quantize": "none"}) for name, part in read.parts.items()}
    result = run(
        read.model,
        choose=lambda model: apply_parts(model, parts, read.train, keep_float32=False),
        half=read.train.bf16 or read.train.fp16,
        optimiser=read.train.optim,
        gpus=gpus,
        quantized=[name for name, part in read.parts.items() if part.quantize == "4bit"],
        init_from=read.init_from,
    )
    _print_parts(result)
    out.print()
    for branch, count in result.tokens.items():
        out.print(f"one {branch}: {count} tokens")
    precision = "16 bits" if read.train.bf16 or read.train.fp16 else "32 bits"
    out.print(f"\nbytes on each of {gpus} GPU(s), {precision}, {read.train.optim}; activations come on top\n")
    lines = [(m.stage, *map(gibibytes, (m.weights, m.gradients, m.optimiser, m.total))) for m in result.memory]
    rows(lines, header=["", "weights", "gradients", "optimiser", "sum"])


def _print_parts(result: Estimate) -> None:
    lines = []
    for part in result.parts:
        lines.append((part.name, f"{part.parameters:,}", f"{part.trainable:,}", share(part.trainable, part.parameters)))
        lines += [(f"  {child.name}", f"{child.parameters:,}", f"{child.trainable:,}", "") for child in part.inner]
    everything = (result.parameters, result.trainable)
    lines.append(("all", f"{everything[0]:,}", f"{everything[1]:,}", share(everything[1], everything[0])))
    rows(lines, header=["part", "parameters", "trainable", ""])


def share(trained: int, of: int) -> str:
    """`1.25 %`."""
    return f"{100 * trained / max(of, 1):.2f} %"


def gibibytes(size: float) -> str:
    """`12.5 GiB`, or MiB where that reads better."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
