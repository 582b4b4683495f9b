"""The playground without a browser: who may ask, what is kept and deleted, replies that end."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from medm.config import validate
from medm.errors import MedmError, RecipeError
from medm.imaging.placement import Placement
from medm.imaging.volumes import read_volume
from medm.inference.grounded_text import GroundedText, Phrase
from medm.inference.options import GenerationOptions
from medm.inference.segmenter import Grounded, MaskPrediction
from medm.serving.files import FileStore
from medm.serving.playground import Application, require_passwords, server_of
from medm.serving.playground_chat import ask
from medm.serving.playground_guard import Guard, Passwords, read_passwords
from medm.serving.playground_options import PlaygroundOptions
from medm.serving.playground_session import Session, Sessions, ViewerFiles
from medm.serving.playground_viewer import Views, viewer
from medm.serving.playground_zero_shot import read_labels, score
from tests.imaging.tiny import phantom
from tests.serving.conftest import LIMITS
from tests.serving.live import Live, png


@pytest.fixture
def sessions(live: Live) -> Iterator[Sessions]:
    store = FileStore(live.service.worker.decoders, limits=LIMITS, keep_seconds=60, max_bytes=2**21)
    made = Sessions(store, ViewerFiles(), keep_seconds=60)
    yield made
    made.close_all()
    assert not store.folder.exists() and not made.viewer_files.folder.exists()


def add(sessions: Sessions, session: Session, content: bytes) -> Any:
    file = sessions.store.add(io.BytesIO(content), len(content))
    session.files.append(file)
    session.pending.append(file)
    return file


def test_other_addresses_need_passwords(tmp_path: Path) -> None:
    assert require_passwords(PlaygroundOptions(models=["m"])) is None
    with pytest.raises(MedmError, match=r"--host 0\.0\.0\.0 .*expected --auth-file"):
        require_passwords(PlaygroundOptions(models=["m"], host="0.0.0.0"))
    file = tmp_path / "users"
    for text, message in (
        ("", "found none"), ("anna\n", "line 1: expected user:password"), ("\nanna:short\n", "line 2"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(MedmError, match=message):
            read_passwords(str(file))
    with pytest.raises(MedmError, match="cannot be read"):
        read_passwords(str(tmp_path / "missing"))
    file.write_text("anna:long-enough\nben:other:words\n")
    options = PlaygroundOptions(models=["m"], host="0.0.0.0", auth_file=str(file))
    found = require_passwords(options)
    assert found is not None and "long-enough" not in repr(found)


def test_at_most_two_models() -> None:
    with pytest.raises(RecipeError, match="models"):
        validate(PlaygroundOptions, {"models": ["a", "b", "c"]}, source="test")


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (None, 401), ("Basic ?", 401), ("Bearer anna:long-enough", 401),
        ("anna:long-enough", 200), ("ben:other:words", 200), ("anna:other:words", 401),
        ("anna:long-enougH", 401),
    ],
)  # fmt: skip
def test_the_guard_asks_for_a_password(given: str | None, status: int) -> None:
    guard = Guard(PlainTextResponse("page"), Passwords(["anna:long-enough", "ben:other:words"]))
    if given is not None and not given.startswith(("Basic ", "Bearer ")):
        given = f"Basic {base64.b64encode(given.encode()).decode()}"
    headers = {} if given is None else {"authorization": given}
    response = TestClient(guard, "http://elsewhere.example").get("/any", headers=headers)
    assert response.status_code == status
    assert ("www-authenticate" in response.headers) == (status == 401)
    assert response.headers["content-security-policy"].startswith("default-src 'self'")


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200), ("http://elsewhere.example:7860", 200), ("https://Elsewhere.example:7860", 200),
        ("https://third.example", 403), ("http://elsewhere.example", 403), ("null", 403),
        ("http://[", 403),
    ],
)  # fmt: skip
def test_a_password_is_not_used_by_pages_of_others(origin: str | None, status: int) -> None:
    guard = Guard(PlainTextResponse("page"), Passwords(["anna:long-enough"]))
    headers = {"authorization": f"Basic {base64.b64encode(b'anna:long-enough').decode()}"}
    if origin is not None:
        headers["origin"] = origin
    client = TestClient(guard, "http://elsewhere.example:7860")
    assert client.get("/any", headers=headers).status_code == status


def test_without_a_password_pages_of_others_are_refused() -> None:
    guard = Guard(PlainTextResponse("page"), None)
    own = TestClient(guard, "http://127.0.0.1:7860")
    assert own.get("/").status_code == 200
    assert own.post("/", headers={"origin": "https://elsewhere.example"}).status_code == 403
    assert own.get("/", headers={"origin": "http://127.0.0.1:9999"}).status_code == 403
    assert TestClient(guard, "http://elsewhere.example").get("/").status_code == 403


def test_stopped_replies_free_their_slots(live: Live, sessions: Sessions) -> None:
    worker, session = live.service.worker, sessions.get("page")
    add(sessions, session, png())
    steps = ask(
        sessions, session, {0: worker, 1: worker}, "What?",
        generation=GenerationOptions(max_new_tokens=300),
    )  # fmt: skip
    next(steps)
    answers = next(steps)
    assert worker.open == 2
    session.stop()
    for answers in steps:  # noqa: B007 (the last one is looked at)
        pass
    assert [one.end.finish for one in answers.values() if one.end] == ["cancelled"] * 2
    assert "stopped" in answers[0].state
    assert live.idle() and not session.streams
    assert [turn.role for turn in session.turns[0]] == ["user", "assistant"]


def test_each_turn_is_kept_and_the_file_belongs_to_the_first(
    live: Live, sessions: Sessions
) -> None:
    worker, session = live.service.worker, sessions.get("page")
    file = add(sessions, session, png())
    options = GenerationOptions(max_new_tokens=3)
    for question in ("What?", "And where?"):
        (last,) = [*ask(sessions, session, {0: worker}, question, generation=options)][-1].values()
        assert last.end is not None and last.error is None and last.grounded is not None
        assert last.end.text == last.text
    assert session.shown[0] == [file] and not session.pending
    assert [turn.text.strip() for turn in session.turns[0][::2]] == ["What?", "And where?"]
    sessions.store.delete(file.id)
    (last,) = [*ask(sessions, session, {0: worker}, "More?", generation=options)][-1].values()
    assert last.error is not None and "no such file" in last.error
    assert len(session.turns[0]) == 4


def test_files_go_with_their_page(live: Live, sessions: Sessions) -> None:
    session = sessions.get("page")
    file = add(sessions, session, png())
    view = Views(live.service.worker.decoders, sessions.viewer_files).of_file(session, file)
    name = view["url"].rpartition("/")[2]
    shown = sessions.viewer_files.find(name)
    assert shown is not None and (view["height"], view["width"]) == (20, 24)
    for other in ("../passwd", "x.png", f"{name}/..", name.upper() + "x"):
        assert sessions.viewer_files.find(other) is None
    sessions.close("page")
    assert not shown.exists() and not file.path.exists()


def test_a_late_page_is_forgotten(live: Live, sessions: Sessions) -> None:
    session = sessions.get("late")
    file = add(sessions, session, png())
    session.used -= 61
    assert sessions.get("other") is not session
    assert not file.path.exists()
    assert sessions.get("late") is not session


def test_a_page_in_use_keeps_its_files(live: Live, sessions: Sessions) -> None:
    session = sessions.get("page")
    file = add(sessions, session, png())
    file.expires = time.time() + 1
    assert sessions.get("page") is session
    assert file.expires > time.time() + 50
    file.expires = 0
    sessions.sweep()
    sessions.get("page")  # a file that is gone is no error
    assert not file.path.exists()


def test_what_an_event_writes_after_its_page_is_closed_is_deleted(
    live: Live, sessions: Sessions
) -> None:
    with sessions.handling("page") as session:
        sessions.close("page")
        file = add(sessions, session, png())
        with session.writing(sessions.viewer_files.new(".png")) as path:
            path.write_bytes(png())
    assert not path.exists() and not file.path.exists()
    with sessions.handling("other") as session:
        file = add(sessions, session, png())
        with session.writing(sessions.viewer_files.new(".png")) as path:
            sessions.clear(session)
            path.write_bytes(png())
    assert path.exists() and not file.path.exists()
    sessions.close("other")
    assert not path.exists()


def test_an_idle_server_deletes_files(live: Live, sessions: Sessions, tmp_path: Path) -> None:
    guard = Guard(PlainTextResponse("page"), None)
    app = Application(guard, [], sessions, tmp_path)
    session = sessions.get("late")
    file = add(sessions, session, png())
    (tmp_path / "a").mkdir()
    old, new = tmp_path / "a" / "old.png", tmp_path / "new.png"
    for path in (old, new):
        path.write_bytes(png())
    server = server_of(app)
    asyncio.run(server.on_tick(0))
    assert file.path.exists() and old.exists()
    session.used -= 61
    os.utime(old, (time.time() - 61, time.time() - 61))
    asyncio.run(server.on_tick(1))
    assert file.path.exists() and old.exists()
    asyncio.run(server.on_tick(600))
    assert not file.path.exists() and not old.exists() and new.exists()
    assert session.closed and sessions.get("late") is not session


def test_a_new_conversation_during_a_reply_is_empty(live: Live, sessions: Sessions) -> None:
    worker, session = live.service.worker, sessions.get("page")
    file = add(sessions, session, png())
    steps = ask(
        sessions, session, {0: worker}, "What?", generation=GenerationOptions(max_new_tokens=300)
    )
    next(steps)
    sessions.clear(session)
    later = add(sessions, session, png())
    assert [*steps] == []
    assert session.turns == {} and session.shown == {} and session.pending == [later]
    assert live.idle() and not session.streams
    assert not file.path.exists() and later.path.exists()


def test_a_page_has_one_reply_at_a_time() -> None:
    session = Session()
    busy = pytest.raises(MedmError, match="a reply is being generated")
    with session.replying(), busy, session.replying():
        pass
    with session.replying():
        pass


def test_masks_of_a_volume_lie_on_its_grid(live: Live, sessions: Sessions, tmp_path: Path) -> None:
    sitk.WriteImage(phantom(), str(tmp_path / "ct.nii.gz"))
    session = sessions.get("page")
    file = add(sessions, session, (tmp_path / "ct.nii.gz").read_bytes())
    original = read_volume(tmp_path / "ct.nii.gz")
    placement = Placement.of_source(original.voxels.shape, original.geometry)
    mask = np.zeros(original.voxels.shape, bool)
    mask[1:3, 1, 2] = True
    masks = [
        MaskPrediction(
            token=number, phrase=Phrase(0, len(words), words), kind="volume", media=0, mask=one,
            placement=placement, quality=0.5, presence=0.5, absent=False,
        )
        for number, (words, one) in enumerate((("<b>lung</b>", mask), ("none", mask & False)))
    ]  # fmt: skip
    views = Views(live.service.worker.decoders, sessions.viewer_files)
    view = views.of_masks(session, [file], Grounded(GroundedText("", "", (), 0), tuple(masks)))
    assert view is not None

    def read(url: str) -> Any:
        path = sessions.viewer_files.find(url.rpartition("/")[2])
        assert path is not None
        return read_volume(path)

    shown, labels = read(view["url"]), read(view["labels"])
    np.testing.assert_array_equal(shown.voxels, original.voxels)
    np.testing.assert_array_equal(labels.voxels, mask)
    for one in (shown, labels):
        np.testing.assert_allclose(one.geometry.steps, original.geometry.steps, atol=1e-5)
        np.testing.assert_allclose(one.geometry.origin, original.geometry.origin, atol=1e-4)
    center = original.geometry.steps @ [1, 1, 2] + original.geometry.origin
    first, second = view["findings"]
    np.testing.assert_allclose(np.array(first["center"]) * (-1, -1, 1), center, atol=1e-4)
    assert first["size"].startswith("2 voxels, ") and second["size"] == "empty mask"
    assert "<b>" not in viewer(view, "chat-0")


def test_labels_of_lines() -> None:
    assert read_labels(" a \n\nb\n") == ["a", "b"]
    assert len(read_labels("\n".join(map(str, range(32))))) == 32
    for text in ("\n".join(map(str, range(33))), "a\n" + "b" * 501):
        with pytest.raises(MedmError, match="at most 32 labels of at most 500 characters"):
            read_labels(text)
    for text in ("", "a", "a\na"):
        with pytest.raises(MedmError, match="two or more different labels"):
            read_labels(text)


def test_maps_are_of_pixels_that_a_limited_process_decoded(
    dual: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded_here(*given: object, **options: object) -> None:
        raise AssertionError("decoded in the process of the server")

    for name in ("read_image", "read_volume"):
        monkeypatch.setattr(f"medm.imaging.preview.{name}", decoded_here)
    worker = dual.service.worker
    asked: list[object] = []
    original = worker.decoders.pixels

    def pixels(*given: Any, **options: Any) -> np.ndarray:
        asked.append(given)
        return original(*given, **options)

    monkeypatch.setattr(worker.decoders, "pixels", pixels)
    file = dual.service.files.add(io.BytesIO(png()), len(png()))
    scores = score(worker, file, ["knee", "brain", "chest"], "a scan of {}")
    dual.service.files.delete(file.id)
    assert [*scores.maps] == [*scores.probabilities] == ["knee", "brain", "chest"]
    assert len(asked) == 1
