"""Studies from a DICOMweb archive, and results to one: QIDO-RS, WADO-RS, STOW-RS (PS3.18).

Needs dicomweb-client, the extra 'dicom'. Certificates are verified. Credentials come from the
environment or from a file, never from the address. Addresses of requests hold UIDs, so errors name
the server and the status alone.
"""

from __future__ import annotations

import importlib
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from medm.config import read_yaml
from medm.errors import DeviceError, MedmError, RecipeError
from medm.files import atomic_directory
from medm.imaging.damage import DECODE_ERRORS
from medm.imaging.dicom import is_dicom, load_pydicom, quiet

if TYPE_CHECKING:
    import requests
    from dicomweb_client import DICOMwebClient

USER, PASSWORD, TOKEN = "MEDM_DICOMWEB_USER", "MEDM_DICOMWEB_PASSWORD", "MEDM_DICOMWEB_TOKEN"
"""Variables of the environment with the credentials: user and password, or a bearer token."""
_FILE_KEYS = {"user", "password", "token"}
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_TIMEOUT = (20.0, 120.0)
"""Seconds to connect, and between two pieces of a reply."""
_SERIES_UID, _SERIES_MODALITY, _SERIES_INSTANCES = "0020000E", "00080060", "00201209"
_STUDY_SERIES = "00201206"
"""NumberOfStudyRelatedSeries."""
MAX_GB = 20.0
"""Most gigabytes (1e9 bytes) of one command, where no other limit is given."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What an archive asks for; empty where it asks for nothing."""

    user: str = ""
    password: str = ""
    token: str = ""

    def __repr__(self) -> str:
        return "Credentials(...)"


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was fetched."""

    studies: int
    series: int
    files: int
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What was stored."""

    files: int
    size: int


def read_credentials(file: Path | None, environment: Mapping[str, str] = os.environ) -> Credentials:
    """Return the credentials of a YAML or JSON file (user and password, or token), or else those
    of the environment.

    Raises:
        RecipeError: the file can be read by others, or holds something else.
    """
    if file is None:
        found = {
            "user": environment.get(USER, ""),
            "password": environment.get(PASSWORD, ""),
            "token": environment.get(TOKEN, ""),
        }
        place = f"{USER}, {PASSWORD}, {TOKEN}"
    else:
        if file.exists() and stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise RecipeError(f"{file}: others can read the credentials; chmod 600 {file}")
        content = read_yaml(file)
        if set(content) - _FILE_KEYS:
            raise RecipeError(f"{file}: expected the keys user and password, or token")
        found = {key: str(value) for key, value in content.items()}
        place = str(file)
    credentials = Credentials(**found)
    if bool(credentials.user) != bool(credentials.password):
        raise RecipeError(f"{place}: user and password go together; found one of them")
    if credentials.user and credentials.token:
        raise RecipeError(f"{place}: a user and a token; the archive takes one of them")
    return credentials


class Archive:
    """A DICOMweb archive.

    Args:
        url: base of its services, such as https://pacs.example.org/dicom-web.
        credentials: sent with every request.
        certificates: file of the authorities to trust, in place of the usual ones.
        max_bytes: most bytes that are received, and that are sent.
        allow_http: send data without TLS to another machine.

    Raises:
        DeviceError: dicomweb-client is not installed.
        RecipeError: the address holds credentials, or is not protected by TLS.
    """

    def __init__(
        self,
        url: str,
        credentials: Credentials,
        *,
        certificates: Path | None = None,
        max_bytes: int = int(MAX_GB * 1e9),
        allow_http: bool = False,
    ) -> None:
        self.name = _checked(url, allow_http=allow_http)
        self._max_bytes = max_bytes
        self._received = self._sent = 0
        self._client = self._connect(url, credentials, certificates)

    def _connect(
        self, url: str, credentials: Credentials, certificates: Path | None
    ) -> DICOMwebClient:
        client, requests = _load_client(), importlib.import_module("requests")
        session = requests.Session()
        session.max_redirects = 0  # data and credentials go to the given server alone
        session.trust_env = False  # neither ~/.netrc nor a proxy that was meant for other traffic
        if certificates is not None:
            if not certificates.is_file():
                raise RecipeError(f"{certificates}: no such file of certificates")
            session.verify = str(certificates)
        if credentials.user:
            session.auth = (credentials.user, credentials.password)
        if credentials.token:
            session.headers["Authorization"] = f"Bearer {credentials.token}"
        session.hooks["response"].append(self._limit)
        made: DICOMwebClient = client(url.rstrip("/"), session=session, timeout=_TIMEOUT)
        made.set_http_retry_params(retry=False)  # it would retry what cannot change for a minute
        return made

    def _limit(self, response: requests.Response, **_: object) -> requests.Response:
        """Count the bytes of a reply, unpacked, and stop at the limit."""
        original = response.iter_content

        def counted(*arguments: Any, **options: Any) -> Iterator[bytes]:
            for chunk in original(*arguments, **options):
                self._received += len(chunk)
                if self._received > self._max_bytes:
                    raise MedmError(
                        f"{self.name}: sends more than {self._max_bytes / 1e9:g} GB; fetch less, "
                        "or raise --max-gb"
                    )
                yield chunk

        response.iter_content = counted  # type: ignore[method-assign]
        return response

    def fetch(
        self,
        studies: Sequence[str],
        output: Path,
        *,
        modalities: Sequence[str] = (),
        progress: Callable[[int], None] = lambda done: None,
    ) -> Fetched:
        """Fetch studies into `study-0001/series-0001/000001.dcm` and so on.

        Files come as the archive stores them, compressed or not.

        Args:
            studies: StudyInstanceUIDs.
            output: new folder, written as a whole or not at all.
            modalities: only series of these; empty for all.
            progress: called with the number of files.

        Raises:
            MedmError: the archive does not answer, refuses, sends less than it lists or more than
                the limit; no such study; the folder is not empty.
            OSError: a file cannot be written.
        """
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise MedmError(f"{output}: exists and is not empty; choose a new folder")
        files = series_count = 0
        size = 0
        with atomic_directory(output) as folder:
            for number, study in enumerate(studies, start=1):
                listed = self._series(study, number, modalities)
                for position, (series, expected) in enumerate(listed, start=1):
                    target = folder / f"study-{number:04d}" / f"series-{position:04d}"
                    target.mkdir(parents=True)
                    place = f"study {number}, series {position}"
                    received = 0
                    for dataset in self._instances(study, series, place):
                        received += 1
                        files += 1
                        path = target / f"{received:06d}.dcm"
                        with quiet():
                            dataset.save_as(path, enforce_file_format=False)
                        size += path.stat().st_size
                        progress(files)
                    if expected is not None and received != expected:
                        raise MedmError(
                            f"{self.name}: {place}: sent {received} of {expected} files; run the "
                            "same command again, or ask the archive's administrator"
                        )
                series_count += len(listed)
        return Fetched(len(studies), series_count, files, size)

    def _series(
        self, study: str, number: int, modalities: Sequence[str]
    ) -> list[tuple[str, int | None]]:
        """Return UID and number of files of the series of a study."""
        listed = []
        for uid, entry in self._entries(study, number).items():
            if modalities and _first(entry, _SERIES_MODALITY) not in modalities:
                continue
            listed.append((uid, _count(entry, _SERIES_INSTANCES)))
        if not listed:
            of = f" of {', '.join(modalities)}" if modalities else ""
            raise MedmError(f"{self.name}: study {number} is not there, or has no series{of}")
        return listed

    def _entries(self, study: str, number: int) -> dict[str, Mapping[str, Any]]:
        """Return every series of a study, of all pages; an archive may limit what one answer lists.

        The client's `get_remaining` asks forever where an archive does not know `offset`.
        """
        found: dict[str, Mapping[str, Any]] = {}
        offset, total = 0, None
        while total is None or len(found) < total:
            with self._told(f"study {number}"):
                page = self._client.search_for_series(
                    study,
                    fields=["NumberOfSeriesRelatedInstances", "NumberOfStudyRelatedSeries"],
                    offset=offset or None,
                )
            new = {str(uid): entry for entry in page if (uid := _first(entry, _SERIES_UID))}
            if new.keys() <= found.keys():
                break
            found |= new
            offset += len(page)
            total = next(filter(None, (_count(entry, _STUDY_SERIES) for entry in page)), total)
        if found and total is not None and len(found) < total:
            raise MedmError(
                f"{self.name}: study {number}: lists {len(found)} of {total} series; ask the "
                "archive's administrator, or fetch with an account that may see all"
            )
        return found

    def _instances(self, study: str, series: str, place: str) -> Iterator[Any]:
        with self._told(place), quiet():
            yield from self._client.iter_series(
                study, series, media_types=(("application/dicom", "*"),)
            )

    def store(
        self, files: Sequence[Path], *, progress: Callable[[int], None] = lambda done: None
    ) -> Stored:
        """Store DICOM files, one request each. Those before a failure stay stored.

        Args:
            files: DICOM, such as SEG and SR that medm wrote.
            progress: called with the number of files.

        Raises:
            MedmError: a file is no DICOM, they are larger than the limit, or the archive refuses
                one.
        """
        pydicom = load_pydicom()
        for file in files:
            if not is_dicom(file):
                raise MedmError(f"{file}: no DICOM file; nothing was sent")
        size = sum(file.stat().st_size for file in files)
        if size > self._max_bytes:
            raise MedmError(
                f"{len(files)} files have {size / 1e9:.2f} GB, more than "
                f"{self._max_bytes / 1e9:g}; send fewer, or raise --max-gb. Nothing was sent"
            )
        for done, file in enumerate(files, start=1):
            try:
                with quiet():
                    dataset = pydicom.dcmread(file, force=True)
            except (*DECODE_ERRORS, pydicom.errors.InvalidDicomError) as error:
                raise MedmError(
                    f"{file}: damaged ({type(error).__name__}); {done - 1} files were stored"
                ) from None
            with self._told(f"{file} ({done - 1} of {len(files)} files were stored)"), quiet():
                answer = self._client.store_instances([dataset])
            failed = answer.get("FailedSOPSequence")
            if failed:
                reason = failed[0].get("FailureReason")
                code = "no reason" if reason is None else f"reason {int(reason):04X}H"
                raise MedmError(
                    f"{self.name}: {file}: refused with {code}; {done - 1} of {len(files)} files "
                    "were stored"
                )
            progress(done)
        return Stored(len(files), size)

    @contextmanager
    def _told(self, place: str) -> Iterator[None]:
        """Turn errors of the network into errors that name no address of a request."""
        requests = importlib.import_module("requests")
        try:
            yield
        except MedmError:
            raise
        except requests.exceptions.HTTPError as error:
            status = 0 if error.response is None else error.response.status_code
            hints = {
                401: "; set the credentials",
                403: "; the account may not do this",
                404: "; check the address of the services",
            }
            raise MedmError(
                f"{self.name}: {place}: HTTP status {status}{hints.get(status, '')}"
            ) from None
        except requests.exceptions.SSLError:
            raise MedmError(
                f"{self.name}: its certificate is not trusted; name the file of your authority by "
                "--certificates"
            ) from None
        except (requests.exceptions.RequestException, *DECODE_ERRORS) as error:
            raise MedmError(
                f"{self.name}: {place}: no usable answer ({type(error).__name__})"
            ) from None


def _checked(url: str, *, allow_http: bool) -> str:
    """Return the name of a server for messages. Raises `RecipeError` for an unsafe address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError("expected an address such as https://pacs.example.org/dicom-web")
    if parts.username is not None or parts.password is not None:
        raise RecipeError(
            f"{parts.hostname}: the address holds credentials, which end in logs; set {USER} and "
            f"{PASSWORD}, or name a file"
        )
    if parts.query or parts.fragment:
        raise RecipeError(f"{parts.hostname}: expected an address without ? and #")
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK and not allow_http:
        raise RecipeError(
            f"{parts.hostname}: http sends data of patients unprotected; use https, or "
            "--allow-http on a network that is protected otherwise"
        )
    return parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"


def _load_client() -> Any:
    try:
        module = importlib.import_module("dicomweb_client")
    except ModuleNotFoundError as error:
        if error.name != "dicomweb_client":
            raise
        raise DeviceError(
            "DICOMweb needs dicomweb-client: pip install 'dicomweb-client' (or 'medm[dicom]')"
        ) from None
    logging.getLogger("dicomweb_client").setLevel(logging.CRITICAL)  # its messages hold UIDs
    load_pydicom()
    return module.DICOMwebClient


def _first(entry: Mapping[str, Any], tag: str) -> object:
    """Return the first value of an element in DICOM JSON; None where it is missing."""
    values = entry.get(tag, {}).get("Value") or [None]
    return values[0]


def _count(entry: Mapping[str, Any], tag: str) -> int | None:
    value = _first(entry, tag)
    return None if value is None else int(str(value))
