"""Runs the commands of a page of the documentation as a reader does: in order, in one shell.

`medm` on the shell's path hands its words to this process, which runs them as the CLI tests do, so
that torch is imported once. What must be a process of its own (a server, and commands with a
plug-in, whose parts would stay registered) is one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import chdir, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from tests.cli.runner import Done, medm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MARK = "==== block {} of the page ===="
LOGGED = re.compile(
    r"what is trained|part  |llm  |\w+\.(encoder|connector)|step \d|the model is in"
)
BIN = Path(sys.executable).parent

RELAY = """\
import json, os, socket, sys
request = {"words": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as link:
    link.sendall(json.dumps(request).encode())
    link.shutdown(socket.SHUT_WR)
    answer = json.loads(link.makefile("rb").read())
for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
    stream.buffer.write(answer[name].encode())
    stream.flush()
sys.exit(answer["code"])
"""
SHIM = """\
#!/bin/sh
case "$1 $*" in
  "serve "*|*" --plugin "*) exec {bin}/medm "$@" ;;
esac
exec {bin}/python -S -E {relay} {port} "$@"
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page that was run."""

    language: str
    source: str
    printed: str
    """Both streams."""
    shown: str
    """What the page says that it prints, in a `text` block behind it; empty without one."""


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """Language and source of the fenced blocks of some languages on a page of docs/."""
    found = FENCE.finditer((DOCS / page).read_text("utf-8"))
    return [(fence[1], fence[2]) for fence in found if fence[1] in languages]


def run_page(
    page: str,
    folder: Path,
    *,
    environment: Mapping[str, str],
    replace: Mapping[str, str] | None = None,
) -> list[Block]:
    """Run the `bash` and `python` blocks of a page; stops at the first command that fails.

    Args:
        page: below docs/.
        folder: working directory.
        environment: variables beside those of this process.
        replace: what cannot be as it is written on every machine (a port), and what replaces it.
    """
    sources, shown = [], []
    for language, source in blocks(page, "bash", "python", "text"):
        for old, new in (replace or {}).items():
            source = source.replace(old, new)
        if language == "text":
            shown[-1] = source
        else:
            sources.append((language, source))
            shown.append("")
    script = ["set -euo pipefail"]
    for number, (language, source) in enumerate(sources):
        body = (
            source if language == "bash" else f"python - <<'PYTHON_BLOCK'\n{source}PYTHON_BLOCK\n"
        )
        script.append(f"echo; echo '{MARK.format(number)}'\n{body}")
    printed = run_script("\n".join(script), folder, environment)
    parts = re.split(re.escape(MARK).replace(r"\{\}", r"\d+") + "\n", printed)[1:]
    return [Block(*one) for one in zip(*zip(*sources, strict=True), parts, shown, strict=True)]


def not_printed(block: Block) -> list[str]:
    """Lines that the page shows behind a block and that the block did not print.

    `...` stands for anything, and spaces are not compared. Lines of the log of a training, which
    goes to the tests' own log, are left out.
    """
    printed = [" ".join(line.split()) for line in block.printed.splitlines()]
    missing = []
    for line in block.shown.splitlines():
        pattern = re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*")
        if not LOGGED.match(line) and not any(re.fullmatch(pattern, one) for one in printed):
            missing.append(line)
    return missing


def run_script(script: str, folder: Path, environment: Mapping[str, str]) -> str:
    """Run a script of bash whose `medm` is this process; returns what it printed.

    Raises:
        AssertionError: it failed; with what it printed.
    """
    with tempfile.TemporaryDirectory() as made, socket.create_server(("127.0.0.1", 0)) as server:
        shims = Path(made)
        (shims / "relay.py").write_text(RELAY)
        port = server.getsockname()[1]
        (shims / "medm").write_text(SHIM.format(bin=BIN, relay=shims / "relay.py", port=port))
        (shims / "medm").chmod(0o755)
        log = shims / "log"
        env = os.environ | dict(environment) | {"PATH": f"{shims}:{BIN}:{os.environ['PATH']}"}
        with log.open("w") as out:
            shell = subprocess.Popen(
                ["bash", "-c", script], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, start_new_session=True,
            )  # fmt: skip
        server.settimeout(0.05)
        try:
            while shell.poll() is None:
                with suppress(TimeoutError):
                    link, _ = server.accept()
                    with link:
                        answer(link)
        finally:
            with suppress(ProcessLookupError):  # also what a page started and did not end
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
        printed = log.read_text()
    assert shell.returncode == 0, printed[-6000:]
    return printed


def answer(link: socket.socket) -> None:
    """Run the command of a shim and send back what it printed."""
    link.settimeout(None)
    with link.makefile("rb") as stream:
        request = json.loads(stream.read())
    with (
        patch.dict(os.environ, request["environment"], clear=True),
        chdir(request["folder"]),
    ):
        done: Done = medm(*request["words"])
    link.sendall(json.dumps({"out": done.out, "err": done.err, "code": done.code}).encode())
