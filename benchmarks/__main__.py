"""Run the benchmarks: print their tables, and store them with the machine they were measured on.

python -m benchmarks                        all suites but gpu
python -m benchmarks gpu                    what a CUDA device can show, in eight minutes
python -m benchmarks closed_forms --quick   one suite, a trial run of a minute or two
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.measuring import ROOT, cores
from benchmarks.reports import Options
from optrelax import relaxations
from optrelax.kernels.pages import keep_pages

SUITES = (
    "closed_forms",
    "deep",
    "deep_layers",
    "gpu",
    "shortcuts",
    "growth",
    "memory",
    "alpha_crown",
    "lp_layers",
    "programs",
    "balls",
    "ball_steps",
    "smooth_lines",
    "smooth_steps",
    "training_steps",
    "relaxation_steps",
    "vnncomp",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run the suites in order."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default all but gpu")
    add("--quick", action="store_true", help="few examples, relaxations and runs, to see that all works")
    add("--runs", type=int, help="counted rounds; default 5, quick 1")
    add(
        "--threads", type=int, default=cores(), help="of torch, and LPs of other solvers at a time; default %(default)s"
    )
    add(
        "--processor-time",
        action="store_true",
        help="of deep, alpha_crown and smooth_steps, on one thread of a machine that is not idle",
    )
    add("--device", help="where the relaxations and layers run; default cpu, of gpu cuda where there is one")
    add("--minutes", type=float, default=8.0, help="of gpu, after which no part begins; default %(default)s")
    add("--data", default="mnist", choices=("mnist", "digits"), help="images of lp_layers; default %(default)s")
    add(
        "--relaxations",
        nargs="+",
        default=(),
        metavar="NAME",
        help="of closed_forms and memory; default all, some 20 minutes",
    )
    add("--networks", nargs="+", default=(), choices=("FC", "CONV"), help="of closed_forms, nothing else; default all")
    add("--auto-lirpa", metavar="PATH", help="checkout of auto_LiRPA (0.7.1 is on no registry); default as installed")
    add("--trained", metavar="RUN", help="of a CNN7 of width 16 on CIFAR-10, for deep, which is left out without one")
    add("--data-dir", help="folder of the data sets; default OPTRELAX_DATA")
    add("--cache", default=str(ROOT / "benchmarks" / "cache"), help="folder of trained weights; default %(default)s")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results; default %(default)s")
    given = parser.parse_args(arguments)
    for suite in given.suites:
        if suite not in SUITES:
            parser.error(f"unknown suite {suite!r}; there are {', '.join(SUITES)}")
    unknown = sorted(set(given.relaxations) - set(relaxations.names()))
    if unknown:
        parser.error(f"unknown relaxation {unknown[0]!r}; there are {', '.join(relaxations.names())}")
    if given.threads < 1 or (given.runs is not None and given.runs < 1):
        parser.error("--threads and --runs must be at least 1")
    if given.processor_time and given.threads > 1:
        parser.error("--processor-time wants --threads 1")
    options = Options(
        threads=given.threads,
        quick=given.quick,
        device=given.device or ("cuda" if "gpu" in given.suites and torch.cuda.is_available() else "cpu"),
        runs=given.runs or (1 if given.quick else 5),
        data=given.data,
        cache=given.cache,
        auto_lirpa=given.auto_lirpa,
        trained=given.trained,
        processor_time=given.processor_time,
        relaxations=tuple(given.relaxations),
        networks=tuple(given.networks),
        out=str(given.out),
        minutes=given.minutes,
        data_dir=given.data_dir or os.environ.get("OPTRELAX_DATA"),
    )
    torch.set_num_threads(options.threads)
    if options.auto_lirpa is not None:
        peers.use_checkout(options.auto_lirpa)
    keep_pages()
    for suite in given.suites or [name for name in SUITES if name != "gpu"]:
        report = importlib.import_module(f"benchmarks.{suite}").run(options)
        report.show()
        for path in report.write(given.out):
            print(path)


if __name__ == "__main__":
    main()
