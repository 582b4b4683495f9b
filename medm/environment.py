"""What is installed beside medm, and what is known not to work together. Torch-free."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

NOT_USERS_EXTRAS = frozenset({"dev"})
_IMPORT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Package:
    """One requirement of medm."""

    name: str
    wanted: str
    """Range of versions that the tests pass at both ends of; empty: any."""
    installed: str | None
    extra: str | None = None
    """The extra that asks for it; None: medm itself."""

    @property
    def state(self) -> str:
        """`ok`, `missing`, or `untested` for a version outside the range."""
        if self.installed is None:
            return "missing"
        asked = Requirement(f"{self.name}{self.wanted}").specifier
        return "ok" if asked.contains(self.installed, prereleases=True) else "untested"


@dataclass(frozen=True, slots=True)
class Folder:
    """A cache on this machine."""

    what: str
    path: Path
    size: int
    """Bytes of its files; 0 where there is no folder."""


def packages() -> list[Package]:
    """Return the requirements of medm and of its extras, those of `dev` left out."""
    found = [_package(line) for line in metadata.requires("medm") or ()]
    return [
        one for one in found if one.name != "medm" and (one.extra or "") not in NOT_USERS_EXTRAS
    ]


def _package(line: str) -> Package:
    asked = Requirement(line)
    extra = None
    if asked.marker is not None:
        _, _, behind = str(asked.marker).partition("extra ==")
        extra = behind.strip(" \"'") or None
    wanted = ",".join(sorted(map(str, asked.specifier), reverse=True))  # the floor first
    return Package(asked.name, wanted, version_of(asked.name), extra)


def version_of(name: str) -> str | None:
    """Return the installed version of a package, None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def incompatibilities(required: list[Package]) -> Iterator[str]:
    """Yield what is known to fail in this environment: what was found, and what to do.

    Args:
        required: see `packages`.
    """
    for one in required:
        if one.extra is None and one.state == "missing":
            yield f"{one.name} is missing; medm needs it: pip install '{one.name}{one.wanted}'"
        elif one.state == "untested":
            yield (
                f"{one.name} {one.installed} is outside the range {one.wanted} that medm is tested "
                f"with: pip install '{one.name}{one.wanted}'"
            )
    if shutil.which("nvidia-smi") and (version_of("torch") or "").endswith("+cpu"):
        yield (
            "torch is a build for CPUs, and this machine has an NVIDIA driver: install a CUDA "
            "build of torch (docs/versions.md)"
        )
    # transformers imports torchvision wherever it is found, for every image processor.
    if importlib.util.find_spec("torchvision") is not None and (reason := _fails("torchvision")):
        yield (
            f"torchvision is installed and cannot be imported ({reason}), so that transformers' "
            "image processors fail; medm does not need it: pip uninstall torchvision timm "
            "open_clip_torch"
        )
    if importlib.util.find_spec("kernels") is not None and not _offline():
        yield (
            "the package kernels is installed: a config may make transformers download compiled "
            "code from the hub. medm never asks for it; uninstall it, or set HF_HUB_OFFLINE=1"
        )


def _fails(module: str) -> str | None:
    """Return why a module cannot be imported, tried in a process of its own."""
    command = [sys.executable, "-P", "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"it takes more than {_IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def _offline(environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def folder(what: str, path: Path) -> Folder:
    """Return the size of a folder. Links are not followed; files that vanish count nothing."""
    size = 0
    for place, _, names in os.walk(path):
        for name in names:
            try:
                size += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118 (many files)
            except OSError:
                continue
    return Folder(what, path, size)
