"""`optrelax certify`: certified, attacked, undecided or an error, for every example of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from optrelax.cli.application import command, fail, print_json, stderr, stdout
from optrelax.cli.inputs import (
    AttackName,
    BatchSize,
    Checkpoint,
    Clip,
    Data,
    DataDir,
    Device,
    Eps,
    Format,
    Json,
    Model,
    NoAttack,
    NoClip,
    Norm,
    Precision,
    Relaxations,
    Seed,
    Split,
    Subset,
    TimeLimit,
    option,
    parse_number,
    read_dtype,
    read_inputs,
)

if TYPE_CHECKING:
    from optrelax.certification.attacks import Attack
    from optrelax.certification.verdicts import CertificationReport
    from optrelax.output.locks import Lock

__all__ = ["certify"]

_JOURNAL = "journal.jsonl"


@command(
    "certify",
    common=("data_dir", "relaxation", "subset", "out"),
    examples=(
        "optrelax certify runs/demo/box --data digits --eps 0.02",
        "optrelax certify net.onnx --data mnist --eps 8/255 --relaxations box crown",
    ),
)
def certify(
    checkpoint: Checkpoint,
    data: Data,
    eps: Eps,
    data_dir: DataDir = None,
    relaxation: Relaxations = ["crown"],  # noqa: B006, typer reads the default and never changes it
    subset: Subset = None,
    exact: Annotated[
        bool, option("--exact", group="Bound", help="HiGHS (MILP) decides what is open; small nets.")
    ] = False,
    time_limit: TimeLimit = 60.0,
    attack: AttackName = "pgd",
    no_attack: NoAttack = False,
    restarts: Annotated[
        int | None, option("--restarts", group="Attack", min=1, show_default="2", help="Starts of pgd.")
    ] = None,
    steps: Annotated[
        int | None, option("--steps", group="Attack", min=0, show_default="20", help="Gradients a start of pgd.")
    ] = None,
    norm: Norm = "linf",
    clip: Clip = (0.0, 1.0),
    no_clip: NoClip = False,
    split: Split = "test",
    model: Model = None,
    precision: Precision = "float64",
    batch_size: BatchSize = None,
    out: Annotated[
        Path | None, option("--out", group="Output", metavar="DIR", help="Keep examples, summary and journal.")
    ] = None,
    table_format: Format = "parquet",
    resume: Annotated[bool, option("--resume", group="Output", help="Go on with the interrupted run in DIR.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Certify a network on a data set, attack it, and count.

    Bounds are rounded outward: a certified example is robust in real arithmetic against every change of its pixels
    by at most eps. Prints a table a relaxation; --out keeps a table an example. Exit code 1 if an example failed.
    """
    radius = parse_number("--eps", eps)
    search = _attack("none" if no_attack else attack, seed, {"restarts": restarts, "steps": steps})
    folder = _Folder.opened(out, table_format, resume)
    inputs = read_inputs(checkpoint, data, data_dir, model=model, device=device, split=split)
    report = _certified(
        inputs.network,
        (inputs.x, inputs.labels),
        radius,
        folder,
        clip=None if no_clip else clip,
        norm=norm,
        relaxation=relaxation,
        attack=search,
        exact=_milp(time_limit) if exact else False,
        dtype=read_dtype(precision),
        subset=subset,
        batch_size=batch_size,
    )
    facts = {"checkpoint": str(checkpoint), "data": inputs.name, "split": split, **report.summary()}
    if folder is not None:
        folder.write(report, facts)
    _show(report, facts, json)
    failed = round(report.errors * report.examples.height)
    if failed:
        first = report.examples.filter(report.examples["verdict"] == "error").row(0, named=True)
        raise fail(f"{failed} example(s) failed; the first is example {first['index']}: {first['message']}")


def _certified(network: Any, data: Any, eps: float, folder: _Folder | None, **options: Any) -> CertificationReport:
    """The work itself, under a bar; a word about resuming after Ctrl-C."""
    import optrelax as ox
    from optrelax.cli.progress_bars import certification_bar

    journal = None if folder is None else folder.journal
    try:
        with certification_bar("certify") as progress:
            return ox.certify(network, data, eps, resume=journal, progress=progress, **options)
    except KeyboardInterrupt:
        again = "add --out DIR to be able to resume" if journal is None else "repeat the command with --resume"
        stderr().print(f"Interrupted; {again}.", markup=False, highlight=False)
        raise


@dataclass(frozen=True, slots=True)
class _Folder:
    """Where the results go."""

    path: Path
    ending: str
    lock: Lock
    """Held until the results are written."""

    @classmethod
    def opened(cls, path: Path | None, ending: str, resume: bool) -> _Folder | None:
        """Check everything about the output before the work starts."""
        from optrelax.certification.journals import is_finished
        from optrelax.output.json_lines import lock_of
        from optrelax.output.tables import require_writable

        if path is None:
            if resume:
                raise ValueError("--resume needs --out DIR, the folder of the interrupted run")
            return None
        require_writable(path)
        folder = cls(path, ending, lock_of(path / _JOURNAL))
        if folder.journal.exists() and not resume:
            if not is_finished(folder.journal):
                raise ValueError(
                    f"{path} holds an unfinished run; add --resume to go on with it, or remove {folder.journal}"
                )
            folder.journal.unlink()
        return folder

    @property
    def journal(self) -> Path:
        """Journal of the run."""
        return self.path / _JOURNAL

    def write(self, report: CertificationReport, facts: Mapping[str, Any]) -> None:
        """Examples, the table and the summary."""
        from optrelax.output.tables import write_frame, write_json
        from optrelax.training.runs import versions

        write_frame(report.examples, self.path / f"examples.{self.ending}")
        write_frame(report.table(), self.path / f"table.{self.ending}")
        write_json({**facts, "versions": versions()}, self.path / "summary.json")
        self.lock.close()


def _attack(name: str, seed: int, given: Mapping[str, int | None]) -> Attack | None:
    from optrelax.certification.attacks import PGD
    from optrelax.certification.strong_attacks import attack_of

    options = {key: value for key, value in given.items() if value is not None}
    if name == "pgd":
        return PGD(seed=seed, **options)
    if options:
        raise ValueError(f"--{next(iter(options))} is an option of --attack pgd, got --attack {name}")
    return attack_of("certify", name, seed)


def _milp(time_limit: float) -> Any:
    from optrelax.layers.milp import Milp

    return Milp(time_limit=time_limit)


def _show(report: CertificationReport, facts: Mapping[str, Any], json: bool) -> None:
    from optrelax.output.tables import rich_table

    if json:
        print_json(facts)
        return
    console = stdout()
    clip = facts["clip"]
    within = f"pixels in [{clip[0]:g}, {clip[1]:g}]" if clip else "pixels unlimited"
    ball = f"{facts['norm']} eps {facts['eps']:g}, {within}"
    title = f"{facts['checkpoint']} on {facts['data']}: {facts['examples']} examples, {ball}"
    decimals = {"certified %": 2, "misclassified at most %": 2, "mean bound": 4, "worst bound": 4, "ms an example": 2}
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(rich_table(report.table(), decimals=decimals))
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
