"""`python -m campaign.worst [--out FILE]`: the worst file of each format, and what reading it costs.

Each file is written and read in forked children with the limits of the campaign. "Before" are the
figures of the first campaign, for the rows of docs/faults.md; it gave none for the other formats.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from campaign.__main__ import quiet
from campaign.harness import Case, Limits, Outcome, run_cases, scratch
from campaign.parts import crafted, http, media
from campaign.report import machine
from medm.config import read_yaml
from medm.errors import MedmError
from medm.files import atomic_write_text
from medm.imaging import load_pixels
from medm.inference.generator import load_engine
from medm.inference.options import GenerationOptions
from medm.serving.limits import Gate
from medm.serving.options import ServeOptions
from medm.serving.service import Service
from medm.types import Sample, Turn
from tests import crafted as files
from tests.inference.tiny import save_tiny

OUT = Path(__file__).parent / "results" / "worst.md"
LIMITS = Limits()
NOT_RECORDED = "not recorded"


@dataclass(frozen=True, slots=True)
class Worst:
    """A file that asks for much."""

    format: str
    what: str
    suffix: str
    make: files.Maker
    read: Callable[[Path], object]
    before: str = NOT_RECORDED


def _pixels(kind: str) -> Callable[[Path], object]:
    return partial(load_pixels, preprocess=media.IMAGE if kind == "image" else media.VOLUME)


def rle_bmp(side: int) -> files.Maker:
    """A BMP in run lengths, each row of which is one pixel: the rest is filled up byte by byte."""

    def make(path: Path) -> None:
        data = b"\x01\x05\x00\x00" * side + b"\x00\x01"
        palette = bytes(1024)
        at = 14 + 40 + len(palette)
        info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(data), 0, 0, 256, 0)
        head = b"BM" + struct.pack("<IHHI", at + len(data), 0, 0, at)
        path.write_bytes(head + info + palette + data)

    return make


def _gif(path: Path) -> None:
    path.write_bytes(b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(40))


def _raw_nrrd(path: Path) -> None:
    head = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 1024 1024 512\nencoding: raw\n\n"
    path.write_bytes(head.encode() + bytes(64))


def _raw_nifti(path: Path) -> None:
    import gzip

    files.nifti((1024, 1024, 512), held=64)(path)
    path.write_bytes(gzip.decompress(path.read_bytes()))


def _plain_dicom(path: Path) -> None:
    import pydicom

    from tests.imaging.test_dicom_sr import radiograph

    dataset = pydicom.dcmread(radiograph(path))
    dataset.Rows = dataset.Columns = 65535
    dataset.save_as(path, enforce_file_format=True)


def _model_with(change: Callable[[Path], None]) -> files.Maker:
    """A model folder at the place of the file, with one file changed; its size is that file's."""

    def make(path: Path) -> None:
        save_tiny(path)
        change(path / "model")

    return make


def _layers(model: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    content["text_config"]["num_hidden_layers"] = 2**63
    (model / "config.json").write_text(json.dumps(content))


def _token_id(model: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["endless"] = 2**31
    (model / "tokenizer.json").write_text(json.dumps(content))


def _template(model: Path) -> None:
    loop = "{% for i in range(99999) %}"
    text = loop * 6 + "{% endfor %}" * 6
    (model / "chat_template.jinja").write_text(text)


def _ask(path: Path) -> None:
    """Open a model folder and encode one question."""
    import torch

    _, processor = load_engine(
        str(path / "model"), GenerationOptions(), device=torch.device("cpu"), dtype="saved"
    )
    processor.encode(Sample((Turn("user", ("What is seen?",)),)), {}, generation=True)


def _body(path: Path) -> None:
    """A body of 32 MiB, the most that is taken, of empty lists: each takes 64 bytes of memory."""
    most = ServeOptions(model="").limits.max_body_bytes
    path.write_bytes(b'{"model": "model", "messages": [' + b"[]," * ((most - 64) // 3) + b"[]]}")


@cache
def _gate(model: str) -> Gate:
    service = Service.of(ServeOptions(model=model, device="cpu"))
    service.start()
    service.worker.wait_ready(300)
    return http.build_app(service, key=None)


def _post(path: Path) -> None:
    gate = _gate(str(path.parent / "served" / "model"))
    response = asyncio.run(http.post(gate, "/v1/chat/completions", http.JSON, path.read_bytes()))
    if response.status_code >= 400:
        raise MedmError(f"status {response.status_code}: {response.json()['error']['message']}")


def _records(path: Path) -> None:
    crafted.read_records(path, "conversations")


IMAGE, VOLUME = _pixels("image"), _pixels("volume")
SHAPE = (1024, 1024, 512)
WORST: Sequence[Worst] = (
    Worst("PNG", "1 x 67,000,000 pixels", ".png", files.png(1, 67_000_000), IMAGE, "12 s, 2.6 GiB"),
    Worst("PNG", "5792 x 5792, 16-bit RGBA", ".png", files.png(5792, 5792, bits=16, color=6), IMAGE),
    Worst("JPEG, progressive", "8192 x 8192, 600 scans", ".jpg", files.progressive_jpeg(8192, 600), IMAGE, "41 s"),
    Worst("JPEG, progressive", "8192 x 8192, color, 100 scans", ".jpg", files.progressive_jpeg(8192, 100, mode="RGB", scan=0), IMAGE),
    Worst("TIFF", "27,000 directories", ".tif", files.many_frames(27_000), IMAGE, "27 s"),
    Worst("TIFF", "8192 x 8192, float", ".tif", files.deflated_tiff(8192, 8192, dtype="float32"), IMAGE),
    Worst("BMP", "8192 x 8192, rows of one run", ".bmp", rle_bmp(8192), IMAGE),
    Worst("GIF", "65535 x 65535", ".gif", _gif, IMAGE),
    Worst("NIfTI", "2^29 voxels in the header", ".nii", _raw_nifti, VOLUME),
    Worst("NIfTI.gz", "2^29 voxels in the header", ".nii.gz", files.nifti(SHAPE, held=1000), VOLUME, "2 GiB"),
    Worst("NIfTI.gz", "2^29 voxels of int16 with a slope", ".nii.gz", files.nifti(SHAPE, datatype=4, bits=16, slope=2.0), VOLUME, "4.1 GiB"),
    Worst("NIfTI.gz", "2^28 voxels of int64", ".nii.gz", files.nifti((1024, 1024, 256), datatype=1024, bits=64), VOLUME, "2.6 GiB"),
    Worst("NIfTI.gz", "2^29 voxels of int8", ".nii.gz", files.nifti(SHAPE), VOLUME),
    Worst("NRRD", "2^29 voxels in the header", ".nrrd", _raw_nrrd, VOLUME),
    Worst("NRRD, packed", "2^29 voxels of uint8", ".nrrd", files.nrrd(SHAPE), VOLUME),
    Worst("MetaImage", "2^29 voxels of uint8", ".mha", files.metaimage(SHAPE), VOLUME),
    Worst("NPY", "2^29 voxels in the header", ".npy", files.npy_header(str(SHAPE)), VOLUME),
    Worst("NPZ, bzip2", "2^29 voxels", ".npz", files.npz(SHAPE, 12), VOLUME, "6.1 GB of 3 kB, 3.0 GB of 227 kB"),
    Worst("NPZ, LZMA", "2^29 voxels", ".npz", files.npz(SHAPE, 14), VOLUME, "6.1 GB of 3 kB, 3.0 GB of 227 kB"),
    Worst("NPZ, deflate", "2^29 voxels", ".npz", files.npz(SHAPE, 8), VOLUME),
    Worst("DICOM", "65535 x 65535 in the header", ".dcm", _plain_dicom, IMAGE),
    Worst("DICOM, compressed", "8192 x 8192, run lengths", ".dcm", files.rle_dicom(8192, 8192, 1), IMAGE),
    Worst("JSON record", "1,000,000 keys, one twice", ".jsonl", files.double_key(1_000_000), _records, "no end (12 MB)"),
    Worst("JSON record", "1,100,000 placeholders", ".jsonl", files.placeholders(1_100_000), _records, "no end (16 MB)"),
    Worst("YAML", "aliases of aliases, 30 levels", ".yaml", files.yaml_aliases(30), read_yaml, "no end"),
    Worst("config.json", "2^63 layers", "/config.json", _model_with(_layers), _ask, "no end"),
    Worst("tokenizer.json", "token id 2^31", "/tokenizer.json", _model_with(_token_id), _ask, "no end"),
    Worst("chat template", "six nested loops of 99,999", "/chat_template.jinja", _model_with(_template), _ask, "no end"),
    Worst("HTTP body", "32 MiB of empty lists", ".json", _body, _post),
)  # fmt: skip
"""By format the file that asks for most, and where that is refused the worst one that is read."""


def measure(one: Worst, folder: Path) -> tuple[int, Outcome]:
    """Write a file and read it in children; return its bytes and the outcome of reading it."""
    path = folder / f"a{one.suffix if one.suffix.startswith('.') else ''}"
    making = Limits(cpu=300, gib=8, wall=900)
    [made] = run_cases([Case(one.what, partial(one.make, path))], making, one.format)
    if made.outcome != "as intended":
        return 0, made
    [outcome] = run_cases([Case(one.what, partial(one.read, path))], LIMITS, one.format)
    held = path / "model" / one.suffix[1:] if path.is_dir() else path
    return held.stat().st_size, outcome


def table(rows: Sequence[tuple[Worst, int, Outcome]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| format | file | bytes | before | seconds of a core | MiB | outcome |",
        "|---|---|---|---|---|---|---|",
    ]
    for one, size, found in rows:
        end = {"as intended": "read", "message": "refused"}.get(found.outcome, found.outcome)
        lines.append(
            f"| {one.format} | {one.what} | {size:,} | {one.before} | {found.cpu:.1f} | "
            f"{found.gib * 1024:.0f} | {end} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all files and write the table; status 1 if one is neither read nor refused."""
    parser = argparse.ArgumentParser(prog="python -m campaign.worst", description=__doc__)
    parser.add_argument("--only", default="", help="formats whose name contains this")
    parser.add_argument("--out", type=Path, default=OUT, help="Markdown file")
    arguments = parser.parse_args()
    quiet()
    setting = "".join(f"- {key}: {value}\n" for key, value in machine().items())
    rows = []
    with scratch() as root:
        run_cases([Case("served", partial(save_tiny, root / "served"))], Limits(cpu=300), "served")
        for number, one in enumerate(WORST):
            if arguments.only.lower() in one.format.lower():
                folder = root / str(number)
                folder.mkdir()
                (folder / "served").symlink_to(root / "served")
                rows.append((one, *measure(one, folder)))
                print(table(rows[-1:]).splitlines()[-1], rows[-1][2].detail, file=sys.stderr)
    text = f"# Worst files\n\n{setting}\n{table(rows)}"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(arguments.out, text)
    print(text)
    sys.exit(0 if all(found.outcome in ("as intended", "message") for _, _, found in rows) else 1)


if __name__ == "__main__":
    main()
