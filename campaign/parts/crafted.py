"""Small files that ask for much, deep nesting, and tricks with paths in archives."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from campaign.harness import Case, Part, WrongResultError, in_fork
from campaign.parts import media
from medm.config import apply_overrides, parse_value, read_yaml
from medm.data.base import AnyPipeline
from medm.data.conversations import Conversations
from medm.data.mask_entries import mask_entries
from medm.data.pairs import Pairs
from medm.data.record_files import RecordFile, parse_json
from medm.data.shards import ShardFile, read_manifest
from medm.data.studies import Studies
from medm.imaging import load_pixels
from medm.models.checkpoint import open_config, open_processor
from tests import crafted
from tests.inference.tiny import save_tiny
from tests.models.test_small_files import FILES

DEPTH = 10_000
DEEP = "[" * DEPTH + "]" * DEPTH
DEEP_OBJECT = '{"a":' * DEPTH + "1" + "}" * DEPTH

RECORDS: dict[str, crafted.Maker] = {
    "many keys, one twice": crafted.double_key(200_000),
    "many placeholders": crafted.placeholders(100_000),
    "many placeholders of volumes": crafted.placeholders(100_000, word="<volume>"),
    "many turns": crafted.turns(50_000),
    "brackets": crafted.brackets(DEPTH),
    "objects": lambda path: path.write_text(DEEP_OBJECT + "\n") and None,
}
PIPELINES: dict[str, Callable[[], AnyPipeline]] = {
    "conversations": Conversations,
    "pairs": Pairs,
    "studies": Studies,
}


def read_records(file: Path, pipeline: str) -> None:
    made = PIPELINES[pipeline]()
    opened = RecordFile(file)
    for index in range(len(opened)):
        made.read(opened[index], file=file, index=index)


def deep_fields(pipeline: str, field: str) -> Callable[[Path], None]:
    """Return a maker of a record with one field nested 400 levels below the parser's limit."""

    def make(path: Path) -> None:
        path.write_text('{"%s": %s}\n' % (field, "[" * 900 + "]" * 900))  # noqa: UP031

    return make


def _media(file: Path, kind: str) -> None:
    load_pixels(file, media.IMAGE if kind == "image" else media.VOLUME)


def _records(folder: Path, maker: crafted.Maker, pipeline: str) -> None:
    maker(folder / "a.jsonl")
    read_records(folder / "a.jsonl", pipeline)


def _yaml(folder: Path, text: str) -> None:
    (folder / "a.yaml").write_text(text)
    read_yaml(folder / "a.yaml")


def _aliases(folder: Path) -> None:
    crafted.yaml_aliases(30)(folder / "a.yaml")
    read_yaml(folder / "a.yaml")


def _refused(action: Callable[[], object]) -> None:
    """Run what has to be refused."""
    action()
    raise WrongResultError("it was accepted")


def _model(folder: Path, name: str) -> None:
    model = folder / "model"
    if not model.exists():
        save_tiny(folder)
    whole = (model / name).read_bytes()
    (model / name).write_text(DEEP_OBJECT)
    try:
        _refused(lambda: (open_config(str(model)), open_processor(str(model))))
    finally:
        (model / name).write_bytes(whole)


def _manifest(folder: Path) -> None:
    (folder / "a.shards.json").write_text(DEEP_OBJECT)
    _refused(lambda: read_manifest(folder / "a.shards.json"))


def _tar(folder: Path, name: str, kind: bytes, link: str) -> None:
    """A member with a hostile name or of another type must not give a file from elsewhere."""
    secret = folder / "secret.png"
    secret.write_bytes(b"secret")
    place = folder / "tar"
    place.mkdir(exist_ok=True)
    with tarfile.open(place / "a.tar", "w") as tar:
        for suffix, content in ((".png", b"own"), (".txt", b"caption")):
            member = tarfile.TarInfo(name + suffix)
            if suffix == ".png":
                member.type, member.linkname = kind, link
            member.size = len(content) if member.type == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(content))
    before = sorted(folder.rglob("*"))
    opened = ShardFile(place / "a.tar")
    for index in range(len(opened)):
        record = opened[index]
        if isinstance(record, dict) and "image" in record:
            with opened.open_media(index, record["image"]) as stream:
                if stream.read() == b"secret":
                    raise WrongResultError("a file outside the shard was read")
    if sorted(folder.rglob("*")) != before:
        raise WrongResultError("a file was written")


TRICKS = {
    "up": ("../../secret", tarfile.REGTYPE, ""),
    "absolute": ("/etc/passwd", tarfile.REGTYPE, ""),
    "symlink": ("0", tarfile.SYMTYPE, "../secret.png"),
    "hard link": ("0", tarfile.LNKTYPE, "../secret.png"),
    "device": ("0", tarfile.CHRTYPE, ""),
    "pipe": ("0", tarfile.FIFOTYPE, ""),
    "folder": ("0", tarfile.DIRTYPE, ""),
    "bidi name": ("a\u202egnp", tarfile.REGTYPE, ""),
    "control characters": ("a\x1b[2J\n", tarfile.REGTYPE, ""),
    "long name": ("a/" * 2000 + "b", tarfile.REGTYPE, ""),
}


def _sparse(folder: Path) -> None:
    crafted.sparse_tar(2**40)(folder / "a.tar")
    opened = ShardFile(folder / "a.tar")
    for index in range(len(opened)):
        opened[index]


GROUPS = ("records", "nesting", "recipes", "tar")
"""Each has a folder: groups run at the same time."""
MEDIA = {"image": crafted.IMAGES, "volume": crafted.VOLUMES}


def _file(folder: Path, kind: str, name: str) -> Path:
    return folder / f"{kind} {name}{MEDIA[kind][name][0]}"


def _prepare(folder: Path) -> None:
    """Write images and volumes: what a maker costs is not the reader's."""
    for kind, table in MEDIA.items():
        for name, (_, maker) in table.items():
            in_fork(partial(maker, _file(folder, kind, name)))
    for group in GROUPS:
        (folder / group).mkdir()


def cases(folder: Path, count: int, seed: int) -> list[Case]:
    """Return every crafted file once; count and seed change nothing."""
    made = []
    records, nesting, recipes, tar = (folder / group for group in GROUPS)
    for kind, table in MEDIA.items():
        for name in table:
            run = partial(_media, _file(folder, kind, name), kind)
            made.append(Case(f"{kind} {name}", run, f"{kind}s"))
    for name, maker in RECORDS.items():
        made.append(
            Case(f"record: {name}", partial(_records, records, maker, "conversations"), "records")
        )
    for pipeline, fields in {
        "conversations": ("conversations", "image", "masks", "id", "task"),
        "pairs": ("captions", "image", "label"),
        "studies": ("images", "report", "triplets", "labels"),
    }.items():
        for field in fields:
            run = partial(_records, nesting, deep_fields(pipeline, field), pipeline)
            made.append(Case(f"deep {pipeline}.{field}", run, "nesting"))
    made += [
        Case("deep JSON", partial(_refused, partial(parse_json, DEEP.encode())), "nesting"),
        Case("deep recipe", partial(_refused, partial(_yaml, nesting, f"a: {DEEP}\n")), "nesting"),
        Case(
            "deep recipe by indents",
            partial(_refused, partial(_yaml, nesting, _indents())),
            "nesting",
        ),
        Case("deep override", partial(_refused, partial(parse_value, DEEP)), "nesting"),
        Case("deep key of an override", partial(_refused, _deep_override), "nesting"),
        Case("deep masks", partial(_refused, partial(mask_entries, _lists(900))), "nesting"),
        Case("deep shard manifest", partial(_manifest, nesting), "nesting"),
        *(Case(f"deep {name}", partial(_model, nesting, name), "nesting") for name in FILES),
        Case("aliases of aliases", partial(_refused, partial(_aliases, recipes)), "recipes"),
        Case("tar of 1 TiB", partial(_sparse, tar), "tar"),
        *(Case(f"tar {name}", partial(_tar, tar, *trick), "tar") for name, trick in TRICKS.items()),
    ]
    return made


def _indents() -> str:
    return "".join(f"{' ' * depth}a:\n" for depth in range(1000))


def _lists(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def _deep_override() -> None:
    made = apply_overrides({}, [".".join(["a"] * DEPTH) + "=1"])
    json.dumps(made)


PART = Part("crafted", "Crafted files, deep nesting, tar archives", _prepare, cases, 1)
