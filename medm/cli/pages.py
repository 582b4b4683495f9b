"""The generated pages of docs/: `medm reference recipes` and `medm reference commands`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medm.cli.console import out

COMMANDS_HEADER = """\
# Commands

Every command and option, as `medm COMMAND --help` prints them. This page is written by `make docs`, and a test fails
when it is not current.

Results go to standard output, everything else to standard error. Exit status: 0 done; 1 failed, or something bad was
found; 2 wrong usage or a wrong recipe; 75 `train`, `infer` or `eval` was stopped by SIGTERM or SIGINT, and the same
command (`train` with `--resume`) continues; 143 or 130 another command was stopped by SIGTERM or SIGINT. An error that
you can fix is one message without a traceback; with `MEDM_TRACEBACK=1` in the environment it has one.

`--plugin FILE` may stand anywhere in a command. A model that was trained with parts of a plug-in needs it wherever it
is opened.
"""


def reference(
    context: typer.Context,
    page: Annotated[Literal["recipes", "commands"], typer.Argument(help="Which page.")],
    output: Annotated[
        Path | None, typer.Argument(help="File to write; standard output without it.")
    ] = None,
) -> None:
    """Write a generated page of docs/, in Markdown."""
    from medm.cli.reference import page as recipes_page

    text = recipes_page() if page == "recipes" else commands_page(context.find_root().command)
    if output is None:
        out.print(text, end="", markup=False)
    else:
        output.write_text(text, encoding="utf-8")


def commands_page(root: Any) -> str:
    """Return every command of a program, its arguments and options, in Markdown."""
    return "\n".join([COMMANDS_HEADER, *_sections(root, "medm", typer.Context(root))])


def _sections(command: Any, path: str, context: typer.Context) -> Iterator[str]:
    """One section a command, groups before their members."""
    if command.hidden:
        return
    members = getattr(command, "commands", {})
    shown = [
        parameter
        for parameter in command.get_params(context)
        if not parameter.hidden and "--help" not in parameter.opts
    ]
    usage = [_usage(parameter) for parameter in shown if not parameter.opts[0].startswith("-")]
    if not members or shown:
        yield f"## `{' '.join([path, *usage])}`\n\n{_prose(command.help)}\n"
        if shown:
            yield "| | |\n|---|---|\n" + "\n".join(_row(parameter) for parameter in shown) + "\n"
    for name, member in members.items():
        yield from _sections(member, f"{path} {name}", context)


def _usage(argument: Any) -> str:
    name = str(argument.name).upper() + (" ..." if argument.nargs != 1 else "")
    return name if argument.required else f"[{name}]"


def _row(parameter: Any) -> str:
    is_option = parameter.opts[0].startswith("-")
    names = (
        ", ".join(f"`{name}`" for name in parameter.opts)
        if is_option
        else f"`{str(parameter.name).upper()}`"
    )
    text = parameter.help or ""
    if is_option and parameter.required:
        text += " Required."
    elif is_option and parameter.default is not None and parameter.default is not False:
        text += f" Default: `{parameter.default}`."
    return f"| {names} | {text.replace('|', chr(92) + '|')} |"


def _prose(text: str | None) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))
