"""SIGTERM and SIGINT from the start of a command to its end."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Any, NoReturn

import pytest

from medm.stopping import RESUMABLE, Stopped, StopSignals
from tests.cli.runner import medm

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("resumable", "status"), [(True, RESUMABLE), (False, None)])
def test_a_stop_ends_a_command_at_once(
    number: signal.Signals, resumable: bool, status: int | None
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    stops = StopSignals()
    with pytest.raises(Stopped) as stopped, stops.handled(resumable=resumable):
        send(number)
    assert stopped.value.code == (128 + number if status is None else status)
    assert stopped.value.number == number
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_deferred_stop_is_noted_and_the_first_one_counts() -> None:
    stops = StopSignals()
    with stops.handled(resumable=True), stops.deferred():
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert stops.received is signal.SIGTERM
    assert stops.received is None, "the next command of this process starts anew"


def test_a_library_is_deferred_without_a_command() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stops = StopSignals()
    with stops.deferred(), stops.deferred():
        send(signal.SIGTERM)
        assert stops.received is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stop_that_a_library_swallowed_is_seen_when_training_begins() -> None:
    stops = StopSignals()
    with stops.handled(resumable=True):
        with suppress(BaseException):  # as in a destructor
            send(signal.SIGTERM)
        with stops.deferred():
            assert stops.received is signal.SIGTERM


COMMANDS = {
    ("train", "quickstart/finetune"): ("medm.training.recipe.load_recipe", RESUMABLE),
    ("infer", "--model", "m", "--data", "d", "--output", "o"): ("medm.config.validate", RESUMABLE),
    ("launch", "--processes", "1", "train", "x"): ("medm.training.recipe.load_recipe", RESUMABLE),
}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("words", list(COMMANDS))
def test_commands_that_continue_end_with_75_before_there_is_anything_to_save(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], number: signal.Signals
) -> None:
    target, status = COMMANDS[words]

    def interrupt(*_: Any, **__: Any) -> NoReturn:
        send(number)
        raise AssertionError("the signal was not handled")

    monkeypatch.setattr(target, interrupt)
    monkeypatch.setattr("medm.cli.recipes.find", lambda name: name)
    done = medm(*words)
    assert done.code == status
    assert (
        done.err
        == f"stopped by {number.name}; the same command starts again (train: with --resume)\n"
    )
    assert "Traceback" not in done.err


@pytest.mark.parametrize("number", SIGNALS)
def test_other_commands_end_with_the_number_of_the_signal(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr("medm.cli.catalogue.rows", lambda *_, **__: send(number))
    assert medm("list", "connectors").code == 128 + number
