"""Compare two results of the same suite: python -m benchmarks.regression OLD.json NEW.json

Watched are ratios and bytes. Exit code 1 where one got worse by more than the threshold or a row went missing, 2 where
the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reports import FORMAT

THRESHOLD = 0.25


@dataclass(frozen=True, slots=True)
class Change:
    """A watched figure of one row, before and after; `new` is None where it is gone."""

    table: str
    row: str
    column: str
    old: float
    new: float | None
    worse: float
    """By which share it got worse: 0.5 is half as much again, or a speed-up divided by 1.5."""

    def __str__(self) -> str:
        where = f"{self.table}: {self.row}: {self.column}"
        if self.new is None:
            return f"{where} was {self.old:.4g}, is gone"
        return f"{where} was {self.old:.4g}, is {self.new:.4g} ({100 * self.worse:+.0f} % worse)"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every watched figure of `old`, the worst first.  ValueError for results of different suites or settings."""
    for key in ("suite", "options"):
        a, b = (_comparable(record[key]) for record in (old, new))
        if a != b:
            raise ValueError(f"the results are of different {key}: {a} and {b}")
    tables = {table["title"]: table for table in new["tables"]}
    changes = []
    for table in old["tables"]:
        other = tables.get(table["title"], {"rows": []})
        rows = {_key(table, row): row for row in other["rows"]}
        for row in table["rows"]:
            changes += _changes(table, row, rows.get(_key(table, row), {}))
    return sorted(changes, key=lambda change: -change.worse)


def _comparable(value: Any) -> Any:
    """Options that were set, as older results lack newer ones; without the rounds, which only make figures steadier."""
    return {k: v for k, v in value.items() if v and k != "runs"} if isinstance(value, Mapping) else value


def _key(table: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return ", ".join(str(row.get(name)) for name in table["keys"])


def _changes(table: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    found = []
    for column in (*table["smaller"], *table["greater"]):
        before, after = old.get(column), new.get(column)
        if before is None:
            continue
        worse = float("inf")
        if after is not None:
            # A speed-up that halves counts as a time that doubles.
            a, b = (before, after) if column in table["smaller"] else (after, before)
            worse = b / a - 1 if a > 0 else (float("inf") if b > 0 else 0.0)
        found.append(Change(table["title"], _key(table, old), column, before, after, worse))
    return found


def read(path: Path) -> dict[str, Any]:
    """A stored result.  ValueError for another file, OSError where it cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no JSON: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path}: is no benchmark result (wanted the format {FORMAT!r})")
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two files; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regression", description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    text = "share by which a figure may get worse; default %(default)s"
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help=text)
    given = parser.parse_args(arguments)
    if not given.threshold >= 0:
        parser.error(f"--threshold must be >= 0, got {given.threshold}")
    try:
        old, new = read(given.old), read(given.new)
        changes = compare(old, new)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    was, now = (record["environment"].get("processor") for record in (old, new))
    if was != now:
        print(f"note: the processor was {was}, is {now}")
    worse = [change for change in changes if change.worse > given.threshold]
    for change in worse:
        print(change)
    print(f"{len(worse)} of {len(changes)} figures worse by more than {100 * given.threshold:g} %")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
