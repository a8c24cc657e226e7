"""What a linear program buys over a closed form: bounds, certified accuracy and time of each, next to the exact answer.

All relaxations bound the same margins of one network over the same boxes. Prints a table and draws tightness against
time. Without a CHECKPOINT a small network is trained first, against attacks (PGD), which favours no relaxation.

    python examples/compare_lp_closed_form.py --out tightness.png
    python examples/compare_lp_closed_form.py net.safetensors --data mnist --data-dir DIR --eps 0.1 --milp-seconds 0
"""

import argparse
import math
from pathlib import Path

import optrelax as ox
from optrelax.data.datasets import normalization
from optrelax.layers.milp import Milp
from optrelax.output.plots import write_figure
from optrelax.training import Training, train
from optrelax.training.losses import AdversarialLoss
from optrelax.training.schedules import ConstantSchedule, LinearRamp

# The LP of the triangles bounds each hidden neuron first. "triangle:preactivation=crown" takes crown's bounds of them,
# so that it cannot be looser than crown; layerwise solves LPs for them too.
RELAXATIONS = ["box", "crown-ibp", "fast-lin", "crown", "triangle:preactivation=crown", "alpha-crown", "layerwise"]


def trained(data: str, data_dir: Path | None, eps: float, epochs: int) -> ox.Network:
    """Three hidden layers of 30 neurons: small enough for a MILP solver."""
    images = ox.load_dataset(data, data_dir, split="train")
    images = images.subset(min(len(images), 5000))
    inputs = math.prod(images.input_shape)
    net = ox.models.fc(inputs, 30, 30, 30, images.classes, seed=0, normalize=normalization(data))
    growing = LinearRamp(0.0, eps, begin=epochs / 10, length=epochs / 2)
    training = Training(
        loss=AdversarialLoss(kappa=0.5), epochs=epochs, eps=growing, lr=ConstantSchedule(2e-3), batch=50
    )
    return train(net, images, training).network


def main() -> None:
    """Train or load, compare, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="what ox.save stored, or the folder of a training run")
    parser.add_argument("--data", default="digits", help="digits, mnist, fashion-mnist, cifar10 or svhn")
    parser.add_argument("--data-dir", type=Path, help="folder of the data files; digits needs none")
    parser.add_argument("--eps", type=float, default=0.05, help="radius; pixels lie in [0, 1]")
    parser.add_argument("--subset", type=int, default=20, help="evenly spaced test images")
    parser.add_argument("--epochs", type=int, default=10, help="of training, without a checkpoint")
    parser.add_argument("--relaxations", nargs="+", default=RELAXATIONS, metavar="NAME")
    parser.add_argument("--milp-seconds", type=float, default=10.0, help="most for the exact answer an image; 0: none")
    parser.add_argument("--out", type=Path, default=Path("tightness.png"), help="the plot, a PNG")
    args = parser.parse_args()

    test = ox.load_dataset(args.data, args.data_dir)
    if args.checkpoint is None:
        net = trained(args.data, args.data_dir, args.eps, args.epochs)
    else:
        net = ox.load(args.checkpoint)
    exact = Milp(time_limit=args.milp_seconds) if args.milp_seconds > 0 else False
    result = ox.compare(net, test, args.eps, args.relaxations, subset=args.subset, milp=exact)

    accuracy = 100 * result.settings["accuracy"]
    print(f"{args.data}: {args.subset} test images, accuracy {accuracy:.1f} %, eps {args.eps:g}")
    print(result)
    write_figure(result.figure(f"{args.data}, eps {args.eps:g}, {args.subset} images"), args.out, svg=False)
    print(f"tightness against time: {args.out}")


if __name__ == "__main__":
    main()
