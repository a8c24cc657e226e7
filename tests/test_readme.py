"""The README does what it says: its Python runs, its commands parse, its links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from optrelax import cli
from optrelax.cli.application import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced code of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command line shown: in console blocks, and in backquotes."""
    # What a command printed stands in the same block: tables, which begin with no command's name.
    lines = [line for block in blocks("console") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`([^`\n]+)`", prose)
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?(optrelax |make |python )", line)]


def parsed(words: list[str]) -> None:
    """Parse a command line as typer does, without running it; raises where it does not fit."""
    for name in cli._COMMANDS:
        importlib.import_module(f"optrelax.cli.{name}")
    command = typer.main.get_command(app)
    context = command.make_context("optrelax", list(words))
    while isinstance(command, typer.core.TyperGroup):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command, context = found, found.make_context(name, rest, parent=context)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_python_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "50 examples, eps 0.02" in capsys.readouterr().out
    assert (tmp_path / "net.safetensors").exists()
    assert len([line for line in code.splitlines() if line]) <= 16


def test_there_are_commands_to_check():
    assert len(commands()) >= 8
    assert len(blocks("python")) == 1


@pytest.mark.parametrize("line", sorted({*commands()}))
def test_commands_parse(line):
    program, *words = shlex.split(line, comments=True)
    if program == "make":
        targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "python" and words[0] == "-m":
        assert (ROOT / words[1] / "__main__.py").is_file()
        assert all((ROOT / words[1] / f"{suite}.py").is_file() for suite in words[2:3])
    elif program == "python":
        assert (ROOT / words[0]).is_file()
    elif "COMMAND" not in words:
        parsed(words)


def test_parsing_notices_what_is_wrong():
    for words in (["certify", "net"], ["train", "--epoch", "3"], ["certfy"]):
        # The base of every complaint about a command line; typer gives it no public name.
        with pytest.raises(typer.BadParameter.__base__):
            parsed(words)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)", README))))
def test_links_lead_somewhere(target):
    assert target.startswith("https://") or (ROOT / target).exists()


def test_no_placeholder_is_left():
    assert "<!--" not in README
