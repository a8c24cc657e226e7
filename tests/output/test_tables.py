"""Tables reach people and programs whole: every format, every odd value, every failure."""

import io
import json
import math

import polars as pl
import pytest
from rich.console import Console

from optrelax.output.tables import (
    json_text,
    require_writable,
    rich_table,
    text_table,
    write_frame,
    write_json,
    write_results,
)

FRAME = pl.DataFrame(
    {
        "name": ["crown", "[bold]box[/bold]", None],
        "certified %": [71.345, 0.0, 100.0],
        "bound": [-1.25, -math.inf, math.nan],
        "count": [1, None, 3],
    }
)


def shown(frame: pl.DataFrame, **options) -> str:
    text = io.StringIO()
    Console(file=text, width=100).print(rich_table(frame, **options))
    return text.getvalue()


def test_terminal_table_shows_every_cell_as_it_is():
    text = shown(FRAME, title="results", decimals={"certified %": 2})
    for cell in ("results", "crown", "[bold]box[/bold]", "71.34", "0.00", "100.00", "-1.25", "-inf", "nan", "-"):
        assert cell in text
    assert "71.345" not in text


def test_plain_text_is_the_terminal_table_at_any_width():
    assert text_table(FRAME, decimals={"certified %": 2}) == shown(FRAME, decimals={"certified %": 2}).rstrip("\n")
    wide = text_table(pl.DataFrame({"c" * 150: ["a"], "d" * 150: ["b"]}))
    assert "c" * 150 in wide
    assert "\x1b" not in wide


LONG = pl.DataFrame(
    {
        "relaxation": ["crown", "triangle:preactivation=crown"],
        "misclassified at most %": [2.125, 100.0],
        "median gap": [7.994e-13, None],
        "what it is": ["lines at slopes of the smaller area", "the LP"],
    }
)


@pytest.mark.parametrize("width", [20, 60, 64, 70, 80, 100, 160])
def test_no_width_cuts_a_word_or_a_number(width):
    text = io.StringIO()
    Console(file=text, width=width, soft_wrap=True).print(rich_table(LONG))
    lines = text.getvalue().splitlines()
    cells = [LONG.columns, *([str(cell) for cell in row] for row in LONG.drop_nulls().iter_rows())]
    words = {word for row in cells for cell in row for word in cell.split()} - {"7.994e-13"}
    assert {"7.994e-13", "2.125"} | words <= {word for line in lines for word in line.split()} | {"100.0"}
    least = len("triangle:preactivation=crown misclassified 7.994e-13 smaller")
    assert max(map(len, lines)) <= max(width, least)
    assert ("│" in text.getvalue()) == (width >= least + 10)  # three more columns between columns, two at each end


def test_numbers_stand_to_the_right():
    table = rich_table(FRAME)
    assert [column.justify for column in table.columns] == ["left", "right", "right", "right"]


def test_parquet_and_csv_keep_the_frame(tmp_path):
    assert pl.read_parquet(write_frame(FRAME, tmp_path / "a.parquet")).equals(FRAME)
    back = pl.read_csv(write_frame(FRAME, tmp_path / "a.csv"))
    assert back.columns == FRAME.columns
    assert back["certified %"].to_list() == [71.345, 0.0, 100.0]
    assert back["bound"][1] == -math.inf


def test_json_is_strict(tmp_path):
    rows = json.loads(
        write_frame(FRAME, tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert rows[0] == {"name": "crown", "certified %": 71.345, "bound": -1.25, "count": 1}
    assert [row["bound"] for row in rows] == [-1.25, None, None]
    assert json.loads(json_text({"a": (1, math.nan), 2: {"b": math.inf}})) == {"a": [1, None], "2": {"b": None}}
    write_json({"a": 1}, tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == {"a": 1}


def test_unknown_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"table\.parqet ends in '\.parqet'; did you mean 'parquet'"):
        write_frame(FRAME, tmp_path / "table.parqet")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("before")

    def fail(self, target):
        target.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_csv", fail)
    with pytest.raises(OSError, match="No space"):
        write_frame(FRAME, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    assert path.read_text() == "before"


def test_writable_folders_are_made_and_others_refused(tmp_path):
    assert require_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="output folder cannot be written") as caught:
            require_writable(place)
        assert caught.value.filename == str(place)


def test_results_of_an_experiment(tmp_path):
    """For programs every number as it is, for people a table of all rows and one of the means over the seeds."""
    names = [f"method-{i}-with-a-long-name-that-no-table-may-cut" for i in range(12)]
    rows = [{"method": name, "seed": seed, "certified %": 50.0 + seed / 3} for name in names for seed in (0, 1)]
    facts = {"command": "python a.py --seeds 0 1", "seeds": [0, 1], "versions": {"torch": "2"}}
    write_results(rows, tmp_path, per="method", facts=facts)
    assert json.loads((tmp_path / "table.json").read_text()) == {**facts, "rows": rows}
    assert pl.read_csv(tmp_path / "table.csv").to_dicts() == rows
    text = (tmp_path / "table.md").read_text()
    assert all(text.count(f"| {name} ") == 3 for name in names)
    assert text.count("| 50.17 ") == 12
    assert "`python a.py --seeds 0 1`" in text
    assert "…" not in text
