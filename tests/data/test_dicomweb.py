"""Studies from an archive and results back, on a small archive in this process and on Orthanc."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pydicom
import pytest

from medm.data.dicomweb import Archive, Credentials, read_credentials
from medm.errors import MedmError, RecipeError
from medm.imaging import VolumePreprocess, prepare
from medm.imaging.dicom_seg import write_dicom_seg
from medm.imaging.dicom_sr import ReportSource, write_dicom_sr
from tests.cli.runner import medm
from tests.data.archive import ORTHANC, PASSWORD, PLUGIN, USER, SmallArchive, orthanc, small_archive
from tests.imaging.tiny import body, phantom, write_series

pytestmark = pytest.mark.skipif(
    find_spec("dicomweb_client") is None or find_spec("highdicom") is None,
    reason="dicomweb-client and highdicom come with the extra 'dicom'",
)
ACCOUNT = Credentials(USER, PASSWORD)
FRAME = pydicom.uid.generate_uid()


@pytest.fixture
def archive() -> Iterator[SmallArchive]:
    with small_archive() as server:
        yield server


def series(folder: Path) -> list[Path]:
    def change(dataset: pydicom.Dataset, z: int) -> None:
        dataset.FrameOfReferenceUID = FRAME

    return write_series(folder, phantom(), change=change)


def results(folder: Path, ct: Path) -> list[Path]:
    """A SEG and an SR on a series."""
    preprocess = VolumePreprocess(windows=[[-1000, 1000]], size=None)
    placement = prepare(ct, preprocess).placement
    folder.mkdir()
    write_dicom_seg(folder / "seg.dcm", [("Liver", body() > 0)], ct, placement)
    write_dicom_sr(folder / "sr.dcm", "No pneumothorax.", [ReportSource(ct, "volume")])
    return [folder / "seg.dcm", folder / "sr.dcm"]


def round_trip(url: str, credentials: Credentials, folder: Path) -> None:
    """A series is stored and fetched, and results on what was fetched are stored and fetched."""
    files = series(folder / "ct")
    sent = {(one := pydicom.dcmread(file)).SOPInstanceUID: one.PixelData for file in files}
    study = str(one.StudyInstanceUID)
    archive = Archive(url, credentials)
    assert archive.store(files).files == 12
    fetched = archive.fetch([study], folder / "fetched")
    assert (fetched.studies, fetched.series, fetched.files) == (1, 1, 12)
    ct = folder / "fetched" / "study-0001" / "series-0001"
    assert sorted(path.name for path in ct.iterdir())[0::12] == ["000001.dcm"]
    read = {(one := pydicom.dcmread(path)).SOPInstanceUID: one.PixelData for path in ct.iterdir()}
    assert read == sent
    archive.store(results(folder / "results", ct))
    again = archive.fetch([study], folder / "again", modalities=["SEG", "SR"])
    found = [pydicom.dcmread(path) for path in sorted((folder / "again").rglob("*.dcm"))]
    assert again.files == 2
    assert {one.Modality for one in found} == {"SEG", "SR"}
    (report,) = [one for one in found if one.Modality == "SR"]
    assert "No pneumothorax." in str(report)
    assert {one.StudyInstanceUID for one in found} == {study}


def test_round_trip_through_a_small_archive(archive: SmallArchive, tmp_path: Path) -> None:
    round_trip(archive.url, Credentials(token="a-token"), tmp_path)
    assert set(archive.seen) == {"Bearer a-token"}


@pytest.mark.skipif(
    ORTHANC is None or PLUGIN is None,
    reason="Orthanc is not installed (Debian: orthanc, orthanc-dicomweb)",
)
def test_round_trip_through_orthanc(tmp_path: Path) -> None:
    with orthanc(tmp_path / "orthanc") as url:
        round_trip(url, ACCOUNT, tmp_path)
        with pytest.raises(MedmError, match=r"HTTP status 401; set the credentials"):
            Archive(url, Credentials(USER, "wrong")).fetch(["1.2.3"], tmp_path / "no")
        with pytest.raises(MedmError, match="study 1 is not there, or has no series"):
            Archive(url, ACCOUNT).fetch(["1.2.3"], tmp_path / "no")
        assert not (tmp_path / "no").exists()


def test_what_goes_wrong_is_named_without_an_identifier(
    archive: SmallArchive, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = series(tmp_path / "ct")
    study = str(pydicom.dcmread(files[0]).StudyInstanceUID)
    client = Archive(archive.url, Credentials())
    client.store(files)
    output = tmp_path / "out"
    cases = [
        ({"status": 404}, "HTTP status 404; check the address"),
        ({"status": 302}, r"no usable answer \(TooManyRedirects\)"),
        ({"drop": 2}, "study 1, series 1: sent 10 of 12 files"),
        ({"body": b"<html>Canary</html>"}, r"study 1: no usable answer \(\w+\)"),
    ]
    with caplog.at_level(logging.DEBUG, logger="medm"):
        for faults, reason in cases:
            for name, value in faults.items():
                setattr(archive, name, value)
            with pytest.raises(MedmError, match=reason) as raised:
                client.fetch([study], output)
            assert study not in str(raised.value) and "Canary" not in str(raised.value)
            archive.status, archive.drop, archive.body = None, 0, None
            assert not output.exists()
        archive.failure = 0xA700
        with pytest.raises(MedmError, match="refused with reason A700H; 0 of 12 files"):
            client.store(files)
    assert study not in caplog.text and "Canary" not in caplog.text


def test_every_page_of_the_series_is_asked_for(archive: SmallArchive, tmp_path: Path) -> None:
    files = series(tmp_path / "ct")[:5]
    for number, file in enumerate(files):
        dataset = pydicom.dcmread(file)
        dataset.SeriesInstanceUID = f"1.2.{number}"
        dataset.save_as(file)
    study = str(dataset.StudyInstanceUID)
    client = Archive(archive.url, Credentials())
    client.store(files)
    archive.page = 2
    assert client.fetch([study], tmp_path / "unknown total").series == 5
    archive.total = 5
    assert client.fetch([study], tmp_path / "known total").series == 5
    archive.knows_offset = False
    with pytest.raises(MedmError, match="study 1: lists 2 of 5 series") as raised:
        client.fetch([study], tmp_path / "out")
    assert study not in str(raised.value) and not (tmp_path / "out").exists()
    archive.total, archive.page = None, None
    assert client.fetch([study], tmp_path / "one page").series == 5


def test_limits(archive: SmallArchive, tmp_path: Path) -> None:
    files = series(tmp_path / "ct")
    study = str(pydicom.dcmread(files[0]).StudyInstanceUID)
    Archive(archive.url, Credentials()).store(files)
    small = Archive(archive.url, Credentials(), max_bytes=10_000)
    with pytest.raises(MedmError, match=r"sends more than 1e-05 GB; fetch less"):
        small.fetch([study], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MedmError, match="Nothing was sent"):
        small.store(files)
    assert len(archive.stored) == 12
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(MedmError, match="no DICOM file; nothing was sent"):
        Archive(archive.url, Credentials()).store([*files, tmp_path / "a.txt"])
    assert len(archive.stored) == 12


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://pacs.example.org/dicom-web", "http sends data of patients unprotected"),
        ("https://me:mine@pacs.example.org/", "holds credentials"),
        ("pacs.example.org", "expected an address"),
        ("https://pacs.example.org/?token=mine", "without [?] and #"),
    ],
)
def test_unsafe_addresses(url: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason) as raised:
        Archive(url, Credentials())
    assert "mine" not in str(raised.value)


def test_credentials(tmp_path: Path) -> None:
    assert read_credentials(None, {"MEDM_DICOMWEB_TOKEN": "t"}) == Credentials(token="t")
    with pytest.raises(RecipeError, match="go together"):
        read_credentials(None, {"MEDM_DICOMWEB_USER": "u"})
    file = tmp_path / "credentials.yaml"
    file.write_text("user: u\npassword: hidden\n")
    file.chmod(0o644)
    with pytest.raises(RecipeError, match="others can read the credentials"):
        read_credentials(file)
    file.chmod(0o600)
    assert read_credentials(file) == Credentials("u", "hidden")
    assert "hidden" not in repr(read_credentials(file))


def test_a_certificate_that_nobody_signed_is_refused(tmp_path: Path) -> None:
    import ssl

    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-days", "2",
         "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")],
        check=False, capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl makes no certificate here")
    with small_archive() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = f"https://localhost:{server.server_port}/dicom-web"
        with pytest.raises(MedmError, match="certificate is not trusted"):
            Archive(url, ACCOUNT).fetch(["1.2.3"], tmp_path / "out")
        trusting = Archive(url, ACCOUNT, certificates=tmp_path / "cert.pem")
        with pytest.raises(MedmError, match="is not there"):
            trusting.fetch(["1.2.3"], tmp_path / "out")


def test_the_commands(
    archive: SmallArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDM_DICOMWEB_USER", USER)
    monkeypatch.setenv("MEDM_DICOMWEB_PASSWORD", PASSWORD)
    files = series(tmp_path / "ct")
    for file in files:
        file.rename(file.with_suffix(".dcm"))
    study = str(pydicom.dcmread(files[0].with_suffix(".dcm")).StudyInstanceUID)
    done = medm("data", "store-dicomweb", archive.url, str(tmp_path / "ct"))
    assert done.code == 0, done.err
    assert "12 files stored" in done.out
    done = medm(
        "data", "fetch-dicomweb", archive.url, str(tmp_path / "out"), "--study", study,
        "--modality", "CT",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "studies 1, series 1, files 12" in done.out
    assert "Canary" not in done.out + done.err
    assert all(value.startswith("Basic ") for value in archive.seen)
    wrong = medm("data", "store-dicomweb", archive.url, str(tmp_path / "none"))
    assert wrong.code == 1 and "nothing was sent" in wrong.err
