"""Mutated HTTP bodies of `medm serve`: an answer or an error in the documented shape, and a server
that goes on.

The application runs in process, without a socket. The service is started by the first case of each
child, since threads do not survive a fork.
"""

from __future__ import annotations

import asyncio
import atexit
import io
import json
import logging
import random
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import httpx
from pydicom.dataset import Dataset

from campaign.harness import Case, Part, WrongResultError, scratch
from campaign.mutate import mutated
from medm.errors import MedmError
from medm.serving.app import build_app
from medm.serving.limits import Gate
from medm.serving.options import Limits, ServeOptions
from medm.serving.service import Service
from tests.imaging.tiny import phantom, write_series
from tests.inference.tiny import save_tiny
from tests.serving.live import data_uri, png, question

LIMITS = Limits(
    max_new_tokens=8,
    max_body_mb=1,
    max_file_mb=1,
    max_images=3,
    max_pixels=250_000,
    max_voxels=100_000,
)
BOUNDARY = "campaign-boundary"


@contextmanager
def _logged() -> Iterator[list[str]]:
    """Give the errors that the server logs inside the block."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Handler(logging.ERROR), logging.getLogger("medm.serving")
    silenced = logging.root.manager.disable
    logger.addHandler(handler)
    logging.disable(logging.NOTSET)
    try:
        yield lines
    finally:
        logging.disable(silenced)
        logger.removeHandler(handler)


def _form(name: str, content: bytes) -> bytes:
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


def _zip() -> bytes:
    """A series of three slices; of the same bytes in every run, so that a case can be repeated."""

    def fix(dataset: Dataset, z: int) -> None:
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", "1.2.3.1"
        dataset.SOPInstanceUID = f"1.2.3.1.{z + 1}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID

    stream = io.BytesIO()
    with scratch() as folder, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in write_series(folder, phantom()[:, :, :3], change=fix):
            entry = zipfile.ZipInfo(file.name)  # of 1980
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
    return stream.getvalue()


FORM = f"multipart/form-data; boundary={BOUNDARY}"
JSON = "application/json"
REQUESTS: dict[str, tuple[str, str, bytes]] = {
    "chat": ("/v1/chat/completions", JSON, json.dumps(question()).encode()),
    "chat with an image": (
        "/v1/chat/completions",
        JSON,
        json.dumps(question("What?", data_uri(png(size=(4, 4))))).encode(),
    ),
    "chat with options": (
        "/v1/chat/completions",
        JSON,
        json.dumps(
            question(temperature=0.5, top_p=0.9, seed=1, stream=False, stop=["x"], n=1)
        ).encode(),
    ),
    "chat streamed": ("/v1/chat/completions", JSON, json.dumps(question(stream=True)).encode()),
    "job": (
        "/v1/jobs",
        JSON,
        json.dumps({"kind": "report", "files": ["file-1"], "prompt": "Report."}).encode(),
    ),
    "upload": ("/v1/files", FORM, _form("a.png", png(size=(4, 4)))),
    "upload of a zip": ("/v1/files", FORM, _form("a.zip", _zip())),
}
"""Path, content type and whole body."""


@cache
def _gate(model: str) -> Gate:
    """Start the service of this process."""
    service = Service.of(
        ServeOptions(model=model, device="cpu", slots=2, queue=4, limits=LIMITS, storage_mb=64)
    )
    service.start()
    atexit.register(service.close)
    service.worker.wait_ready(300)
    return build_app(service, key=None)


async def post(gate: Gate, path: str, kind: str, body: bytes) -> httpx.Response:
    transport = httpx.ASGITransport(gate, raise_app_exceptions=False, client=("127.0.0.1", 9))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        return await client.post(path, content=body, headers={"content-type": kind}, timeout=60)


def _run(folder: Path, name: str, number: int, seed: int) -> None:
    path, kind, whole = REQUESTS[name]
    rng = random.Random(f"{seed} {name} {number}")
    body = mutated(whole, rng, text=kind == JSON) if number else whole
    gate = _gate(str(folder / "model"))
    with _logged() as lines:
        response = asyncio.run(post(gate, path, kind, body))
    if response.status_code >= 500:
        raise WrongResultError(
            f"status {response.status_code}: {response.text[:300]}; the log: {'; '.join(lines)}"
        )
    if response.status_code >= 400:
        error = response.json()["error"]
        if set(error) != {"message", "type", "param", "code"}:
            raise WrongResultError(f"an error of another shape: {response.text[:300]}")
        if number == 0 and name != "job":
            raise WrongResultError(f"the whole body is refused: {response.text[:300]}")
        raise MedmError(error["message"])
    health = asyncio.run(_get(gate))
    if health != 200:
        raise WrongResultError(f"afterwards the server is not ready: {health}")


async def _get(gate: Gate) -> int:
    transport = httpx.ASGITransport(gate, client=("127.0.0.1", 9))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        return (await client.get("/health/ready")).status_code


def _prepare(folder: Path) -> None:
    save_tiny(folder)


def _cases(folder: Path, count: int, seed: int) -> list[Case]:
    return [
        Case(f"{name} {number}", partial(_run, folder, name, number, seed), name)
        for name in REQUESTS
        for number in range(count)
    ]


PART = Part("http", "Mutated HTTP bodies", _prepare, _cases, 1000)
