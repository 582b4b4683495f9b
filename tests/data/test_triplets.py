"""Triplets of reports: by rules, and from RadGraph files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medm.data.triplets import ORGANS, extract_triplets, read_radgraph
from medm.errors import DataError
from medm.metrics.chest_labels import PHRASES
from medm.models.knowledge_files import read_graph
from tests.cli.runner import medm

SENTENCES = [
    ("Small left pleural effusion.", [("pleural effusion", "present at", "left pleura")]),
    ("There is no pneumothorax.", [("pneumothorax", "absent at", "pleura")]),
    ("Possible pneumonia in the right lower lobe.", [("pneumonia", "possible at", "right lower lobe")]),
    ("The heart is mildly enlarged.", [("cardiomegaly", "present at", "heart")]),
    ("Left basilar opacity.", [("opacity", "present at", "left basilar lung")]),
    (
        "Opacity in the left upper lobe and small right effusion.",
        [("opacity", "present at", "left upper lobe"), ("pleural effusion", "present at", "right pleura")],
    ),
    (
        "No effusion or pneumothorax in the left hemithorax.",
        [
            ("pleural effusion", "absent at", "left hemithorax"),
            ("pneumothorax", "absent at", "left hemithorax"),
        ],
    ),
    (
        "No consolidation, but bilateral effusions.",
        [("consolidation", "absent at", "lung"), ("pleural effusion", "present at", "bilateral pleura")],
    ),
    ("Blunting of the left costophrenic angle.", [("pleural effusion", "present at", "pleura")]),
    ("Fracture of the right ninth rib.", [("fracture", "present at", "right ninth rib")]),
    ("Effusion, and the left lung is clear.", [("pleural effusion", "present at", "pleura")]),
    ("Endotracheal tube above the carina.", [("endotracheal tube", "present at", "carina")]),
    ("The lungs are clear.", [("abnormality", "absent at", "chest")]),
    ("Comparison with the earlier study.", []),
    ("Effusion. Effusion.", [("pleural effusion", "present at", "pleura")]),
    ("", []),
]  # fmt: skip


@pytest.mark.parametrize(("report", "expected"), SENTENCES)
def test_finding_relation_and_location(report: str, expected: list[tuple[str, str, str]]) -> None:
    assert extract_triplets(report) == expected


def test_every_finding_of_the_labeler_has_an_organ_of_the_chest_graph() -> None:
    assert set(ORGANS) == set(PHRASES)
    assert set(ORGANS.values()) - {"chest"} <= set(read_graph("chest").nodes)


def test_a_report_that_repeats_itself_takes_no_minutes() -> None:
    assert extract_triplets("left lower lobe opacity and " * 2000) == [
        ("opacity", "present at", "left lower lobe")
    ]


DOCUMENT = {
    "text": "Small left effusion . No pneumothorax . Opacity may be pneumonia .",
    "entities": {
        "1": {"tokens": "Small", "label": "OBS-DP", "relations": [["modify", "3"]]},
        "2": {"tokens": "left", "label": "ANAT-DP", "relations": []},
        "3": {"tokens": "effusion", "label": "OBS-DP", "relations": [["located_at", "2"]]},
        "4": {"tokens": "pneumothorax", "label": "OBS-DA", "relations": []},
        "5": {"tokens": "Opacity", "label": "OBS-DP", "relations": [["suggestive_of", "6"]]},
        "6": {"tokens": "pneumonia", "label": "Observation::uncertain", "relations": []},
    },
}
FROM_RADGRAPH = [
    ["small", "modifies", "effusion"],
    ["effusion", "present at", "left"],
    ["pneumothorax", "absent at", "chest"],
    ["opacity", "suggests", "pneumonia"],
    ["opacity", "present at", "chest"],
    ["pneumonia", "possible at", "chest"],
]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_radgraph_entities_become_triplets(tmp_path: Path) -> None:
    found = read_radgraph(write(tmp_path / "r.json", {"s1": DOCUMENT}))
    assert [list(triplet) for triplet in found.by_id["s1"]] == FROM_RADGRAPH
    assert found.find("s1", "another text") == found.by_id["s1"]
    same = "Small left effusion. No pneumothorax.\nOpacity may be pneumonia."
    assert found.find("s2", same) == found.by_id["s1"]
    assert found.find("s2", "Other.") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"r\.json: expected an object of documents"),
        ({"s1": {"text": "a"}}, r"r\.json, field 's1': expected an object with `text`"),
        (
            {"s1": {"entities": {"1": {"tokens": "a", "label": "OBS"}}}},
            r"field 's1\.entities\.1\.label': expected ANAT-DP.*found 'OBS'",
        ),
        (
            {"s1": {"entities": {"1": {"tokens": "", "label": "OBS-U"}}}},
            r"field 's1\.entities\.1\.tokens': expected text",
        ),
        (
            {"s1": {"entities": {"1": {"tokens": "a", "label": "OBS-U", "relations": [["modify", "7"]]}}}},
            r"field 's1\.entities\.1\.relations\.0': expected \[located_at.*'7'",
        ),
    ],
)  # fmt: skip
def test_another_form_of_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_radgraph(write(tmp_path / "r.json", content))


def test_the_command_adds_triplets_and_leaves_the_rest(tmp_path: Path) -> None:
    records = [
        {"id": "s1", "images": ["a.png"], "report": "Small left effusion."},
        {"id": "q", "images": ["a.png"], "question": "Effusion?", "answer": "yes"},
        {"id": "s2", "images": ["b.png"], "report": "See above.", "triplets": [["a", "b", "c"]]},
    ]
    source, output = write(tmp_path / "in.json", records), tmp_path / "out.jsonl"
    done = medm("data", "triplets", str(source), str(output))
    assert done.code == 0, done.err
    assert "3 records, 2 reports, 1 triplets; 1 reports without any" in done.out
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == [
        records[0] | {"triplets": [["pleural effusion", "present at", "left pleura"]]},
        records[1],
        records[2] | {"triplets": []},
    ]


def test_the_command_reads_radgraph_and_names_what_it_lacks(tmp_path: Path) -> None:
    records = [{"id": "s1", "findings": "x"}, {"id": "s2", "findings": "y"}]
    source, output = write(tmp_path / "in.json", records), tmp_path / "out.json"
    radgraph = write(tmp_path / "r.json", {"s1": DOCUMENT})
    done = medm(
        "data",
        "triplets",
        str(source),
        str(output),
        "--radgraph",
        str(radgraph),
        "--field",
        "findings",
    )
    assert done.code == 0, done.err
    assert [one["triplets"] for one in json.loads(output.read_text())] == [FROM_RADGRAPH, []]
    assert "has 1 of the reports neither by id nor by text: record 1" in " ".join(done.out.split())


def test_a_file_without_reports_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", [{"id": "s1", "text": "Effusion."}])
    done = medm("data", "triplets", str(source), str(tmp_path / "out.json"))
    assert done.code == 1
    assert "no record has a field 'report'" in " ".join((done.out + done.err).split())
    assert not (tmp_path / "out.json").exists()
