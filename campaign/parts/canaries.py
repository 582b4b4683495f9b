"""Names of patients that stand where they may: they are in no output that has no need of them.

Each source of a name has its own canary. After the commands have run, every file and every log is
searched for each.
"""

from __future__ import annotations

import json
import logging
import struct
from functools import cache, partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from campaign.harness import Case, Limits, Part, WrongResultError, in_fork
from tests import tiny
from tests.cli.runner import medm
from tests.imaging.tiny import CANARY, phantom, write_series

TAG = CANARY.partition("^")[2]
"""Of DICOM tags."""
CANARIES = {
    "DICOM tags": TAG,
    "EXIF": "Exifcanary",
    "PNG text": "Textcanary",
    "NIfTI descrip": "Niftcanary",
    "record text": "Recordcanary",
    "file name": "Filecanary",
    "extra field": "Fieldcanary",
}
ALLOWED = {
    "record text": ("infer.jsonl", "all.json", "in.json", "train.json"),
    "file name": ("infer.jsonl", "all.json", "run.json", "log of"),
    "extra field": ("infer.jsonl", "all.json"),
}
"""Outputs in which a name may stand, since they are made of it: results, and messages that have to
name a file (docs/data.md)."""


def prepare(folder: Path) -> None:
    """Write data with names, and run commands over it; outputs lie in `out`, logs in `logs`."""
    data, out, logs = (folder / name for name in ("data", "out", "logs"))
    for place in (data, out, logs):
        place.mkdir()
    _write_data(data)
    model = tiny.lvlm_section(tiny.save_llm("qwen2.5", data / "llm"))
    recipe = {
        "model": model,
        "data": {"train": [{"path": str(data / "train.json"), "root": str(data)}]},
        "parts": {"image.connector": {"tune": "full", "lr": 1e-2}},
        "train": {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1},
        "output_dir": str(out / "model"),
    }  # fmt: skip
    (data / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    commands: dict[str, list[str]] = {
        "check": ["data", "check", str(data / "train.json"), "--root", str(data), "--decode"],
        "check of volumes": [
            "data", "check", str(data / "volumes.json"), "--root", str(data), "--decode",
        ],
        "train": ["train", str(data / "recipe.yaml")],
        "infer": [
            "infer", "--model", str(out / "model"), "--data", str(data / "in.json"), "--root",
            str(data), "--output", str(out / "infer.jsonl"), "--json", str(out / "all.json"),
            "--max-new-tokens", "2", "--device", "cpu", "--workers", "0",
        ],
        "preview": [
            "data", "preview", str(data / "a.png"), str(out / "preview.png"),
        ],
        "export": [
            "export", "--model", str(out / "model"), "--format", "merged", str(out / "merged"),
        ],
    }  # fmt: skip
    for name, arguments in commands.items():
        in_fork(partial(_logged, logs / name, arguments))


def _logged(log: Path, arguments: list[str]) -> None:
    logging.disable(logging.NOTSET)
    done = medm(*arguments)
    log.write_text(f"status {done.code}\n{done.out}\n{done.err}", encoding="utf-8")


def _write_data(data: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    text = PngInfo()
    text.add_text("Patient", CANARIES["PNG text"])
    Image.fromarray(noise).save(data / "a.png", pnginfo=text)
    exif = Image.Exif()
    exif[0x010E], exif[0x013B] = CANARIES["EXIF"], CANARIES["EXIF"]
    Image.fromarray(noise[::-1].copy()).save(data / f"{CANARIES['file name']}.jpg", exif=exif)
    write_series(data / "series", phantom())
    sitk.WriteImage(phantom(), str(data / "a.nii"))
    nifti = bytearray((data / "a.nii").read_bytes())
    struct.pack_into("80s", nifti, 148, CANARIES["NIfTI descrip"].encode())
    (data / "a.nii").write_bytes(nifti)
    words = CANARIES["record text"]
    records = [
        {
            "id": str(number), "image": [("a.png", f"{CANARIES['file name']}.jpg")[number % 2]],
            "note": CANARIES["extra field"],
            "conversations": [
                {"from": "human", "value": f"<image>\nIs {words} ill?"},
                {"from": "gpt", "value": f"{words} is well."},
            ],
        }
        for number in range(4)
    ]  # fmt: skip
    (data / "train.json").write_text(json.dumps(records))
    (data / "in.json").write_text(json.dumps(records))
    volumes = [
        {"volume": [name], "conversations": [
            {"from": "human", "value": "<volume>\nReport?"}, {"from": "gpt", "value": "Normal."}]}
        for name in ("a.nii", "series")
    ]  # fmt: skip
    (data / "volumes.json").write_text(json.dumps(volumes))


@cache
def _outputs(folder: Path) -> dict[str, bytes]:
    found = {f"log of {log.name}": log.read_bytes() for log in (folder / "logs").iterdir()}
    for file in (folder / "out").rglob("*"):
        if file.is_file():
            found[str(file.relative_to(folder / "out"))] = file.read_bytes()
    return found


def _search(folder: Path, source: str, name: str) -> None:
    content = _outputs(folder)[name].lower()
    allowed = any(one in name for one in ALLOWED.get(source, ()))
    if not allowed and CANARIES[source].lower().encode() in content:
        at = content.index(CANARIES[source].lower().encode())
        around = content[max(at - 60, 0) : at + 40].decode(errors="replace")
        raise WrongResultError(f"{name} holds the canary of {source}: {around!r}")


def _status(folder: Path, name: str) -> None:
    text = (folder / "logs" / name).read_text(encoding="utf-8")
    if not text.startswith("status 0\n"):
        raise WrongResultError(f"the command failed: {text[:500]}")


def cases(folder: Path, count: int, seed: int) -> list[Case]:
    """Return a search of every output for every canary; count and seed change nothing."""
    commands = [
        Case(f"command {log.name}", partial(_status, folder, log.name), "commands")
        for log in sorted((folder / "logs").iterdir())
    ]
    return commands + [
        Case(f"{source} in {name}", partial(_search, folder, source, name), source)
        for source in CANARIES
        for name in sorted(_outputs(folder))
    ]


PART = Part("canaries", "Names of patients in outputs and logs", prepare, cases, 1, Limits(cpu=60))
