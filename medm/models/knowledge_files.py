"""Graphs of knowledge: files, names as word pieces, and the config of a checkpoint."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

import medm.knowledge
from medm.config import flatten
from medm.errors import RecipeError, suggest
from medm.knowledge import GraphOptions, KnowledgeOptions
from medm.knowledge.spec import GraphSpec
from medm.types import Config

_SHIPPED = Path(medm.knowledge.__file__).parent / "graphs"
_FIELDS = ("name", "groups", "edges")


@dataclass(frozen=True, slots=True)
class _Row:
    """A node as a file describes it."""

    place: str
    """File and row, for messages."""
    name: str
    groups: tuple[str, ...]
    edges: tuple[str, ...]


def shipped_graphs() -> list[str]:
    """Return the names of the graphs that come with medm."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def read_graph(file: str) -> GraphSpec:
    """Return a graph that comes with medm, by name, or that of a file.

    A JSON file has `{"nodes": [{"name": "heart", "groups": ["heart"], "edges": ["lung"]}, ...]}`. A
    CSV file has the columns `name`, `groups` and `edges`, with `;` between several values. `edges`
    names other nodes; one end of an edge is enough.

    Raises:
        RecipeError: no such graph or file, or a row that is wrong, with file, row and field.
    """
    path = Path(file)
    if path.suffix not in (".json", ".csv"):
        if file not in shipped_graphs():
            raise RecipeError(
                f"knowledge graph {file!r}: expected a graph that comes with medm, "
                f"{' or '.join(shipped_graphs())}, or the path of a .json or .csv file"
                f"{suggest(file, shipped_graphs())}"
            )
        path = _SHIPPED / f"{file}.json"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"knowledge graph {file}: cannot be read ({reason})") from None
    rows = list(_csv_rows(text, path) if path.suffix == ".csv" else _json_rows(text, path))
    if not rows:
        raise RecipeError(f"knowledge graph {path}: expected nodes, found none")
    return _graph(rows)


def _graph(rows: list[_Row]) -> GraphSpec:
    """Return the graph of rows. Raises `RecipeError`."""
    places: dict[str, int] = {}
    for number, row in enumerate(rows):
        if row.name in places:
            raise RecipeError(
                f"{row.place}, field 'name': {row.name!r} stands in {rows[places[row.name]].place} "
                "already; name each node once"
            )
        places[row.name] = number
    edges: list[list[int]] = []
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        for end in row.edges:
            if end not in places:
                raise RecipeError(
                    f"{row.place}, field 'edges': no node is named {end!r}{suggest(end, places)}"
                )
            if end == row.name:
                raise RecipeError(
                    f"{row.place}, field 'edges': {end!r} is the node itself; leave it out, nodes "
                    "always see themselves"
                )
            edge = sorted((number, places[end]))
            if edge not in edges:
                edges.append(edge)
        for group in row.groups:
            groups.setdefault(group, []).append(number)
    return GraphSpec(nodes=list(places), edges=edges, groups=groups)


def _json_rows(text: str, path: Path) -> Iterator[_Row]:
    """Yield the nodes of a JSON file."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"knowledge graph {path}: is not valid JSON ({error})") from None
    nodes = content.get("nodes") if isinstance(content, dict) else None
    if not isinstance(nodes, list):
        raise RecipeError(
            f'knowledge graph {path}: expected {{"nodes": [{{"name": ..., "groups": [...], '
            '"edges": [...]}, ...]}}'
        )
    for number, node in enumerate(nodes):
        place = f"knowledge graph {path}, row {number}"
        if not isinstance(node, dict):
            raise RecipeError(f"{place}: expected an object, found {node!r}")
        if unknown := sorted(set(node) - set(_FIELDS)):
            raise RecipeError(
                f"{place}, field {unknown[0]!r}: unknown; expected {', '.join(_FIELDS)}"
            )
        yield _Row(
            place,
            _name(node.get("name"), place),
            _names(node.get("groups", []), f"{place}, field 'groups'"),
            _names(node.get("edges", []), f"{place}, field 'edges'"),
        )


def _csv_rows(text: str, path: Path) -> Iterator[_Row]:
    """Yield the nodes of a CSV file, whose rows count from 1, the header."""
    reader = csv.DictReader(text.splitlines(), strict=True)
    columns = list(reader.fieldnames or [])
    if "name" not in columns or set(columns) - set(_FIELDS):
        raise RecipeError(
            f"knowledge graph {path}, row 1: expected the columns {', '.join(_FIELDS)}, found "
            f"{', '.join(columns) or 'none'}"
        )
    try:
        for row in reader:
            place = f"knowledge graph {path}, row {reader.line_num}"
            if None in row:
                raise RecipeError(f"{place}: has more values than the header has columns")
            yield _Row(
                place,
                _name(row["name"], place),
                _split(row.get("groups")),
                _split(row.get("edges")),
            )
    except csv.Error as error:
        raise RecipeError(
            f"knowledge graph {path}, row {reader.line_num}: is not valid CSV ({error})"
        ) from None


def _split(cell: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (cell or "").split(";") if part.strip())


def _name(value: object, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{place}, field 'name': expected the name of a node, found {value!r}")
    return value.strip()


def _names(value: object, place: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise RecipeError(f"{place}: expected a list of names, found {value!r}")
    return tuple(value)


def word_pieces(names: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the word pieces of each name, tokenized by itself and without special tokens."""
    return [list(tokenizer(name, add_special_tokens=False)["input_ids"]) for name in names]


def described_knowledge(
    options: KnowledgeOptions, tokenizer: PreTrainedTokenizerBase, *, place: str
) -> Config:
    """Return the config of a source of knowledge: name, keywords and `fusion`.

    That of a graph has its nodes and their word pieces in place of its file.

    Args:
        options: its block.
        tokenizer: of the word embeddings that its texts are read with.
        place: key of the recipe that holds the block, for messages.

    Raises:
        RecipeError: the file of a graph is wrong, or a name has no word pieces.
    """
    fields = options.model_dump()
    if not isinstance(options, GraphOptions):
        return fields
    try:
        graph = _graph_of(options)
    except RecipeError as error:
        raise RecipeError(f"{place}.file: {error}") from None
    pieces = word_pieces(graph.nodes, tokenizer)
    if empty := [name for name, own in zip(graph.nodes, pieces, strict=True) if not own]:
        raise RecipeError(
            f"{place}.file: {options.file}: the tokenizer has no word pieces for {empty[0]!r}"
        )
    return {
        **{key: value for key, value in fields.items() if key not in ("file", "shuffle")},
        "graph": graph.model_dump(),
        "node_ids": pieces,
    }


def knowledge_differences(
    held: Mapping[str, object], options: KnowledgeOptions | None
) -> list[str]:
    """List what a recipe says otherwise than the config of a checkpoint.

    Args:
        held: entry in the config, as `described_knowledge` returns it.
        options: block of the recipe; None where it has none.
    """
    if options is None:
        return [f"knowledge {held['name']!r}, and the recipe none"]
    mine = flatten(held)
    different = [
        f"knowledge.{key} {mine[key]!r}, not {value!r}"
        for key, value in flatten(options.model_dump()).items()
        if key in mine and mine[key] != value
    ]
    if isinstance(options, GraphOptions) and held["name"] == options.name:
        graph = _graph_of(options)
        if graph.model_dump() != held.get("graph"):
            different.append(f"knowledge.graph of other nodes or edges than {options.file!r}")
    return different


def _graph_of(options: GraphOptions) -> GraphSpec:
    graph = read_graph(options.file)
    return graph if options.shuffle is None else graph.shuffled(options.shuffle)
