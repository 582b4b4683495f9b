"""The page of the playground: its components (gradio) and what their events do."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic import ValidationError

from medm.errors import MedmError
from medm.inference.options import GenerationOptions
from medm.serving.file_types import TAKEN
from medm.serving.playground_chat import Answer, ask
from medm.serving.playground_session import Session, Sessions
from medm.serving.playground_viewer import FILES, Views, describe, viewer
from medm.serving.playground_zero_shot import Scores, read_labels, score
from medm.serving.worker import Worker, random_seed

NOTICE = (
    "Not for clinical use. Replies, masks and probabilities can be wrong in every way. Files stay "
    "on this server, are deleted when the page is closed, and nothing is logged."
)
STATIC = "medm/static"
HEAD = "".join(
    f'<script defer src="{STATIC}/{name}"></script>' for name in ("niivue.umd.js", "viewer.js")
) + f'<link rel="stylesheet" href="{STATIC}/viewer.css">'  # fmt: skip
_DEFAULT_LENGTH = 256


def theme() -> gr.Theme:
    """Return the look of the page, with fonts of the user's system alone."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Default(primary_hue="teal", font=sans, font_mono=mono)


@dataclass(frozen=True, slots=True)
class Playground:
    """What the events of a page use."""

    workers: Mapping[int, Worker]
    """Ready ones, by the number of their model."""
    names: Sequence[str]
    """Of the models."""
    sessions: Sessions
    views: Views

    def of_kind(self, kind: str) -> dict[int, Worker]:
        """Return the models of a kind."""
        return {number: one for number, one in self.workers.items() if one.kind == kind}


def build_page(play: Playground) -> gr.Blocks:
    """Return the page. Models that reply are asked in chat, dual encoders for labels."""
    chats, duals = play.of_kind("lvlm"), play.of_kind("dual-encoder")
    with gr.Blocks(title="medm playground", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f'<div class="medm-notice" role="note">{html.escape(NOTICE)}</div>')
        sections = [(chats, "Chat", _chat_section), (duals, "Zero-shot", _zero_shot_section)]
        present = [section for section in sections if section[0]]
        for workers, name, build in present:
            if len(present) == 1:
                build(play, workers)
            else:
                with gr.Tab(name):
                    build(play, workers)

        def closed(request: gr.Request) -> None:
            play.sessions.close(_page(request))

        page.unload(closed)
    return page


def _page(request: gr.Request) -> str:
    assert request.session_hash is not None
    return request.session_hash


def _upload(section: str) -> gr.File:
    return gr.File(
        label="Add an image or volume",
        height=130,
        elem_id=f"{section}-upload",
    )


def _add(play: Playground, session: Session, path: str | None) -> None:
    """Keep an upload for the next question; the copy of gradio is deleted."""
    if path is None:
        return
    copy = Path(path)
    try:
        with copy.open("rb") as stream:
            file = play.sessions.store.add(stream, copy.stat().st_size)
    finally:
        copy.unlink(missing_ok=True)
    session.files.append(file)
    session.pending.append(file)


def _add_and_view(play: Playground, session: Session, path: str | None) -> dict[str, Any] | None:
    try:
        _add(play, session, path)
        return _view(play, session)
    except MedmError as error:
        raise _shown_error(error) from None


def _view(play: Playground, session: Session) -> dict[str, Any] | None:
    return play.views.of_file(session, session.files[-1]) if session.files else None


def _shown_error(error: Exception) -> gr.Error:
    return gr.Error(str(error), print_exception=False)


def _chat_section(play: Playground, workers: Mapping[int, Worker]) -> None:
    viewers: list[gr.HTML] = []
    chats: list[gr.Chatbot] = []
    states: list[gr.HTML] = []
    with gr.Row():
        for number in workers:
            with gr.Column(min_width=320):
                gr.Markdown(f"**{play.names[number]}**", elem_classes="medm-model")
                side = gr.Row if len(workers) == 1 else gr.Column
                with side():
                    with gr.Column(min_width=320, scale=3):
                        viewers.append(gr.HTML(viewer(None, f"chat-{number}")))
                    with gr.Column(min_width=280, scale=2):
                        chats.append(_chatbot(number))
                        states.append(gr.HTML(elem_id=f"state-{number}"))
    with gr.Row(equal_height=True):
        upload = _upload("chat")
        with gr.Column(scale=3):
            waiting = gr.HTML(_waiting([]), elem_id="waiting")
            question = gr.Textbox(
                label="Question", lines=1, max_lines=6, elem_id="question", submit_btn=False
            )
            with gr.Row():
                send = gr.Button("Ask", variant="primary", elem_id="ask")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
                restart = gr.Button("New conversation", elem_id="restart")
    settings = _settings(workers)
    outputs = [question, waiting, *viewers, *chats, *states]

    def added(path: str | None, request: gr.Request) -> list[Any]:
        with play.sessions.handling(_page(request)) as session:
            view = _add_and_view(play, session, path)
        shown = [viewer(view, f"chat-{number}") for number in workers]
        return [None, _waiting([describe(session.pending)]), *shown]

    def asked(text: str | None, *values: Any, request: gr.Request) -> Iterator[dict[Any, Any]]:
        with play.sessions.handling(_page(request)) as session:
            try:
                with session.replying():
                    yield from replies(session, text or "", values)
            except ValidationError as error:
                raise _shown_error(MedmError(error.errors()[0]["msg"])) from None
            except MedmError as error:
                raise _shown_error(error) from None

    def replies(session: Session, text: str, values: Sequence[Any]) -> Iterator[dict[Any, Any]]:
        if not text.strip():
            raise MedmError("expected a question")
        generation = _generation(*values[:5])
        conversation = session.turns
        files = describe(session.pending)
        said = [{"role": "user", "content": f"[{files}]\n{text}" if files else text}]
        histories = [[*session.messages.get(number, []), *said] for number in workers]
        yield {question: "", waiting: _waiting([]), **dict(zip(chats, histories, strict=True))}
        task = values[5] or None
        for answers in ask(play.sessions, session, workers, text, generation=generation, task=task):
            if session.turns is not conversation:
                return
            rows = [answers[number] for number in workers]
            shown = [
                [*history, {"role": "assistant", "content": row.text}] if row.text else history
                for history, row in zip(histories, rows, strict=True)
            ]
            lines = [_state(row) for row in rows]
            session.messages = dict(zip(workers, shown, strict=True))
            yield dict(zip((*chats, *states), (*shown, *lines), strict=True))
        for place, number in enumerate(workers):
            found = answers[number].grounded
            if session.turns is not conversation:
                return
            if found is None:
                continue
            view = play.views.of_masks(session, session.shown[number], found)
            if view is not None and session.turns is conversation:
                yield {viewers[place]: viewer(view, f"chat-{number}")}

    def stopped(request: gr.Request) -> None:
        play.sessions.get(_page(request)).stop()

    def restarted(request: gr.Request) -> list[Any]:
        play.sessions.clear(play.sessions.get(_page(request)))
        empty = [viewer(None, f"chat-{number}") for number in workers]
        return ["", _waiting([]), *empty, *[[] for _ in chats], *["" for _ in states]]

    hidden: Any = {
        "api_visibility": "private",
        "show_progress": "hidden",
        "concurrency_limit": None,
    }
    upload.upload(added, [upload], [upload, waiting, *viewers], **hidden)
    for trigger in (send.click, question.submit):
        trigger(_with_request(asked), [question, *settings], outputs, **hidden)
    stop.click(stopped, None, None, queue=False, **hidden)
    restart.click(restarted, None, outputs, **hidden)


def _with_request(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Return a function of gradio's form: the request comes last among its arguments."""

    def event(request: gr.Request, *given: Any) -> Iterator[Any]:
        yield from function(*given, request=request)

    return event


def _chatbot(number: int) -> gr.Chatbot:
    # Plain text: a reply must neither be read as HTML nor ask for images of other hosts.
    return gr.Chatbot(
        label="Conversation",
        height=430,
        elem_id=f"chat-{number}",
        render_markdown=False,
        feedback_options=None,
        buttons=["copy"],
        placeholder="Add an image or volume and ask about it.",
    )


def _settings(workers: Mapping[int, Worker]) -> list[Any]:
    """Return the components of the settings of generation, in the order of `_generation`."""
    most = min(worker.limits.max_new_tokens for worker in workers.values())
    tasks = sorted({task for worker in workers.values() for task in worker.processor.tasks})
    with gr.Accordion("Settings of replies", open=False), gr.Row():
        return [
            gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 is greedy decoding"),
            gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="needs a temperature"),
            gr.Number(0, precision=0, minimum=0, label="Top-k", info="0 for all tokens"),
            gr.Number(
                None, precision=0, minimum=0, label="Seed", info="empty for another one each time"
            ),
            gr.Slider(
                1, most, min(_DEFAULT_LENGTH, most), step=1, label="Longest reply",
                info="in tokens", elem_id="max-new-tokens",
            ),
            gr.Dropdown(["", *tasks], value="", label="Task", visible=bool(tasks)),
        ]  # fmt: skip


def _generation(
    temperature: float, top_p: float, top_k: int | None, seed: int | None, longest: int
) -> GenerationOptions:
    """Return the options of generation. Raises `ValidationError`."""
    if temperature == 0:
        return GenerationOptions(max_new_tokens=int(longest))
    return GenerationOptions(
        max_new_tokens=int(longest),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k or 0,
        seed=random_seed() if seed is None else seed,
    )


def _waiting(parts: Sequence[str]) -> str:
    text = f"Files are {TAKEN}."
    if any(parts):
        text = f"With the next question: {', '.join(parts)}"
    return f'<div class="medm-state">{html.escape(text)}</div>'


def _state(answer: Answer) -> str:
    kind = " medm-error" if answer.error else ""
    return f'<div class="medm-state{kind}">{html.escape(answer.state)}</div>'


def _zero_shot_section(play: Playground, workers: Mapping[int, Worker]) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            upload = _upload("zero-shot")
            shown = gr.HTML(viewer(None, "zero-shot"))
        with gr.Column(scale=1, min_width=260):
            labels = gr.Textbox(
                label="Labels, one a line", lines=5, elem_id="labels",
                placeholder="pneumonia\nno finding",
            )  # fmt: skip
            template = gr.Textbox(
                "{}", label="Template", info="{} stands for the label", elem_id="template"
            )
            send = gr.Button("Compare", variant="primary", elem_id="compare")
    bars: list[gr.Label] = []
    maps: list[gr.HTML] = []
    with gr.Row():
        for number in workers:
            with gr.Column(min_width=320):
                gr.Markdown(f"**{play.names[number]}**", elem_classes="medm-model")
                bars.append(
                    gr.Label(
                        label="Probabilities over these labels alone, not calibrated",
                        elem_id=f"probabilities-{number}",
                    )
                )
                maps.append(gr.HTML(elem_id=f"maps-{number}"))

    def added(path: str | None, request: gr.Request) -> list[Any]:
        with play.sessions.handling(_page(request)) as session:
            view = _add_and_view(play, session, path)
        return [None, viewer(view, "zero-shot")]

    def compared(lines: str, sentence: str, request: gr.Request) -> list[Any]:
        with play.sessions.handling(_page(request)) as session:
            try:
                if not session.files:
                    raise MedmError("expected an image or volume; add one first")
                wanted = read_labels(lines)
                with play.sessions.store.using([session.files[-1].id]) as (file,):
                    found = [score(worker, file, wanted, sentence) for worker in workers.values()]
            except MedmError as error:
                raise _shown_error(error) from None
            pages = [_maps(play, session, one) for one in found]
        return [*(one.probabilities for one in found), *pages]

    hidden: Any = {
        "api_visibility": "private",
        "show_progress": "minimal",
        "concurrency_limit": None,
    }
    upload.upload(added, [upload], [upload, shown], **hidden)
    send.click(compared, [labels, template], [*bars, *maps], **hidden)


def _maps(play: Playground, session: Session, scores: Scores) -> str:
    """Write the maps of similarity to files of the page; return the elements that show them."""
    parts = [f'<div class="medm-state">{html.escape(scores.note)}</div>'] if scores.note else []
    for label, sheet in scores.maps.items():
        with session.writing(play.sessions.viewer_files.new(".png")) as path:
            sheet.save(path, "PNG")
        words = html.escape(f"Similarity to: {label}", quote=True)
        parts.append(f'<img src="{FILES}/{path.name}" alt="{words}">')
    return f'<div class="medm-maps">{"".join(parts)}</div>'
