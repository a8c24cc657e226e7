"""Certification: every example of a data set is certified, attacked, undecided or an error."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from optrelax.analysis import Net
from optrelax.certification.attacks import PGD, Attack
from optrelax.certification.certifiers import Certifier
from optrelax.certification.journals import Journal
from optrelax.certification.preparation import asked_samples, batch_size_of, milp_of
from optrelax.certification.strong_attacks import attack_of
from optrelax.certification.verdict_rules import confirm
from optrelax.certification.verdicts import CertificationReport, Example, Verdict
from optrelax.joined_specifications import Spec
from optrelax.regions import Number, Region
from optrelax.relaxations import NamedRelaxations
from optrelax.rounding import Rounding

if TYPE_CHECKING:
    from optrelax.layers.milp import Milp

__all__ = ["CertificationProgress", "CertificationReport", "Verdict", "certify"]

_PGD = PGD()


@dataclass(frozen=True, slots=True)
class CertificationProgress:
    """How far a run has come."""

    done: int
    total: int
    counts: Mapping[Verdict, int]
    """Examples of each verdict so far."""
    expected: float | None = None
    """In the first call, of more than 8 examples: seconds they take, by some timed before, all asked all but MILP."""


def certify(
    net: Net,
    data: object,
    eps: Number | None = None,
    clip: tuple[Number, Number] | None = (0.0, 1.0),
    relaxation: NamedRelaxations = "crown",
    *,
    region: Region | None = None,
    spec: Spec | None = None,
    attack: Attack | str | None = _PGD,
    exact: Milp | bool = False,
    cascade: bool = False,
    rounding: Rounding = "outward",
    dtype: torch.dtype = torch.float64,
    norm: str = "linf",
    subset: int | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[CertificationProgress], None] | None = None,
) -> CertificationReport:
    """Certify every example of `data` against all inputs within eps of it in a norm, or of a region.

    Args:
        net: a module of supported ops in eval mode, or a captured network; it is not changed. Bounds are computed in
            `dtype` on its device, over the region rounded outward.
        data: a pair (x [n, *input_shape], labels [n]), a Dataset of such, or a DataLoader.
        eps: in the units of x.
        clip: legal range of an input entry, in the units of x, or None.
        relaxation: one or several, as a mapping under names of your own; unsound ones are refused.
        region: one of every input, in place of eps, clip and norm.
        spec: what is asked of the outputs in place of the labels' margins: rows, a `Specification` or several by name,
            of every input or shared; data may then be inputs alone. Its groups' greatest values are the margins.
        attack: an attack, "pgd", "strong" (`StrongAttack`: hundreds of times the work), or None or "none": only inputs
            that are misclassified then count as attacked.
        exact: True or a `Milp`: a MILP solver takes the examples left undecided; what it proves is reported apart.
        cascade: try the relaxations in the order given, each on those examples alone that are classified rightly and
            that the ones before it left open; the attack, after the first, likewise.
        rounding: "outward", or "nearest", which leaves floating-point error out.
        dtype: in which bounds are computed.
        norm: "linf", "l2" or "l1".
        subset: that many evenly spaced examples.
        batch_size: default by the size of the network, at most 100 on a CPU.
        max_bytes: memory for the coefficients of a relaxation that sets none itself; default 32 MiB on a CPU (what its
            caches like: three times as fast as without a limit), 1 GiB elsewhere.
        resume: a journal (JSON lines): made if it is not there, else continued. Ctrl-C leaves it whole.
        progress: called before the first batch, with the seconds to expect, and after every batch.

    Returns:
        Fractions, and a table with a row an example.

    Raises:
        ValueError: for bad input, an unsound relaxation, or a journal that is in use by another process, damaged, of
            another configuration, or with a verdict that its own bounds contradict.
        UnsupportedOpError: for a network that cannot be bounded.

    Sound: yes. Certified means that every margin's lower bound by one of the relaxations is > 0 (0 is not), attacked
    that a point of the region, the input among them, was replayed in float64 and has a margin <= 0. An example with
    a NaN bound or an exception is an error and never certified; the others of its batch are not touched by it.

    Example:
        >>> net, x = ox.models.fc(4, 8, 3, seed=0), torch.full((3, 4), 0.5)
        >>> report = ox.certify(net, (x, torch.tensor([0, 1, 2])), eps=0.001, relaxation=["box", "crown"])
        >>> report.examples["verdict"].to_list()
        ['certified', 'attacked', 'attacked']
    """
    samples, region, asked = asked_samples(data, subset, region, spec)
    run = Certifier.prepared(
        net, samples, eps, clip, relaxation, rounding, dtype, max_bytes, norm=norm, region=region, spec=asked
    )
    run = replace(run, attack=attack_of("certify", attack), exact=milp_of(exact), cascade=cascade)
    if run.exact is not None and asked is not None and not (asked.single and bool((asked.offsets == 0).all())):
        raise ValueError("certify: exact=True settles plain rows, not offsets or 'any of'; leave it out")
    size = batch_size_of("certify", run.network, batch_size)
    with contextlib.ExitStack() as stack:
        journal = None
        if resume is not None:
            journal = stack.enter_context(Journal(resume, run.fingerprint(), len(run.samples)))
        stack.enter_context(torch.no_grad())
        examples = _collect(run, size, journal, progress)
    return CertificationReport.of(examples, run.settings())


def _collect(
    run: Certifier, size: int, journal: Journal | None, progress: Callable[[CertificationProgress], None] | None
) -> list[Example]:
    """Everything in order, what the journal holds first."""
    index = run.samples.index.tolist()
    found = {} if journal is None else _resumed(run, journal)
    counts = dict.fromkeys(Verdict, 0)
    for example in found.values():
        counts[example.verdict] += 1

    def tell(expected: float | None = None) -> None:
        if progress is not None:
            progress(CertificationProgress(len(found), len(index), dict(counts), expected))

    left = torch.tensor([place for place, i in enumerate(index) if i not in found], dtype=torch.int64, device="cpu")
    tell(None if progress is None else run.expected_seconds(left, size))
    for chunk in torch.arange(len(index), device="cpu").split(size) if index else ():
        # Whole batches, as the first run took them: the last bits depend on what is computed together.
        if all(index[position] in found for position in chunk.tolist()):
            continue
        for example in run.isolated(chunk, frozenset(found)):
            found[example.index] = example
            counts[example.verdict] += 1
            if journal is not None:
                journal.append([example])
        tell()
    return list(found.values())


def _resumed(run: Certifier, journal: Journal) -> dict[int, Example]:
    """What the journal holds, in the order of the data, each borne out by its own numbers; else ValueError."""
    for example in journal.done.values():
        try:
            confirm(run, example)
        except ValueError as error:
            raise ValueError(f"resume: {journal.path}: {error}") from error
    return {i: journal.done[i] for i in run.samples.index.tolist() if i in journal.done}
