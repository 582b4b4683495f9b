"""One question to several models at once: their replies while they are generated, and masks."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from medm.errors import MedmError
from medm.inference.chat import with_tokens
from medm.inference.options import GenerationOptions
from medm.inference.segmenter import Grounded
from medm.serving.errors import as_serving_error
from medm.serving.playground_session import Session, Sessions
from medm.serving.worker import ReplyEnd, ReplyEvent, ReplyStream, Worker
from medm.types import Media, Turn, TurnPart


@dataclass(slots=True)
class Answer:
    """The reply of one model."""

    text: str = ""
    tokens: int = 0
    stream: ReplyStream | None = None
    end: ReplyEnd | None = None
    error: str | None = None
    """Why there is no reply, or no masks of it."""
    grounded: Grounded | None = None
    """Masks of the reply, from a model with a mask head."""
    segmenting: bool = False
    """The masks are being made."""

    @property
    def state(self) -> str:
        """The state of the reply, for people."""
        if self.error is not None:
            return f"Error: {self.error}"
        if self.segmenting:
            return f"{self.tokens} tokens; the masks are being made"
        if self.end is None:
            return f"{self.tokens} tokens so far"
        ends = {"length": ", the longest reply that the settings allow", "cancelled": ", stopped"}
        return f"{self.tokens} tokens{ends.get(self.end.finish, '')}"


def ask(
    sessions: Sessions,
    session: Session,
    workers: Mapping[int, Worker],
    question: str,
    *,
    generation: GenerationOptions,
    task: str | None = None,
) -> Iterator[dict[int, Answer]]:
    """Yield the replies to one question, by the number of the model, as they grow.

    Turns are kept for each model that replies. Leaving the loop early cancels all replies. Where
    the conversation is forgotten meanwhile, the loop ends and nothing is kept.

    Args:
        sessions: hold the uploads.
        session: of the page.
        workers: the models, by number.
        question: of the user.
        generation: settings, the longest reply included.
        task: kind of task, for models whose experts are chosen by it.
    """
    conversation = session.turns  # another object once the conversation was forgotten
    content: list[TurnPart] = []
    for file in session.pending:
        content += [Media(file.kind), "\n"]
    turn = Turn("user", (*content, question))
    shown = {number: [*session.shown.get(number, []), *session.pending] for number in workers}
    events: queue.SimpleQueue[tuple[int, ReplyEvent]] = queue.SimpleQueue()
    answers = {number: Answer() for number in workers}
    with ExitStack() as stack:
        try:
            used = {file.id for files in shown.values() for file in files}
            stack.enter_context(sessions.store.using(used))
        except MedmError as error:
            yield {number: Answer(error=str(error)) for number in workers}
            return
        stack.callback(session.stop)
        for number, worker in workers.items():

            def listen(event: ReplyEvent, number: int = number) -> None:
                events.put((number, event))

            turns = [*conversation.get(number, []), turn]
            try:
                stream = worker.submit(
                    turns,
                    [file.path for file in shown[number]],
                    generation=generation,
                    max_new_tokens=generation.max_new_tokens,
                    task=task,
                    listener=listen,
                )
            except MedmError as error:
                answers[number].error = str(error)
                continue
            answers[number].stream = stream
            session.streams.append(stream)
            stack.callback(session.streams.remove, stream)
        yield answers
        for _ in _collect(events, answers):
            if session.turns is not conversation:
                return
            yield answers
        if session.turns is not conversation:
            return
        for number, answer in answers.items():
            if answer.end is not None and answer.error is None:
                reply = Turn("assistant", _parts(workers[number], answer.end))
                conversation.setdefault(number, []).extend((turn, reply))
                session.shown[number] = shown[number]
        if any(answer.error is None for answer in answers.values()):
            session.pending = []
        yield from _segment(workers, answers)


def _collect(
    events: queue.SimpleQueue[tuple[int, ReplyEvent]], answers: Mapping[int, Answer]
) -> Iterator[None]:
    """Add the events to the answers until all have ended; several at once are one step."""
    while any(one.end is None and one.error is None for one in answers.values()):
        found = [events.get()]
        with suppress(queue.Empty):
            while True:
                found.append(events.get_nowait())
        for number, event in found:
            answer = answers[number]
            answer.text += event.text
            answer.tokens = event.tokens
            if event.end is not None:
                answer.end = event.end
                answer.tokens = len(event.end.ids) or answer.tokens
                if event.end.error is not None:
                    answer.error = str(event.end.error)
                elif event.end.finish == "cancelled":  # the worker does not repeat the text
                    answer.end = ReplyEnd("cancelled", answer.text, event.end.ids)
        yield


def _segment(
    workers: Mapping[int, Worker], answers: dict[int, Answer]
) -> Iterator[dict[int, Answer]]:
    """Make the masks of complete replies of models with a mask head."""
    for number, answer in answers.items():
        stream = answer.stream
        done = answer.end is not None and answer.end.finish != "cancelled"
        if stream is None or not done or answer.error or not workers[number].has_masks:
            continue
        answer.segmenting = True
        yield answers
        try:
            answer.grounded = workers[number].segment(stream).result()
        except MedmError as error:
            answer.error = f"no masks: {as_serving_error(error)}"
        answer.segmenting = False
        yield answers


def _parts(worker: Worker, end: ReplyEnd) -> tuple[TurnPart, ...]:
    """Return a reply as parts of a turn, with its control tokens where masks belong to them."""
    if not (worker.has_masks and end.ids):
        return (end.text,)

    def decoded() -> tuple[TurnPart, ...]:
        assert worker.engine is not None
        return with_tokens(worker.engine.processor.decode_with_control_tokens(end.ids))

    return worker.call(decoded, continues=True).result()
