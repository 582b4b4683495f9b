"""The pinned environments belong to the ranges that pyproject.toml declares."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALLED_EXTRAS = ("text-metrics", "surface-metrics", "plot", "dicom", "quickstart", "dev")


def requirements() -> Iterator[Requirement]:
    lines = [*PROJECT["dependencies"]]
    for extra in INSTALLED_EXTRAS:
        lines += PROJECT["optional-dependencies"][extra]
    for line in lines:
        requirement = Requirement(line)
        if requirement.name != "medm":
            yield requirement


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


@pytest.mark.parametrize("name", ["locked", "oldest"])
def test_every_requirement_is_pinned_inside_its_range(name: str) -> None:
    pinned = pins(name)
    outside = {
        str(requirement): str(pinned.get(canonicalize_name(requirement.name)))
        for requirement in requirements()
        if canonicalize_name(requirement.name) not in pinned
        or not requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])
    }
    assert not outside, "run make lock"


def test_the_oldest_versions_are_the_declared_floors() -> None:
    pinned = pins("oldest")
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        if requirement.name in (
            "torch",
            "tokenizers",
        ):  # one CPU build is at hand; transformers decides tokenizers
            continue
        (floor,) = [
            Version(part.version) for part in requirement.specifier if part.operator == ">="
        ]
        held = pinned[canonicalize_name(requirement.name)]
        assert held.release[: len(floor.release)] == floor.release, f"{line}: oldest.txt has {held}"


def test_every_dependency_has_a_ceiling() -> None:
    open_ended = [
        line
        for line in PROJECT["dependencies"]
        if "<" not in {s.operator for s in Requirement(line).specifier}
    ]
    assert open_ended == []


def test_the_makefile_installs_the_torch_of_the_lock() -> None:
    assert f"TORCH ?= torch=={pins('locked')['torch']}\n" in (ROOT / "Makefile").read_text(
        encoding="utf-8"
    )
