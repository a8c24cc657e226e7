"""Docstrings of public names: every section that applies is there, and their examples print what is shown."""

import ast
import doctest
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax import layers
from optrelax.layers.network_solver import NetworkSolver

PUBLIC = {f"optrelax.{name}": getattr(ox, name) for name in ox.__all__ if name != "__version__"}
PUBLIC |= {f"optrelax.layers.{name}": getattr(layers, name) for name in layers.__all__}
IMPORTS = {"torch": torch, "nn": nn, "ox": ox} | {name: getattr(layers, name) for name in layers.__all__}
CALLABLE = {name: value for name, value in PUBLIC.items() if not inspect.ismodule(value)}
FUNCTIONS = {name: value for name, value in CALLABLE.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in CALLABLE.items() if inspect.isclass(value)}
RULES = [layers.Envelope, layers.FixedSlopes, layers.EnvelopeGradient, layers.FixedDualGradient, layers.KKT]
SECTIONS = re.compile(r"^(Args|Returns|Raises|Example):\n((?:    .*\n|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^    (\w[\w, ]*): ", re.MULTILINE)


def sections(value: Any) -> dict[str, str]:
    return dict(SECTIONS.findall((inspect.getdoc(value) or "") + "\n"))


def entries(value: Any, section: str) -> set[str]:
    return {name for names in ENTRY.findall(sections(value).get(section, "")) for name in names.split(", ")}


def says(value: Any, word: str) -> bool:
    line = re.compile(rf"(^|  |, ){word}(, \w+)*: ", re.MULTILINE | re.IGNORECASE)
    return line.search(inspect.getdoc(value) or "") is not None


@functools.cache
def tree(value: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


def fields_with_docstrings(value: type) -> Iterator[str]:
    body = tree(value).body
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            yield field.target.id


def raises(value: Any) -> bool:
    """Whether its own body raises: of a class, what makes an object."""
    made = ("__init__", "__post_init__")
    found = tree(value)
    parts = [part for part in found.body if getattr(part, "name", "") in made] if inspect.isclass(value) else [found]
    return any(isinstance(node, ast.Raise) for part in parts for node in ast.walk(part))


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_print_what_is_shown(name, registries_as_before, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(PUBLIC[name]), dict(IMPORTS), name, None, None)
    assert example.examples
    assert ">>> " in sections(PUBLIC[name])["Example"]
    shown = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=shown.append)
    assert not failed, "".join(shown)


@pytest.mark.parametrize("name", CALLABLE)
def test_every_argument_is_described_where_it_is_taken_or_in_a_public_base(name):
    value = CALLABLE[name]
    described = entries(value, "Args")
    if inspect.isclass(value):
        for base in value.__mro__[:-1]:
            if base is value or base in CLASSES.values():
                described |= entries(base, "Args") | set(fields_with_docstrings(base))
        if issubclass(value, Exception | nn.Module) and "__init__" not in vars(value):
            return
    taken = set() if inspect.isabstract(value) else set(inspect.signature(value).parameters)
    enum = {"value", "names", "module", "qualname", "type", "start", "boundary"}
    assert taken - described - (enum if value is layers.Status else set()) == set()
    assert entries(value, "Args") <= taken | set(fields_with_docstrings(value) if inspect.isclass(value) else ())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_result_is_described(name):
    returns = inspect.signature(FUNCTIONS[name]).return_annotation
    assert ("Returns" in sections(FUNCTIONS[name])) == (returns not in (None, "None"))


@pytest.mark.parametrize("name", [name for name, value in CALLABLE.items() if raises(value)])
def test_what_raises_says_what(name):
    assert entries(CALLABLE[name], "Raises")


@pytest.mark.parametrize("name", CLASSES)
def test_bounds_say_whether_they_hold_and_what_their_gradient_is(name):
    value = CLASSES[name]
    if issubclass(value, ox.Relaxation | NetworkSolver | layers.ProgramSolver | layers.LinearProgram | ox.Bounded):
        assert says(value, "Sound")
    if issubclass(value, ox.Relaxation | layers.LinearProgram | ox.Bounded) or value in RULES:
        assert says(value, "Gradient")
