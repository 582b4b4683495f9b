"""Small files of a model folder: looked at before a model is built from them.

A config may ask for any number of layers, and a tokenizer for any id: both would be built for ever.
The weights of the folder, which are compared with their checksums, show what is plausible.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import transformers
from safetensors import SafetensorError, safe_open

from medm.errors import CheckpointError, MedmError
from medm.models.manifest import changed_small_files
from medm.models.published.weights import read_object

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_TOKEN = 10_000_000
"""Largest plausible token id; the largest published vocabularies have 262,144."""
_LARGE_NUMBER = re.compile(rb":\s*(\d{8,})")
"""Values of eight digits and more in JSON."""
_MODULES = re.compile(r"layers|depth|blocks|stages|experts|n_layer|num_tasks")
"""Parts of names that count modules."""
_WIDTHS = re.compile(r"hidden_size|intermediate|vocab_size|d_model|ffn|mlp_dim|embed_dim|^dim$")
"""Parts of names of tensor sizes."""
_LEAST_MODULES, _LEAST_WIDTH = 1000, 2**20
"""Values that are let through whatever the weights hold."""
_JSON = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)


def _vocabulary_files(tokenizer_class: object) -> list[str]:
    """Return the files one of which a tokenizer needs; none for one of bytes, which has none."""
    found = (
        getattr(transformers, tokenizer_class, None) if isinstance(tokenizer_class, str) else None
    )
    if found is None:
        return ["tokenizer.json", "tokenizer.model", "vocab.txt"]
    return list(found.vocab_files_names.values())


def check_small_files(folder: Path) -> None:
    """Check the sizes that configs declare, and the ids of the tokenizer. Warn of changed files.

    Raises:
        CheckpointError: with the file and the field; also for a file that is no JSON object, and
            for a tokenizer that is missing.
    """
    if changed := changed_small_files(folder):
        missing = [name for name in changed if not (folder / name).is_file()]
        if needed := [name for name in missing if name in _JSON]:
            raise CheckpointError(
                f"{folder}: {', '.join(needed)} is missing, which its manifest.json lists; copy "
                "the folder again"
            )
        _warn_once(folder.absolute(), tuple(changed))
    for name in _JSON:
        if (folder / name).is_file():
            if name == "tokenizer.json":
                _check_ids(folder / name)
            else:
                _check_values(folder / name, read_object(folder / name))
    described = folder / "tokenizer_config.json"
    if described.is_file():
        names = _vocabulary_files(read_object(described).get("tokenizer_class"))
        if names and not any((folder / name).is_file() for name in names):
            raise CheckpointError(f"{folder}: tokenizer.json is missing; copy the folder again")
    tensors, width = _extent(folder)
    bounds = (
        (_MODULES, max(_LEAST_MODULES, tensors), f"the weights hold {tensors} tensors"),
        (_WIDTHS, max(_LEAST_WIDTH, 8 * width), f"the largest side of a tensor is {width}"),
    )
    for field, value in _numbers(read_object(folder / "config.json")):
        for pattern, limit, reason in bounds:
            if pattern.search(field.rpartition(".")[2]) and value > limit:
                raise CheckpointError(
                    f"{folder / 'config.json'}: {field}: expected at most {limit}, found "
                    f"{str(value)[:40]} ({reason}); the file is damaged, copy it again"
                )


def _check_values(file: Path, content: Mapping[str, object]) -> None:
    """Refuse values that transformers keeps unseen and the first question would meet."""
    for field in ("eos_token_id", "suppress_tokens"):
        ids = content.get(field) if file.name == "generation_config.json" else None
        for value in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if not _is_token_id(value) or (field == "suppress_tokens" and ids is value):
                expected = "a list of token ids" if field == "suppress_tokens" else "token ids"
                raise CheckpointError(
                    f"{file}: {field}: expected {expected}, found {str(value)[:40]!r}; the file is "
                    "damaged, copy it again"
                )
    length = content.get("model_max_length") if file.name == "tokenizer_config.json" else None
    if length is not None and (isinstance(length, bool) or not isinstance(length, (int, float))):
        raise CheckpointError(
            f"{file}: model_max_length: expected a number, found {str(length)[:40]!r}; the file is "
            "damaged, copy it again"
        )


def _is_token_id(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_TOKEN


@functools.lru_cache(maxsize=64)
def _warn_once(folder: Path, changed: tuple[str, ...]) -> None:
    """Warn of changed files; a command opens config, processor and weights one after another."""
    logger.warning(
        "%s: %s changed since the model was written (sha256 in manifest.json). If you did not "
        "edit it, copy the folder again",
        folder,
        ", ".join(changed),
    )


def opening(folder: Path, action: Callable[[], T], *, what: str) -> T:
    """Run an action that opens a part of a folder; any error of it names the files that changed.

    Raises:
        CheckpointError: the action failed.
    """
    try:
        return action()
    except CheckpointError:
        raise
    except BaseException as error:
        # A damaged file makes transformers raise nearly anything; tokenizers panics in Rust.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        changed = changed_small_files(folder)
        hint = f"; changed since it was written: {', '.join(changed)}" if changed else ""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if isinstance(error, MedmError):
            reason = str(error)
        raise CheckpointError(f"{folder}: {what} cannot be opened ({reason}){hint}") from None


def _check_ids(file: Path) -> None:
    data = file.read_bytes()
    if any(int(found[1]) > _MAX_TOKEN for found in _LARGE_NUMBER.finditer(data)):
        # The digits may stand in a token.
        large = [pair for pair in _numbers(read_object(file)) if pair[1] > _MAX_TOKEN]
        for field, value in large:
            raise CheckpointError(
                f"{file}: {field[-80:]}: expected an id of at most {_MAX_TOKEN}, found "
                f"{str(value)[:40]}; the file is damaged, copy it again"
            )


def _numbers(value: object, place: str = "") -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of nested JSON with their fields; those of a list by its name."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, place)


def count_values(folder: Path) -> int:
    """Return the numbers that the weights of a folder hold, by their headers.

    Raises:
        CheckpointError: a header is damaged.
    """
    return sum(math.prod(shape) for shape in _shapes(folder))


def _extent(folder: Path) -> tuple[int, int]:
    """Return the number of tensors of the weights, and the largest side of any, by the headers."""
    shapes = list(_shapes(folder))
    return len(shapes), max((side for shape in shapes for side in shape), default=0)


def _shapes(folder: Path) -> Iterator[list[int]]:
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()
                shapes: list[list[int]] = [opened.get_slice(name).get_shape() for name in names]
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{file}: cannot be opened ({error})") from None
        yield from shapes
