"""Docstrings of public names: their examples run, and print what is shown."""

import doctest
import inspect

import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax import layers

PUBLIC = {f"optrelax.{name}": getattr(ox, name) for name in ox.__all__ if name != "__version__"}
PUBLIC |= {f"optrelax.layers.{name}": getattr(layers, name) for name in layers.__all__}
IMPORTS = {"torch": torch, "nn": nn, "ox": ox} | {name: getattr(layers, name) for name in layers.__all__}


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if ">>> " in (inspect.getdoc(value) or "")])
def test_examples_print_what_is_shown(name, registries_as_before, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(PUBLIC[name]) or ""
    example = doctest.DocTestParser().get_doctest(text, dict(IMPORTS), name, None, None)
    shown = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=shown.append)
    assert not failed, "".join(shown)
