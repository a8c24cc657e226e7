"""Help: it fits a screen of 80 x 50, names nothing that is not there, and is short where `-h` asks."""

import importlib
import re
import shlex

import pytest
import typer

from optrelax import cli
from optrelax.cli.application import app

for name in cli._COMMANDS:
    importlib.import_module(f"optrelax.cli.{name}")


def commands(group, path=()) -> dict[tuple[str, ...], object]:
    found = {}
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        inner = commands(command, (*path, name)) if hasattr(command, "list_commands") else {}
        found |= {(*path, name): command} | inner
    return found


COMMANDS = commands(typer.main.get_command(app))
SINGLE = {path: command for path, command in COMMANDS.items() if not hasattr(command, "list_commands")}


def page(capsys, monkeypatch, *arguments: str) -> list[str]:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_a_screen(capsys, monkeypatch, path):
    lines = page(capsys, monkeypatch, *path, "--help")
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("path", SINGLE, ids=" ".join)
def test_every_option_is_named_whole_and_once(capsys, monkeypatch, path):
    text = "\n".join(page(capsys, monkeypatch, *path, "--help"))
    for p in SINGLE[path].params:
        if p.param_type_name == "option" and p.name != "help":
            name = max(p.opts, key=len)
            assert len(re.findall(rf"^  (?:\S+, )?{name}(?![\w-])", text, re.M)) == 1, name


@pytest.mark.parametrize("path", SINGLE, ids=" ".join)
def test_short_help_is_no_longer_and_says_what_is_left_out(capsys, monkeypatch, path):
    short, whole = page(capsys, monkeypatch, *path, "-h"), page(capsys, monkeypatch, *path, "--help")
    assert len(short) <= len(whole) + 1
    options = sum(line.startswith("  --") for line in whole)
    left = options - sum(line.startswith("  --") for line in short)
    assert (f"{left} options more: optrelax {' '.join(path)} --help" in short) == (left > 0)


@pytest.mark.parametrize("path", SINGLE, ids=" ".join)
def test_examples_name_options_that_exist(path):
    command = SINGLE[path]
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    names = {p.name for p in command.params}
    assert set(command.common) <= names
    for example in command.examples:
        words = shlex.split(example)
        assert words[1 : 1 + len(path)] == list(path)
        assert {word for word in words if word.startswith("--")} <= known
