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
            help="merged: adapters merged into the weights. llava: transformers' "
            "LlavaForConditionalGeneration. encoder: a vision encoder for other recipes.",
        ),
    ],
    branch: Annotated[
        str | None, typer.Option(help="Whose encoder, where the model has several branches.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Image to compare with.  [default: a drawn one]")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Question to compare with.  [default: a fixed one]")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the reply that is compared.")] = 24,
    without_masks: Annotated[
        bool,
        typer.Option(
            "--without-masks",
            help="llava: write the words alone of a model that also answers with masks.",
        ),
    ] = False,
) -> None:
    """Write a model in another form, and verify it.

    The export gives the same logits, the same reply and the same masks, or nothing is written.

    A llava export runs in a process that cannot import medm. OUT also gets a README and the records
    of the model.
    """
    from medm.models.export.export import PROMPT
    from medm.models.export.export import export as run

    proof = run(
        model,
        target,
        form=form,
        branch=branch,
        image=image,
        prompt=prompt or PROMPT,
        max_new_tokens=max_new_tokens,
        without_masks=without_masks,
    )
    out.print(f"{target}: {proof}", markup=False)
    note("Not for clinical use.")


def import_(
    source: Annotated[str, typer.Argument(help="Published folder, file or Hugging Face id.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    kind: Annotated[
        Literal[
            "auto",
            "medm-vl",
            "llava",
            "internvl",
            "sa2va",
            "clip",
            "siglip",
            "m3d-clip",
            "medm-clip",
            "dual-encoder",
            "blip",
            "projector",
        ],
        typer.Option(help="What the source is; found out without it."),
    ] = "auto",
    llm: Annotated[
        str | None, typer.Option(help="Folder or id with the language model's config.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Folder or id with the encoder's config.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Template by name or file, if not the published one.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or id with the tokenizer, if a dual encoder or BLIP has none."),
    ] = None,
    preprocess: Annotated[
        list[str] | None,
        typer.Option(
            help="branch.key=value that replaces what is known, as in recipes; repeatable."
        ),
    ] = None,
) -> None:
    """Turn published weights into a medm checkpoint, an encoder bundle or a projector file.

    Every tensor is loaded or named with its reason, in OUT/import.json; nothing is skipped
    silently.
    """
    from medm.config import apply_overrides
    from medm.models.published.importing import import_model
    from medm.models.published.source_configs import Hints

    hints = Hints(llm, encoder, chat_template, apply_overrides({}, preprocess or []), tokenizer)
    for line in import_model(source, target, kind=kind, hints=hints).lines():
        out.print(line, markup=False)
    note("Not for clinical use.")


def estimate(
    recipe: Annotated[
        str, typer.Argument(help="A file, or a name that `medm list recipes` prints.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value ...")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the training state.")] = 1,
    length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens of a sample, vision tokens included; data.max_length without it."
        ),
    ] = None,
) -> None:
    """Print what a recipe costs in parameters, vision tokens and memory.

    Shows the trainable fraction, and the memory under each ZeRO stage.

    Memory holds the activations of one step and says on which GPU it fits.
    No weights are read; published configs and tokenizers come from local folders, the cache, or the
    hub.
    """
    from medm.cli.recipes import find, refuse_options
    from medm.models.estimate import estimate as run
    from medm.training.parts import apply_parts
    from medm.training.recipe import load_recipe

    refuse_options("estimate", [recipe, *(overrides or [])], known=["--gpus", "--help"])
    read = load_recipe(find(recipe), overrides or [])
    # On the meta device there is nothing to quantise; the sizes are counted all the same.
    parts = {
        name: part.model_copy(update={"quantize": "none"}) for name, part in read.parts.items()
    }
    result = run(
        read.model,
        choose=lambda model: apply_parts(model, parts, read.train, keep_float32=False),
        half=read.train.bf16 or read.train.fp16,
        optimiser=read.train.optim,
        gpus=gpus,
        quantized=[name for name, part in read.parts.items() if part.quantize == "4bit"],
        init_from=read.init_from,
        rows=read.train.per_device_train_batch_size,
        length=length or read.data.max_length,
    )
    _print_parts(result)
    out.print()
    for branch, count in result.tokens.items():
        items = result.items.get(branch, 1)
        tiles = f" at most, in {items} items (tiles and thumbnail)" if items > 1 else ""
        out.print(f"one {branch}: {count} tokens{tiles}")
    precision = "16 bits" if read.train.bf16 or read.train.fp16 else "32 bits"
    out.print(f"\nmemory on each of {gpus} GPU(s), {precision}, {read.train.optim}")
    if result.step is None:
        out.print(f"without activations ({result.unknown})\n", markup=False)
    else:
        step = result.step
        out.print(
            f"activations: {step.rows} samples of {step.length} tokens, {step.labels} of them "
            "learned at most\n"
        )
    lines = [
        (
            m.stage,
            *map(gibibytes, (m.weights, m.gradients, m.optimiser, m.activations, m.total)),
            m.fits_in(),
        )
        for m in result.memory
    ]
    rows(lines, header=["", "weights", "gradients", "optimizer", "activations", "sum", "fits in"])


def _print_parts(result: Estimate) -> None:
    lines = []
    for part in result.parts:
        lines.append(
            (
                part.name,
                f"{part.parameters:,}",
                f"{part.trainable:,}",
                share(part.trainable, part.parameters),
            )
        )
        lines += [
            (f"  {child.name}", f"{child.parameters:,}", f"{child.trainable:,}", "")
            for child in part.inner
        ]
    everything = (result.parameters, result.trainable)
    lines.append(
        ("all", f"{everything[0]:,}", f"{everything[1]:,}", share(everything[1], everything[0]))
    )
    rows(lines, header=["part", "parameters", "trainable", ""])


def share(trained: int, of: int) -> str:
    """`1.25 %`."""
    return f"{100 * trained / max(of, 1):.2f} %"


def gibibytes(size: float) -> str:
    """`12.5 GiB`, or MiB where that reads better."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
