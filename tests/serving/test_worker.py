"""One thread owns the model; requests of any thread are answered as `medm infer` answers."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import medm
from medm.errors import CheckpointError
from medm.inference.options import GenerationOptions
from medm.serving.errors import ServingError
from medm.serving.options import Limits, ServeOptions
from medm.serving.worker import ReplyEvent, Worker
from medm.types import Media, Turn
from tests.inference.tiny import save_tiny


def png(seed: int = 0, *, size: tuple[int, int] = (20, 24)) -> bytes:
    """Noise in color."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def ask(text: str, *, images: int = 0) -> list[Turn]:
    content = [part for _ in range(images) for part in (Media("image"), "\n")]
    return [Turn("user", (*content, text))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("worker"))


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[Worker]:
    options = ServeOptions(
        model=str(folder), device="cpu", slots=2, queue=2, limits=Limits(max_new_tokens=64)
    )
    worker = Worker(options)
    worker.start()
    worker.wait_ready(120)
    yield worker
    worker.close()


def test_replies_are_those_of_the_python_api(worker: Worker, folder: Path) -> None:
    model = medm.load(folder, device="cpu")
    expected = model.ask("What is seen?", image=png(), max_new_tokens=12)
    stream = worker.submit(ask("What is seen?", images=1), [png()], max_new_tokens=12)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == expected
    assert stream.end is not None and stream.end.text == expected
    assert len(stream.end.ids) == 12 and stream.end.finish == "length"
    assert stream.prompt_tokens == len(
        worker.encode(ask("What is seen?", images=1), [png()]).input_ids
    )


def test_sampling_depends_on_the_seed_alone(worker: Worker) -> None:
    def reply(seed: int) -> str:
        generation = GenerationOptions(temperature=1.5, seed=seed)
        stream = worker.submit(ask("What?"), generation=generation, max_new_tokens=8)
        beside = worker.submit(ask("And beside it?"), max_new_tokens=8)
        text = stream.result().text
        beside.result()
        return text

    first = reply(3)
    assert reply(3) == first
    assert reply(4) != first


def test_a_stop_sequence_ends_the_reply_and_frees_the_slot(worker: Worker) -> None:
    whole = worker.submit(ask("What?"), max_new_tokens=30).result().text
    stop = whole[5:8]
    end = worker.submit(ask("What?"), stop=[stop, "never"], max_new_tokens=30).result()
    assert end.finish == "stop"
    assert end.text == whole[: whole.index(stop)]
    assert len(end.ids) < 30
    assert worker.open == 0


def test_a_full_queue_refuses_and_cancelled_requests_make_room(worker: Worker) -> None:
    held = threading.Event()
    blocked = worker.call(held.wait)
    streams = [worker.submit(ask("What?"), max_new_tokens=60) for _ in range(3)]
    with pytest.raises(ServingError, match="running or waiting") as refused:
        worker.submit(ask("What?"))
    assert refused.value.status == 429 and refused.value.headers["retry-after"] == "1"
    for stream in streams[:2]:
        stream.cancel()
    held.set()
    assert blocked.result() is True
    assert streams[2].result().finish == "length"
    assert [stream.result().finish for stream in streams[:2]] == ["cancelled", "cancelled"]
    assert worker.open == 0
    assert worker.submit(ask("What?"), max_new_tokens=2).result().text


def test_leaving_the_loop_cancels(worker: Worker) -> None:
    stream = worker.submit(ask("What?"), max_new_tokens=60)
    for _ in stream:
        break
    assert worker.call(lambda: True).result()
    assert stream.end is not None and stream.end.finish == "cancelled"
    assert worker.open == 0


def test_too_long_prompts_and_replies_are_refused_before_an_image_is_decoded(
    worker: Worker,
) -> None:
    for turns, wanted in (
        (ask("What?"), 65),
        (ask("what " * 200), None),
        (ask("x" * 200_000), None),
        (ask("What?", images=40), None),
    ):
        images = [b"no image"] * len(turns[0].content[:-1:2])
        with pytest.raises(ServingError) as refused:
            worker.submit(turns, images, max_new_tokens=wanted)
        assert (refused.value.status, refused.value.code) == (413, "context_length_exceeded")
    assert worker.open == 0


def test_a_step_that_fails_ends_its_requests_and_the_worker_goes_on(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert worker.engine is not None
    with monkeypatch.context() as patch:

        def fail() -> None:
            raise RuntimeError("the words of a patient")

        patch.setattr(worker.engine, "step", fail)
        with pytest.raises(ServingError) as failed:
            worker.submit(ask("What?"), max_new_tokens=4).result()
    assert failed.value.status == 500
    assert "patient" not in str(failed.value) + caplog.text
    assert "RuntimeError" in caplog.text
    assert worker.submit(ask("What?"), max_new_tokens=4).result().text


def test_a_request_that_the_engine_refuses_and_a_thread_that_ends(
    worker: Worker, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits: the request has an error, and a server whose model is gone says so."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the words of a patient")

    assert worker.engine is not None
    with monkeypatch.context() as patch:
        patch.setattr(worker.engine, "submit", fail)
        with pytest.raises(ServingError) as failed:
            worker.submit(ask("What?"), max_new_tokens=4).result()
    assert failed.value.status == 500
    assert worker.open == 0
    assert worker.submit(ask("What?"), max_new_tokens=4).result().text

    other = Worker(ServeOptions(model=str(folder), device="cpu"))
    other.start()
    other.wait_ready(120)
    monkeypatch.setattr(other, "_step", fail)
    with pytest.raises(ServingError):
        other.submit(ask("What?"), max_new_tokens=4).result()
    assert other.state == "failed"
    assert isinstance(other.failure, RuntimeError)
    assert "patient" not in caplog.text
    other.close()


def test_a_listener_that_fails_does_not_harm_others(worker: Worker) -> None:
    def listener(event: ReplyEvent) -> None:
        raise RuntimeError("the event loop is closed")

    worker.submit(ask("What?"), listener=listener, max_new_tokens=60)
    assert worker.submit(ask("What?"), max_new_tokens=4).result().text
    assert worker.call(lambda: True).result()
    assert worker.open == 0


def test_after_its_end_a_worker_refuses(folder: Path) -> None:
    worker = Worker(ServeOptions(model=str(folder), device="cpu"))
    with pytest.raises(ServingError) as refused:
        worker.submit(ask("What?"))
    assert refused.value.code == "loading"
    worker.start()
    worker.wait_ready(120)
    stream = worker.submit(ask("What?"), max_new_tokens=400)
    worker.close()
    assert stream.end is not None and stream.end.finish == "cancelled"
    with pytest.raises(ServingError) as refused:
        worker.submit(ask("What?"))
    assert refused.value.code == "draining"
    with pytest.raises(ServingError, match="has ended"):
        worker.call(lambda: True, continues=True).result()


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Worker(ServeOptions(model=str(tmp_path)))
