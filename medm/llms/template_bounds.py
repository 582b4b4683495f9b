"""Bounds of time and memory for chat templates, which are programs from somewhere else.

Jinja's sandbox keeps a template from the system, but lets it loop for days. A thread watches a
rendering and ends it from outside; between two watches a single operation may still take more.
"""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from medm.errors import RecipeError
from medm.limits import MAX_TEMPLATE_MEMORY, MAX_TEMPLATE_SECONDS

_INTERVAL = 0.05
_POWER = re.compile(r"\*\*|\*\s*\d{5,}|\d{5,}\s*\*|\|\s*(?:center|indent)\s*\(\s*\d{4,}")
"""Operations of which one alone can take all time or memory."""


class TemplateLimitError(RecipeError):
    """A chat template takes too much time or memory."""


class _Interrupt(BaseException):
    """Raised inside the template by the thread that watches it."""


def check_operations(template: str) -> None:
    """Refuse a template with powers and large repetitions, which no conversation needs.

    Raises:
        TemplateLimitError: with the operation.
    """
    for block in re.findall(r"\{[{%].*?[%}]\}", template, re.DOTALL):
        if found := _POWER.search(re.sub(r"'[^']*'|\"[^\"]*\"", "''", block)):
            raise TemplateLimitError(
                f"the model's chat template computes {found.group()!r}, which may take all time or "
                "memory; correct chat_template.jinja in the model folder, or set "
                "model.llm.chat_template to another one"
            )


@contextmanager
def bounded() -> Iterator[None]:
    """Run a block for at most `MAX_TEMPLATE_SECONDS`, with at most `MAX_TEMPLATE_MEMORY` more.

    The time is processor time of this thread, so that a busy machine is not the template's fault.

    Raises:
        TemplateLimitError: it took more.
    """
    thread = threading.get_ident()
    spent = _clock_of(thread)
    ended, guard = threading.Event(), threading.Lock()
    reasons: list[str] = []

    def watch() -> None:
        if ended.wait(_INTERVAL):  # nearly always: nothing is measured then
            return
        process = psutil.Process()
        before, deadline = process.memory_info().rss, spent() + MAX_TEMPLATE_SECONDS
        while not ended.wait(_INTERVAL):
            grown = process.memory_info().rss - before
            late = spent() >= deadline
            if not late and grown < MAX_TEMPLATE_MEMORY:
                continue
            with guard:
                if not ended.is_set():
                    reasons.append(
                        f"{MAX_TEMPLATE_SECONDS} s" if late else f"{grown / 2**30:.1f} GiB"
                    )
                    _raise_in(thread, _Interrupt)
            return

    threading.Thread(target=watch, name="chat-template", daemon=True).start()
    try:
        yield
    except _Interrupt:
        pass
    finally:
        with guard:
            ended.set()
        try:
            if reasons:
                _raise_in(thread, None)  # not raised yet
        except _Interrupt:
            pass
    if reasons:
        raise TemplateLimitError(
            f"the model's chat template took more than {reasons[0]} for one conversation; correct "
            "chat_template.jinja in the model folder, or set model.llm.chat_template to another one"
        )


def _clock_of(thread: int) -> Callable[[], float]:
    """Return the clock of the processor time of a thread; where there is none, that of the wall."""
    try:
        clock = time.pthread_getcpuclockid(thread)
    except AttributeError:  # macOS, Windows
        return time.monotonic
    return lambda: time.clock_gettime(clock)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Raise an exception in another thread at its next instruction; None takes it back."""
    raised = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
