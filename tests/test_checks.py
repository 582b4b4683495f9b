"""`make check` and the pre-commit hooks run the same targets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from medm.config import read_yaml

ROOT = Path(__file__).parents[1]
MAKE = "make --no-print-directory "


def targets_of_check(makefile: str) -> list[str]:
    """Return the prerequisites of `check` in a Makefile."""
    found = re.findall(r"^check:([^\n#]*)", makefile, flags=re.MULTILINE)
    assert len(found) == 1, f"expected one rule for `check` in the Makefile, found {len(found)}"
    return found[0].split()


def problems(makefile: str, hooks: list[dict[str, object]]) -> list[str]:
    """List what differs between the targets of `make check` and the hooks."""
    targets = targets_of_check(makefile)
    entries = [str(hook["entry"]) for hook in hooks]
    expected = [MAKE + target for target in targets]
    found = []
    if entries != expected:
        found.append(f"expected the hooks to run {expected}, found {entries}")
    for hook in hooks:
        # A hook that gets file names, or skips some, checks less than `make check`.
        settings = (hook.get("language"), hook.get("always_run"), hook.get("pass_filenames"))
        if settings != ("system", True, False):
            found.append(
                f"hook {hook['id']}: expected language: system, always_run: true and "
                f"pass_filenames: false, found {settings}"
            )
        if filters := {"files", "exclude", "types", "stages"} & hook.keys():
            found.append(f"hook {hook['id']}: remove {sorted(filters)}; `make check` has none")
    return found


def shipped_hooks() -> list[dict[str, object]]:
    repos = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repo["repo"] for repo in repos] == ["local"], "expected local hooks only"
    hooks: list[dict[str, object]] = repos[0]["hooks"]
    return hooks


def test_hooks_run_what_make_check_runs() -> None:
    found = problems((ROOT / "Makefile").read_text("utf-8"), shipped_hooks())
    assert not found, "Makefile and .pre-commit-config.yaml differ:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "check",
    ["check: lint types layers docs", "check: lint types", "check: types lint layers", "check:"],
)
def test_a_changed_target_is_noticed(check: str) -> None:
    assert problems(f"all: check\n{check}\n", shipped_hooks())


@pytest.mark.parametrize(
    "change",
    [
        {"entry": "ruff check ."},
        {"language": "python"},
        {"always_run": False},
        {"pass_filenames": True},
        {"exclude": "^tests/"},
        {"stages": ["manual"]},
    ],
)
def test_a_hook_that_checks_less_is_noticed(change: dict[str, object]) -> None:
    hooks = shipped_hooks()
    assert problems((ROOT / "Makefile").read_text("utf-8"), [hooks[0] | change, *hooks[1:]])
