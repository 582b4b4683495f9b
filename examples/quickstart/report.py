"""Score what the model answered about volumes it never saw, before and after finetuning, and say what it means.

    python examples/quickstart/report.py [folder, by default work_dirs/quickstart]

Reads data/test.json, before.jsonl, after.jsonl and the loss logs; writes results.json, results.md and sheet.html.
"""

from __future__ import annotations

import base64
import html
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fetch import REPOSITORY
from prepare import QUESTIONS

from medm.metrics.choice import parse_choice, parse_yes_no

ROUNDS = 4000
"""Bootstrap samples of an interval."""
SHOWN_PER_VOLUME = 4
"""Pictures of each volume on the sheet."""

NOTES = (
    "Not for clinical use. This shows that the machinery learns, and nothing about medicine: a handful of volumes.",
    "Slices of one volume resemble each other, so volumes are what counts: the interval draws whole volumes with "
    "replacement. With so few of them it is itself rough, and no second seed was run.",
    "Spine CT and abdominal MR are never trained on. Where the modality is wrong there and right elsewhere, the model "
    "learned which region usually comes in which modality, not what CT and MR look like.",
    "Level is asked of lungs and brains alone. Lesions: training holds a nodule on three slices and one small brain "
    "lesion, too little to learn from; the row is there so that nobody has to wonder.",
    "'Most frequent' answers what was most frequent in training; 'best constant' is the constant answer that turns out "
    "best on the test pictures, which nobody could have known before.",
)  # fmt: skip


@dataclass(frozen=True)
class Answered:
    """One question about one picture, and what was made of it."""

    kind: str
    volume: str
    split: str
    picture: str
    question: str
    truth: str
    before: str
    after: str

    def hit(self, reply: str) -> bool:
        """Whether a reply names this answer and no other."""
        return parse(self.kind, reply) == self.truth


def parse(kind: str, reply: str) -> str | None:
    """The one answer that a reply names; None where it names none, or several."""
    options = QUESTIONS[kind][1]
    if options == ("yes", "no"):
        said = parse_yes_no(reply)
        return None if said is None else "yes" if said else "no"
    letters = {chr(ord("A") + number): option for number, option in enumerate(options)}
    letter = parse_choice(reply, letters)
    return letters[letter] if letter else None


def main(arguments: list[str]) -> int:
    """Write the three files and print the table. Returns the exit status."""
    folder = Path(arguments[0]) if arguments else REPOSITORY / "work_dirs" / "quickstart"
    answered = read(folder)
    frequent = most_frequent(json.loads((folder / "data" / "finetune.json").read_text(encoding="utf-8")))
    results = {
        "held_out": score([a for a in answered if a.split == "test"], frequent),
        "apart": score([a for a in answered if a.split == "extra"], frequent),
        "by_volume": by_volume(answered),
        "notes": list(NOTES),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = markdown(results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    (folder / "sheet.html").write_text(sheet(folder, answered, results), encoding="utf-8")
    print(text)
    print(f"Pictures with questions and answers: {folder / 'sheet.html'}")
    return 0


def read(folder: Path) -> list[Answered]:
    """Every question with both replies. A record that was refused counts as an empty reply."""
    questions = json.loads((folder / "data" / "test.json").read_text(encoding="utf-8"))
    replies = {}
    for when in ("before", "after"):
        lines = map(json.loads, (folder / f"{when}.jsonl").read_text(encoding="utf-8").splitlines())
        replies[when] = {line["index"]: line.get("reply", "") for line in lines}
        if len(replies[when]) != len(questions):
            raise SystemExit(
                f"{when}.jsonl answers {len(replies[when])} of {len(questions)} questions; run medm infer again"
            )
    return [
        Answered(
            kind=record["question_type"], volume=record["source_volume"], split=record["split"],
            picture=record["image"][0], question=QUESTIONS[record["question_type"]][0], truth=record["answer"],
            before=replies["before"][index], after=replies["after"][index],
        )
        for index, record in enumerate(questions)
    ]  # fmt: skip


def most_frequent(records: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Question type -> its most frequent answer in training."""
    kinds = {question: kind for kind, (question, _) in QUESTIONS.items()}
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in QUESTIONS}
    for record in records:
        turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            counts[kinds[question]][answer] += 1
    return {kind: count.most_common(1)[0][0] for kind, count in counts.items() if count}


def score(answered: Sequence[Answered], frequent: dict[str, str]) -> list[dict[str, Any]]:
    """One row a question type."""
    rows = []
    for kind in QUESTIONS:
        asked = [a for a in answered if a.kind == kind]
        if not asked:
            continue
        after = np.array([a.hit(a.after) for a in asked], dtype=float)
        truths = Counter(a.truth for a in asked)
        low, high = interval_over_volumes(after, [a.volume for a in asked])
        rows.append(
            {
                "question": kind,
                "n": len(asked),
                "volumes": len({a.volume for a in asked}),
                "before": float(np.mean([a.hit(a.before) for a in asked])),
                "after": float(after.mean()),
                "low": low,
                "high": high,
                "most_frequent": truths[frequent[kind]] / len(asked),
                "best_constant": max(truths.values()) / len(asked),
                "chance": 1 / len(QUESTIONS[kind][1]),
                "unreadable": float(np.mean([parse(kind, a.after) is None for a in asked])),
            }
        )
    return rows


def interval_over_volumes(hits: np.ndarray, volumes: Sequence[str]) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the mean that draws whole volumes; none for a single volume."""
    names = sorted(set(volumes))
    if len(names) < 2:
        return None, None
    member = np.array([[volume == name for name in names] for volume in volumes], dtype=float)  # (n, volumes)
    sums, counts = hits @ member, member.sum(axis=0)
    drawn = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=ROUNDS)
    low, high = np.quantile(drawn @ sums / (drawn @ counts), [0.025, 0.975])
    return float(low), float(high)


def by_volume(answered: Sequence[Answered]) -> dict[str, dict[str, dict[str, float]]]:
    """Volume -> question type -> accuracy after finetuning, and n."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for volume in dict.fromkeys(a.volume for a in answered):
        for kind in QUESTIONS:
            hits = [a.hit(a.after) for a in answered if a.volume == volume and a.kind == kind]
            if hits:
                table.setdefault(volume, {})[kind] = {"after": float(np.mean(hits)), "n": len(hits)}
    return table


def markdown(results: dict[str, Any]) -> str:
    """The tables and what they do not show."""
    lines = ["# Quickstart: answers about volumes that were never trained on", ""]
    lines += _table(results["held_out"])
    if results["apart"]:
        lines += ["", "Counted apart, the head CT that is fetched and not part of the repository:", ""]
        lines += _table(results["apart"])
    lines += ["", "After finetuning, volume by volume:", "", *_volume_table(results["by_volume"]), ""]
    return "\n".join([*lines, *(f"- {note}" for note in results["notes"]), ""])


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = ["question", "before", "after", "95 % (volumes)", "most frequent", "best constant", "chance", "n", "volumes"]
    body = []
    for row in rows:
        interval = "-" if row["low"] is None else f"{row['low']:.2f}-{row['high']:.2f}"
        numbers = [f"{row[key]:.2f}" for key in ("most_frequent", "best_constant", "chance")]
        name, before, after = row["question"], f"{row['before']:.2f}", f"{row['after']:.2f}"
        body.append([name, before, after, interval, *numbers, str(row["n"]), str(row["volumes"])])
    return _aligned(head, body)


def _volume_table(table: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    kinds = list(QUESTIONS)
    cells = {name: [_cell(row.get(kind)) for kind in kinds] for name, row in table.items()}
    return _aligned(["volume", *kinds], [[name, *row] for name, row in cells.items()])


def _cell(entry: dict[str, float] | None) -> str:
    return "" if entry is None else f"{entry['after']:.2f} ({entry['n']:.0f})"


def _aligned(head: list[str], body: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]
    rows = [head, ["-" * width for width in widths], *body]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]


def sheet(folder: Path, answered: Sequence[Answered], results: dict[str, Any]) -> str:
    """One HTML page that needs no other file: tables, loss curves, and pictures with question, answer and truth."""
    volumes: dict[str, list[str]] = {}
    for a in answered:
        pictures = volumes.setdefault(a.volume, [])
        if a.picture not in pictures:
            pictures.append(a.picture)
    parts = []
    for volume, pictures in volumes.items():
        step = max(1, len(pictures) // SHOWN_PER_VOLUME)
        cards = "".join(_card(folder, [a for a in answered if a.picture == name]) for name in pictures[::step])
        parts.append(f"<h2>{html.escape(volume)}</h2><div class=row>{cards}</div>")
    curves = "".join(curve(folder / stage / "loss.jsonl", stage) for stage in ("pretrain", "finetune"))
    return PAGE.format(table=html.escape(markdown(results)), curves=curves, pictures="".join(parts))


def _card(folder: Path, asked: Sequence[Answered]) -> str:
    picture = base64.b64encode((folder / "data" / "images" / asked[0].picture).read_bytes()).decode()
    rows = "".join(
        f"<tr class={'hit' if a.hit(a.after) else 'miss'}><td>{html.escape(a.question)}"
        f"<td>{html.escape(a.after or '(nothing)')}<td>{html.escape(a.truth)}</tr>"
        for a in asked
    )
    head = "<tr><th>question<th>answer<th>truth</tr>"
    return f'<div class=card><img src="data:image/png;base64,{picture}" alt=""><table>{head}{rows}</table></div>'


def curve(log: Path, title: str) -> str:
    """The training loss as a drawing; empty where there is no log."""
    if not log.is_file():
        return ""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    points = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    if len(points) < 2:
        return ""
    steps, losses = np.array(points, dtype=float).T
    x = 40 + 300 * (steps - steps[0]) / (steps[-1] - steps[0])
    y = 150 - 130 * losses / losses.max()
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f'<svg width=360 height=185 role=img aria-label="loss, {title}"><path d="M40 20V150H340" class=axis />'
        f'<polyline points="{path}" class=line /><text x=5 y=26>{losses.max():.1f}</text><text x=20 y=154>0</text>'
        f"<text x=40 y=175>{title}: loss over {int(steps[-1])} steps, {losses[-1]:.2f} at the end</text></svg>"
    )


PAGE = """<!doctype html><meta charset=utf-8><title>medm quickstart</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }}
pre {{ overflow-x: auto; font-size: 13px; background: #f6f6f4; padding: 1rem }}
.row {{ display: flex; flex-wrap: wrap; gap: 1rem }}
.card {{ width: 17.5rem; font-size: 12px }}
.card img {{ width: 100%; background: #000; display: block }}
table {{ border-collapse: collapse; width: 100% }} td, th {{ text-align: left; padding: 2px 4px; vertical-align: top }}
.miss td {{ color: #a3271f }} .miss td:nth-child(2)::after {{ content: " \\2717" }}
.axis {{ fill: none; stroke: #999 }} .line {{ fill: none; stroke: #24618f; stroke-width: 1.5 }}
text {{ font-size: 12px }}
</style>
<h1>medm quickstart</h1><p><b>Not for clinical use.</b> The patient's right is on the left of each picture.</p>
<pre>{table}</pre><div class=row>{curves}</div>{pictures}
"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
