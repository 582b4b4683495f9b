"""The commands of docs/serving.md, run as they are written; the server is ended by SIGTERM."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import SimpleITK as sitk

from medm.serving.options import Limits, ServeOptions
from tests.imaging.tiny import phantom
from tests.inference.grounded import build_grounded
from tests.inference.tiny import save_tiny
from tests.models import plain_head
from tests.serving.live import png, question
from tests.test_readme import environment

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")
PLUGIN = """\
from medm.heads import HEADS
from tests.models.plain_head import NAME, PlainHead, PlainOptions
HEADS.add(NAME, PlainHead, "for tests", options=PlainOptions)
"""


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def save_model(folder: Path) -> None:
    """A model whose replies are `[SEG]` alone, which a random one would not write."""
    with plain_head.registered():
        model, processor = build_grounded(folder)
        kept = processor.control_token_ids["[SEG]"]
        every = range(model.get_input_embeddings().num_embeddings)
        model.generation_config.suppress_tokens = [token for token in every if token != kept]
        model.save_pretrained(folder / "work_dirs" / "finetune")
        processor.save_pretrained(folder / "work_dirs" / "finetune")


@pytest.mark.timeout(300)
def test_the_page(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "image.png").write_bytes(png())
    (tmp_path / "plugin.py").write_text(PLUGIN)
    sitk.WriteImage(phantom(), str(tmp_path / "ct.nii.gz"))
    port = str(free_port())

    def here(text: str) -> str:
        return text.replace("8000", port)

    start, *commands = map(here, blocks("bash"))
    # The head of the tests is a plug-in; `exec` makes the signal reach the server.
    start = start.replace("medm serve", "exec medm --plugin plugin.py serve")
    env = environment() | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-ec", start], cwd=tmp_path, env=env, stdout=log, stderr=log
        )
    try:
        while "http://" not in (tmp_path / "log").read_text() and server.poll() is None:
            time.sleep(0.05)
        for command in commands:
            done = subprocess.run(
                ["bash", "-ec", command], cwd=tmp_path, env=env, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, (done.stdout, done.stderr, (tmp_path / "log").read_text())
            assert done.stdout
        assert sitk.ReadImage(str(tmp_path / "mask.nii.gz")).GetSize() == phantom().GetSize()
        done = subprocess.run(
            [sys.executable, "-c", here(blocks("python")[0])], cwd=tmp_path, env=env,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        drains(server, f"http://127.0.0.1:{port}", (tmp_path / "api-key").read_text().strip())
    finally:
        server.kill()
    text = (tmp_path / "log").read_text()
    assert f"http://127.0.0.1:{port}" in text and "Not for clinical use" in text
    assert "Traceback" not in text
    assert (tmp_path / "api-key").read_text().strip() not in text


def drains(server: subprocess.Popen[bytes], url: str, key: str) -> None:
    """Running streams end as they would have; new requests get 503; the exit status is 0."""
    headers = {"authorization": f"Bearer {key}"}
    chat = f"{url}/v1/chat/completions"

    def stream(number: int) -> list[str]:
        body = question("What?" + " And?" * number, max_tokens=250, stream=True)
        with httpx.stream("POST", chat, json=body, headers=headers, timeout=60) as response:
            return [line for line in response.iter_lines() if line]

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, number) for number in range(8)]
        while "medm_open_requests 8.0" not in httpx.get(f"{url}/metrics", headers=headers).text:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        statuses = set()
        while 503 not in statuses and not all(one.done() for one in streams):
            body = question(max_tokens=1)
            statuses.add(httpx.post(chat, json=body, headers=headers, timeout=60).status_code)
        assert 503 in statuses
        assert httpx.get(f"{url}/health/live").status_code == 200
        assert httpx.get(f"{url}/health/ready").status_code == 503
        for one in streams:
            lines = one.result()
            assert lines[-1] == "data: [DONE]"
            last = json.loads(lines[-2].removeprefix("data: "))
            assert last["usage"]["completion_tokens"] == 250
    assert server.wait(20) == 0


def test_the_worker_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "work_dirs").rename(tmp_path / "work_dirs" / "finetune")
    (tmp_path / "image.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[1], {})
    assert capsys.readouterr().out


def test_the_limits_of_the_page_are_the_defaults() -> None:
    defaults = {**ServeOptions(model="m").model_dump(), **Limits().model_dump()}
    rows = re.findall(r"^\| [^|]+ \| `--([a-z-]+)` \| ([^|]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 13
    for flag, default in rows:
        value = defaults[flag.replace("-", "_")]
        shown = value if value is None or value % 1 else int(value)
        assert default == ("the model's context" if shown is None else str(shown))
