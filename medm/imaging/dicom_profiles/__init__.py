"""Profiles of header cleaning: the action for each DICOM element, as data."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from medm.config import read_yaml
from medm.errors import RecipeError, UnknownNameError, suggest
from medm.imaging.dicom import load_pydicom

Action: TypeAlias = Literal["X", "Z", "D", "U", "K", "S"]
"""Remove, empty, dummy value, another UID, keep, or a sequence that stays with its items cleaned."""

_FOLDER = Path(__file__).parent
_CODES: Mapping[str, Action] = {
    "X": "X", "Z": "Z", "D": "D", "U": "U", "X/Z": "Z", "X/D": "D", "Z/D": "D", "X/Z/D": "D",
    "X/Z/U*": "S",
}  # fmt: skip
"""Codes of PS3.15, Table E.1-1a, and what is done."""
_KEYS = {"description", "actions", "additions", "repeating", "extends", "keep"}


@dataclass(frozen=True, slots=True)
class Profile:
    """What is done with each element of a header."""

    name: str
    """Of the file, without its folder: it is written into the cleaned files."""
    description: str
    actions: Mapping[int, Action]
    """By tag."""
    repeating: Mapping[str, Action]
    """By tag in small letters with x for any digit."""

    def action(self, tag: int) -> Action | None:
        """Return the action for an element; None for one that the profile does not list."""
        found = self.actions.get(tag)
        if found is not None or tag >> 24 not in (0x50, 0x60):
            return found
        digits = f"{tag:08x}"
        for pattern, action in self.repeating.items():
            if all(known in ("x", digit) for known, digit in zip(pattern, digits, strict=True)):
                return action
        return None


def profile_names() -> list[str]:
    """Return the names of the profiles that are shipped."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


@functools.cache
def load_profile(name: str) -> Profile:
    """Return a profile by its name, or of a YAML file of one's own.

    A file may extend a profile, or another file whose path is relative to its folder.

    Raises:
        UnknownNameError: no profile of that name.
        RecipeError: the file is no profile, or extends itself.
    """
    return _load(name, Path(), ())


def _load(name: str, folder: Path, extending: tuple[Path, ...]) -> Profile:
    """Return a profile. `extending` are the files that extend it, one after the other."""
    path = _FOLDER / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")):
        path = folder / name
    elif name not in profile_names():
        raise UnknownNameError(
            "profile of header cleaning", name, profile_names(), hint="; or a YAML file of yours"
        )
    if path.resolve() in extending:
        raise RecipeError(f"{path}: extends: the file extends itself, at once or through others")
    content = read_yaml(path)
    if unknown := [key for key in content if key not in _KEYS]:
        raise RecipeError(f"{path}: unknown key {unknown[0]!r}{suggest(unknown[0], _KEYS)}")
    actions: dict[int, Action] = {}
    repeating: dict[str, Action] = {}
    if "extends" in content:
        base = _load(str(content["extends"]), path.parent, (*extending, path.resolve()))
        actions |= base.actions
        repeating |= base.repeating
    for key in ("actions", "additions"):
        for code, names in _listed(content, key, path).items():
            actions |= {_tag(keyword, path): _CODES[code] for keyword in names}
    for code, patterns in _listed(content, "repeating", path).items():
        repeating |= {pattern.lower(): _CODES[code] for pattern in patterns}
    kept = content.get("keep", [])
    if not isinstance(kept, list):
        raise RecipeError(f"{path}: keep: expected a list of DICOM keywords")
    actions |= {_tag(str(keyword), path): "K" for keyword in kept}
    return Profile(path.stem, str(content.get("description", "")), actions, repeating)


def _listed(content: Mapping[str, object], key: str, path: Path) -> Mapping[str, list[str]]:
    found = content.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(names, list) for names in found.values()):
        raise RecipeError(f"{path}: {key}: expected a list of elements for each action")
    for code in found:
        if code not in _CODES:
            raise RecipeError(f"{path}: {key}: unknown action {code!r}{suggest(str(code), _CODES)}")
    return found


def _tag(keyword: str, path: Path) -> int:
    load_pydicom()
    from pydicom.datadict import tag_for_keyword

    tag = tag_for_keyword(keyword)
    if tag is None:
        raise RecipeError(f"{path}: {keyword!r} is no keyword of DICOM, such as PatientName")
    return tag
