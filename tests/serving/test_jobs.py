"""Jobs: reports and masks of uploaded files, with progress, results and cancellation."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from medm.serving.worker import ReplyStream, Worker
from tests.imaging.tiny import phantom
from tests.inference.grounded import ids_of
from tests.serving.live import Live, code, png, upload
from tests.serving.test_files import zipped_series


@pytest.fixture
def grounded(live: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    """A random model writes no `[SEG]`: the masks are those of another reply."""
    own = Worker.segment
    ids = tuple(
        ids_of(live.service.worker.processor, "A <p> ball </p>[SEG] and <p> two </p>[SEG].")
    )

    def segment(self: Worker, stream: ReplyStream, **options: Any) -> Any:
        assert stream.end is not None
        stream.end = replace(stream.end, ids=ids)
        return own(self, stream, **options)

    monkeypatch.setattr(Worker, "segment", segment)
    yield live
    for job in list(live.service.jobs._jobs):
        live.service.jobs.delete(job)
    for file in list(live.service.files._files):
        live.service.files.delete(file)
    assert live.service.files.stored == 0


def submit(client: httpx.Client, task: str, *files: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "model", "task": task, "files": files, "prompt": "Where?", "max_tokens": 6}
    response = client.post("/v1/jobs", json=body | fields)
    assert response.status_code == 202, response.text
    job = response.json()
    assert job["object"] == "job" and job["status"] in ("queued", "running")
    return job


def finished(client: httpx.Client, name: str) -> dict[str, Any]:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        job = client.get(f"/v1/jobs/{name}").json()
        if job["status"] in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.02)
    raise AssertionError(job)


def test_a_report_is_the_reply_to_its_prompt(grounded: Live, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    with grounded.client() as client:
        name = upload(client, tmp_path / "a.png")["id"]
        job = finished(client, submit(client, "report", name)["id"])
        assert job["status"] == "succeeded" and job["formats"] == ["json"]
        assert job["progress"]["stage"] == "generating"
        result = client.get(f"/v1/jobs/{job['id']}/result").json()
        content = [
            {"type": "file", "file": {"file_id": name}},
            {"type": "text", "text": "Where?"},
        ]
        body = {"model": "model", "messages": [{"role": "user", "content": content}]}
        reply = client.post("/v1/chat/completions", json=body | {"max_tokens": 6}).json()
        assert result["text"] == reply["choices"][0]["message"]["content"]
        assert result["usage"]["completion_tokens"] == 6
        assert result["notice"] == "Not for clinical use"
        assert code(client.get(f"/v1/jobs/{job['id']}/result?format=nifti"))[1] == "unsupported"
        assert client.delete(f"/v1/jobs/{job['id']}").json()["deleted"] is True
        assert code(client.get(f"/v1/jobs/{job['id']}")) == (404, "job_not_found")


def test_masks_of_a_volume_lie_on_its_grid(grounded: Live, tmp_path: Path) -> None:
    image = phantom()
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    with grounded.client() as client:
        name = upload(client, tmp_path / "a.nii.gz")["id"]
        job = finished(client, submit(client, "segmentation", name)["id"])
        assert job["status"] == "succeeded", job
        assert job["formats"] == ["json", "nifti"]
        assert job["progress"] == {"stage": "segmenting", "done": 12, "total": 12}
        result = client.get(f"/v1/jobs/{job['id']}/result").json()
        assert result["text"] == "A ball and two."
        assert [mask["phrase"] for mask in result["masks"]] == ["ball", "two"]
        for mask in result["masks"]:
            url = f"/v1/jobs/{job['id']}/result?format=nifti&mask={mask['mask']}"
            path = tmp_path / "mask.nii.gz"
            path.write_bytes(client.get(url).content)
            drawn = sitk.ReadImage(str(path))
            assert drawn.GetSize() == image.GetSize()
            np.testing.assert_allclose(drawn.GetOrigin(), image.GetOrigin(), atol=1e-4)
            np.testing.assert_allclose(drawn.GetDirection(), image.GetDirection(), atol=1e-5)
            assert int(sitk.GetArrayFromImage(drawn).sum()) == mask["voxels"]
        missing = client.get(f"/v1/jobs/{job['id']}/result?format=nifti&mask=2")
        assert code(missing) == (404, "not_found")


def test_masks_of_a_series_are_also_a_dicom_seg(grounded: Live, tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="highdicom comes with the extra 'dicom'")
    frame = pydicom.uid.generate_uid()

    def complete(dataset: pydicom.Dataset, z: int) -> None:
        dataset.FrameOfReferenceUID = frame

    with grounded.client() as client:
        name = upload(client, zipped_series(tmp_path, change=complete))["id"]
        job = finished(client, submit(client, "segmentation", name)["id"])
        assert job["formats"] == ["json", "nifti", "dicom-seg"], job
        content = client.get(f"/v1/jobs/{job['id']}/result?format=dicom-seg").content
        result = client.get(f"/v1/jobs/{job['id']}/result").json()
    seg = pydicom.dcmread(io.BytesIO(content))
    assert seg.FrameOfReferenceUID == frame
    assert len(seg.SegmentSequence) == 2
    assert int(seg.pixel_array.sum()) == sum(mask["voxels"] for mask in result["masks"])


def test_masks_of_an_image(grounded: Live, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    with grounded.client() as client:
        name = upload(client, tmp_path / "a.png")["id"]
        job = finished(client, submit(client, "segmentation", name)["id"])
        assert job["formats"] == ["json", "png"]
        response = client.get(f"/v1/jobs/{job['id']}/result?format=png&mask=1")
    assert response.headers["content-type"] == "image/png"
    assert response.content.startswith(b"\x89PNG")


def test_a_job_is_cancelled_between_slices_and_chat_goes_on(
    grounded: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies of others advance while a long volume is segmented."""
    from medm.inference.segmenter import Segmenter

    own = Segmenter.encode

    def slow(self: Segmenter, pixels: np.ndarray) -> Any:
        time.sleep(0.2)
        return own(self, pixels)

    monkeypatch.setattr(Segmenter, "encode", slow)
    values = np.random.default_rng(0).integers(0, 99, (60, 8, 8), np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.nii"))
    with grounded.client() as client:
        name = upload(client, tmp_path / "a.nii")["id"]
        first = submit(client, "segmentation", name)["id"]
        waiting = submit(client, "report", name)["id"]
        while client.get(f"/v1/jobs/{first}").json()["progress"]["done"] < 2:
            time.sleep(0.02)
        assert client.get(f"/v1/jobs/{waiting}").json()["status"] == "queued"
        assert code(client.get(f"/v1/jobs/{first}/result")) == (409, "job_not_done")
        assert grounded.chat(max_tokens=4).status_code == 200
        progress = client.get(f"/v1/jobs/{first}").json()
        assert progress["status"] == "running"
        assert 2 <= progress["progress"]["done"] < progress["progress"]["total"] == 60
        assert client.post(f"/v1/jobs/{waiting}/cancel").json()["status"] == "cancelled"
        assert grounded.service.jobs.get(waiting).request.prompt == ""  # takes no memory any more
        client.post(f"/v1/jobs/{first}/cancel")
        assert finished(client, first)["status"] == "cancelled"
        assert code(client.get(f"/v1/jobs/{first}/result")) == (409, "job_not_done")
    assert grounded.idle()


def test_refused_jobs(grounded: Live, dual: Live, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    body = {"model": "model", "task": "report", "files": ["file-x"], "prompt": "Where?"}
    with grounded.client() as client:
        assert code(client.post("/v1/jobs", json=body)) == (404, "file_not_found")
        assert code(client.post("/v1/jobs", json=body | {"files": []}))[0] == 400
        assert code(client.post("/v1/jobs", json=body | {"files": ["x"] * 4}))[0] == 400
        assert code(client.post("/v1/jobs", json=body | {"task": "biopsy"}))[0] == 400
        name = upload(client, tmp_path / "a.png")["id"]
        long = submit(client, "report", name, prompt="word " * 200)["id"]
        job = finished(client, long)
        assert job["status"] == "failed"
        assert job["error"]["code"] == "context_length_exceeded"
    with dual.client() as client:
        assert code(client.post("/v1/jobs", json=body)) == (400, "unsupported")
