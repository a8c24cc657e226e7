"""`optrelax verify`: does a network have the property of a VNN-LIB file?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optrelax.cli.application import command, print_json, say
from optrelax.cli.inputs import read_dtype
from optrelax.cli.option_sets import AttackOptions
from optrelax.cli.options import Checkpoint, Json, Precision, Relaxations, Seed, option

if TYPE_CHECKING:
    from optrelax.certification.property_verdicts import Counterexample, PropertyVerdict

__all__ = ["verify"]

_SHOWN = 10  # entries of a counterexample on the screen


@command(
    "verify",
    common=("relaxation", "timeout"),
    examples=(
        "optrelax verify net.onnx property.vnnlib",
        "optrelax verify net.onnx property.vnnlib.gz --relaxations box crown --json",
    ),
)
def verify(
    *,
    checkpoint: Checkpoint,
    prop: Annotated[
        Path,
        typer.Argument(
            metavar="PROPERTY", rich_help_panel="Network", show_default=False, help="VNN-LIB file, plain or .gz."
        ),
    ],
    relaxation: Relaxations = ["crown"],  # noqa: B006, typer reads the default and never changes it
    timeout: Annotated[
        float | None,
        option("--timeout", group="Bound", metavar="S", min=0.001, show_default="none", help="No step begins after."),
    ] = None,
    attack: AttackOptions,
    seed: Seed = 0,
    precision: Precision = "float64",
    json: Json = False,
) -> None:
    """Decide a property: holds, violated (with a counterexample that was replayed) or unknown.

    A VNN-LIB file states what must not happen. Bounds are rounded outward: what holds, holds in real arithmetic for
    every input of the file's box. Several relaxations are tried in order. Exit code 0 whatever the verdict.
    """
    import optrelax as ox
    from optrelax.certification.property_files import read_property
    from optrelax.certification.strong_attacks import attack_of
    from optrelax.certification.verifying import default_attack

    wanted = read_property(prop)
    own = attack.name == "pgd"
    search = default_attack(wanted.inputs, seed) if own else attack_of("verify", attack.name, seed) or False
    found = ox.verify(
        checkpoint, wanted, relaxation, attack=search, dtype=read_dtype(precision), timeout=timeout or None
    )
    if json:
        print_json({"network": str(checkpoint), "property": str(prop), **found.record()})
    else:
        _show(found)


def _show(found: PropertyVerdict) -> None:
    say(f"{found}  ({found.seconds:.2f} s, {found.cases} case(s), {found.open_cases} open)")
    if found.counterexample is not None:
        say(*(f"{name}: {values}" for name, values in _entries(found.counterexample)))


def _entries(point: Counterexample) -> list[tuple[str, str]]:
    """Inputs and outputs of a counterexample, the first few of many; --json gives all."""
    shown: list[tuple[str, Any]] = [
        ("inputs", point.x),
        ("outputs in float64", point.outputs),
        ("outputs replayed", point.replayed),
    ]
    found = []
    for name, values in shown:
        numbers = values.flatten().tolist()
        dots = f", ... ({len(numbers)} numbers, --json prints all)" if len(numbers) > _SHOWN else ""
        found.append((name, ", ".join(f"{n:.9g}" for n in numbers[:_SHOWN]) + dots))
    return found
