"""Requests with names of patients to a running `medm serve`: what it answers and logs is kept."""

from __future__ import annotations

import io
import logging
import time
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from campaign.canary_data import CANARIES, NAME, PHOTOGRAPHS, RADIOGRAPH, SERIES
from campaign.harness import WrongResultError
from medm.serving.options import Limits, ServeOptions
from medm.serving.worker import ReplyStream, Worker
from tests.inference.grounded import ids_of
from tests.models import plain_head
from tests.serving.live import data_uri, question, running

TEXT, KEY = CANARIES["record text"], CANARIES["name of a field"]
CHAT = "/v1/chat/completions"


def talk(data: Path, model: Path, out: Path, log: Path) -> None:
    """Serve a model with a mask head and send it requests; a file in `out` for each answer.

    Args:
        data: files of `campaign.canary_data.write_data`.
        model: a folder with the head of `tests.models.plain_head`.
        out: folder for the answers.
        log: file for what the server logs and prints.
    """
    _let_reply("A <p> ball </p>[SEG].")
    logging.disable(logging.NOTSET)
    with (
        log.open("w", encoding="utf-8") as stream,
        redirect_stdout(stream),
        redirect_stderr(stream),
    ):
        handler = logging.StreamHandler(stream)
        logging.getLogger().addHandler(handler)
        logging.getLogger("medm").setLevel(logging.DEBUG)
        for name in ("httpx", "httpcore", "asyncio"):  # the client's, and not the server's
            logging.getLogger(name).setLevel(logging.CRITICAL)
        logging.getLogger().setLevel(logging.INFO)
        stream.write("status 0\n")
        options = ServeOptions(
            model=str(model), name="model", slots=2, limits=Limits(max_new_tokens=8)
        )
        with plain_head.registered(), running(options) as live, live.client() as client:
            for name, response in _answers(client, data):
                lines = [str(response.status_code), str(dict(response.headers))]
                (out / name).write_bytes("\n".join(lines).encode() + b"\n" + response.content)


def _let_reply(text: str) -> None:
    """Let masks be those of this reply: a random model writes no `[SEG]`."""
    own = Worker.segment

    def segment(self: Worker, stream: ReplyStream, **options: Any) -> Any:
        assert stream.end is not None
        stream.end = replace(stream.end, ids=tuple(ids_of(self.processor, text)))
        return own(self, stream, **options)

    Worker.segment = segment  # type: ignore[method-assign]


def _zip(folder: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{NAME}/{file.name}")
    return stream.getvalue()


def _answers(client: httpx.Client, data: Path) -> Any:
    """Yield a name and the response of each request."""
    files = {
        "image": (PHOTOGRAPHS[1], (data / PHOTOGRAPHS[1]).read_bytes()),
        "PNG": (f"{NAME}.png", (data / PHOTOGRAPHS[0]).read_bytes()),
        "DICOM": (RADIOGRAPH, (data / RADIOGRAPH).read_bytes()),
        "NIfTI": (f"{NAME}.nii", (data / "a.nii").read_bytes()),
        "series": (f"{NAME}.zip", _zip(data / SERIES)),
    }
    ids: dict[str, str] = {}
    for name, file in files.items():
        response = client.post("/v1/files", files={"file": file})
        yield f"upload of {name}", response
        if response.status_code != 200:
            raise WrongResultError(f"upload of {name}: {response.text[:500]}")
        ids[name] = response.json()["id"]
        yield f"file {name}", client.get(f"/v1/files/{ids[name]}")
    for name, file in files.items():
        cut = (file[0], file[1][: len(file[1]) // 2])
        yield f"damaged {name}", client.post("/v1/files", files={"file": cut})
    cut = _zip(data / "cut series")
    yield "zip of damaged slices", client.post("/v1/files", files={"file": (f"{NAME}.zip", cut)})
    strange = (f"{NAME}.txt", TEXT.encode() * 40)
    yield "upload of text", client.post("/v1/files", files={"file": strange})
    yield "another form field", client.post("/v1/files", files={KEY: files["image"]})
    yield "purpose", client.post("/v1/files", files={"file": strange}, data={"purpose": TEXT})
    yield from _jobs(client, ids)
    for name, body in _bodies(data).items():
        yield name, client.post(CHAT, json=body)
    parts = [{"type": TEXT, TEXT: TEXT}]
    for route, further in (("zero-shot", {"labels": [TEXT, TEXT, 1]}), ("embeddings", {})):
        body = {"model": "model", "input": parts, **further}
        yield f"wrong part of {route}", client.post(f"/v1/{route}", json=body)
    raw = {"content-type": "application/json"}
    yield "no JSON", client.post(CHAT, content=f'{{"{TEXT}'.encode(), headers=raw)
    yield "no UTF-8", client.post(CHAT, content=f'{{"{TEXT}": "'.encode() + b'\xff"}', headers=raw)
    yield "content type", client.post(CHAT, content=TEXT, headers={"content-type": f"text/{TEXT}"})
    for path in (f"/v1/files/{NAME}", f"/v1/jobs/{TEXT}", f"/{TEXT}", f"/v1/models/{TEXT}"):
        yield f"GET {len(path)}", client.get(path)
    yield "wrong key", client.get("/v1/models", headers={"authorization": f"Bearer {TEXT}"})
    for path in ("/metrics", "/v1/models", "/", "/openapi.json"):
        yield f"GET {path.replace('/', ' ')}", client.get(path)


def _jobs(client: httpx.Client, ids: dict[str, str]) -> Any:
    """Run a job on each file, and fetch its results."""
    body = {"model": "model", "prompt": f"Is {TEXT} ill?", "max_tokens": 4}
    for name, file in ids.items():
        sent = client.post("/v1/jobs", json=body | {"task": "segmentation", "files": [file]})
        yield f"job on {name}", sent
        job = sent.json()["id"]
        end = time.monotonic() + 120
        while time.monotonic() < end:
            found = client.get(f"/v1/jobs/{job}")
            if found.json()["status"] in ("succeeded", "failed", "cancelled"):
                break
            time.sleep(0.05)
        yield f"ended job on {name}", found
        for form in found.json().get("formats") or ["json"]:
            suffix = {"nifti": ".nii.gz", "dicom-seg": ".dcm", "png": ".png"}.get(form, "")
            result = client.get(f"/v1/jobs/{job}/result?format={form}")
            yield f"result of {name}{suffix}", result
        yield f"result of {name} as another", client.get(f"/v1/jobs/{job}/result?format={TEXT}")
    yield (
        "job about no file",
        client.post("/v1/jobs", json=body | {"task": "report", "files": [NAME]}),
    )
    yield (
        "job of a wrong task",
        client.post("/v1/jobs", json=body | {"task": TEXT, "files": [ids["image"]]}),
    )


def _bodies(data: Path) -> dict[str, dict[str, Any]]:
    """Return chat requests that are right, and wrong in one place each."""
    image = (data / PHOTOGRAPHS[1]).read_bytes()
    text = f"Is {TEXT} ill?"

    def part(**fields: Any) -> dict[str, Any]:
        return question() | {"messages": [{"role": "user", "content": [fields]}]}

    def url(address: str) -> dict[str, Any]:
        return question("What?", address)

    return {
        "chat": question(text, user=TEXT, metadata={KEY: TEXT}, stop=[TEXT]),
        "chat with an image": question(text, data_uri(image, "image/jpeg")),
        "chat streamed": question(text, stream=True),
        "conversation": question() | {"messages": [
            {"role": "system", "content": text}, {"role": "user", "content": text, "name": TEXT},
            {"role": "assistant", "content": text}, {"role": "user", "content": text, KEY: TEXT}]},
        "too long": question(text * 200),
        "value of an unknown field": question(text, beams=TEXT),
        "unknown field": question(text, **{KEY: TEXT}),
        "unknown field of a part": part(type="text", text=text, **{KEY: TEXT}),
        "unsupported": question(text, tools=[{"name": TEXT}], response_format={"type": TEXT}),
        "wrong type": question(text, temperature=TEXT, seed=TEXT, max_tokens=TEXT),
        "wrong role": question() | {"messages": [{"role": TEXT, "content": text}]},
        "wrong part": part(type=TEXT, text=text),
        "no part": question() | {"messages": [{"role": "user", "content": [text]}]},
        "no messages": question() | {"messages": text},
        "reply at the end": question() | {"messages": [
            {"role": "user", "content": text}, {"role": "assistant", "content": text}]},
        "model": question(text) | {"model": TEXT},
        "task": question(text, task=TEXT),
        "long stop": question(text, stop=[TEXT * 100]),
        "file id": part(type="file", file={"file_id": f"file-{TEXT}"}),
        "path": url(f"/data/{NAME}.png"),
        "host": url(f"http://{TEXT}.example/{NAME}.png"),
        "media type": url(f"data:image/{TEXT};base64,AAAA"),
        "no base64": url(f"data:image/png;base64,{TEXT}%%"),
        "damaged image": url(data_uri(image[: len(image) // 2], "image/jpeg")),
        "DICOM image": url(data_uri((data / RADIOGRAPH).read_bytes(), "application/dicom")),
        "damaged DICOM image": url(
            data_uri((data / RADIOGRAPH).read_bytes()[:900], "application/dicom")
        ),
    }  # fmt: skip
