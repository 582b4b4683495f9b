"""Reports of scores in Markdown and in HTML.

The HTML page shows images, and needs no script and no file from outside the report.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from medm.evaluation.cases import Case
from medm.evaluation.task_report import TaskReport
from medm.files import atomic_write_text
from medm.metrics.base import MetricResult
from medm.metrics.compare import Comparison

NOT_CLINICAL = (
    "Not for clinical use. These are scores on a benchmark, not evidence of benefit or safety "
    "for patients."
)

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 "
    "1em;color:#222}table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid "
    "#ddd;padding:.3em "
    ".8em;text-align:left;vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}small,.s{color:#666;font-size:12px}.c{display:flex;gap:1em;border-top:1px "
    "solid #ddd;padding:1em 0}.c img{max-width:420px;height:auto}.c dl{margin:0}.c "
    "dt{color:#666}.c dd{margin:0 0 .6em;white-space:pre-wrap}"
)

Table = tuple[Sequence[str], list[Sequence[str]]]
"""Header and rows of text."""


def write_reports(report: TaskReport) -> None:
    """Write `report.md` and `report.html` beside the results."""
    atomic_write_text(report.folder / "report.md", markdown(report))
    atomic_write_text(report.folder / "report.html", page(report))


def number(value: float | None) -> str:
    """Return a number with three decimals; a dash for an undefined one."""
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def interval(low: float, high: float) -> str:
    """Return an interval as `0.412 to 0.533`; a dash for an undefined one."""
    return "–" if math.isnan(low) else f"{low:.3f} to {high:.3f}"


def results_table(results: Iterable[MetricResult]) -> Table:
    """Return the table of results, one metric a row."""
    rows: list[Sequence[str]] = [
        (r.name, number(r.value), interval(r.low, r.high), _items(r), r.signature) for r in results
    ]
    return ("metric", "value", "95 % interval", "n", "signature"), rows


def _items(result: MetricResult) -> str:
    """Return `120`, or `120 in 14` where 14 groups were resampled."""
    return str(result.n) if result.clusters is None else f"{result.n} in {result.clusters.count}"


def group_table(name: str, groups: dict[str, list[MetricResult]]) -> Table:
    """Return the table of a field: one value of it a row, one metric a column.

    A cell holds the metric, its interval and its number of items. It is empty where a row lacks the
    metric. The column `n` is the row's items; a metric may score fewer.
    """
    columns = list(dict.fromkeys(result.name for results in groups.values() for result in results))
    rows: list[Sequence[str]] = []
    for value, results in groups.items():
        by_name = {result.name: result for result in results}
        cells = [_with_interval(by_name[column]) if column in by_name else "" for column in columns]
        rows.append((value, str(max((result.n for result in results), default=0)), *cells))
    return (name, "n", *columns), rows


def _with_interval(result: MetricResult) -> str:
    """Return `0.500 (0.412 to 0.533, n 12)`."""
    return f"{number(result.value)} ({interval(result.low, result.high)}, n {_items(result)})"


def comparison_table(comparisons: Iterable[Comparison]) -> Table:
    """Return the table of comparisons, one metric a row."""
    rows: list[Sequence[str]] = [
        (
            c.name,
            number(c.first),
            number(c.second),
            f"{c.difference:+.3f}",
            interval(c.low, c.high),
            number(c.p_value),
            str(c.n) if c.clusters is None else f"{c.n} in {c.clusters}",
            c.test,
        )
        for c in comparisons
    ]
    return ("metric", "this", "other", "difference", "95 % interval", "p", "n", "test"), rows


def tables(report: TaskReport) -> list[tuple[str, str, Table]]:
    """Return the title, a sentence and the table of each section of a report."""
    sections = [("Scores", "", results_table(report.scores.results))]
    if report.scores.original:
        sentence = (
            "As the benchmark's authors compute them, for comparison with their papers alone."
        )
        sections.append(("Original scoring", sentence, results_table(report.scores.original)))
    if report.comparisons:
        sentence = f"Paired, on the same items, against {report.against}."
        sections.append(("Comparison", sentence, comparison_table(report.comparisons)))
    for name, groups in report.scores.groups.items():
        sections.append((f"By {name}", "", group_table(name, groups)))
    return sections


def metadata_lines(report: TaskReport) -> list[str]:
    """Return the metadata of a report, one entry a line, without the options of the task."""
    return [
        f"{key.replace('_', ' ')}: {_plain(value)}"
        for key, value in report.metadata.items()
        if value is not None and key != "options"
    ]


def _plain(value: object) -> str:
    return (
        ", ".join(f"{key} {item}" for key, item in value.items())
        if isinstance(value, dict)
        else str(value)
    )


def markdown(report: TaskReport) -> str:
    """Return the report as Markdown."""
    lines = [f"# {report.task}", "", f"{report.summary}. {report.n} items.", "", NOT_CLINICAL, ""]
    lines += [f"- {_md(line)}" for line in [*report.scores.notes, *metadata_lines(report)]]
    for title, sentence, table in tables(report):
        lines += [
            "",
            f"## {title}",
            "",
            *([sentence, ""] if sentence else []),
            *_markdown_table(table),
        ]
    for title, cases in _case_sections(report):
        lines += ["", f"## {title}", ""]
        for case in cases:
            lines += [f"### {_md(case.id)}{_scored(case)}", ""]
            lines += [f"![{_md(case.id)}]({image})" for image in case.images] + [""] * bool(
                case.images
            )
            lines += [f"- {label}: {_md(text)}" for label, text in _texts(case)] + [""]
    return "\n".join(lines).rstrip() + "\n"


def page(report: TaskReport) -> str:
    """Return the report as one HTML page."""
    out = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_esc(report.task)}</title>',
        f"<style>{_STYLE}</style><h1>{_esc(report.task)}</h1>",
        f"<p>{_esc(report.summary)}. {report.n} "
        f"items.</p><p><strong>{NOT_CLINICAL}</strong></p><ul>",
        *[f"<li>{_esc(note)}</li>" for note in report.scores.notes],
        *[f'<li class="s">{_esc(line)}</li>' for line in metadata_lines(report)],
        "</ul>",
    ]
    for title, sentence, table in tables(report):
        out += [
            f"<h2>{_esc(title)}</h2>",
            f"<p>{_esc(sentence)}</p>" if sentence else "",
            _html_table(table),
        ]
    for title, cases in _case_sections(report):
        out.append(f"<h2>{_esc(title)}</h2>")
        out += [_html_case(case) for case in cases]
    return "\n".join(line for line in out if line) + "\n</html>\n"


def write_summary(folder: Path, reports: Sequence[TaskReport]) -> None:
    """Write `summary.md`: the first metric of every task, and the notes on its numbers."""
    rows: list[Sequence[str]] = []
    for report in reports:
        head = report.scores.results[0] if report.scores.results else None
        values = (
            (head.name, number(head.value), interval(head.low, head.high))
            if head
            else ("–", "–", "–")
        )
        rows.append((f"[{report.task}]({report.task}/report.md)", str(report.n), *values))
    table = _markdown_table(
        (("task", "items", "metric", "value", "95 % interval"), rows), escape=str
    )
    notes = [f"- {report.task}: {_md(note)}" for report in reports for note in report.scores.notes]
    notes = ["", "## Notes", "", *notes] if notes else []
    atomic_write_text(
        folder / "summary.md",
        "\n".join(["# Evaluation", "", NOT_CLINICAL, "", *table, *notes]) + "\n",
    )


def _case_sections(report: TaskReport) -> list[tuple[str, list[Case]]]:
    return [
        (title, cases)
        for title, cases in (("Worst items", report.worst), ("Random items", report.random))
        if cases
    ]


def _scored(case: Case) -> str:
    return "" if case.score is None else f" ({case.metric} {number(case.score)})"


def _texts(case: Case) -> list[tuple[str, str]]:
    lines = [
        ("question", case.question),
        ("reference", case.answer),
        ("reply", case.reply or "(none)"),
    ]
    return lines + ([("no image", case.problem)] if case.problem else [])


def _html_case(case: Case) -> str:
    images = "".join(f'<img src="{_esc(image)}" alt="">' for image in case.images)
    texts = "".join(f"<dt>{_esc(label)}</dt><dd>{_esc(text)}</dd>" for label, text in _texts(case))
    title = f"{_esc(case.id)}<small>{_esc(_scored(case))}</small>"
    return f'<div class="c"><div>{images}</div><div><h3>{title}</h3><dl>{texts}</dl></div></div>'


def _html_table(table: Table) -> str:
    header, rows = table
    head = "".join(f"<th>{_esc(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td{_kind(cell)}>{_esc(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _kind(cell: str) -> str:
    digits = cell[:1].isdigit() or cell[:1] in "+–-"
    return ' class="n"' if digits else ' class="s"' if "|" in cell else ""


def _markdown_table(table: Table, *, escape: Callable[[str], str] | None = None) -> list[str]:
    header, rows = table
    clean = escape or _md
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(clean(cell) for cell in row) + " |" for row in rows]


def _md(text: str) -> str:
    """Return text as one line of Markdown, with the characters of markup escaped."""
    flat = " ".join(str(text).split())
    for mark in ("\\", "|", "<", "*", "_", "`", "["):
        flat = flat.replace(mark, "\\" + mark)
    return flat


def _esc(text: object) -> str:
    return html.escape(str(text))
