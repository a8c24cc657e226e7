"""`optrelax demo`: the main job in one go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from optrelax.cli.application import command, print_json, say, show_table
from optrelax.cli.comparing import show_comparison
from optrelax.cli.inputs import parse_number
from optrelax.cli.options import DataDir, Json, Seed, Subset, option
from optrelax.cli.progress_bars import certification_bar, comparison_bar, training_bar

if TYPE_CHECKING:
    from optrelax.papers.demo import DemoResult

__all__ = ["demo"]


@command("demo", common=("data", "data_dir", "out"), examples=("optrelax demo --data mnist --data-dir DATA",))
def demo(
    data: Annotated[
        Literal["digits", "mnist"], option("--data", group="Data", metavar="NAME", help="digits or mnist.")
    ] = "digits",
    data_dir: DataDir = None,
    out: Annotated[Path, option("--out", group="Output", metavar="DIR", help="Networks, tables and pictures.")] = Path(
        "runs/demo"
    ),
    epochs: Annotated[
        int | None, option("--epochs", group="Recipe", min=1, show_default="recipes", help="Of each training.")
    ] = None,
    eps: Annotated[
        str | None,
        option("--eps", group="Region", metavar="X", show_default="recipes", help="Radius to train for: 8/255."),
    ] = None,
    subset: Subset = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train one network in four ways, certify each by every relaxation, and compare LPs with closed forms on the last.

    Ways: natural, box, crown-ibp, and the triangle LP as a layer. Draws certified accuracy against eps for each, and
    tightness against time. --subset is of the test images. Networks that an earlier run finished in DIR are not
    trained again.
    """
    from optrelax.papers.demo import RELAXATIONS, SLOW, Demo, available, run

    settings = Demo(
        data=data,
        data_dir=data_dir,
        relaxations=available(RELAXATIONS),
        slow=available(SLOW),
        epochs=epochs,
        eps=None if eps is None else parse_number("--eps", eps),
        subset=subset,
        seed=seed,
    )
    result = run(
        settings,
        out,
        training_bar=training_bar,
        certification_bar=certification_bar,
        comparison_bar=comparison_bar,
    )
    if json:
        tables = {"table": result.table.to_dicts(), "comparison": result.comparison.table.to_dicts()}
        print_json({**tables, "pictures": [str(path) for path in result.pictures]})
        return
    _show(result)


def _show(result: DemoResult) -> None:
    what = f"Percent of {result.examples} test images, eps {result.eps:g}: "
    what += "accuracy, accuracy under attack (PGD), certified by"
    say(what)
    seconds = {name: 0 for name in result.table.columns if name.endswith(" s")}
    short = {name: name.removesuffix(" %") for name in result.table.columns if name.endswith(" %")}
    decimals = seconds | dict.fromkeys(short.values(), 1)
    show_table(result.table.rename(short), decimals)
    show_comparison(result.comparison, f"The network trained with {result.table['training'][-1]}, by each relaxation:")
    for path in result.pictures:
        what = "tightness against time" if path.stem == "tightness" else "certified accuracy against eps"
        say(f"{what}: {path}")
    say(f"{result.seconds:.0f} s in all")
