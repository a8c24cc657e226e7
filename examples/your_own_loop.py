"""Certified training in a loop of your own: your module, your optimiser, one loss from the library.

The network is a plain `nn.Module` with a branch; it is trained so that no change of at most eps in any pixel of a
digit can change the answer, certified by CROWN, and stored in a file that needs neither this class nor a pickle.

    python examples/your_own_loop.py --epochs 30
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import optrelax as ox
from optrelax.kernels.pages import keep_pages
from optrelax.training.schedules import LinearRamp

EPS = 0.1  # pixels lie in [0, 1]


class Net(nn.Module):
    """A convolution and a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.branch = nn.Linear(128, 128)
        self.last = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 1, 8, 8] -> [batch, 10]."""
        x = torch.relu(self.conv((x - 0.3052) / 0.3763)).flatten(1)
        return self.last(x + torch.relu(self.branch(x)))


def train(net: nn.Module, epochs: int) -> None:
    """Each step bounds the margins of a batch over its boxes and descends on their cross-entropy."""
    digits = ox.load_dataset("digits", split="train")
    network = ox.capture(net, digits.input_shape)  # says at once what cannot be bounded
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    eps = LinearRamp(0.0, EPS, begin=1.0, length=epochs / 2)  # from 0, after one epoch of natural training
    kappa = LinearRamp(1.0, 0.5, begin=1.0, length=epochs / 2)  # weight of the natural loss
    for epoch in range(epochs):
        batches = torch.randperm(len(digits), generator=order).split(50)
        for step, index in enumerate(batches):
            x, labels = digits[index]
            now = epoch + step / len(batches)
            region = ox.LinfBall(x, eps(now), clip=(0.0, 1.0))
            terms = ox.CertifiedLoss("crown-ibp", kappa=kappa(now))(network, region, labels)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
        print(f"epoch {epoch + 1:2d}: last batch's loss {terms.total.item():.3f} at eps {eps(now):.3f}")


def main() -> None:
    """Train, certify, store, load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    epochs = parser.parse_args().epochs

    keep_pages()  # faster steps; a setting of the whole program
    torch.manual_seed(0)
    net = Net()
    print(f"can be bounded: {ox.check(net, input_shape=(1, 8, 8))}")
    train(net, epochs)

    test = ox.load_dataset("digits", split="test")
    print(ox.certify(net, test, eps=EPS, relaxation="crown"))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        ox.save(net, path, input_shape=(1, 8, 8), extra={"eps": EPS})
        difference = (ox.load(path)(test.images) - net(test.images)).abs().max()
        print(f"stored and loaded: logits differ by at most {difference.item():.0e}")


if __name__ == "__main__":
    main()
