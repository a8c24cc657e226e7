"""Ways to train one network, and what each can be certified for: does a tighter bound in the loss train better?

A method is the end of a recipe's name: a relaxation in the loss, one with smoothed weights (crown-rgs), box-shi, sabr,
mtl-ibp. `layerwise` continues from `triangle`: LP-LAST, and LP-ALL for the last tenth of the epochs. Each network is
certified by the relaxation of its loss and by the best of several; the truth lies between what a MILP solver proves, on
some of the images, and what no attack defeats. The same call again computes only what is missing.

    python examples/train_compare.py                                                     # the digits, a few minutes
    python examples/train_compare.py --data mnist --data-dir DIR --epochs 10 --seeds 0 1 2
    python examples/train_compare.py --methods crown crown-rgs --init "runs/train-compare/crown-seed={seed}" --out fine
"""

import argparse
import itertools
import json
import resource
import shlex
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import polars as pl

import optrelax as ox
from optrelax.cli.progress_bars import certification_bar, training_bar
from optrelax.kernels.pages import keep_pages
from optrelax.layers.milp import Milp
from optrelax.output.tables import text_table, write_results
from optrelax.training import train
from optrelax.training.recipes import Recipe, recipe
from optrelax.training.recording import versions
from optrelax.training.runs import start_from

METHODS = ["box", "hbox", "crown-ibp", "deepz", "crown", "triangle", "layerwise"]
CERTIFY = {"fc-small": ["box", "crown-ibp", "crown", "triangle", "layerwise"], "conv": ["box", "crown-ibp", "crown"]}


def chosen(args: argparse.Namespace, method: str) -> Recipe:
    """The recipe with the numbers of the command line; fine-tuning is at the full eps from its first step."""
    changes = {"warmup": 0.0, "mixing": 0.0} if args.init else {}
    changes |= {k: v for k in ("epochs", "subset", "eps") if (v := getattr(args, k)) is not None}
    changes |= {name: json.loads(value) for name, _, value in (item.partition("=") for item in args.settings)}
    end = {"layerwise": "triangle-to-layerwise"}.get(method, method)
    return recipe(f"{args.data}-{args.network}-{end}", **changes)


def measured(args: argparse.Namespace, method: str, seed: int) -> Iterator[tuple[str, object]]:
    """One row: a network trained, or taken up where it was, and certified."""
    row, folder = chosen(args, method), args.out / f"{method}-seed={seed}"
    images = ox.load_dataset(args.data, args.data_dir, split="train")
    images = images.subset(row.subset or len(images))
    net, facts = row.network(images, seed), {"recipe": asdict(row), "seed": seed}
    facts |= start_from(net, args.init.format(seed=seed)) if args.init else {}
    with training_bar(folder.name) as watch:
        how = {"folder": folder, "resume": True, "facts": facts, "watch": watch}
        history = train(net, images, row.training(seed), **how).history
    own = row.other if row.beta == 0 else row.relaxation or "box"
    names = list(dict.fromkeys([*(args.certify_relaxations or CERTIFY[args.network]), own]))
    test = ox.load_dataset(args.data, args.data_dir)

    def certified(subset: int | None, exact: Milp | bool, kind: str) -> ox.CertificationReport:
        journal = folder / f"{kind}-{subset}-{'+'.join(names)}.jsonl"
        with certification_bar(f"{folder.name}: {kind}") as progress:
            how = {"relaxation": names, "exact": exact, "subset": subset, "resume": journal, "progress": progress}
            return ox.certify(net, test, row.eps, **how)

    report = bracket = certified(size := args.certify_subset or len(test), False, "verdicts")
    if args.milp_seconds > 0:
        exact = Milp(time_limit=args.milp_seconds)
        bracket = certified(min(args.milp_subset, size), exact, f"milp-{args.milp_seconds:g}s")
    yield from {"training": method, "seed": seed, "accuracy %": 100 * report.accuracy}.items()
    yield "own %", 100 * report.certified_by[own]
    yield "best %", 100 * report.certified
    yield "MILP, at least %", 100 * (bracket.certified + bracket.certified_milp)
    yield "of images", len(bracket.examples)
    yield "attacks, at most %", 100 * (1 - report.attacked)
    yield "s an epoch", statistics.median(epoch.seconds for epoch in history)
    # The last tenth: at the full eps, and of LP-ALL.
    yield "s a late epoch", statistics.median(epoch.seconds for epoch in history[-max(1, row.epochs // 10) :])
    # Of the process, so the most of this row and those before it.
    yield "peak MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Row after row; what is there is stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist or fashion-mnist")
    parser.add_argument("--data-dir", type=Path, help="folder of the data files; digits needs none")
    parser.add_argument("--network", choices=CERTIFY, default="fc-small", help="784-100-100-10, or a convolution first")
    parser.add_argument("--methods", "--relaxations", nargs="+", metavar="NAME", help="default: seven relaxations")
    parser.add_argument("--epochs", type=int, help="default the recipe's, 30, 100 or 200; ramps keep their shares")
    parser.add_argument("--eps", type=float, help="radius; pixels lie in [0, 1]")
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE", help="of the recipe: lr=1e-4")
    parser.add_argument("--subset", type=int, help="evenly spaced training images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--init", metavar="RUN", help="fine-tune this network, without ramps; {seed} is the row's")
    parser.add_argument("--certify-subset", type=int, help="evenly spaced test images; default all")
    parser.add_argument("--certify-relaxations", nargs="+", metavar="NAME", help="beside the row's own")
    parser.add_argument("--milp-subset", type=int, default=100, help="evenly spaced ones for MILP too")
    parser.add_argument("--milp-seconds", type=float, default=2.0, help="most time an image; 0 for no MILP")
    parser.add_argument("--out", type=Path, default=Path("runs/train-compare"), help="folder of runs and tables")
    args = parser.parse_args()
    keep_pages()

    # CONV's rows are the paper's, where `crown-ibp` is the mix that ends at Box and CROWN-IBP (R) has its own name.
    methods = args.methods or [f"{m}-r" if (args.network, m) == ("conv", "crown-ibp") else m for m in METHODS]
    facts = {"command": shlex.join(["python", *sys.argv]), "seeds": args.seeds, "versions": versions()}
    rows: list[dict[str, object]] = []
    for method, seed in itertools.product(methods, args.seeds):
        rows.append(dict(measured(args, method, seed)))
        write_results(rows, args.out, per="training", facts=facts)
        print(f"{method}, seed {seed}: {rows[-1]['best %']:.2f} % certified", flush=True)
    print(text_table(pl.DataFrame(rows), decimals={name: 2 for name in rows[0] if "%" in name}))
    print(f"stored in {args.out}: table.md, table.csv, table.json")


if __name__ == "__main__":
    main()
