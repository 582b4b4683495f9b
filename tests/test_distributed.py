"""What goes wrong on one process is told to all; defects keep their traceback."""

from __future__ import annotations

import pytest

from medm.distributed import failures
from medm.errors import DataError, MedmError


@pytest.mark.parametrize("kind", [MedmError, DataError, OSError, RuntimeError])
def test_an_error_that_may_befall_one_process_is_collected(kind: type[Exception]) -> None:
    def fails() -> None:
        raise kind("no room")

    assert failures(fails) == ["process 0: no room"]


def test_a_defect_is_not() -> None:
    def breaks() -> None:
        raise KeyError("no such branch")

    with pytest.raises(KeyError):
        failures(breaks)
