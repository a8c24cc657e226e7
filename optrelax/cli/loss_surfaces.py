"""`optrelax measure sensitivity` and `landscape`: what relaxations make of the loss around a network's weights."""

from __future__ import annotations

from typing import Annotated

from optrelax.cli.application import command
from optrelax.cli.measuring import Compared, Examples, measures
from optrelax.cli.option_sets import NetworkOptions, OutputOptions, RadiusOptions
from optrelax.cli.options import Seed, option

__all__ = ["landscape", "sensitivity"]


@command(
    "sensitivity",
    measures,
    common=("data_dir", "relaxations", "out"),
    examples=("optrelax measure sensitivity runs/demo/box --data digits --eps 0.02",),
)
def sensitivity(
    *,
    seed: Seed = 0,
    asked: NetworkOptions,
    radius: RadiusOptions,
    compared: Compared,
    steps: Annotated[
        list[float], option("--steps", group="Measure", metavar="SIZE", help="Shares of each weight's norm.")
    ] = [1e-4, 1e-3, 1e-2],  # noqa: B006, typer only reads it
    draws: Annotated[int, option("--draws", group="Measure", min=1, help="Of the random direction.")] = 8,
    ascent: Annotated[int, option("--ascent", group="Measure", min=1, help="Sub-steps of the adversarial step.")] = 5,
    examples: Examples = 16,
    results: OutputOptions,
) -> None:
    """Change of the certified loss and of its gradient under small steps of the weights, relative to their size.

    Random steps, adversarial ones (up the loss) and straight ones down the gradient; local Lipschitz constants are
    per norm of the weights. Small networks also get the degrees of the bound as a rational function of a step.
    """
    import optrelax as ox
    from optrelax.cli.progress_bars import measurement_bar

    eps = radius.value
    results.require_writable()
    inputs = asked.read()
    with measurement_bar("sensitivity") as progress:
        result = ox.measure_sensitivity(
            inputs.network,
            (inputs.x, inputs.labels),
            eps,
            compared.relaxations,
            steps=steps,
            draws=draws,
            ascent=ascent,
            examples=examples,
            seed=seed,
            progress=progress,
            **radius.settings,
        )
    facts = asked.facts | result.summary()
    title = f"{asked.title}, {examples} examples, {radius.norm} eps {eps:g}"
    pictures = results.write({"table": result.table}, facts, lambda: {"sensitivity": result.figure(title)})
    columns = ["relaxation", "kind", "step", "loss", "relative change", "bound change", "gradient change"]
    columns += ["predicted", "agreement", "loss Lipschitz", "gradient Lipschitz"]
    notes = [
        "changes: to the loss, of the mean smallest margin's bound in logits, and to the norm of the loss's gradient; "
        "Lipschitz constants per norm of the weights",
        "a small loss is nearly exp(-margin), so its relative change grows with margins: compare bounds, or losses of "
        "like size",
    ]
    known = [f"{name} {pair[0]}/{pair[1]}" for name, pair in result.settings["degrees"].items() if pair is not None]
    if known:
        notes.append(f"degrees along a line in weight space (numerator/denominator, at most): {', '.join(known)}")
    results.show(facts, result.table.select(columns), title, notes, pictures)


@command(
    "landscape",
    measures,
    common=("data_dir", "relaxations", "out"),
    examples=("optrelax measure landscape runs/demo/box --data digits --eps 0.02 --out OUT",),
)
def landscape(
    *,
    seed: Seed = 0,
    asked: NetworkOptions,
    ball: RadiusOptions,
    compared: Compared,
    dimensions: Annotated[
        int, option("--dimensions", group="Measure", min=1, max=2, help="1: a line; 2: a plane.")
    ] = 2,
    radius: Annotated[
        float, option("--radius", group="Measure", help="Largest step; 1: as large as the weights.")
    ] = 0.5,
    points: Annotated[int, option("--points", group="Measure", min=3, help="Along each direction, odd.")] = 21,
    examples: Examples = 16,
    results: OutputOptions,
) -> None:
    """The certified loss around a checkpoint, along random filter-normalised directions, on one scale.

    All relaxations see the same directions and examples. --out keeps the points and the picture (PNG and SVG).
    """
    import optrelax as ox
    from optrelax.cli.progress_bars import measurement_bar

    eps = ball.value
    results.require_writable()
    inputs = asked.read()
    with measurement_bar("landscape") as progress:
        result = ox.measure_landscape(
            inputs.network,
            (inputs.x, inputs.labels),
            eps,
            compared.relaxations,
            dimensions=dimensions,
            radius=radius,
            points=points,
            examples=examples,
            seed=seed,
            progress=progress,
            **ball.settings,
        )
    facts, table = asked.facts | result.summary(), result.table()
    title = f"{asked.title}, {examples} examples, {ball.norm} eps {eps:g}"
    frames = {"table": table, "points": result.points}
    pictures = results.write(frames, facts, lambda: {"landscape": result.figure(title)})
    notes = ["loss at the network itself, least and greatest of the slice; roughness: second to first differences"]
    results.show(facts, table, title, notes, pictures)
