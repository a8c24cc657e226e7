"""Reports: a table's rows as Markdown, a self-contained HTML page, CSV and figures."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optrelax.output.files import write_whole
from optrelax.output.plots import write_figure
from optrelax.output.tables import json_text, write_frame
from optrelax.papers.frames import TableOutcomes
from optrelax.papers.measured_sections import Section
from optrelax.papers.published import SETTING, SOURCE
from optrelax.papers.sections import sections

if TYPE_CHECKING:
    import polars as pl

__all__ = ["WrittenReport", "write_index", "write_report"]


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """What was written of a table."""

    table: str
    title: str
    budget: str
    seconds: float
    failed: Mapping[str, str]
    tables: Mapping[str, list[dict[str, object]]]
    folder: Path

    def summary(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "table": self.table,
            "budget": self.budget,
            "seconds": self.seconds,
            "failed": dict(self.failed),
            "tables": dict(self.tables),
            "report": str(self.folder / "report.html"),
        }


def write_report(found: TableOutcomes, folder: Path, command: str) -> WrittenReport:
    """Write report.md, report.html, report.json, and each table and figure, into folder/TABLE.

    command: what the reader types to get the same.
    """
    home = folder / found.plan.table
    parts = sections(found)
    for part in parts:
        for name, frame in part.tables.items():
            write_frame(frame, home / f"{name}.csv")
        for picture in part.pictures:
            write_figure(picture.figure, home / f"{picture.name}.png")
    text = _markdown(found, parts, command)
    write_whole(home / "report.md", text.encode())
    write_whole(home / "report.html", html_page(text, found.plan.title, home).encode())
    tables = {name: frame.to_dicts() for part in parts for name, frame in part.tables.items()}
    plan = found.plan
    report = WrittenReport(plan.table, plan.title, plan.budget, found.seconds(), found.failed(), tables, home)
    write_whole(home / "report.json", (json_text(report.summary() | {"report": "report.html"}) + "\n").encode())
    return report


def write_index(reports: Sequence[WrittenReport], folder: Path, command: str) -> Path:
    """index.md: the reports of one folder, with what they took."""
    lines = ["# The tables, measured again", "", f"One run: `{command}`.", ""]
    lines += ["| report | what | budget | minutes of its processes, by the clock | rows that failed |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for report in reports:
        where = f"[{report.table}]({report.table}/report.md) ([HTML]({report.table}/report.html))"
        minutes = f"{report.seconds / 60:.1f}"
        lines.append(f"| {where} | {report.title} | {report.budget} | {minutes} | {len(report.failed)} |")
    lines += ["", "Networks are shared between the reports: their training counts in each that uses them.", ""]
    path = folder / "index.md"
    write_whole(path, "\n".join(lines).encode())
    return path


# --- Markdown -----------------------------------------------------------------------------------------------------


def _markdown(found: TableOutcomes, parts: Sequence[Section], command: str) -> str:
    plan = found.plan
    lines = [f"# {plan.title}", "", f"Report `{plan.table}`, budget `{plan.budget}`, first seed {plan.seed}.", ""]
    lines += ["## What was measured", "", *(f"- {note}" for note in plan.notes), ""]
    for part in parts:
        lines += [f"## {part.title}", ""]
        for name, frame in part.tables.items():
            lines += [*_table(frame, part.decimals), "", f"({name}.csv)", ""]
        lines += [*(f"- {remark}" for remark in part.remarks), *([""] if part.remarks else [])]
        for picture in part.pictures:
            lines += [f"![{picture.name}]({picture.name}.png)", "", f"*{picture.caption}*", ""]
    if failed := found.failed():
        lines += ["## Rows that failed", "", "Their cells are dashes above.", ""]
        lines += [*(f"- `{name}`: {_escaped(error)}" for name, error in failed.items()), ""]
    lines += ["## How it was made", "", *(f"- {line}" for line in _origin(found, command)), ""]
    return "\n".join(lines)


def _origin(found: TableOutcomes, command: str) -> list[str]:
    versions: dict[str, list[str]] = {}
    for row in found.plan.rows():
        for name, value in (found.outcomes[row.name].versions or {}).items():
            if value not in versions.setdefault(name, []):
                versions[name].append(value)
    seconds = found.seconds()
    lines = [
        f"`{command}`",
        f"{seconds:.0f} s ({seconds / 60:.1f} min) of single-threaded processes, training included, whichever call "
        "did it; the clock's, so other work on the machine counts.",
        "Versions: " + ", ".join(f"{name} {' and '.join(values)}" for name, values in versions.items()) + ".",
    ]
    if found.plan.published:
        lines.append(f"Columns `(paper)`: {SOURCE}; {SETTING}. No other figure here is published.")
    else:
        lines.append("No published figure stands here: none of this table's is known to us.")
    return lines


def _table(frame: pl.DataFrame, decimals: Mapping[str, int]) -> list[str]:
    names = [_escaped(name) for name in frame.columns]
    numeric = [kind.is_numeric() for kind in frame.dtypes]
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---:' if n else '---' for n in numeric)} |"]
    for row in frame.iter_rows():
        cells = [_cell(value, decimals.get(name)) for value, name in zip(row, frame.columns, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(value: object, places: int | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        if math.isnan(value):
            return "–"
        if places is None or (value != 0 and abs(value) < 0.5 * 10.0**-places):
            return f"{value:.3g}"
        return f"{value:.{places}f}"
    return _escaped(str(value))


def _escaped(text: str) -> str:
    """Text in a cell: a bar would end it."""
    return text.replace("|", "\\|")


# --- HTML ---------------------------------------------------------------------------------------------------------

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;display:block;overflow-x:auto;font-size:13px}"
    "th,td{border-bottom:1px solid #ddd;padding:.25em .6em;vertical-align:top}th{text-align:left}"
    "img{max-width:100%}code{background:#f3f3f3;padding:0 .2em}"
)


def html_page(markdown: str, title: str, home: Path) -> str:
    """The Markdown as one page that needs no other file: figures are inside it."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(markdown)

    def inside(found: re.Match[str]) -> str:
        image = base64.b64encode((home / found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{image}"'

    body = re.sub(r'src="([\w.-]+\.png)"', inside, body)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'
