"""Shipped recipes as medm resolves them, every default filled in, compared with golden files.

A changed default changes every recipe that does not name the key. The golden files show it in
review.
Run as a script (`make golden`), this module renews the files.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import pytest

from medm.cli.recipes import shipped
from medm.training.recipe import dump, load_recipe, resolved

GOLDEN = Path(__file__).parent / "golden" / "recipes"
RENEW = "If the change is intended, run `make golden` and commit the files with it."
MACHINE_PATH = re.compile(r"(?:^|[\s'\":=])(?:/|~/|[A-Za-z]:\\)\w", re.MULTILINE)
"""A path from the root of a file system or from a home folder."""


def golden_file(name: str, folder: Path = GOLDEN) -> Path:
    """Return the golden file of a recipe: `medm-vl-2d/pretrain` has medm-vl-2d-pretrain.yaml."""
    return folder / f"{name.replace('/', '-')}.yaml"


def resolve(recipe: Path) -> str:
    return dump(resolved(load_recipe(recipe)))


def difference(recipe: Path, golden: Path) -> str:
    """Return a unified diff from the golden file to the resolved recipe; empty where they agree."""
    before = golden.read_text("utf-8").splitlines() if golden.is_file() else []
    after = resolve(recipe).splitlines()
    lines = difflib.unified_diff(before, after, golden.name, "resolved now", n=2, lineterm="")
    return "\n".join(lines)


def renew(folder: Path = GOLDEN) -> None:
    """Write the golden file of every shipped recipe and remove those of recipes that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {golden_file(name, folder): path for name, path in shipped().items()}
    for file in set(folder.glob("*.yaml")) - files.keys():
        file.unlink()
    for file, recipe in files.items():
        file.write_text(resolve(recipe), encoding="utf-8")


@pytest.mark.parametrize("name", sorted(shipped()))
def test_recipe_resolves_to_its_golden_file(name: str) -> None:
    changed = difference(shipped()[name], golden_file(name))
    assert not changed, f"{name} resolves to other values than its golden file.\n{RENEW}\n{changed}"


def test_every_golden_file_belongs_to_one_recipe() -> None:
    expected = [golden_file(name).name for name in shipped()]
    found = [file.name for file in GOLDEN.iterdir()]
    assert sorted(expected) == sorted(found), f"{GOLDEN.name}: files and recipes differ. {RENEW}"


def test_golden_files_hold_no_path_of_a_machine() -> None:
    named = {file.name: MACHINE_PATH.findall(file.read_text("utf-8")) for file in GOLDEN.iterdir()}
    assert not {name: found for name, found in named.items() if found}


@pytest.mark.parametrize("value", ["/data/x", "'/home/a/b'", "~/weights", "C:\\data"])
def test_a_path_of_a_machine_is_found(value: str) -> None:
    assert MACHINE_PATH.search(f"model:\n  path: {value}\n")


@pytest.mark.parametrize("value", ["data/x.json", "org/model", "0.5", "no", "'a / b'"])
def test_other_values_are_no_path_of_a_machine(value: str) -> None:
    assert not MACHINE_PATH.search(f"model:\n  path: {value}\n")


def test_changed_added_and_removed_keys_differ_until_renewed(tmp_path: Path) -> None:
    name, recipe = next(iter(shipped().items()))
    golden = golden_file(name, tmp_path)
    assert difference(recipe, golden), "a missing golden file is a difference"
    (tmp_path / "of-a-removed-recipe.yaml").write_text("seed: 0\n", encoding="utf-8")
    renew(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in GOLDEN.iterdir()}
    assert not difference(recipe, golden)

    lines = golden.read_text("utf-8").splitlines(keepends=True)
    for edited in (lines[1:], ["added: 1\n", *lines], ["kind: other\n", *lines[1:]]):
        golden.write_text("".join(edited), encoding="utf-8")
        assert difference(recipe, golden)


if __name__ == "__main__":
    renew()
