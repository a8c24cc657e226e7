"""`optrelax certify`: certified, attacked, undecided or an error, for every example of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from optrelax.cli.application import command, fail, print_json, say, show_table, stderr
from optrelax.cli.inputs import legal_range
from optrelax.cli.option_sets import (
    AttackOptions,
    BoundOptions,
    MilpOptions,
    NetworkOptions,
    OutputOptions,
    RadiusOptions,
)
from optrelax.cli.options import Format, Relaxations, Seed, Subset, option

if TYPE_CHECKING:
    from optrelax.certification.attacks import Attack
    from optrelax.certification.verdicts import CertificationReport
    from optrelax.output.locks import Lock

__all__ = ["certify"]


Cascade = Annotated[
    bool, option("--cascade", group="Bound", help="A relaxation takes only what those before it left open.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactOptions(MilpOptions):
    """Whether HiGHS decides what bounds and the attack leave open."""

    milp: Annotated[bool, option("--exact", group="Bound", help="HiGHS (MILP) decides what is open; small nets.")] = (
        False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions(AttackOptions):
    """An attack, and how long PGD searches."""

    restarts: Annotated[
        int | None, option("--restarts", group="Attack", min=1, show_default="2", help="Starts of pgd.")
    ] = None
    steps: Annotated[
        int | None, option("--steps", group="Attack", min=0, show_default="20", help="Gradients a start of pgd.")
    ] = None

    def chosen(self, seed: int) -> Attack | None:
        """The attack.  ValueError for options of another one."""
        from optrelax.certification.attacks import PGD
        from optrelax.certification.strong_attacks import attack_of

        given = {"restarts": self.restarts, "steps": self.steps}
        options = {key: value for key, value in given.items() if value is not None}
        if self.name == "pgd":
            return PGD(seed=seed, **options)
        if options:
            raise ValueError(f"--{next(iter(options))} is an option of --attack pgd, got --attack {self.name}")
        return attack_of("certify", self.name, seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificationOutput(OutputOptions):
    """Results with a journal."""

    out: Annotated[
        Path | None, option("--out", group="Output", metavar="DIR", help="Keep examples, summary and journal.")
    ] = None
    table_format: Format = "parquet"
    resume: Annotated[bool, option("--resume", group="Output", help="Go on with the interrupted run in DIR.")] = False

    @property
    def journal(self) -> Path | None:
        """Journal of the run."""
        return None if self.out is None else self.out / "journal.jsonl"

    def opened(self) -> Lock | None:
        """Check everything about the output before the work starts; the lock is held until results are written."""
        from optrelax.certification.journals import is_finished
        from optrelax.output.json_lines import lock_of

        if self.journal is None:
            if self.resume:
                raise ValueError("--resume needs --out DIR, the folder of the interrupted run")
            return None
        self.require_writable()
        lock = lock_of(self.journal)
        if self.journal.exists() and not self.resume:
            if not is_finished(self.journal):
                raise ValueError(
                    f"{self.out} holds an unfinished run; add --resume to go on with it, or remove {self.journal}"
                )
            self.journal.unlink()
        return lock


@command(
    "certify",
    common=("data_dir", "relaxation", "subset", "out"),
    examples=(
        "optrelax certify runs/demo/box --data digits --eps 0.02",
        "optrelax certify net.onnx --data mnist --eps 8/255 --relaxations box crown",
    ),
)
def certify(
    *,
    asked: NetworkOptions,
    radius: RadiusOptions,
    relaxation: Relaxations = ["crown"],  # noqa: B006, typer reads the default and never changes it
    cascade: Cascade = False,
    subset: Subset = None,
    exact: ExactOptions,
    search: SearchOptions,
    bound: BoundOptions,
    results: CertificationOutput,
    seed: Seed = 0,
) -> None:
    """Certify a network on a data set, attack it, and count.

    Bounds are rounded outward: a certified example is robust in real arithmetic against every change of its pixels
    by at most eps. Prints a table a relaxation; --out keeps a table an example. Exit code 1 if an example failed.
    """
    eps, attack, lock = radius.value, search.chosen(seed), results.opened()
    inputs = asked.read()
    report = _certified(
        inputs.network,
        (inputs.x, inputs.labels),
        eps,
        results.journal,
        relaxation=relaxation,
        cascade=cascade,
        attack=attack,
        exact=exact.solver,
        subset=subset,
        **radius.settings,
        **bound.settings,
    )
    facts = {**asked.facts, **report.summary()}
    results.write({"examples": report.examples, "table": report.table()}, facts)
    if lock is not None:
        lock.close()
    _show(report, facts, inputs.x.shape[1:], results.json)
    failed = round(report.errors * report.examples.height)
    if failed:
        first = report.examples.filter(report.examples["verdict"] == "error").row(0, named=True)
        raise fail(f"{failed} example(s) failed; the first is example {first['index']}: {first['message']}")


def _certified(network: Any, data: object, eps: float, journal: Path | None, **options: Any) -> CertificationReport:
    """The work itself, under a bar; a word about resuming after Ctrl-C."""
    import optrelax as ox
    from optrelax.cli.progress_bars import certification_bar

    try:
        with certification_bar("certify") as progress:
            return ox.certify(network, data, eps, resume=journal, progress=progress, **options)
    except KeyboardInterrupt:
        again = "add --out DIR to be able to resume" if journal is None else "repeat the command with --resume"
        stderr().print(f"Interrupted; {again}.", markup=False, highlight=False)
        raise


def _show(report: CertificationReport, facts: Mapping[str, Any], shape: Sequence[int], json: bool) -> None:
    if json:
        print_json(facts)
        return
    ball = f"{facts['norm']} eps {facts['eps']:g}, {legal_range(shape, facts['clip'])}"
    title = f"{facts['checkpoint']} on {facts['data']}: {facts['examples']} examples, {ball}"
    decimals = {
        "certified %": 2,
        "misclassified at most %": 2,
        "mean bound": 4,
        "worst bound": 4,
        "ms an example": 2,
        "seconds": 1,
    }
    say(title)
    show_table(report.table(), decimals)
    say(str(report))
