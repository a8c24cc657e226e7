"""Networks trained for the benchmarks, once: cached as weights, named by everything that decides them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from benchmarks.reports import Options
from optrelax.data.datasets import load_dataset
from optrelax.data.splits import Dataset
from optrelax.output.files import read_tensors, write_tensors
from optrelax.training import train
from optrelax.training.recipes import Recipe, recipe


@dataclass(frozen=True, slots=True)
class Trained:
    """How a network is trained: a recipe's numbers, shortened; weights and order of the images from `seed`.

    norm, eps: of the ball trained against, where it is not the recipe's.  images: evenly spaced ones; default all.
    """

    model: str
    method: str
    epochs: int
    seed: int = 0
    norm: str = "linf"
    eps: float | None = None
    images: int | None = None

    def recipe(self, data: str) -> Recipe:
        """The recipe on a data set."""
        short = recipe(f"{data}-fc-small-{self.method}", epochs=self.epochs, norm=self.norm)
        eps = short.eps if self.eps is None else self.eps
        name = f"{data}-{self.model}-{self.method}"
        return replace(short, model=self.model, name=name, eps=eps, subset=self.images)

    def network(self, options: Options) -> nn.Sequential:
        """The trained network in float32, from the cache where it is there."""
        wanted = self.recipe(options.data)
        where = "" if options.device == "cpu" else f"-{options.device.replace(':', '')}"
        path = Path(options.cache) / f"{wanted.name}{where}-{self._digest(wanted)}.safetensors"
        images = load_dataset(options.data, options.data_dir, split="train")
        images = images.subset(wanted.subset or len(images))
        net = wanted.network(images, self.seed)
        if path.exists():
            net.load_state_dict(read_tensors(path)[0])
        else:
            self._train(net.to(options.device), images, wanted, path)
        return net.cpu().eval()

    def _train(self, net: nn.Sequential, images: Dataset, wanted: Recipe, path: Path) -> None:
        train(net, images, wanted.training(self.seed))
        write_tensors(path, net.state_dict(), {"recipe": json.dumps(asdict(wanted)), "seed": str(self.seed)})

    def _digest(self, wanted: Recipe) -> str:
        settings = json.dumps([asdict(wanted), self.seed], sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:12]
