"""Every command, by name.

Command modules load only what `--help` needs; the package is imported inside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from medm import __version__
from medm.cli import (
    archive,
    catalogue,
    chat,
    convert,
    data,
    doctor,
    embed,
    evaluate,
    infer,
    launch,
    models,
    pages,
    playground,
    serve,
    split,
    train,
)
from medm.cli.console import out, start_logging
from medm.cli.option_flags import add_option_command
from medm.cli.running import LAUNCHER


class _Commands(TyperGroup):
    """The commands, with the messages of wrong options as a person would say them."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix(
                "Value error, "
            )  # pydantic's word for what typer raises
            raise


app = typer.Typer(
    cls=_Commands,
    help="Train, evaluate and deploy small medical vision-language models. Not for clinical use.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"medm {__version__}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            help="Python file that registers parts of your own; may be given several times.",
            metavar="FILE",
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options that stand before any command."""
    start_logging(verbose=verbose)
    if context.invoked_subcommand == LAUNCHER:  # these are for the processes that it starts
        context.obj = [f"--plugin={file}" for file in plugin or []] + ["--verbose"] * verbose
    elif plugin:
        from medm.registry import load_plugin

        for file in plugin:
            load_plugin(file)


app.command("list")(catalogue.list_parts)
app.add_typer(catalogue.recipes, name="recipes")
data.app.add_typer(convert.app, name="convert")
data.app.command("split")(split.split)
data.app.command("leaks")(split.leaks)
data.app.command("clean")(archive.clean)
data.app.command("fetch-dicomweb")(archive.fetch_dicomweb)
data.app.command("store-dicomweb")(archive.store_dicomweb)
app.add_typer(data.app, name="data")
# A recipe's keys that are typed as options of other trainers are answered by name
# (`recipes.refuse_options`).
app.command("train", context_settings={"ignore_unknown_options": True})(train.train)
app.command(
    LAUNCHER,
    cls=launch.LaunchCommand,
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
)(launch.launch)
add_option_command(app, "infer", infer.infer, infer.flags)
add_option_command(app, "eval", evaluate.evaluate, evaluate.flags)
app.command("chat")(chat.chat)
add_option_command(app, "serve", serve.serve, serve.flags)
add_option_command(app, "playground", playground.playground, playground.flags)
app.command("zero-shot")(embed.zero_shot)
add_option_command(app, "embed", embed.embed, embed.flags)
app.command("estimate", context_settings={"ignore_unknown_options": True})(models.estimate)
app.command("export")(models.export)
app.command("import")(models.import_)
app.command("doctor")(doctor.doctor)
app.command("reference", hidden=True)(pages.reference)
