"""`medm doctor`: the environment that a bug report needs, and what is known to fail in it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medm import __version__
from medm.cli.console import note, out, rows

if TYPE_CHECKING:
    from medm.environment import Package


def doctor(
    cache: Annotated[
        list[Path] | None,
        typer.Option(
            help="Volume or feature cache whose size is printed; may be given several times.",
            metavar="DIR",
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print versions, devices, extras, sizes of caches, and known incompatibilities.

    Reads no model and no data, and asks no hub. The exit status is 1 when something is known to
    fail.
    """
    from medm.environment import folder, incompatibilities, packages

    found = packages()
    own = [one for one in found if one.extra is None]
    extras: dict[str, list[Package]] = {}
    for one in found:
        if one.extra is not None:
            extras.setdefault(one.extra, []).append(one)
    machine, problems = _machine(), list(incompatibilities(found))
    caches = [folder("Hugging Face hub", _hub_cache()), folder("torch extensions", _extensions())]
    caches += [folder("cache", path) for path in cache or []]
    if json_output:
        report = {
            "medm": __version__,
            **machine,
            "packages": {one.name: one.installed for one in own},
            "extras": {
                name: {one.name: one.installed for one in several}
                for name, several in extras.items()
            },
            "caches": {str(one.path): one.size for one in caches},
            "problems": problems,
        }
        out.print(json.dumps(report, indent=2), markup=False)
    else:
        rows([("medm", __version__), *((name, str(value)) for name, value in machine.items())])
        out.print()
        rows(
            [(one.name, one.installed or "-", one.wanted or "any", one.state) for one in own],
            header=["package", "installed", "tested range", ""],
        )
        out.print()
        rows(
            [(f"medm[{name}]", _state_of(several)) for name, several in sorted(extras.items())],
            header=["extra", ""],
        )
        out.print()
        rows(
            [(one.what, f"{one.size / 2**30:.2f} GiB", str(one.path)) for one in caches],
            header=["cache", "size", "folder"],
        )
        out.print()
        for line in problems:
            out.print(f"problem: {line}", markup=False)
        if not problems:
            note("No known incompatibility.")
    if problems:
        raise typer.Exit(1)


def _state_of(several: list[Package]) -> str:
    missing = [one.name for one in several if one.state == "missing"]
    return f"missing: {', '.join(missing)}" if missing else "installed"


def _machine() -> dict[str, object]:
    """Return the machine and its devices, in words."""
    import psutil
    import torch

    memory, free = psutil.virtual_memory(), shutil.disk_usage(Path.cwd()).free
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    machine: dict[str, object] = {
        "Python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory": f"{memory.total / 2**30:.0f} GiB, {memory.available / 2**30:.0f} GiB free",
        "disk": f"{free / 2**30:.0f} GiB free here",
        "torch build": f"{torch.__version__}, {cuda}",
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            machine[f"GPU {index}"] = (
                f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {bf16}"
            )
    elif torch.version.cuda:
        machine["GPU"] = "none: this build of torch has CUDA, and no driver or device was found"
    else:
        machine["GPU"] = "none: this build of torch runs on CPUs"
    machine["hub"] = "offline" if os.environ.get("HF_HUB_OFFLINE") else "may be asked for configs"
    return machine


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _extensions() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
