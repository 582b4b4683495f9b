"""Score what a model answered about volumes it never saw, before and after training, and say what
it means.

    python examples/quickstart/report.py [folder, by default work_dirs/quickstart]

Reads data/{about,finetune,test}.json, before.jsonl (where there is one), after.jsonl and the loss
logs; writes results.json, results.md and sheet.html.
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
from typing import Any, TypeAlias

import numpy as np
from fetch import REPOSITORY

from medm.metrics.choice import parse_choice, parse_yes_no

CONSTANTS = (
    "'Most frequent' answers what was most frequent in training; 'best constant' is the constant "
    "answer that turns out best on the test pictures, which nobody could have known before."
)
ROUNDS = 4000
"""Bootstrap samples of an interval."""
SHOWN_PER_VOLUME = 4
"""Pictures of each volume on the sheet."""

Questions: TypeAlias = dict[str, tuple[str, list[str]]]
"""Question type -> its wording and its answers."""


@dataclass(frozen=True)
class Answered:
    """One question about one picture, and what was made of it."""

    kind: str
    question: str
    options: Sequence[str]
    volume: str
    split: str
    picture: str
    truth: str
    before: str | None
    after: str

    def hit(self, reply: str | None) -> bool:
        """Whether a reply names this answer and no other."""
        return reply is not None and parse(self.options, reply) == self.truth


def parse(options: Sequence[str], reply: str) -> str | None:
    """The one answer that a reply names; None where it names none, or several."""
    if set(options) == {"yes", "no"}:
        said = parse_yes_no(reply)
        return None if said is None else "yes" if said else "no"
    letters = {chr(ord("A") + number): option for number, option in enumerate(options)}
    letter = parse_choice(reply, letters)
    return letters[letter] if letter else None


def main(arguments: list[str]) -> int:
    """Write the three files and print the table. Returns the exit status."""
    folder = Path(arguments[0]) if arguments else REPOSITORY / "work_dirs" / "quickstart"
    about = json.loads((folder / "data" / "about.json").read_text(encoding="utf-8"))
    answered = read(folder, about["questions"])
    training = json.loads((folder / "data" / "finetune.json").read_text(encoding="utf-8"))
    frequent = most_frequent(training, about["questions"])
    results = {
        "held_out": score([a for a in answered if a.split == "test"], frequent),
        "apart": score([a for a in answered if a.split == "extra"], frequent),
        "by_volume": by_volume(answered),
        "notes": [*about["notes"], CONSTANTS, *unreadable_before(answered)],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = markdown(results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    (folder / "sheet.html").write_text(sheet(folder, answered, results), encoding="utf-8")
    print(text)
    print(f"Pictures with questions and answers: {folder / 'sheet.html'}")
    return 0


def read(folder: Path, questions: Questions) -> list[Answered]:
    """Every question with its replies. A record that was refused counts as an empty reply."""
    records = json.loads((folder / "data" / "test.json").read_text(encoding="utf-8"))
    before, after = (
        _replies(folder / f"{when}.jsonl", len(records)) for when in ("before", "after")
    )
    if not after:
        raise SystemExit(
            f"{folder / 'after.jsonl'}: not there; run medm infer with the finetuned model"
        )
    return [
        Answered(
            kind=(kind := record["question_type"]),
            question=questions[kind][0],
            options=questions[kind][1],
            volume=record["source_volume"],
            split=record["split"],
            truth=record["answer"],
            picture=record["picture"] if "picture" in record else record["image"][0],
            before=before[index] if before else None,
            after=after[index],
        )
        for index, record in enumerate(records)
    ]


def _replies(file: Path, expected: int) -> dict[int, str]:
    if not file.is_file():
        return {}
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    replies = {line["index"]: line.get("reply", "") for line in lines}
    if len(replies) != expected:
        raise SystemExit(
            f"{file.name} answers {len(replies)} of {expected} questions; run medm infer again"
        )
    return replies


def most_frequent(records: Iterable[dict[str, Any]], questions: Questions) -> dict[str, str]:
    """Question type -> its most frequent answer in training."""
    kinds = {question: kind for kind, (question, _) in questions.items()}
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in questions}
    for record in records:
        turns = [
            turn["value"].rpartition(">\n")[2] for turn in record["conversations"]
        ]  # without the placeholder
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            counts[kinds[question]][answer] += 1
    return {kind: count.most_common(1)[0][0] for kind, count in counts.items() if count}


def score(answered: Sequence[Answered], frequent: dict[str, str]) -> list[dict[str, Any]]:
    """One row a question type."""
    rows = []
    for kind in dict.fromkeys(a.kind for a in answered):
        asked = [a for a in answered if a.kind == kind]
        after = np.array([a.hit(a.after) for a in asked], dtype=float)
        truths = Counter(a.truth for a in asked)
        low, high = interval_over_volumes(after, [a.volume for a in asked])
        rows.append(
            {
                "question": kind,
                "n": len(asked),
                "volumes": len({a.volume for a in asked}),
                "before": None
                if asked[0].before is None
                else float(np.mean([a.hit(a.before) for a in asked])),
                "after": float(after.mean()),
                "low": low,
                "high": high,
                "most_frequent": truths[frequent[kind]] / len(asked),
                "best_constant": max(truths.values()) / len(asked),
                "chance": 1 / len(asked[0].options),
                "unreadable": float(np.mean([parse(a.options, a.after) is None for a in asked])),
            }
        )
    return rows


def unreadable_before(answered: Sequence[Answered]) -> list[str]:
    """How much of the score before training is a matter of form."""
    replies = [(a.options, a.before) for a in answered if a.before is not None]
    if not replies:
        return []
    share = np.mean([parse(options, reply) is None for options, reply in replies])
    return [
        f"Before training, {share:.0%} of the replies name none of the answers, or several: much "
        "of that low score is form, not sight. Compare with the constant answers first."
    ]


def interval_over_volumes(
    hits: np.ndarray, volumes: Sequence[str]
) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the mean that draws whole volumes; none for a single volume."""
    names = sorted(set(volumes))
    if len(names) < 2:
        return None, None
    member = np.array(
        [[volume == name for name in names] for volume in volumes], dtype=float
    )  # (n, volumes)
    sums, counts = hits @ member, member.sum(axis=0)
    drawn = np.random.default_rng(0).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=ROUNDS
    )
    low, high = np.quantile(drawn @ sums / (drawn @ counts), [0.025, 0.975])
    return float(low), float(high)


def by_volume(answered: Sequence[Answered]) -> dict[str, dict[str, dict[str, float]]]:
    """Volume -> question type -> accuracy after finetuning, and n."""
    hits: dict[str, dict[str, list[bool]]] = {}
    for a in answered:
        hits.setdefault(a.volume, {}).setdefault(a.kind, []).append(a.hit(a.after))
    return {
        volume: {
            kind: {"after": float(np.mean(all_)), "n": len(all_)} for kind, all_ in kinds.items()
        }
        for volume, kinds in hits.items()
    }


def markdown(results: dict[str, Any]) -> str:
    """The tables and what they do not show."""
    lines = ["# Answers about volumes that were never trained on", ""]
    lines += _table(results["held_out"])
    if results["apart"]:
        lines += ["", "Counted apart: what is fetched and not part of the repository.", ""]
        lines += _table(results["apart"])
    lines += [
        "",
        "After finetuning, volume by volume:",
        "",
        *_volume_table(results["by_volume"]),
        "",
    ]
    return "\n".join([*lines, *(f"- {note}" for note in results["notes"]), ""])


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = [
        "question",
        "before",
        "after",
        "95 % (volumes)",
        "most frequent",
        "best constant",
        "chance",
        "n",
        "volumes",
    ]
    body = []
    for row in rows:
        interval = "-" if row["low"] is None else f"{row['low']:.2f}-{row['high']:.2f}"
        numbers = [f"{row[key]:.2f}" for key in ("most_frequent", "best_constant", "chance")]
        name, before, after = row["question"], _share(row["before"]), _share(row["after"])
        body.append([name, before, after, interval, *numbers, str(row["n"]), str(row["volumes"])])
    return _aligned(head, body)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _volume_table(table: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    kinds = list(dict.fromkeys(kind for row in table.values() for kind in row))
    cells = {name: [_cell(row.get(kind)) for kind in kinds] for name, row in table.items()}
    return _aligned(["volume", *kinds], [[name, *row] for name, row in cells.items()])


def _cell(entry: dict[str, float] | None) -> str:
    return "" if entry is None else f"{entry['after']:.2f} ({entry['n']:.0f})"


def _aligned(head: list[str], body: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]
    rows = [head, ["-" * width for width in widths], *body]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]


def sheet(folder: Path, answered: Sequence[Answered], results: dict[str, Any]) -> str:
    """One HTML page that needs no other file: tables, loss curves, and pictures with question,
    answer and truth.
    """
    volumes: dict[str, list[str]] = {}
    for a in answered:
        pictures = volumes.setdefault(a.volume, [])
        if a.picture not in pictures:
            pictures.append(a.picture)
    parts = []
    for volume, pictures in volumes.items():
        step = max(1, len(pictures) // SHOWN_PER_VOLUME)
        cards = "".join(
            _card(folder, [a for a in answered if a.picture == name]) for name in pictures[::step]
        )
        parts.append(f"<h2>{html.escape(volume)}</h2><div class=row>{cards}</div>")
    curves = "".join(
        curve(folder / stage / "loss.jsonl", stage) for stage in ("pretrain", "finetune")
    )
    return PAGE.format(table=html.escape(markdown(results)), curves=curves, pictures="".join(parts))


def _card(folder: Path, asked: Sequence[Answered]) -> str:
    picture = base64.b64encode(
        (folder / "data" / "images" / asked[0].picture).read_bytes()
    ).decode()
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


PAGE = """<!doctype html><meta charset=utf-8><title>medm</title>
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
<h1>Answers about volumes that were never trained on</h1>
<p><b>Not for clinical use.</b> The patient's right is on the left of each picture.</p>
<pre>{table}</pre><div class=row>{curves}</div>{pictures}
"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
