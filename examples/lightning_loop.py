"""Certified training in Lightning: the bounds are a module, the loop is Lightning's, and so is its logger.

The network is trained so that no change of at most eps in any pixel of a digit can change the answer, and certified.
Where Lightning is not installed, the same module is stepped by a loop of ten lines.

    python examples/lightning_loop.py --epochs 30
"""

import argparse
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import optrelax as ox
from optrelax.training.schedules import LinearRamp

EPS = 0.05  # pixels lie in [0, 1]


def lightning() -> ModuleType | None:
    """Lightning under either of its names, if it is there."""
    names = [name for name in ("lightning.pytorch", "pytorch_lightning") if _is_there(name)]
    return importlib.import_module(names[0]) if names else None


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


L = lightning()
Module: Any = nn.Module if L is None else L.LightningModule


class Certified(Module):
    """A network, and the bounds by which it is trained."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.bounded = ox.Bounded(net, "crown-ibp")
        self.eps = LinearRamp(0.0, EPS, begin=0.0, length=steps / 2)
        self.done = 0

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Loss of one batch: natural and certified cross-entropy."""
        x, labels = batch
        margins = self.bounded(x, self.eps(self.done), labels)
        self.done += 1
        natural = nn.functional.cross_entropy(self.bounded.net(x), labels)
        return (natural + ox.certified_cross_entropy(margins)) / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def fit(module: Any, loader: DataLoader, epochs: int) -> None:
    """Lightning's trainer, or what it comes down to."""
    if L is not None:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        L.Trainer(max_epochs=epochs, accelerator="cpu", enable_model_summary=False, **quiet).fit(module, loader)
        return
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for index, batch in enumerate(loader):
            optimizer.zero_grad()
            module.training_step(batch, index).backward()
            optimizer.step()


def main() -> None:
    """Train and certify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    loader = DataLoader(ox.load_dataset("digits", split="train"), batch_size=50, shuffle=True)
    net = ox.models.fc(64, 50, 50, 10, seed=0)
    print(f"trained by {'a plain loop' if L is None else L.__name__}")
    fit(Certified(net, epochs * len(loader)), loader, epochs)
    print(ox.certify(net.eval(), ox.load_dataset("digits"), eps=EPS, relaxation="crown"))


if __name__ == "__main__":
    main()
