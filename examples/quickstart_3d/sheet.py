"""Draw one picture of what the model answered: slices of held-out blocks, each with question,
answer and truth.

    python examples/quickstart_3d/sheet.py [folder, by default work_dirs/quickstart_3d]

Reads data/{about,test}.json, data/images and after.jsonl; writes sheet.png. It needs no browser;
sheet.html shows more of the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))


from fetch import REPOSITORY
from report import Answered, read

BLOCKS_PER_VOLUME = 3
WIDTH, MARGIN, LINE = 560, 8, 17
"""Pixels: width of a card, space around it, height of a line of text."""
GROUND, INK, RIGHT, WRONG = (250, 250, 247), (30, 30, 30), (32, 110, 60), (170, 40, 30)
HEADING = "3-D quickstart: blocks of volumes that were never trained on. Not for clinical use."
SIDES = (
    "Middle slices: axial, coronal, sagittal. The patient's right is on the left of the first two."
)


def main(arguments: list[str]) -> int:
    """Write the picture. Returns the exit status."""
    folder = Path(arguments[0]) if arguments else REPOSITORY / "work_dirs" / "quickstart_3d"
    about = json.loads((folder / "data" / "about.json").read_text(encoding="utf-8"))
    cards = [card(folder, asked) for asked in chosen(read(folder, about["questions"]))]
    sheet(cards).save(folder / "sheet.png", optimize=True)
    print(f"One picture of them: {folder / 'sheet.png'}")
    return 0


def chosen(answered: Sequence[Answered]) -> list[list[Answered]]:
    """The questions of a few blocks of each volume, evenly spread."""
    result = []
    for _, of_volume in groupby(answered, key=lambda a: a.volume):
        blocks = [list(asked) for _, asked in groupby(of_volume, key=lambda a: a.picture)]
        count = min(BLOCKS_PER_VOLUME, len(blocks))
        result += [blocks[round(i * (len(blocks) - 1) / max(count - 1, 1))] for i in range(count)]
    return result


def card(folder: Path, asked: Sequence[Answered]) -> Image.Image:
    """One block: its picture, and a line a question with answer and truth."""
    picture = Image.open(folder / "data" / "images" / asked[0].picture).convert("RGB")
    picture = picture.resize(
        (WIDTH, round(WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS
    )
    drawn = Image.new("RGB", (WIDTH, picture.height + (2 * len(asked) + 1) * LINE + MARGIN), GROUND)
    drawn.paste(picture)
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(13)
    row = picture.height + 3
    draw.text(
        (0, row),
        f"{asked[0].volume}{' (counted apart)' if asked[0].split == 'extra' else ''}",
        INK,
        font,
    )
    for a in asked:
        hit = a.hit(a.after)
        # A reply is whatever the model wrote; it stays on its line.
        reply = " ".join(a.after.split())[:48] or "(nothing)"
        draw.text((0, row + LINE), a.question, INK, font)
        draw.text((12, row + 2 * LINE), f"answer: {reply}", RIGHT if hit else WRONG, font)
        draw.text(
            (WIDTH // 2, row + 2 * LINE),
            f"truth: {a.truth}   ({'correct' if hit else 'wrong'})",
            INK,
            font,
        )
        row += 2 * LINE
    return drawn


def sheet(cards: Sequence[Image.Image], columns: int = 3) -> Image.Image:
    """Cards in rows under a heading."""
    rows = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    heights = [max(drawn.height for drawn in row) + MARGIN for row in rows]
    top = 2 * LINE + 2 * MARGIN
    whole = Image.new("RGB", (columns * (WIDTH + MARGIN) + MARGIN, top + sum(heights)), GROUND)
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(14)
    for line, text in enumerate((HEADING, SIDES)):
        draw.text((MARGIN, MARGIN + line * LINE), text, INK, font)
    for row, height in zip(rows, heights, strict=True):
        for column, drawn in enumerate(row):
            whole.paste(drawn, (MARGIN + column * (WIDTH + MARGIN), top))
        top += height
    return whole


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
