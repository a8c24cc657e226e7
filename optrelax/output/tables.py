"""Tables for people and for programs: rich tables on a terminal; CSV, JSON and Parquet files.

Every file appears whole or not at all.
"""

import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optrelax.errors import suggest
from optrelax.output.files import replacing, write_whole
from optrelax.output.json_lines import json_ready

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

__all__ = [
    "FORMATS",
    "json_text",
    "markdown_table",
    "require_writable",
    "rich_table",
    "text_table",
    "write_frame",
    "write_json",
    "write_results",
]

FORMATS = ("csv", "json", "parquet")
"""What `write_frame` writes, by the ending of the file's name."""


def rich_table(
    frame: "pl.DataFrame", *, title: str | None = None, decimals: Mapping[str, int] | None = None
) -> "Table":
    """A data frame as a table for a terminal: numbers to the right, missing values as a dash.

    No width cuts a name or a number: where it is small, text breaks at spaces, then the lines between columns go, and
    what is still wider than the terminal is wider.
    decimals: places of a column of floats; the others are shown to four significant digits.
    """
    from rich.text import Text

    from optrelax.output.fitted_tables import FittedTable

    table = FittedTable(title=title, title_justify="left")
    places = decimals or {}
    for name, kind in frame.schema.items():
        table.add_column(Text(name), justify="right" if kind.is_numeric() else "left")
    for row in frame.iter_rows(named=True):
        # Text, not str: a message may hold square brackets, which rich would read as markup.
        table.add_row(*(Text(_cell(value, places.get(name))) for name, value in row.items()))
    return table


def text_table(frame: "pl.DataFrame", *, decimals: Mapping[str, int] | None = None) -> str:
    """The same table as plain text, as wide as it needs: for `print`, logs and notebooks; decimals as `rich_table`."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None).print(rich_table(frame, decimals=decimals))
    return text.getvalue().rstrip("\n")


def markdown_table(frame: "pl.DataFrame", *, decimals: int = 2) -> str:
    """The whole data frame as a Markdown table, floats to `decimals` places."""
    import polars as pl

    plain: dict[str, Any] = {"tbl_hide_dataframe_shape": True, "tbl_hide_column_data_types": True}
    whole: dict[str, Any] = {"tbl_rows": -1, "tbl_cols": -1, "tbl_width_chars": 10_000, "fmt_str_lengths": 1000}
    with pl.Config(tbl_formatting="MARKDOWN", float_precision=decimals, **plain, **whole):
        return str(frame)


def _cell(value: Any, places: int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if places is None else f"{value:.{places}f}"
    return str(value)


def write_frame(frame: "pl.DataFrame", path: str | os.PathLike[str]) -> Path:
    """Write a data frame as CSV, JSON (a list of objects) or Parquet, whichever `path` ends in; returns the path.

    NaN and infinities, which JSON cannot hold, become null there; CSV and Parquet keep them.
    Raises ValueError for another ending, OSError where the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise ValueError(f"write_frame: {path.name} ends in {path.suffix!r}; {suggest(kind, FORMATS)}")
    with replacing(path) as temporary:
        if kind == "csv":
            frame.write_csv(temporary)
        elif kind == "parquet":
            frame.write_parquet(temporary)
        else:
            temporary.write_text(json_text(frame.to_dicts()) + "\n", encoding="utf-8")
    return path


def write_json(value: object, path: str | os.PathLike[str]) -> Path:
    """Write a JSON-ready value, as `json_text` says it; returns the path."""
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(json_text(value) + "\n", encoding="utf-8")
    return path


def write_results(
    rows: Sequence[Mapping[str, object]], folder: str | os.PathLike[str], *, per: str, facts: Mapping[str, object]
) -> None:
    """Write the rows of an experiment to table.csv, table.json and table.md in a folder, for programs and for people.

    per: column whose rows the Markdown also averages over the seeds.  facts: `command`, `seeds`, `versions`: what it
    takes to make them again.
    """
    import polars as pl

    folder, frame = Path(folder), pl.DataFrame(rows)
    write_frame(frame, folder / "table.csv")
    write_json({**facts, "rows": rows}, folder / "table.json")
    means = markdown_table(frame.group_by(per, maintain_order=True).mean().drop("seed"))
    parts = [markdown_table(frame), f"Means over seeds {facts['seeds']}:", means, f"`{facts['command']}`"]
    write_whole(folder / "table.md", ("\n\n".join([*parts, str(facts["versions"])]) + "\n").encode())


def json_text(value: object) -> str:
    """Strict JSON, indented: NaN and infinities become null, as JSON has no word for them."""
    return json.dumps(json_ready(value, lambda _: None), indent=2, allow_nan=False, ensure_ascii=False)


def require_writable(folder: str | os.PathLike[str]) -> Path:
    """Make the folder and prove that files can be written to it, before hours of work; returns its path.

    Raises PermissionError that names the folder and the reason.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        # One type for a file in the way, a missing right, a full or read-only disk: the user must name another folder.
        raise PermissionError(error.errno, f"output folder cannot be written: {error.strerror}", str(folder)) from error
    return folder
