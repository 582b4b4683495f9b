"""Loading of torch and DeepSpeed checkpoints without running code in them.

DeepSpeed reads its files with `weights_only=False`, so an untrusted checkpoint could run code.
Inside `safe_loading` every `torch.load` of the process is weights-only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch

from medm.errors import CheckpointError


def _restore_indexed_cpu(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


# transformers before 5.24 loads an optimizer to "cpu:0" when several processes train on CPUs; torch
# knows "cpu" alone. The priority is one that no package of torch has: equal ones cannot be sorted.
torch.serialization.register_package(15, lambda _storage: None, _restore_indexed_cpu)

_FORCE, _FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def safe_loading(classes: tuple[type, ...] = ()) -> Iterator[None]:
    """Refuse pickled objects in every file that torch reads inside.

    Args:
        classes: allowed classes besides tensors and plain values.

    Raises:
        CheckpointError: a file holds anything else; none of its code was run.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORBID)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(list(classes)):
            yield
    except UnpicklingError as error:
        raise CheckpointError(
            "a checkpoint holds more than tensors and plain values, and was not loaded "
            f"({_first_line(error)}). It was not written by this run, or was tampered with"
        ) from None
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _first_line(error: Exception) -> str:
    text = str(error)
    _, found, rest = text.partition("WeightsUnpickler error: ")
    return (rest if found else text).strip().splitlines()[0]
