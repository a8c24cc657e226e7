"""README and documentation do what they say: their Python runs, commands parse, the site builds without a network.

A Python block may be followed by a text block: what it prints (times left out, other decimals roughly), or the error
that it ends with, where it begins like `ValueError: `; three dots stand for anything.
"""

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from inspect import ismodule
from pathlib import Path

import pages
import pytest
import typer

import optrelax as ox
from optrelax import cli, layers
from optrelax.cli.application import app
from optrelax.networks import registry
from optrelax.relaxations import resolve
from optrelax.training.recipe_rows import ROWS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if any(block[0] == "python" for block in pages.blocks(page.read_text()))]
PROGRAM = re.compile(r"(?:\$ )?((?:torchrun .*)?optrelax|make|python) ")


# --- Python -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, str | None]]]:
    """What every block of every page did: in one process, in which annotations are not checked, as at a reader's."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPTRELAX_TRACEBACK": ""}
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "pages.py"), *map(str, WITH_CODE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def as_words(text: str) -> str:
    """The text with roughly comparable numbers masked: decimals, percentages and times."""
    text = re.sub(r"\d+\.\d+ s\b", "T s", text)
    return re.sub(r"-?\d+\.\d+(e[+-]\d+)?|\d+(?= %)", "N", re.sub(r" +", " ", text)).strip()


def numbers(text: str) -> list[tuple[float, bool]]:
    """Decimals and percentages, times left out; whether each is a percentage."""
    text = re.sub(r"\d+\.\d+ s\b", "", text)
    found = re.findall(r"(-?\d+\.\d+(?:e[+-]\d+)?|\d+(?= %))( %)?", text)
    return [(float(number), bool(percent)) for number, percent in found]


def matches(shown: str, error: str) -> bool:
    """Whether the error is the one shown."""
    pattern = ".*".join(re.escape(part) for part in shown.strip().split("..."))
    return re.fullmatch(pattern, error.strip(), re.DOTALL) is not None


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_python_runs_and_prints_what_is_shown(page, results):
    assert results[page.name]
    for block in results[page.name]:
        shown, error = block["shown"], block["error"]
        if shown is not None and re.match(r"(\w*Error|error): ", shown):
            assert error is not None, f"no error from:\n{block['code']}"
            assert matches(shown, error), f"shown:\n{shown}\nraised:\n{error}"
            continue
        assert error is None, f"{error}\nfrom:\n{block['code']}"
        if shown is not None:
            assert as_words(block["printed"]) == as_words(shown)
            # Another processor rounds otherwise, and training multiplies the difference.
            for (got, percent), (wanted, _) in zip(numbers(block["printed"]), numbers(shown), strict=True):
                assert got == pytest.approx(wanted, rel=0.3, abs=4 if percent else 0.5)


def test_the_readme_is_short_and_prints_a_result(results):
    block = results["README.md"][0]
    assert "50 examples, eps 0.02" in block["printed"]
    assert len([line for line in block["code"].splitlines() if line]) <= 16


def test_the_faq_shows_many_errors(results):
    assert sum(block["error"] is not None for block in results["faq.md"]) >= 15


@pytest.mark.parametrize(
    ("shown", "error", "same"),
    [
        ("ValueError: a ... c\n", "ValueError: a b b c", True),
        ("ValueError: a", "ValueError: a b", False),
        ("error: x [y]", "error: x [y]\n", True),
    ],
)
def test_errors_are_compared_as_a_whole(shown, error, same):
    assert matches(shown, error) == same


# --- commands -----------------------------------------------------------------------------------------------------


def shown_commands(page: Path) -> list[str]:
    """Every command line of console blocks."""
    # What a command printed stands in the same block: tables, which begin with no command's name.
    text = page.read_text()
    lines = [line for language, code, _ in pages.blocks(text) if language == "console" for line in code.splitlines()]
    return [line for line in lines if PROGRAM.match(line)]


def named_commands(page: Path) -> list[str]:
    """Every command line in backquotes; there a command may stand without its arguments."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line.replace("\n", " ") for line in re.findall(r"`([^`]+)`", prose) if PROGRAM.match(line)]


COMMANDS = sorted({(line, True) for page in PAGES for line in shown_commands(page)})
COMMANDS += sorted({(line, False) for page in PAGES for line in named_commands(page)})


def parsed(words: list[str], whole: bool = True) -> dict[str, object]:
    """Parse a command line as typer does, without running it; raises where it does not fit. Returns its options.

    whole: a command alone, without arguments, is not enough.
    """
    for name in cli._COMMANDS:
        importlib.import_module(f"optrelax.cli.{name}")
    command = typer.main.get_command(app)
    context = command.make_context("optrelax", list(words))
    while isinstance(command, typer.core.TyperGroup):
        rest = [*context._protected_args, *context.args]
        if not rest and not whole:
            return {}
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        if not rest and not whole:
            return {}
        command, context = found, found.make_context(name, rest, parent=context)
    return context.params


def check_command(line: str, whole: bool) -> None:
    """Raise unless the command line is one that could be run."""
    line = re.sub(r"^torchrun .*?(?=optrelax )", "", line.removeprefix("$ "))
    program, *words = shlex.split(line, comments=True)
    if program == "make":
        targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets)
    elif program == "python" and words[0] == "-m":
        assert (ROOT / words[1] / "__main__.py").is_file() or importlib.util.find_spec(words[1])
        if words[1] == "benchmarks":
            assert all((ROOT / words[1] / f"{suite}.py").is_file() for suite in words[2:3])
    elif program == "python":
        assert (ROOT / words[0]).is_file()
    elif "COMMAND" not in words:
        options = parsed(words, whole)
        for name in options.get("relaxations") or ():
            resolve(name)
        if words[0] in ("train", "sweep"):
            assert {word for word in words if re.match(r"(digits|mnist|cifar10|svhn|fashion-mnist)-", word)} <= set(
                ROWS
            )


@pytest.mark.parametrize(("line", "whole"), COMMANDS)
def test_commands_parse(line, whole):
    check_command(line, whole)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 20


@pytest.mark.parametrize(
    "line",
    [
        "optrelax certify net",
        "optrelax train --epoch 3",
        "optrelax certfy",
        "optrelax measure tightnes net --data digits",
        "optrelax compare net --data digits --eps 0.1 --relaxations crwn",
        "optrelax train digits-fc-nosuch",
        "make nothing",
        "python -m benchmarks nosuch",
        "python examples/nosuch.py",
    ],
)
def test_parsing_notices_what_is_wrong(line):
    # The base of every complaint about a command line; typer gives it no public name.
    with pytest.raises((typer.BadParameter.__base__, ValueError, AssertionError)):
        check_command(line, whole=True)


# --- links and the site -------------------------------------------------------------------------------------------

LINKS = sorted({(page, target) for page in PAGES for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())})


@pytest.mark.parametrize(("page", "target"), LINKS, ids=lambda value: getattr(value, "name", value))
def test_links_lead_somewhere_in_the_checkout(page, target):
    assert target.startswith("https://") or (page.parent / target).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholder_is_left(page):
    assert not re.search(r"<!--|\bTODO\b|\bTBD\b|\?\?\?", page.read_text())


OFFLINE = """
import socket, sys
def refuse(*_):
    raise OSError("the documentation must build without a network")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--quiet", "--site-dir", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` builds it, with every connection refused."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-P", "-c", OFFLINE, str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr or done.stdout
    return folder


def test_the_site_has_every_page(site):
    for page in PAGES:
        name = "index" if page == README else page.stem
        assert (site / f"{name}.html").is_file()
    assert not (site / "tools").exists()


def test_the_site_loads_nothing_from_elsewhere(site):
    """Links may lead anywhere; scripts, styles, fonts and pictures are here."""
    html = list(site.rglob("*.html"))
    assert len(html) > 10
    for page in html:
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=\"?([^\s\">]+)", page.read_text())
        for tag in re.findall(r"<link\b[^>]*>", page.read_text()):
            if re.search(r"rel=\"?(stylesheet|preload|icon|preconnect)", tag):
                loaded += re.findall(r"href=\"?([^\s\">]+)", tag)
        assert [target for target in loaded if re.match(r"(https?:)?//", target)] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\"?https?:", style.read_text())


def test_search_and_formulas_need_no_network(site):
    """From disk: the index is a script, the worker that reads it is here; formulas are MathML."""
    home = (site / "index.html").read_text()
    assert (site / "search" / "search_index.js").read_text().startswith("var __index = {")
    assert re.search(r"<script src=\"?javascripts/iframe-worker\.js", home)
    assert len(re.findall("<math", (site / "mathematics.html").read_text())) > 50
    for page in site.rglob("*.html"):
        assert not re.search(r"\$<code>|language-math", page.read_text()), page


def test_the_page_of_networks_lists_every_op():
    page = (ROOT / "docs" / "networks.md").read_text()
    listed = page.partition("## All ops")[2].partition("```text")[2].partition("```")[0].split()
    supported = registry.supported().partition(" of the ops ")[2].partition(";")[0].split(", ")
    assert listed == [name for name in supported if not name.startswith("_")]


def test_every_public_name_is_in_the_reference(site):
    reference = "".join((site / f"{name}.html").read_text() for name in ("api", "api-layers"))
    anchors = set(re.findall(r"id=\"(optrelax[\w.]*)\"", reference))
    wanted = {f"optrelax.{name}" for name in ox.__all__} | {f"optrelax.layers.{name}" for name in layers.__all__}
    lazy = {f"optrelax.{name}": getattr(ox, name).__name__ for name in ox.__all__ if ismodule(getattr(ox, name))}
    assert {lazy.get(name, name) for name in wanted} - anchors == set()


def test_the_reference_keeps_shapes_as_they_are_written(site):
    text = re.sub(r"<[^>]+>", "", (site / "api.html").read_text())
    assert "spec: rows [*batch, k, outputs] or [k, outputs], such as margins(labels, classes)" in text
