"""`medm embed`: vectors of an annotation file or a folder, as JSONL, NPZ or Parquet."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from medm.config import validate
from medm.errors import DataError, DeviceError, RecipeError
from medm.files import atomic_file, atomic_write_text
from medm.imaging.paths import files_below
from medm.inference.batch import InferSummary, Progress, infer
from medm.inference.options import EmbedOptions
from medm.inference.predictions import read_lines
from medm.models import load_processor
from medm.os_errors import require_writable
from medm.types import JsonObject, parse_view


def embed(options: EmbedOptions, *, progress: Progress | None = None) -> InferSummary | None:
    """Write the vectors of every record, or of every image or volume of a folder.

    The ending of `output` is its format. Lines are appended to a JSONL file, from which a run that
    was stopped resumes: the output itself, or for NPZ and Parquet `OUTPUT.rows.jsonl` beside it,
    from which the output is made at the end.

    Args:
        options: of the run; `data` may be a folder.
        progress: told how far the run is.

    Returns:
        The summary; None on ranks of a launch other than rank 0.

    Raises:
        RecipeError: the ending is none of these.
        DeviceError: Parquet without pyarrow.
        DataError: the folder holds no files.
        MedmError: as `medm.inference.batch.infer`.
    """
    output = Path(options.output)
    write = _writer(output)
    require_writable(output)
    changes: JsonObject = {}
    if Path(options.data).is_dir():
        changes |= _listed(options)
    if write is not None:
        changes["output"] = f"{output}.rows.jsonl"
    section = {**options.model_dump(), **changes}
    summary = infer(validate(EmbedOptions, section, source="medm embed"), progress=progress)
    if summary is not None and write is not None:
        write(Path(changes["output"]), output)
    return summary


def _writer(output: Path) -> Callable[[Path, Path], None] | None:
    """Return the writer of the output; None if the lines themselves are the output."""
    endings: dict[str, Callable[[Path, Path], None] | None] = {
        ".jsonl": None,
        ".npz": _write_npz,
        ".parquet": _write_parquet,
    }
    if output.suffix not in endings:
        raise RecipeError(f"{output}: expected an output that ends in {', '.join(endings)}")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise DeviceError(
            f"{output}: Parquet needs pyarrow: pip install pyarrow, or write .npz or .jsonl"
        )
    return endings[output.suffix]


def _listed(options: EmbedOptions) -> JsonObject:
    """Data and root of a run over the files of a folder, which are listed beside the output."""
    folder = Path(options.data)
    (branch,) = load_processor(options.model).preprocess
    kind = parse_view(branch).kind
    names = [path.relative_to(folder).as_posix() for path in files_below(folder, kind)]
    if not names:
        raise DataError(f"expected {kind}s at any depth, found none", file=folder)
    if options.root is not None:
        raise RecipeError(f"--root: not beside a folder as data; paths are relative to {folder}")
    items = Path(f"{options.output}.items.jsonl")
    text = "".join(
        json.dumps({"id": name, kind: name}, ensure_ascii=False) + "\n" for name in names
    )
    atomic_write_text(items, text)
    return {"data": str(items), "root": str(folder)}


def _write_npz(lines: Path, output: Path) -> None:
    """`ids` (N,), `embeddings` (N, D) and, with captions, `text_embeddings` (M, D) and `text_rows`
    (M,), the row of `ids` that a caption belongs to. Records with an error are left out.
    """
    ids: list[str] = []
    vectors, texts, rows = [], [], []
    for line in read_lines(lines):
        if "error" in line:
            continue
        for text in line.get("text_embeddings", ()):
            texts.append(np.asarray(text, np.float32))
            rows.append(len(ids))
        ids.append(str(line.get("id", line["index"])))
        vectors.append(np.asarray(line["embedding"], np.float32))
    arrays = {
        "ids": np.asarray(ids, dtype=np.str_),
        "embeddings": np.stack(vectors) if vectors else np.zeros((0, 0), np.float32),
    }
    if texts:
        arrays |= {"text_embeddings": np.stack(texts), "text_rows": np.asarray(rows, np.int64)}
    with atomic_file(output) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def _write_parquet(lines: Path, output: Path) -> None:
    """Columns `id`, `embedding` and, with captions, `text_embeddings`; records with an error are
    left out.
    """
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    vector = pyarrow.list_(pyarrow.float32())
    fields = [("id", pyarrow.string()), ("embedding", vector)]
    first = next((line for line in read_lines(lines) if "error" not in line), None)
    with_texts = first is not None and "text_embeddings" in first
    if with_texts:
        fields.append(("text_embeddings", pyarrow.list_(vector)))
    schema = pyarrow.schema(fields)
    with atomic_file(output) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        group: list[JsonObject] = []
        for line in read_lines(lines):
            if "error" in line:
                continue
            row: JsonObject = {
                "id": str(line.get("id", line["index"])),
                "embedding": line["embedding"],
            }
            if with_texts:
                row["text_embeddings"] = line["text_embeddings"]
            group.append(row)
            if len(group) == _ROWS_PER_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
                group = []
        writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))


_ROWS_PER_GROUP = 8192
