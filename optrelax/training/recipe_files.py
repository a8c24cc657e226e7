"""Recipes as TOML files: every field of `Recipe` by its name, checked, and printed back.

`data` may be the user's FILE.npz and `model` his module:function.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from optrelax.errors import suggest
from optrelax.frozen import field_values
from optrelax.training.recipes import Recipe

__all__ = ["read_recipe", "read_setting", "recipe_text"]

_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "tuple[float, ...]": (list,),
    "tuple[tuple[str, float], ...]": (list,),
}


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe of a TOML file; without `name` it is called as the file is.

    Raises FileNotFoundError, and ValueError for what is no TOML, no field, no fitting value, or missing.
    """
    file = Path(path)
    try:
        given = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{file}: no such file; `optrelax train RECIPE --show` prints one to begin with"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected TOML, such as eps = 0.1: {error}") from error
    known = {f.name: f for f in fields(Recipe)}
    for name in given:
        _require_known(file, name)
    given = {"name": file.stem, **given}
    missing = [name for name, f in known.items() if f.default is MISSING and name not in given]
    if missing:
        raise ValueError(f"{file}: lacks {', '.join(missing)}")
    return Recipe(**{name: _checked(file, name, str(known[name].type), value) for name, value in given.items()})


def read_setting(where: str, text: str) -> tuple[str, object]:
    """A field and its value from NAME=VALUE, the value as in such a file; a string needs no quotes.

    Raises ValueError, which begins with `where`, for another form, no field, and no fitting value.
    """
    name, equals, given = text.partition("=")
    if not (equals and name and given):
        raise ValueError(f"{where} must be NAME=VALUE, such as weight_decay=1e-4, got {text!r}")
    _require_known(where, name)
    try:
        value = tomllib.loads(f"value = {given}")["value"]
    except tomllib.TOMLDecodeError:
        value = given
    kinds = {f.name: str(f.type) for f in fields(Recipe)}
    return name, _checked(where, name, kinds[name], value)


def _require_known(where: str | Path, name: str) -> None:
    known = [f.name for f in fields(Recipe)]
    if name not in known:
        raise ValueError(f"{where}: no setting {name!r}; {suggest(name, known)}")


def _checked(file: str | Path, name: str, kind: str, value: Any) -> Any:
    wanted = _KINDS[kind.removesuffix(" | None")]
    fits = isinstance(value, wanted) and (not isinstance(value, bool) or bool in wanted)
    if not fits:
        raise ValueError(f"{file}: {name} must be {' or '.join(t.__name__ for t in wanted)}, got {value!r}")
    if name == "milestones":
        return tuple(float(_checked(file, "an entry of milestones", "float", epoch)) for epoch in value)
    if name == "stages":
        return tuple(_stage(file, stage) for stage in value)
    return float(value) if "float" in kind and wanted == _KINDS["float"] else value


def _stage(file: str | Path, stage: Any) -> tuple[str, float]:
    match stage:
        case [str(name), int() | float() as begin]:
            return name, float(begin)
    raise ValueError(f"{file}: an entry of stages must be [relaxation, epoch], got {stage!r}")


def recipe_text(recipe: Recipe) -> str:
    """The recipe as such a file: every field that is set.  `read_recipe` of it is the same recipe."""
    last = recipe.optimisation
    values = {name: value for name, value in field_values(recipe).items() if name not in last} | last
    # A JSON string, number, list or bool is one of TOML too.
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items() if value is not None)
