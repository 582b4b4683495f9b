"""The page of the playground in a browser: chat, masks, volumes, two models, zero-shot."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medm.inference.batch import infer
from medm.inference.options import GenerationOptions, InferOptions
from tests.imaging.tiny import phantom
from tests.inference.grounded import build_grounded
from tests.inference.tiny import read_output, save_image, save_tiny, write_records
from tests.models import plain_head
from tests.models.dual_encoder import tiny
from tests.serving.playground_live import TOKENS, live_page
from tests.test_readme import environment

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
]  # fmt: skip
WAIT = 60_000
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as running:
        started = running.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield started
        started.close()


@contextmanager
def opened(browser: Any, url: str) -> Iterator[Any]:
    """A page in the browser, which asks no other server."""
    page = browser.new_page(viewport={"width": 900, "height": 800})
    page.set_default_timeout(WAIT)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    failed: list[str] = []
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(url)
    yield page
    assert not failed
    assert [one for one in asked if not one.startswith((url, "data:", "blob:"))] == []
    page.close()


@contextmanager
def by_command(model: Path, folder: Path) -> Iterator[str]:
    """The same by `medm playground`, which is ended by SIGTERM and leaves no file."""
    folder.mkdir()
    command = [
        sys.executable, "-m", "medm", "playground", "--model", str(model), "--port", "0",
        "--device", "cpu",
    ]  # fmt: skip
    with subprocess.Popen(
        command, env=environment() | {"TMPDIR": str(folder)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as started:  # fmt: skip
        assert started.stdout is not None
        try:
            lines = iter(started.stdout.readline, "")
            yield next(line.strip() for line in lines if line.startswith("http://"))
            assert any(folder.glob("medm-*"))
            started.send_signal(signal.SIGTERM)
            rest = "".join(lines)  # `communicate` would lose what is buffered
            started.wait(60)
            assert started.returncode == 0, rest
            assert "Not for clinical use" in rest and "Traceback" not in rest
            assert "knee" not in rest
            assert not [*folder.glob("medm-*")]
        finally:
            started.kill()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("playground")
    with plain_head.registered():
        model, processor = build_grounded(root / "grounded")
        kept = processor.control_token_ids["[SEG]"]
        every = range(model.get_input_embeddings().num_embeddings)
        # A random model writes no [SEG]; this one writes nothing else.
        model.generation_config.suppress_tokens = [token for token in every if token != kept]
        model.save_pretrained(root / "masks")
        processor.save_pretrained(root / "masks")
    dual, processor = tiny.make(tiny.section(tiny.save_tokenizer(root / "tokenizer")))
    dual.save_pretrained(root / "dual")
    processor.save_pretrained(root / "dual")
    return {"text": save_tiny(root / "text"), "masks": root / "masks", "dual": root / "dual"}


def ask(page: Any, text: str) -> None:
    page.fill("#question textarea", text)
    page.click("#ask")


def pixels(page: Any, name: str) -> np.ndarray:
    """(H, W, 3) int of what the viewer of a model shows."""
    canvas = page.locator(f'.medm-viewer[data-name="{name}"] canvas')
    content = canvas.screenshot()
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def changed(one: np.ndarray, other: np.ndarray) -> int:
    """Pixels that differ."""
    return int((np.abs(one - other).max(axis=-1) > 20).sum())


def infer_reply(model: Path, folder: Path, question: str) -> str:
    """The reply of `medm infer` to the image a.png."""
    record = {
        "id": "a", "image": "a.png",
        "conversations": [{"from": "human", "value": f"<image>\n{question}"}],
    }  # fmt: skip
    options = InferOptions(
        model=str(model), data=str(write_records(folder, [record])),
        output=str(folder / "out.jsonl"), workers=0, device="cpu",
        generation=GenerationOptions(max_new_tokens=TOKENS),
    )  # fmt: skip
    infer(options)
    (line,) = read_output(folder / "out.jsonl")
    return line["reply"]


def test_two_models_reply_and_masks_are_shown(
    browser: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    save_image(tmp_path / "a.png", 3)
    sitk.WriteImage(phantom(), str(tmp_path / "ct.nii.gz"))
    expected = infer_reply(models["text"], tmp_path, "What is seen?")
    with (
        live_page(models["masks"], models["text"]) as live,
        opened(browser, live.url) as page,
    ):
        assert "Not for clinical use" in page.inner_text(".medm-notice")
        page.set_input_files("#chat-upload input[type=file]", str(tmp_path / "a.png"))
        page.wait_for_selector('[data-name="chat-1"][data-ready=image]')
        ask(page, "What is seen?")
        page.wait_for_selector(".medm-findings li")
        assert page.locator(".medm-findings li").count() == TOKENS
        for number in (0, 1):
            assert f"{TOKENS} tokens" in page.inner_text(f"#state-{number}")
        assert expected in page.inner_text("#chat-1")
        page.click("#restart")
        page.wait_for_selector('[data-name="chat-0"][data-ready=empty]')
        page.set_input_files("#chat-upload input[type=file]", str(tmp_path / "ct.nii.gz"))
        page.wait_for_selector('[data-name="chat-0"][data-ready=volume]')
        page.click('[data-name="chat-0"] button:has-text("Soft tissue")')
        assert page.input_value('[data-name="chat-0"] .medm-width') == "400"
        page.wait_for_timeout(300)
        bare = pixels(page, "chat-0")
        assert bare.max() > 150 and bare.std() > 10
        ask(page, "Segment the body.")
        page.wait_for_selector('[data-name="chat-0"][data-ready=volume] .medm-findings li')
        page.wait_for_timeout(300)
        masked = pixels(page, "chat-0")
        assert changed(masked, bare) > 100
        assert page.input_value('[data-name="chat-0"] .medm-width') == "400"
        page.click(".medm-findings li:nth-child(2) button")
        assert page.get_attribute('[data-name="chat-0"]', "data-selected")
        page.wait_for_timeout(500)
        focused = pixels(page, "chat-0")
        assert changed(focused, masked) > 100  # the others are gray
        for box in page.locator(".medm-findings input").all():
            box.uncheck()
        page.wait_for_timeout(500)
        assert changed(pixels(page, "chat-0"), focused) > 100  # no mask is left


def test_zero_shot(browser: Any, models: dict[str, Path], tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 3)
    with by_command(models["dual"], tmp_path / "tmp") as url, opened(browser, url) as page:
        page.set_input_files("#zero-shot-upload input[type=file]", str(tmp_path / "a.png"))
        page.wait_for_selector('[data-name="zero-shot"][data-ready=image]')
        page.fill("#labels textarea", "knee\nbrain")
        page.fill("#template input, #template textarea", "a scan of {}")
        page.click("#compare")
        page.wait_for_selector("#maps-0 img")
        text = page.inner_text("#probabilities-0")
        assert "knee" in text and "brain" in text and "%" in text
        images = page.locator("#maps-0 img")
        assert images.count() == 2
        assert images.first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
        page.fill("#labels textarea", "knee")
        page.click("#compare")
        page.wait_for_selector("text=two or more different labels")
