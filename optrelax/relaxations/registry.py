"""The registry: relaxations by name, imported when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from optrelax.errors import suggest
from optrelax.frozen import field_values
from optrelax.relaxations.base import Relaxation
from optrelax.uncompiled import uncompiled

NamedRelaxations = Relaxation | str | Sequence[Relaxation | str] | Mapping[str, Relaxation | str]
"""One relaxation or several, each itself or its name; in a mapping by names of one's own."""

_HERE = "optrelax.relaxations:"
_LAYERS = "optrelax.layers:"
_NAMES: dict[str, tuple[str, dict[str, object]]] = {
    "box": (_HERE + "Box", {}),
    "hbox": (_HERE + "HBox", {}),
    "hbox-diag": (_HERE + "HBox", {"slope": "diag"}),
    "hbox-diag-c": (_HERE + "HBox", {"slope": "diag", "continuous": True}),
    "hbox-switch": (_HERE + "HBox", {"slope": "switch"}),
    "hzono": (_HERE + "HBox", {"slope": "chord"}),
    "deepz": (_HERE + "DeepZ", {}),
    "deepz-box": (_HERE + "DeepZ", {"slope": "box"}),
    "deepz-diag": (_HERE + "DeepZ", {"slope": "diag"}),
    "deepz-diag-c": (_HERE + "DeepZ", {"slope": "diag", "continuous": True}),
    "deepz-switch": (_HERE + "DeepZ", {"slope": "switch"}),
    "deepz-soft": (_HERE + "DeepZ", {"slope": "soft"}),
    "deepz-slanted": (_HERE + "DeepZ", {"slope": "slanted"}),
    "fast-lin": (_HERE + "FastLin", {}),
    "crown": (_HERE + "Crown", {}),
    "crown-0": (_HERE + "Crown", {"lower": 0}),
    "crown-1": (_HERE + "Crown", {"lower": 1}),
    "crown-0-c": (_HERE + "Crown", {"lower": 0, "continuous": True}),
    "crown-1-c": (_HERE + "Crown", {"lower": 1, "continuous": True}),
    "crown-0-tria": (_HERE + "Crown", {"lower": 0, "tria": True}),
    "crown-1-tria": (_HERE + "Crown", {"lower": 1, "tria": True}),
    "crown-0-tria-c": (_HERE + "Crown", {"lower": 0, "tria": True, "continuous": True}),
    "crown-1-tria-c": (_HERE + "Crown", {"lower": 1, "tria": True, "continuous": True}),
    "crown-soft": (_HERE + "Crown", {"lower": "soft"}),
    "crown-ibp": (_HERE + "CrownIBP", {}),
    "crown-ibp-soft": (_HERE + "CrownIBP", {"lower": "soft", "gamma": 10.0}),
    "box-widen": (_HERE + "Box", {"omega": 0.5}),
    "box-round": (_HERE + "Box", {"omega": 0.5, "F": 10.0}),
    "cauchy": (_HERE + "Cauchy", {}),
    # The one place where the core names the layers.
    "alpha-crown": (_LAYERS + "AlphaCrown", {}),
    "triangle": (_LAYERS + "Triangle", {}),
    "layerwise": (_LAYERS + "Layerwise", {}),
}
_FACTORIES: dict[str, Callable[..., Relaxation]] = {}


def names() -> tuple[str, ...]:
    """Every registered relaxation, in the order of the documentation."""
    return (*_NAMES, *_FACTORIES)


def register_relaxation(name: str, factory: Callable[..., Relaxation], replace: bool = False) -> None:
    """Make `name` (and `name:option=value`) stand for what `factory` returns.

    Args:
        name: without ":" and ",".
        factory: a class or function whose keyword arguments are the options.
        replace: take the place of an earlier registration of yours, as a notebook cell that is run again wants.

    Raises:
        ValueError: for a name in use; the library's own names stay what they are.

    Example:
        >>> ox.register_relaxation("loose-box", lambda omega=0.01: ox.Box(omega=omega), replace=True)
        >>> net, region = ox.models.fc(4, 2, seed=0), ox.LinfBall(torch.zeros(1, 4), eps=0.1)
        >>> ox.bounds(net, region, "loose-box:omega=0.5").lower.shape
        torch.Size([1, 2])
    """
    if name in _NAMES or (name in _FACTORIES and not replace):
        cure = "choose another name" if name in _NAMES else "pass replace=True to replace it"
        raise ValueError(f"register_relaxation: {name!r} is registered already; {cure}")
    if not name or any(sign in name for sign in ":,+"):
        raise ValueError(f"register_relaxation: a name has no ':', ',' or '+', got {name!r}")
    _FACTORIES[name] = factory


@uncompiled
def resolve(relaxation: Relaxation | str) -> Relaxation:
    """An object from a name such as "crown" or "box-round:omega=0.5,F=10"; objects pass through.

    Names joined by "+", options at the last alone, are the intersection: "box+crown" is `Intersect(Box(), Crown())`.
    Raises ValueError for an unknown name (with the nearest known one) or option.
    """
    match relaxation:
        case Relaxation():
            return relaxation
        case type(__name__=name):
            raise TypeError(f"relaxation: wants a relaxation object, got the class {name}; write {name}()")
        case str():
            name, _, text = relaxation.partition(":")
        case _:
            raise TypeError(f"relaxation: wants a name or a relaxation object, got {type(relaxation).__name__}")
    if "+" in name:
        # What stands behind a colon belongs to the last, a "+" of its own included.
        *parts, _ = name.split("+")
        together: Relaxation = _imported(_HERE + "Intersect")(*parts, relaxation.removeprefix("+".join(parts) + "+"))
        return together
    preset: dict[str, object] = {}
    if name in _FACTORIES:
        factory = _FACTORIES[name]
    elif name in _NAMES:
        target, preset = _NAMES[name]
        factory = _imported(target)
    else:
        if "," in name:
            raise ValueError(f"relaxation {relaxation!r}: several are a list of names; on a command line, with spaces")
        raise ValueError(f"unknown relaxation {name!r}; {suggest(name, names())}")
    options = dict(preset) | _options(relaxation, text)
    _require_known(relaxation, factory, options)
    try:
        made = factory(**options)
    except TypeError as error:
        raise ValueError(f"relaxation {relaxation!r}: {error}") from None
    if not isinstance(made, Relaxation):
        raise TypeError(f"relaxation {relaxation!r}: wants a relaxation object, got {type(made).__name__}")
    return made


def resolve_bound(owner: str, relaxation: Relaxation | str) -> Relaxation:
    """As `resolve`, for the pre-activation bounds of another; ValueError for an estimate."""
    found = resolve(relaxation)
    if not found.sound:
        raise ValueError(f"{owner}: preactivation={name_of(found)} is an estimate, not a bound")
    return found


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def named_relaxations(
    owner: str, given: NamedRelaxations, naming: Callable[[Relaxation], str] | None = None
) -> dict[str, Relaxation]:
    """One relaxation or several by the names that tables show, in a mapping by the user's own.

    naming: of objects; by default `name_of`.  ValueError for none, or one twice.
    """
    several = [given] if isinstance(given, str | Relaxation) else given
    pairs = several.items() if isinstance(several, Mapping) else [(one, one) for one in several]
    named: dict[str, Relaxation] = {}
    for one, relaxation in pairs:
        found = resolve(relaxation)
        name = one.strip() if isinstance(one, str) else (naming or name_of)(found)
        if name in named:
            raise ValueError(f"{owner}: relaxation {name!r} is given twice")
        named[name] = found
    if not named:
        raise ValueError(f"{owner}: give at least one relaxation")
    return named


def _require_known(whole: str, factory: object, options: dict[str, object]) -> None:
    """ValueError for an option that a relaxation's class lacks, with the nearest it has."""
    if not is_dataclass(factory):
        return
    known = [f.name for f in fields(factory) if f.init]
    for key in options:
        if key not in known:
            raise ValueError(f"relaxation {whole!r}: no option {key!r}; {suggest(key, known)}")


def _options(whole: str, text: str) -> dict[str, object]:
    options: dict[str, object] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"relaxation {whole!r}: options are written name=value, got {item!r}")
        options[key.strip()] = _value(value.strip())
    return options


def _value(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def name_of(relaxation: object) -> str:
    """The name (with options that differ from its defaults) that `resolve` turns back into this object."""
    if isinstance(relaxation, _imported(_HERE + "Intersect")):
        return _joined(relaxation)
    best: str | None = None
    for name in names():
        target = _NAMES.get(name, ("", {}))[0]
        if target.startswith(_LAYERS) and type(relaxation).__name__ != target.partition(":")[2]:
            continue
        try:
            other = resolve(name)
        except (ImportError, AttributeError):
            continue
        if other == relaxation:
            return name
        if type(other) is type(relaxation) and best is None:
            best = f"{name}:{_differences(relaxation, other)}"
    return best or type(relaxation).__name__


def _joined(relaxation: Relaxation) -> str:
    """The name of an intersection; its class alone where no name is it."""
    name = "+".join(map(name_of, relaxation.parts))
    try:
        return name if len(relaxation.parts) > 1 and resolve(name) == relaxation else type(relaxation).__name__
    except ValueError:
        return type(relaxation).__name__


def _shown(value: object) -> object:
    match value:
        case Mapping():  # bounds that the user gave: numbers of a batch, which no string tells
            return "given"
        case Relaxation():
            return name_of(value)
    return value


def _differences(relaxation: Relaxation, other: Relaxation) -> str:
    defaults = field_values(other)
    changed = [f"{name}={_shown(value)}" for name, value in field_values(relaxation).items() if value != defaults[name]]
    return ",".join(changed)
