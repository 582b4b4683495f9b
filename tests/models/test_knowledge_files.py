"""Graphs from files, and the graph of the chest that comes with medm."""

from __future__ import annotations

from pathlib import Path

import pytest

from medm.config import validate
from medm.errors import RecipeError
from medm.knowledge import GraphOptions
from medm.metrics.chest_labels import LABELS, PHRASES, label_report
from medm.models.knowledge_files import described_knowledge, read_graph, shipped_graphs, word_pieces
from tests import tiny

JSON = """{"nodes": [
  {"name": "lung", "groups": ["anatomy"]},
  {"name": "opacity", "groups": ["lung", "finding"], "edges": ["lung"]},
  {"name": "normal"}
]}"""
CSV = "name,groups,edges\nlung,anatomy,\nopacity,lung; finding,lung\nnormal,,\n"


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_json_and_csv_hold_the_same_graph(tmp_path: Path) -> None:
    spec = read_graph(write(tmp_path, "g.json", JSON))
    assert spec.nodes == ["lung", "opacity", "normal"]
    assert spec.edges == [[0, 1]]
    assert spec.groups == {"anatomy": [0], "lung": [1], "finding": [1]}
    assert read_graph(write(tmp_path, "g.csv", CSV)) == spec


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("g.json", "{", r"g.json: is not valid JSON"),
        ("g.json", "[]", r'g.json: expected \{"nodes"'),
        ("g.json", '{"nodes": []}', r"g.json: expected nodes, found none"),
        ("g.json", '{"nodes": [{"name": " "}]}', r"g.json, row 0, field 'name': expected the name"),
        ("g.json", '{"nodes": [{"name": "a", "x": 1}]}', r"g.json, row 0, field 'x': unknown"),
        ("g.json", '{"nodes": ["a"]}', r"g.json, row 0: expected an object, found 'a'"),
        (
            "g.json",
            '{"nodes": [{"name": "a", "edges": "b"}]}',
            r"row 0, field 'edges': expected a list",
        ),
        (
            "g.json",
            '{"nodes": [{"name": "lung"}, {"name": "b", "edges": ["lungs"]}]}',
            r"row 1, field 'edges': no node is named 'lungs'.*'lung'",
        ),
        (
            "g.json",
            '{"nodes": [{"name": "a", "edges": ["a"]}]}',
            r"field 'edges': 'a' is the node itself",
        ),
        ("g.csv", "name\na\nb\na\n", r"g.csv, row 4, field 'name': 'a' stands in .*row 2 already"),
        (
            "g.csv",
            "node,edges\na,b\n",
            r"g.csv, row 1: expected the columns name, groups, edges, found node",
        ),
        ("g.csv", "name,edges\na,b\n", r"g.csv, row 2, field 'edges': no node is named 'b'"),
        ("g.csv", "name\na,b\n", r"g.csv, row 2: has more values"),
    ],
)
def test_errors_name_file_row_and_field(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_graph(write(tmp_path, name, text))


def test_an_unknown_graph_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"'chets': expected a graph that comes with medm, chest, or"
    ):
        read_graph("chets")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_graph(str(tmp_path / "none.json"))
    options = validate(GraphOptions, {"name": "graph", "file": "chets"}, source="test")
    with pytest.raises(RecipeError, match=r"^model\.knowledge\.file: knowledge graph 'chets'"):
        described_knowledge(options, tiny.make_tokenizer("qwen2.5"), place="model.knowledge")


@pytest.mark.parametrize("name", shipped_graphs())
def test_shipped_graphs_are_read_and_connected(name: str) -> None:
    spec = read_graph(name)
    rows = spec.connected()
    alone = [node for node, row in zip(spec.nodes, rows, strict=True) if sum(row) == 1]
    assert alone == []


def test_the_chest_graph_names_findings_as_the_labeler_reads_them() -> None:
    spec = read_graph("chest")
    assert 20 <= len(spec.nodes) <= 30
    read = {node: label_report(f"There is {node}.") for node in spec.nodes}
    labels = {
        label
        for found in read.values()
        for label, status in found.items()
        if status == "positive" and label in PHRASES
    }
    assert labels == set(PHRASES)
    assert len(LABELS) == len(labels) + 1


def test_names_are_tokenized_each_by_itself() -> None:
    tokenizer = tiny.make_tokenizer("llama-2")
    pieces = word_pieces(["heart", "big heart"], tokenizer)
    assert [len(own) for own in pieces] == [5, 9]
    assert pieces[1][4:] == pieces[0]
    assert tokenizer.bos_token_id not in pieces[0]


def test_a_checkpoint_holds_the_graph_and_not_its_file(tmp_path: Path) -> None:
    block = {"name": "graph", "file": write(tmp_path, "g.json", JSON), "layers": 1}
    options = validate(GraphOptions, block, source="test")
    config = described_knowledge(options, tiny.make_tokenizer("qwen2.5"), place="model.knowledge")
    assert config["graph"] == read_graph(str(tmp_path / "g.json")).model_dump()
    assert config["layers"] == 1 and "file" not in config and "shuffle" not in config
    assert str(tmp_path) not in str(config)
    mixed = described_knowledge(
        options.model_copy(update={"shuffle": 1}),
        tiny.make_tokenizer("qwen2.5"),
        place="model.knowledge",
    )
    assert mixed["graph"] != config["graph"] and mixed["node_ids"] != config["node_ids"]
