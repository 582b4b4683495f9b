"""Writes one launcher beside this file for each benchmark that `medm list tasks` prints.

Run it again when a task is added: `python scripts/eval/write_launchers.py`.
"""

from __future__ import annotations

from pathlib import Path

from medm.registry import Entry
from medm.tasks import TASKS

TEMPLATE = """#!/usr/bin/env bash
# {summary}. Further arguments go to `medm eval`.
MODEL=${{MODEL:-work_dirs/medm-vl-{branch}/finetune}}
DATA=${{DATA:-data/{name}}}  # the benchmark's folder as it is distributed
OUTPUT=${{OUTPUT:-work_dirs/eval}}
GPUS=${{GPUS:-}}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${{NODES:-1}}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval --model "$MODEL" --task {name} --data "$DATA" --output "$OUTPUT" "$@"
"""

OF_VOLUMES = ("m3d-", "ct-rate-")
"""Beginnings of the names of benchmarks over volumes."""


def launcher(entry: Entry) -> str:
    """The text of one launcher."""
    branch = "ct" if entry.name.startswith(OF_VOLUMES) else "2d"
    return TEMPLATE.format(name=entry.name, summary=entry.summary, branch=branch)


def launchers() -> dict[str, str]:
    """File name to text; `custom` needs a file and metrics of one's own and has none."""
    return {f"{entry.name}.sh": launcher(entry) for entry in TASKS.entries() if entry.name != "custom"}


if __name__ == "__main__":
    for name, text in launchers().items():
        file = Path(__file__).with_name(name)
        file.write_text(text, encoding="utf-8")
        file.chmod(0o755)
