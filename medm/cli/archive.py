"""`medm data clean`, `fetch-dicomweb` and `store-dicomweb`: DICOM from an archive and back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from medm.cli.console import note, out

LISTED = 20
"""Files that are listed."""

_Url = Annotated[
    str,
    typer.Argument(
        metavar="URL", help="Base of the services, such as https://pacs.example.org/dicom-web."
    ),
]
_CredentialsFile = Annotated[
    Path | None,
    typer.Option(
        "--credentials",
        help="YAML or JSON file with user and password, or token, that only you can read.  "
        "[default: MEDM_DICOMWEB_USER and _PASSWORD, or _TOKEN, of the environment]",
    ),
]
_Certificates = Annotated[
    Path | None,
    typer.Option(help="Certificates of the authorities to trust (PEM), for an internal one."),
]
_MaxGb = Annotated[
    float, typer.Option("--max-gb", min=0, help="Most gigabytes that are received or sent.")
]
_AllowHttp = Annotated[
    bool, typer.Option("--allow-http", help="Also without TLS, to another machine than this.")
]


def clean(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="DICOM files at any depth.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder outside of FOLDER.")],
    profile: Annotated[
        str,
        typer.Option(
            help="basic, basic-patient-characteristics, or a YAML file of yours: see "
            "docs/hospital.md."
        ),
    ] = "basic",
    salt_file: Annotated[
        Path | None,
        typer.Option(
            help="Key of UIDs and pseudonyms, 16 bytes or more; with the same one further files of "
            "a study fit. Without it they are random."
        ),
    ] = None,
) -> None:
    """Clean the headers of DICOM images by a profile of PS3.15. No anonymization: pixels stay.

    Private elements are removed and UIDs replaced alike in all files. Files whose pixels may show
    names are listed, in cleaning.json too, which counts what was done and holds no value.
    """
    from medm.imaging.dicom_clean import REPORT, clean_folder
    from medm.imaging.dicom_profiles import load_profile
    from medm.imaging.pseudonyms import Pseudonyms, read_salt

    report = clean_folder(
        folder,
        output,
        load_profile(profile),
        pseudonyms=Pseudonyms(read_salt(salt_file)),
        progress=lambda done: note(f"{done} files") if done % 1000 == 0 else None,
    )
    out.print(
        f"{output}: {report.files} files, profile {report.profile}; {len(report.actions)} elements "
        f"changed, {report.private} private ones removed, {report.uids} UIDs replaced",
        markup=False,
    )
    if report.links:
        out.print(f"{report.links} links not followed")
    for reason, count in Counter(report.left_out.values()).items():
        out.print(f"{count} files left out: {reason}", markup=False)
        listed = [file for file, why in report.left_out.items() if why == reason]
        for file in listed[:LISTED]:
            out.print(f"  {file}", markup=False)
        if count > LISTED:
            out.print(f"  ... and {count - LISTED} more")
    if report.flagged:
        out.print(
            f"look at {len(report.flagged)} files before they leave the hospital, all in {REPORT}:"
        )
    reasons = Counter(reason for found in report.flagged.values() for reason in found)
    for reason, count in reasons.items():
        first = next(name for name, found in report.flagged.items() if reason in found)
        out.print(f"  {count} files: {reason}; the first: {first}", markup=False)
    note("Header cleaning is no anonymization: pixels are unchanged, and heads show faces.")


def fetch_dicomweb(
    url: _Url,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    study: Annotated[list[str], typer.Option(help="StudyInstanceUID; may be given several times.")],
    modality: Annotated[
        list[str] | None, typer.Option(help="Only series of it; may be given several times.")
    ] = None,
    credentials: _CredentialsFile = None,
    certificates: _Certificates = None,
    max_gb: _MaxGb = 20.0,
    allow_http: _AllowHttp = False,
) -> None:
    """Fetch studies from a DICOMweb archive (QIDO-RS, WADO-RS) into a new folder.

    Headers come as they are. The folder is written atomically.
    """
    from medm.data.dicomweb import Archive, read_credentials

    archive = Archive(
        url,
        read_credentials(credentials),
        certificates=certificates,
        max_bytes=int(max_gb * 1e9),
        allow_http=allow_http,
    )
    fetched = archive.fetch(
        study,
        output,
        modalities=modality or [],
        progress=lambda done: note(f"{done} files") if done % 500 == 0 else None,
    )
    out.print(
        f"{output}: studies {fetched.studies}, series {fetched.series}, files {fetched.files}, "
        f"{fetched.size / 1e9:.3f} GB",
        markup=False,
    )
    note(f"headers hold data of patients; clean them: medm data clean {output} CLEANED")


def store_dicomweb(
    url: _Url,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILES", help="DICOM files, or folders of them (.dcm)."),
    ],
    credentials: _CredentialsFile = None,
    certificates: _Certificates = None,
    max_gb: _MaxGb = 20.0,
    allow_http: _AllowHttp = False,
) -> None:
    """Store DICOM files in a DICOMweb archive (STOW-RS): masks (SEG) and reports (SR) of `infer`.

    Not for clinical use: store them where nobody takes them for findings of a person.
    """
    from medm.data.dicomweb import Archive, read_credentials
    from medm.errors import MedmError

    found: list[Path] = []
    for file in files:
        if not file.exists():
            raise MedmError(f"{file}: no such file or folder; nothing was sent")
        found += sorted(file.rglob("*.dcm")) if file.is_dir() else [file]
    if not found:
        raise MedmError("no .dcm file in the folders; nothing was sent")
    archive = Archive(
        url,
        read_credentials(credentials),
        certificates=certificates,
        max_bytes=int(max_gb * 1e9),
        allow_http=allow_http,
    )
    stored = archive.store(
        found, progress=lambda done: note(f"{done} files") if done % 100 == 0 else None
    )
    out.print(f"{archive.name}: {stored.files} files stored, {stored.size / 1e6:.2f} MB")
