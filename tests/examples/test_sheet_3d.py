"""The picture of answers: a few blocks of each volume, with what was asked, answered and true;
nothing spills over."""

import importlib
import json

import numpy as np
import pytest
from PIL import Image

from tests.examples.scripts import scripts

QUESTIONS = {
    "region": ("Which region?", ["head", "chest"]),
    "side": ("Which half?", ["left", "right"]),
}


@pytest.fixture(scope="module")
def sheet():
    with scripts("quickstart_3d", "quickstart"):
        yield importlib.import_module("sheet")


@pytest.fixture
def folder(tmp_path):
    """Two volumes: five blocks with two questions each, and one block with one."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    records = []
    for volume, split, blocks, kinds in (
        ("a", "test", 5, ("region", "side")),
        ("b", "extra", 1, ("region",)),
    ):
        for number in range(blocks):
            picture = f"{volume}_{number}.png"
            Image.new("L", (96, 32), 40 * number).save(tmp_path / "data" / "images" / picture)
            records += [
                {
                    "question_type": kind,
                    "source_volume": volume,
                    "split": split,
                    "answer": QUESTIONS[kind][1][1],
                    "picture": picture,
                }
                for kind in kinds
            ]
    (tmp_path / "data" / "test.json").write_text(json.dumps(records))
    (tmp_path / "data" / "about.json").write_text(json.dumps({"questions": QUESTIONS, "notes": []}))
    lines = [
        {"index": index, "reply": "chest" if index % 2 else "x" * 500}
        for index in range(len(records))
    ]
    (tmp_path / "after.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_few_blocks_of_each_volume_are_shown_with_all_their_questions(sheet, folder):
    shown = sheet.chosen(sheet.read(folder, QUESTIONS))
    assert [asked[0].picture for asked in shown] == ["a_0.png", "a_2.png", "a_4.png", "b_0.png"]
    assert [len(asked) for asked in shown] == [2, 2, 2, 1]


def test_the_picture_holds_every_card_and_says_right_and_wrong_in_colours(sheet, folder, capsys):
    assert sheet.main([str(folder)]) == 0
    drawn = Image.open(folder / "sheet.png")
    assert str(folder / "sheet.png") in capsys.readouterr().out
    assert drawn.width == 3 * (sheet.WIDTH + sheet.MARGIN) + sheet.MARGIN
    tall, short = (
        sheet.card(folder, asked) for asked in sheet.chosen(sheet.read(folder, QUESTIONS))[-2:]
    )
    assert tall.height - short.height == 2 * sheet.LINE
    inks = {
        tuple(int(value) for value in pixel)
        for pixel in np.unique(np.asarray(tall).reshape(-1, 3), axis=0)
    }
    assert sheet.WRONG in inks
    # A reply of 500 letters does not reach the truth beside it.
    line = np.asarray(tall)[
        -sheet.MARGIN - 2 * sheet.LINE :, sheet.WIDTH // 2 - 12 : sheet.WIDTH // 2 - 2
    ]
    assert (line == sheet.GROUND).all()
