"""`/v1/chat/completions`: a conversation of OpenAI's form to a prompt, and the reply back."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse

from medm.serving.errors import ServingError
from medm.serving.schemas import IGNORED_HEADER, ChatBody, TextPart, ignored_fields, stops_of
from medm.serving.service import Service, generation_of, not_text
from medm.serving.worker import ReplyEnd, ReplyEvent, ReplyStream
from medm.types import JsonObject, Media, Role, Turn, TurnPart

CLIENT_LEFT = 499
_FINISH = {"stop": "stop", "length": "length"}
_SLOW_READER_SECONDS = 60
"""After which a client that does not read its stream is let go."""


@dataclass(slots=True)
class _Inbox:
    """Events of a stream, handed from the thread of the worker to the event loop."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[ReplyEvent] = field(default_factory=asyncio.Queue)

    def __call__(self, event: ReplyEvent) -> None:
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


def router(service: Service) -> APIRouter:
    """Return the routes of chat."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", summary="Reply to a conversation")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await _Reply(service, body, request).respond()

    return routes


class _Reply:
    """The reply to one request."""

    def __init__(self, service: Service, body: ChatBody, request: Request) -> None:
        self.service, self.body, self.request = service, body, request
        self.id = f"chatcmpl-{secrets.token_urlsafe(18)}"
        self.created = int(time.time())
        self.inbox = _Inbox()
        self.started = time.monotonic()
        self.headers: dict[str, str] = {}

    async def respond(self) -> Response:
        service, body = self.service, self.body
        service.require_model(body.model)
        ignored = ignored_fields(body.model_extra)
        if body.n not in (None, 1):
            raise ServingError("unsupported", "expected n = 1: one reply a request", param="n")
        stream = await service.in_thread(lambda: self._submit(ignored))
        if ignored:
            self.headers[IGNORED_HEADER] = ", ".join(ignored)
        service.metrics.tokens.labels("prompt").inc(stream.prompt_tokens)
        if body.stream:
            return EventSourceResponse(
                self._events(stream), headers=self.headers, send_timeout=_SLOW_READER_SECONDS
            )
        return await self._whole(stream)

    def _submit(self, ignored: list[str]) -> ReplyStream:
        body = self.body
        generation, without_effect = generation_of(body)
        ignored += without_effect
        parts = [
            (f"messages.{number}.content.{place}", part)
            for number, message in enumerate(body.messages)
            if isinstance(message.content, list)
            for place, part in enumerate(message.content)
        ]
        with self.service.sources(not_text(parts)) as sources:
            kinds = [source.kind for source in sources]
            return self.service.worker.submit(
                turns_of(body, kinds),
                [source.content for source in sources],
                generation=generation,
                max_new_tokens=body.max_completion_tokens or body.max_tokens,
                stop=stops_of(body.stop),
                task=body.task,
                listener=self.inbox,
            )

    async def _whole(self, stream: ReplyStream) -> Response:
        """Wait for the end, or for the client to leave."""
        left = asyncio.ensure_future(_until_left(self.request))
        try:
            while True:
                event = asyncio.ensure_future(self.inbox.events.get())
                await asyncio.wait({left, event}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    return Response(status_code=CLIENT_LEFT)
                found = event.result()
                self._note(found)
                if found.end is not None:
                    break
        finally:
            left.cancel()
            stream.cancel()
        end = _checked(found.end)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": end.text, "refusal": None},
            "logprobs": None,
            "finish_reason": _FINISH[end.finish],
        }
        body = self._object("chat.completion", [choice]) | {"usage": _usage(stream, end)}
        return JSONResponse(body, headers=self.headers)

    async def _events(self, stream: ReplyStream) -> AsyncIterator[dict[str, str]]:
        """Yield the reply as server-sent events. Closing the iterator frees the slot."""
        options = self.body.stream_options
        apart = options is not None and bool(options.include_usage)
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            while True:
                event = await self.inbox.events.get()
                self._note(event)
                if event.text:
                    yield self._chunk({"content": event.text})
                if event.end is not None:
                    break
            end = _checked(event.end)
            usage = _usage(stream, end)
            last = self._object("chat.completion.chunk", [_delta({}, _FINISH[end.finish])])
            yield _event(last if apart else last | {"usage": usage})
            if apart:
                yield _event(self._object("chat.completion.chunk", []) | {"usage": usage})
        except ServingError as error:
            yield _event(error.body())
        finally:
            stream.cancel()
        yield {"data": "[DONE]"}

    def _note(self, event: ReplyEvent) -> None:
        """Count a piece of the reply."""
        metrics = self.service.metrics
        if event.text and self.started:
            metrics.first_token.observe(time.monotonic() - self.started)
            self.started = 0.0
        if event.end is not None:
            metrics.tokens.labels("reply").inc(len(event.end.ids))

    def _chunk(self, delta: JsonObject) -> dict[str, str]:
        return _event(self._object("chat.completion.chunk", [_delta(delta, None)]))

    def _object(self, kind: str, choices: list[JsonObject]) -> JsonObject:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.service.name,
            "choices": choices,
        }


def turns_of(body: ChatBody, kinds: Sequence[str]) -> list[Turn]:
    """Return the conversation of a body.

    Parts of a message stand on lines of their own, as images do in medm's prompts.

    Args:
        body: the request.
        kinds: "image" or "volume" of each image and file, in order.

    Raises:
        ServingError: an image in another message than a user's, a system message behind others, or
            no question at the end.
    """
    turns: list[Turn] = []
    left = iter(kinds)
    for number, message in enumerate(body.messages):
        role: Role = "system" if message.role == "developer" else message.role
        place = f"messages.{number}"
        if role == "system" and any(turn.role != "system" for turn in turns):
            raise ServingError(
                "invalid_value", "system messages stand before all others", param=place
            )
        content: list[TurnPart] = []
        parts = [message.content] if isinstance(message.content, str) else message.content
        for part in parts:
            if isinstance(part, (str, TextPart)):
                item: TurnPart = part if isinstance(part, str) else part.text
            elif role == "user":
                item = Media(next(left))
            else:
                raise ServingError(
                    "invalid_value", "images stand in messages of the user", param=place
                )
            content += ["\n", item] if content else [item]
        if turns and turns[-1].role == role == "system":
            turns[-1] = Turn(role, (*turns[-1].content, "\n\n", *content))
        else:
            turns.append(Turn(role, tuple(content)))
    if turns[-1].role != "user":
        raise ServingError(
            "invalid_value", "expected a message of the user at the end", param="messages"
        )
    return turns


async def _until_left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _checked(end: ReplyEnd | None) -> ReplyEnd:
    """Return a complete reply. Raises `ServingError` for another one."""
    assert end is not None
    if end.error is not None:
        raise end.error
    if end.finish == "cancelled":
        raise ServingError("draining", "the server ended before the reply was complete")
    return end


def _usage(stream: ReplyStream, end: ReplyEnd) -> JsonObject:
    return {
        "prompt_tokens": stream.prompt_tokens,
        "completion_tokens": len(end.ids),
        "total_tokens": stream.prompt_tokens + len(end.ids),
    }


def _delta(delta: JsonObject, finish: str | None) -> JsonObject:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def _event(content: JsonObject) -> dict[str, str]:
    return {"data": json.dumps(content, ensure_ascii=False)}
