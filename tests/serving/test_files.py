"""Uploads: read once in a limited process, kept under random ids, deleted when they expire."""

from __future__ import annotations

import asyncio
import hashlib
import io
import signal
import stat
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset

from medm.serving import server
from medm.serving.files import FileStore
from medm.serving.server import Server
from tests.imaging.tiny import phantom, write_multi_frame, write_series
from tests.serving.live import Live, code, data_uri, png, question, upload

Change = Callable[[Dataset, int], None]


def zipped_series(
    folder: Path, *, change: Change | None = None, drop: int | None = None, extra: bytes = b""
) -> Path:
    """A zip of a DICOM series, as archives of a PACS are: folders, and names of patients."""
    write_series(folder / "series", phantom(), change=change)
    files = sorted((folder / "series").iterdir())
    path = folder / "Name^Of^Patient.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, file in enumerate(files):
            if number != drop:
                archive.write(file, f"../DICOM/Name^Of^Patient/{file.name}")
        if extra:
            archive.writestr("DICOM/IM9999", extra)
    return path


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_volume(live: Live, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"Name^Of^Patient{ending}"
    sitk.WriteImage(phantom(), str(path))
    with live.client() as client:
        answer = upload(client, path)
        assert client.get(f"/v1/files/{answer['id']}").json() == answer
        assert client.delete(f"/v1/files/{answer['id']}").json()["deleted"] is True
        assert code(client.get(f"/v1/files/{answer['id']}")) == (404, "file_not_found")
    assert answer["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert answer["bytes"] == path.stat().st_size
    assert answer["kind"] == "volume"
    assert answer["geometry"]["size"] == [12, 20, 26]
    assert answer["geometry"]["spacing_mm"] == pytest.approx([5.0, 2.0, 1.5], abs=1e-5)
    assert answer["geometry"]["axes"] == "SPL"
    assert answer["expires_at"] - answer["created_at"] == 3600
    assert "Patient" not in str(answer)
    assert not list(live.service.files.folder.iterdir())


def test_a_dicom_series(live: Live, tmp_path: Path) -> None:
    path = zipped_series(tmp_path)
    with live.client() as client:
        answer = upload(client, path)
        (folder,) = live.service.files.folder.iterdir()
        names = sorted(file.name for file in (folder / "series").iterdir())
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        client.delete(f"/v1/files/{answer['id']}")
    assert names == [f"{number:06d}" for number in range(12)]
    geometry = answer["geometry"]
    assert (geometry["size"], geometry["modality"], geometry["unit"]) == ([12, 20, 26], "CT", "HU")


def test_images_and_dicom_files(live: Live, tmp_path: Path) -> None:
    write_series(tmp_path / "series", phantom())
    single = next((tmp_path / "series").iterdir())
    frames = write_multi_frame(tmp_path / "frames.dcm", phantom())
    (tmp_path / "a.png").write_bytes(png())
    with live.client() as client:
        found = [upload(client, path) for path in (tmp_path / "a.png", single, frames)]
        for answer in found:
            client.delete(f"/v1/files/{answer['id']}")
    assert [answer["kind"] for answer in found] == ["image", "image", "volume"]
    assert [answer["geometry"]["size"] for answer in found] == [[20, 24], [20, 26], [12, 20, 26]]


def test_an_uploaded_image_is_answered_as_one_in_the_request(live: Live, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(3))
    part = {"type": "text", "text": "What is seen?"}
    with live.client() as client:
        name = upload(client, tmp_path / "a.png")["id"]
        bodies = [
            question("What is seen?", data_uri(png(3))),
            question("What is seen?", name),
            question()
            | {
                "messages": [
                    {"role": "user", "content": [{"type": "file", "file": {"file_id": name}}, part]}
                ]
            },
        ]
        replies = [
            client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
            for body in bodies
        ]
        client.delete(f"/v1/files/{name}")
    assert replies[0] == replies[1] == replies[2]


def volume(folder: Path, *shape: int) -> bytes:
    path = folder / "large.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros(shape, np.int16)), str(path))
    return path.read_bytes()


def large_dicom(folder: Path) -> bytes:
    """A series of more voxels than are taken, by its headers."""

    def change(dataset: Dataset, z: int) -> None:
        dataset.Rows = dataset.Columns = 100
        dataset.PixelData = bytes(2 * 100 * 100)

    return zipped_series(folder, change=change).read_bytes()


def tilted(folder: Path) -> bytes:
    def change(dataset: Dataset, z: int) -> None:
        x, y, height = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y + 2 * z, height]

    return zipped_series(folder, change=change).read_bytes()


def encrypted(folder: Path) -> bytes:
    content = bytearray(zipped_series(folder).read_bytes())
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = content.find(mark)
        while place >= 0:
            content[place + at] |= 1
            place = content.find(mark, place + 4)
    return bytes(content)


def zip_bomb(folder: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(50 * 2**20))
    return stream.getvalue()


def plain_zip(folder: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.png", png())
    return stream.getvalue()


REFUSED: dict[str, tuple[Callable[[Path], bytes], tuple[int, str]]] = {
    "nothing": (lambda folder: b"", (415, "unsupported_type")),
    "text": (lambda folder: b"hello" * 99, (415, "unsupported_type")),
    "gzip of something": (lambda folder: b"\x1f\x8b" + bytes(99), (415, "unsupported_type")),
    "zip without DICOM": (plain_zip, (415, "unsupported_type")),
    "damaged PNG": (lambda folder: png()[:200], (400, "invalid_image")),
    "damaged zip": (lambda folder: zipped_series(folder).read_bytes()[:900], (400, "invalid_file")),
    "encrypted zip": (encrypted, (400, "invalid_file")),
    "truncated NIfTI": (lambda folder: volume(folder, 9, 9, 9)[:-20], (400, "invalid_file")),
    "too many bytes": (lambda folder: bytes(2**20 + 2**17), (413, "body_too_large")),
    "zip bomb": (zip_bomb, (413, "body_too_large")),
    "too many voxels": (lambda folder: volume(folder, 50, 50, 50), (413, "too_many_voxels")),
    "too many voxels in DICOM": (large_dicom, (413, "too_many_voxels")),
    "missing slice": (
        lambda folder: zipped_series(folder, drop=5).read_bytes(),
        (422, "geometry"),
    ),
    "tilted gantry": (tilted, (422, "geometry")),
    "single slice": (lambda folder: volume(folder, 1, 9, 9), (422, "geometry")),
    "damaged slice": (
        lambda folder: zipped_series(folder, extra=b"\0" * 400).read_bytes(),
        (400, "invalid_file"),
    ),
    "MetaImage that names another file": (
        lambda folder: (
            b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\n"
            b"ElementDataFile = /etc/passwd\n"
        ),
        (400, "invalid_file"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_upload(live: Live, tmp_path: Path, name: str) -> None:
    make, expected = REFUSED[name]
    with live.client() as client:
        response = client.post("/v1/files", files={"file": ("Name^Of^Patient", make(tmp_path))})
        assert code(response) == expected
        assert str(live.service.files.folder) not in response.text
        assert "Patient" not in response.text
        assert code(client.post("/v1/files", data={"file": "text"})) in (
            (400, "invalid_value"),
            (415, "unsupported_type"),
        )
    assert not list(live.service.files.folder.iterdir())
    assert live.service.files.stored == 0


def test_full_storage(live: Live, tmp_path: Path) -> None:
    store = live.service.files
    with live.client() as client, store.room(2 * 2**20 - 100):
        response = client.post("/v1/files", files={"file": ("a.png", png())})
        assert code(response) == (429, "storage_full")
        assert response.headers["retry-after"]
    with live.client() as client:
        answer = client.post("/v1/files", files={"file": ("a.png", png())}).json()
        client.delete(f"/v1/files/{answer['id']}")


def test_a_file_in_use_outlives_its_expiry(live: Live) -> None:
    store: FileStore = live.service.files
    file = store.add(io.BytesIO(png()), len(png()))
    with store.using([file.id]) as (held,):
        held.expires = time.time() - 1
        store.sweep()
        assert held.path.exists()
        assert store.stored == file.size
    assert not file.path.exists()
    assert store.stored == 0


def test_expired_files_go_though_no_request_comes(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: FileStore = live.service.files
    file = store.add(io.BytesIO(png()), len(png()))
    file.expires = time.time() - 1
    monkeypatch.setattr(server, "SWEEP_TICKS", 1)
    end = time.monotonic() + 20
    while file.path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not file.path.exists()


def test_an_upload_that_comes_in_is_waited_for_while_the_server_drains(live: Live) -> None:
    idle = SimpleNamespace(state="draining", open=0)
    draining = Server(live.gate, live.service.options)
    draining.service = SimpleNamespace(worker=idle, jobs=idle)  # type: ignore[assignment]
    draining.gate = SimpleNamespace(bodies=1)  # type: ignore[assignment]
    draining.handle_exit(signal.SIGTERM, None)
    assert asyncio.run(draining.on_tick(1)) is False
    draining.gate.bodies = 0
    assert asyncio.run(draining.on_tick(2)) is True


def test_a_zip_whose_member_has_no_name_is_damaged(live: Live, tmp_path: Path) -> None:
    """Python's zipfile meets it with an IndexError."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("n", b"content")
    content = bytearray(stream.getvalue())
    for mark, at in ((b"PK\x03\x04", 26), (b"PK\x01\x02", 28)):  # the lengths of the name
        start = content.index(mark)
        content[start + at : start + at + 2] = b"\0\0"
        content[start + at + 2 : start + at + 4] = b"\1\0"  # its letter is an extra field
    with live.client() as client:
        response = client.post("/v1/files", files={"file": ("a.zip", bytes(content))})
    assert code(response) == (400, "invalid_file")
