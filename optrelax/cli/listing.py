"""`optrelax relaxations`: every name that --relaxation takes, and a picture of what each does with a neuron."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optrelax.cli.application import command, print_json, say, show_table
from optrelax.cli.options import Json, option

if TYPE_CHECKING:
    import polars as pl

__all__ = ["relaxations"]

# Where a bound may jump in the weights (arXiv 2102.06700, section 4), and what each does with a crossing neuron, whose
# pre-activation lies in [l, u]; s = u / (u - l) is the slope of the chord.
_NOTES: dict[str, tuple[str, str]] = {
    "box": ("", "intervals"),
    "hbox": ("l = 0", "input noise shared, new errors as intervals; slope 0"),
    "hbox-diag": ("u = 0", "as hbox, slope 1"),
    "hbox-diag-c": ("", "as hbox-diag, dead neurons relaxed too"),
    "hbox-switch": ("|l| = |u|", "as hbox, slope 1 where -l <= u, else 0"),
    "hzono": ("", "as hbox, slope s"),
    "deepz": ("", "zonotope, slope s (smallest area)"),
    "deepz-box": ("l = 0", "zonotope, slope 0"),
    "deepz-diag": ("u = 0", "zonotope, slope 1"),
    "deepz-diag-c": ("", "as deepz-diag, dead neurons relaxed too"),
    "deepz-switch": ("|l| = |u|", "zonotope, slope 1 where -l <= u, else 0"),
    "deepz-soft": ("", "zonotope, slope sigmoid(gamma (l/u - u/l))"),
    "deepz-slanted": ("l = 0", "zonotope, slope kappa s"),
    "fast-lin": ("", "back-substitution, slope s below and above"),
    "crown": ("|l| = |u|", "back-substitution, below slope 1 where -l <= u, else 0; chord above"),
    "crown-0": ("l = 0", "as crown, slope 0 below"),
    "crown-1": ("u = 0", "as crown, slope 1 below"),
    "crown-0-c": ("", "as crown-0, active neurons relaxed too"),
    "crown-1-c": ("", "as crown-1, dead neurons relaxed too"),
    "crown-0-tria": ("l = 0, u = 0", "slope 0 below, slope 1 above"),
    "crown-1-tria": ("l = 0, u = 0", "slope 1 below, slope 0 above"),
    "crown-0-tria-c": ("", "as crown-0-tria, stable neurons relaxed too"),
    "crown-1-tria-c": ("", "as crown-1-tria, stable neurons relaxed too"),
    "crown-soft": ("", "as crown, slope sigmoid(gamma (l/u - u/l)) below"),
    "crown-ibp": ("|l| = |u|", "crown on pre-activation bounds from box"),
    "crown-ibp-soft": ("", "crown-soft on pre-activation bounds from box"),
    "box-widen": ("", "box, every pre-activation widened by omega"),
    "box-round": ("everywhere", "box, pre-activations rounded outward, F jumps a unit"),
    "cauchy": ("", "deepz with radii estimated from k random projections"),
    "alpha-crown": ("?", "crown, slopes below of all layers optimised"),
    "triangle": ("", "LP of the triangles, one a margin (LP-LAST)"),
    "layerwise": ("", "LP of the triangles, one a neuron and direction (LP-ALL)"),
}


@command(
    "relaxations",
    common=("name", "plot"),
    examples=("optrelax relaxations crown-soft", "optrelax relaxations --plot relaxations.png"),
)
def relaxations(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", rich_help_panel="Bound", help="One of them, with its options.")
    ] = None,
    plot: Annotated[
        Path | None, option("--plot", group="Output", metavar="OUT.png", help="Draw them for one ReLU, PNG and SVG.")
    ] = None,
    lower: Annotated[
        float | None, option("--lower", group="Output", show_default="-1", help="Least pre-activation drawn.")
    ] = None,
    upper: Annotated[
        float | None, option("--upper", group="Output", show_default="2", help="Greatest pre-activation drawn.")
    ] = None,
    relaxations: Annotated[
        list[str] | None,
        option("--relaxations", group="Output", metavar="NAME", show_default="all made of lines", help="Those drawn."),
    ] = None,
    json: Json = False,
) -> None:
    """List every relaxation: whether its bounds hold, and whether they are continuous in the weights.

    --plot draws what each allows of one neuron, from the lines that bounds are computed with.
    """
    if name is not None:
        _show_options(name, json)
        return
    if plot is not None:
        pictures = _draw(plot, -1.0 if lower is None else lower, 2.0 if upper is None else upper, relaxations)
        if json:
            print_json({"pictures": pictures})
        else:
            say(f"relaxations of one neuron: {pictures[0]}")
        return
    if not (lower is None and upper is None and not relaxations):
        raise ValueError("--lower, --upper and --relaxations belong to --plot OUT.png, which is missing")
    frame = relaxation_frame()
    if json:
        print_json(frame.to_dicts())
        return
    show_table(frame)
    say(
        "Joined by +, as in box+crown: the best of several, bounding by what pulls rows back only the neurons that the "
        "others leave crossing."
    )


def _show_options(name: str, json: bool) -> None:
    """One relaxation: what it is, and its options with their defaults."""
    from optrelax.relaxations import resolve

    found = resolve(name)
    together = "+" in name.partition(":")[0]  # whose parts have the options
    options = {} if together else {f.name: _shown(getattr(found, f.name)) for f in fields(found) if f.init}
    about = (inspect.getdoc(type(found)) or "").partition("\nExample:")[0].strip()
    if json:
        print_json(
            {"name": name, "sound": found.sound, "options": {k: str(v) for k, v in options.items()}, "about": about}
        )
        return
    width = max(map(len, options), default=0)
    lines = [about, "", f"Options, as in {name}:NAME=VALUE,NAME=VALUE, and their defaults:"][: 1 if together else None]
    lines += [f"  {key:<{width}}  {value}" for key, value in options.items()]
    say("\n".join(lines))


def _shown(value: object) -> object:
    """A default as one would write it: relaxations by name, solvers and gradient rules by class."""
    from optrelax.relaxations import Relaxation, name_of

    if isinstance(value, Relaxation):
        return name_of(value)
    return f"{type(value).__name__}()" if is_dataclass(value) else value


def _draw(path: Path, lower: float, upper: float, relaxations: list[str] | None) -> list[str]:
    """The picture's files."""
    from optrelax.output.plots import write_figure
    from optrelax.output.relaxation_figures import relaxation_panels

    return [str(file) for file in write_figure(relaxation_panels(lower, upper, relaxations or None), path)]


def relaxation_frame() -> pl.DataFrame:
    """One row a name: relaxation, sound, continuous, jumps at, what it is."""
    import polars as pl

    from optrelax.relaxations import names, resolve

    rows: list[dict[str, object]] = []
    for name in names():
        try:
            found = resolve(name)
        except (ImportError, AttributeError):
            continue
        jumps, note = _NOTES.get(name, ("?", (type(found).__doc__ or "").strip().partition("\n")[0]))
        rows.append(
            {
                "relaxation": name,
                "sound": "yes" if found.sound else "no",
                "continuous": {"": "yes", "?": None}.get(jumps, "no"),
                "jumps at": jumps.strip("?") or None,
                "what it is": note,
            }
        )
    kinds = dict.fromkeys(("relaxation", "sound", "continuous", "jumps at", "what it is"), pl.String)
    return pl.DataFrame(rows, schema=kinds)
