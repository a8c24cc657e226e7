"""Seven ways to train one network, and what each can be certified for: does a tighter bound in the loss train better?

Network, images, ramps and epochs are the same; only the relaxation in the loss differs. `layerwise` continues from
`triangle`: LP-LAST, and LP-ALL for the last tenth of the epochs. Each network is certified by the relaxation it was
trained with and by the best of all; the truth lies between what a MILP solver proves and what no attack defeats.
Training and certification resume: the same call again computes only what is missing.

    python examples/train_compare.py                                                     # the digits, a few minutes
    python examples/train_compare.py --data mnist --data-dir DIR --epochs 10 --seeds 0 1 2 --certify-subset 1000
"""

import argparse
import itertools
import shlex
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import polars as pl

import optrelax as ox
from optrelax.cli.progress_bars import training_bar
from optrelax.layers.milp import Milp
from optrelax.pages import keep_pages
from optrelax.recipes import recipe
from optrelax.runs import versions
from optrelax.tables import text_table, write_frame, write_json
from optrelax.training import train

METHODS = {name: name for name in ("box", "hbox", "crown-ibp", "deepz", "crown", "triangle")}
METHODS["layerwise"] = "triangle-to-layerwise"  # by relaxation: the end of the recipe's name


def measured(args: argparse.Namespace, relaxation: str, seed: int) -> dict[str, object]:
    """One row: a network trained with a relaxation, or taken up where it was, and certified."""
    changes = {k: v for k in ("epochs", "subset", "eps") if (v := getattr(args, k)) is not None}
    row = recipe(f"{args.data}-fc-small-{METHODS[relaxation]}", **changes)
    images = ox.load_dataset(args.data, args.data_dir, split="train")
    images = images.subset(row.subset or len(images))
    folder = args.out / f"{relaxation}-seed={seed}"
    how = {"folder": folder, "resume": True, "facts": {"recipe": asdict(row), "seed": seed}}
    with training_bar(folder.name) as watch:
        result = train(row.network(images, seed), images, row.training(seed), watch=watch, **how)
    test = ox.load_dataset(args.data, args.data_dir).subset(args.certify_subset)
    how = {"exact": args.milp_seconds > 0 and Milp(time_limit=args.milp_seconds), "resume": folder / "verdicts.jsonl"}
    report = ox.certify(result.network, test, row.eps, relaxation=list(METHODS), **how)
    last = result.history[-max(1, row.epochs // 10) :]  # at the full eps, and of LP-ALL
    return {
        "training": relaxation,
        "seed": seed,
        "accuracy %": 100 * report.accuracy,
        "own %": 100 * report.certified_by[relaxation],
        "best %": 100 * report.certified,
        "MILP, at least %": 100 * (report.certified + report.certified_milp),
        "attacks, at most %": 100 * (1 - report.attacked),
        "s an epoch": statistics.median(epoch.seconds for epoch in last),
    }


def store(rows: list[dict[str, object]], args: argparse.Namespace) -> None:
    """The table so far as CSV, JSON and Markdown, with what it takes to make it again."""
    frame = pl.DataFrame(rows)
    means = frame.group_by("training", maintain_order=True).mean().drop("seed")
    command = shlex.join(["python", *sys.argv])
    write_frame(frame, args.out / "table.csv")
    write_json({"command": command, "seeds": args.seeds, "versions": versions(), "rows": rows}, args.out / "table.json")
    plain = {"tbl_formatting": "MARKDOWN", "tbl_hide_dataframe_shape": True, "tbl_hide_column_data_types": True}
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=1000, float_precision=2, **plain):
        parts = [str(frame), f"Means over seeds {args.seeds}:", str(means), f"`{command}`", str(versions())]
    (args.out / "table.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    """Row after row; what is there is stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist or fashion-mnist")
    parser.add_argument("--data-dir", type=Path, help="folder of the data files; digits needs none")
    parser.add_argument("--relaxations", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--epochs", type=int, help="default the recipe's, 30 or 100; ramps keep their shares")
    parser.add_argument("--eps", type=float, help="radius; pixels lie in [0, 1]")
    parser.add_argument("--subset", type=int, help="evenly spaced training images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--certify-subset", type=int, default=100, help="evenly spaced test images")
    parser.add_argument("--milp-seconds", type=float, default=2.0, help="most time an image; 0 for no MILP")
    parser.add_argument("--out", type=Path, default=Path("runs/train-compare"), help="folder of runs and tables")
    args = parser.parse_args()
    keep_pages()

    rows: list[dict[str, object]] = []
    for relaxation, seed in itertools.product(args.relaxations, args.seeds):
        rows.append(measured(args, relaxation, seed))
        store(rows, args)
        print(f"{relaxation}, seed {seed}: {rows[-1]['best %']:.2f} % certified", flush=True)
    print(text_table(pl.DataFrame(rows), decimals={name: 2 for name in rows[0] if "%" in name}))
    print(f"stored in {args.out}: table.md, table.csv, table.json")


if __name__ == "__main__":
    main()
