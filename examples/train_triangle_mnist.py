"""All of MNIST by linear programs: a network of 100-100-10 trained through the triangle LP, certified on 10,000 images.

Each step solves one LP an image and wrong class (LP-LAST), stopped after a few iterations of dual ascent and started
from where the same image's LP stood an epoch before. An LP that misses its gap target falls back to a closed form,
which bounds the margin all the same; each line says how many did, and how far from the optimum the others are.
Six epochs take some 40 minutes of one core. Ctrl-C or worse: the same call again goes on where it stopped.

    python examples/train_triangle_mnist.py --data-dir DIR --epochs 6
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import optrelax as ox
from optrelax.kernels.pages import keep_pages
from optrelax.output.tables import text_table
from optrelax.training import TrainingProgress, train
from optrelax.training.recipes import Recipe, recipe


def watch(now: TrainingProgress) -> None:
    """A line every quarter of an epoch."""
    if 4 * now.step % now.steps >= 4:
        return
    line = f"epoch {now.epoch - 1 + now.step / now.steps:.2f}: eps {now.eps:.3f}, loss {now.loss:.3f}"
    line += f", accuracy {100 * now.natural_accuracy:.1f} %"
    if now.robust_accuracy is not None:
        line += f", certified by the LPs {100 * now.robust_accuracy:.1f} %"
    if now.unfinished is not None:
        line += f"; {100 * now.unfinished:.2f} % of the LPs fell back, median relative gap {now.median_gap:.0e}"
    print(line, flush=True)


def chosen(args: argparse.Namespace) -> Recipe:
    """The recipe with the numbers of the command line."""
    names = ("epochs", "eps", "subset", "iterations", "gap")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return recipe(f"{args.data}-fc-small-triangle", **changes)


def main() -> None:
    """Train, or go on; certify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="mnist, fashion-mnist or digits")
    parser.add_argument("--data-dir", type=Path, help="folder of the data files; digits needs none")
    parser.add_argument("--epochs", type=int, default=6, help="ramps keep their shares")
    parser.add_argument("--eps", type=float, help="radius; pixels lie in [0, 1]")
    parser.add_argument("--iterations", type=int, help="of an LP at a training step")
    parser.add_argument("--gap", type=float, help="target of an LP: certified relative gap")
    parser.add_argument("--subset", type=int, help="evenly spaced training images; default all")
    parser.add_argument("--certify-subset", type=int, help="evenly spaced test images; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/train-triangle-mnist"), help="folder of the run")
    args = parser.parse_args()
    keep_pages()

    row = chosen(args)
    images = ox.load_dataset(args.data, args.data_dir, split="train")
    images = images if row.subset is None else images.subset(row.subset)
    how = {"folder": args.out, "resume": True, "facts": {"recipe": asdict(row), "seed": args.seed}}
    result = train(row.network(images, args.seed), images, row.training(args.seed), watch=watch, **how)
    last, seconds = result.history[-1], sum(epoch.seconds for epoch in result.history)
    print(f"{len(images)} images, {row.epochs} epochs, {seconds:.0f} s; the last one {last.seconds:.0f} s")
    print(f"in it {100 * last.unfinished:.2f} % of the LPs fell back, median relative gap {last.median_gap:.0e}")

    test = ox.load_dataset(args.data, args.data_dir)
    journal = args.out / "certification.jsonl"
    how = {"relaxation": ["crown", "triangle"], "subset": args.certify_subset, "resume": journal}
    report = ox.certify(result.network, test, row.eps, **how)
    print(report)
    print(text_table(report.table(), decimals={"certified %": 2, "misclassified at most %": 2}))


if __name__ == "__main__":
    main()
