"""DICOMweb archives for tests: a small one in this process, and Orthanc where it is installed."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pydicom

USER, PASSWORD = "reader", "secret-of-the-test"
ORTHANC = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")
PLUGIN = next(
    (str(path) for path in sorted(Path("/usr/lib/orthanc").glob("libOrthancDicomWeb.so*"))), None
)
BOUNDARY = "the-boundary"


class SmallArchive(ThreadingHTTPServer):
    """Holds data sets in memory, and answers what medm asks. Faults are set by tests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.stored: list[pydicom.FileDataset] = []
        self.status: int | None = None
        """Answer of every request."""
        self.drop = 0
        """Instances that are listed and not sent."""
        self.body: bytes | None = None
        """Sent in place of every answer."""
        self.failure: int | None = None
        """Failure Reason of stored instances."""
        self.page: int | None = None
        """Most series of one answer."""
        self.knows_offset = True
        self.total: int | None = None
        """NumberOfStudyRelatedSeries."""
        self.seen: list[str] = []
        """Values of the header Authorization."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/dicom-web"


class _Handler(BaseHTTPRequestHandler):
    server: SmallArchive

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: bytes, kind: str, status: int = 200) -> None:
        if self.server.status is not None:
            status, body = self.server.status, b""
        self.server.seen.append(self.headers.get("Authorization", ""))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if status in (301, 302):
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        body = self.server.body if self.server.body is not None else body
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")[1:]
        study = parts[1]
        of_study = [one for one in self.server.stored if one.StudyInstanceUID == study]
        if len(parts) == 3:
            series = sorted({str(one.SeriesInstanceUID) for one in of_study})
            listed = []
            for uid in series:
                own = [one for one in of_study if one.SeriesInstanceUID == uid]
                listed.append(
                    {
                        "0020000E": {"vr": "UI", "Value": [uid]},
                        "00080060": {"vr": "CS", "Value": [own[0].Modality]},
                        "00201209": {"vr": "IS", "Value": [len(own)]},
                    }
                )
            if self.server.total is not None:
                for entry in listed:
                    entry["00201206"] = {"vr": "IS", "Value": [self.server.total]}
            asked = parse_qs(self.path.partition("?")[2]).get("offset", ["0"])[0]
            start = int(asked) if self.server.knows_offset else 0
            listed = listed[start:][: self.server.page]
            self._answer(json.dumps(listed).encode(), "application/dicom+json")
            return
        own = [one for one in of_study if one.SeriesInstanceUID == parts[3]]
        body = b""
        for one in own[self.server.drop :]:
            stream = io.BytesIO()
            one.save_as(stream, enforce_file_format=True)
            body += f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
            body += stream.getvalue() + b"\r\n"
        body += f"--{BOUNDARY}--".encode()
        self._answer(body, f'multipart/related; type="application/dicom"; boundary={BOUNDARY}')

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers["Content-Length"]))
        boundary = self.headers["Content-Type"].partition('boundary="')[2].rstrip('"').encode()
        for part in data.split(b"--" + boundary)[1:-1]:
            content = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
            dataset = pydicom.dcmread(io.BytesIO(content))
            if self.server.failure is None:
                self.server.stored.append(dataset)
        answer: dict[str, Any] = {}
        if self.server.failure is not None:
            item = {"00081197": {"vr": "US", "Value": [self.server.failure]}}
            answer["00081198"] = {"vr": "SQ", "Value": [item]}
        self._answer(json.dumps(answer).encode(), "application/dicom+json")


@contextmanager
def small_archive() -> Iterator[SmallArchive]:
    server = SmallArchive()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def orthanc(folder: Path) -> Iterator[str]:
    """A real Orthanc with its DICOMweb plug-in, which asks for a password; its address."""
    assert ORTHANC is not None and PLUGIN is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "Name": "test",
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "Plugins": [PLUGIN],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "orthanc.json").write_text(json.dumps(options))
    with (folder / "orthanc.log").open("w") as log:
        process = subprocess.Popen([ORTHANC, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/dicom-web/studies", process, folder / "orthanc.log")
        yield f"http://127.0.0.1:{port}/dicom-web"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except urllib.error.HTTPError:  # it asks for a password: it is there
            return
        except OSError:
            time.sleep(0.1)
            continue
        return
    raise RuntimeError(f"Orthanc did not start: {log.read_text()[-2000:]}")
