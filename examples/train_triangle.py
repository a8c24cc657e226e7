"""Training through linear programs, and who can certify the result: the triangle relaxation as a layer, on real data.

Each step bounds the margins of a batch by one LP an image and wrong class, and descends on their cross-entropy. An LP
is stopped after a few iterations: its bound holds all the same, and the certified gap says how loose it may be.
The digits take half a minute of processor time, MNIST three minutes an epoch.

    python examples/train_triangle.py
    python examples/train_triangle.py --data mnist --data-dir DIR --epochs 10
"""

import argparse
import math
import time
from pathlib import Path

import torch

import optrelax as ox
from optrelax.data.datasets import normalization
from optrelax.data.splits import Dataset
from optrelax.layers import DualAscent, Status, Triangle
from optrelax.output.tables import text_table
from optrelax.training import Training, TrainingProgress, train
from optrelax.training.schedules import LinearRamp, StepDecay

# The last two start from the same bounds of the hidden neurons, so that the LP cannot be looser than crown.
CERTIFIERS = ["box", "crown-ibp", "deepz", "crown", "triangle:preactivation=crown"]


def training(eps: float, epochs: int, iterations: int) -> Training:
    """Ramps over half of the epochs: the radius from 0, the weight of the natural loss down to a half."""
    layer = Triangle(solver=DualAscent(max_iterations=iterations))
    return Training(
        loss=ox.CertifiedLoss(layer, kappa=0.5),
        epochs=epochs,
        eps=LinearRamp(0.0, eps, begin=0.05 * epochs, length=0.5 * epochs),
        kappa=LinearRamp(1.0, 0.5, begin=0.05 * epochs, length=0.5 * epochs),
        lr=StepDecay(2e-3, at=(0.8 * epochs,)),
        batch=50,
    )


def watch(now: TrainingProgress) -> None:
    """A line an epoch."""
    if now.step == now.steps:
        held = "-" if now.robust_accuracy is None else f"{100 * now.robust_accuracy:.1f} %"
        accuracy = 100 * now.natural_accuracy
        print(f"epoch {now.epoch:2d}: eps {now.eps:.3f}, accuracy {accuracy:.1f} %, certified by the LPs {held}")


def show_lps(net: ox.Network, test: Dataset, eps: float, iterations: int) -> None:
    """How far the LPs of the test images are from their optima after as many iterations as a training step makes."""
    region = ox.LinfBall(test.images, eps, clip=(0.0, 1.0))
    spec = ox.margins(test.labels, classes=test.classes)
    for count in (iterations, 200):
        with torch.no_grad():
            solution = Triangle(solver=DualAscent(max_iterations=count)).solve(net, region, spec)
        relative = solution.gap / solution.lower.abs().clamp_min(1)
        unfinished = int((solution.status != Status.OPTIMAL).sum())
        gaps = f"median relative gap {relative.median():.1e}, largest {relative.max():.1e}"
        print(f"{count:3d} iterations at most: {gaps}, {unfinished} of {relative.numel()} LPs unfinished")


def main() -> None:
    """Train, certify, look at the LPs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist, fashion-mnist, cifar10 or svhn")
    parser.add_argument("--data-dir", type=Path, help="folder of the data files; digits needs none")
    parser.add_argument("--eps", type=float, default=0.1, help="radius; pixels lie in [0, 1]")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=8, help="of an LP at a training step")
    parser.add_argument("--subset", type=int, default=360, help="evenly spaced test images")
    args = parser.parse_args()

    images = ox.load_dataset(args.data, args.data_dir, split="train")
    test = ox.load_dataset(args.data, args.data_dir).subset(args.subset)
    widths = (math.prod(images.input_shape), 50, 50, images.classes)
    module = ox.models.fc(*widths, seed=0, normalize=normalization(args.data))
    begin = time.process_time()
    net = train(module, images, training(args.eps, args.epochs, args.iterations), watch=watch).network
    print(f"training took {time.process_time() - begin:.0f} s of processor time")

    report = ox.certify(net, test, args.eps, relaxation=CERTIFIERS)
    print(report)
    print(f"under attack (PGD) {100 * report.pgd_accuracy:.2f} % are right; no certified % can exceed that:")
    print(text_table(report.table(), decimals={"certified %": 2, "misclassified at most %": 2}))
    show_lps(net, test, args.eps, args.iterations)


if __name__ == "__main__":
    main()
