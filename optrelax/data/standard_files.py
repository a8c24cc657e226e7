"""Where the files of the standard data sets come from, how they are read, and what is said where one is missing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from optrelax.data.data_files import Arrays, DataFolder, read_idx
from optrelax.data.fetching import Source
from optrelax.data.splits import Split

__all__ = ["advice_on", "cifar10_of_torchvision", "idx_sources", "read_idx_pair", "torchvision_advice"]


def idx_sources(places: Sequence[str], sums: Sequence[str]) -> list[Source]:
    """The four files of MNIST or of what has its form; sums of test images, test labels, then training ones."""
    sizes = (7_840_016, 10_008, 47_040_016, 60_008)
    files = [f"{stem}-{part}-ubyte" for stem in ("t10k", "train") for part in ("images-idx3", "labels-idx1")]
    return [
        Source((file,), tuple(f"{place}/{file}.gz" for place in places), digest, size, "gzip")
        for file, digest, size in zip(files, sums, sizes, strict=True)
    ]


def read_idx_pair(folder: DataFolder, split: Split, url: str) -> Arrays:
    """The image file and the label file of one split."""
    advice = advice_on(folder, f"put the four IDX files of {url}, gzipped or not, into {folder.home}")
    stem = "train" if split == "train" else "t10k"
    paths = []
    for part, rank in (("images", 3), ("labels", 1)):
        spellings = [f"{stem}-{part}{dot}idx{rank}-ubyte" for dot in "-."]
        paths.append(folder.require(*(s + end for s in spellings for end in ("", ".gz")), advice=advice))
    images, labels = read_idx(paths[0], rank=3), read_idx(paths[1], rank=1)
    if len(images) != len(labels):
        raise ValueError(f"{paths[1]}: expected {len(images)} labels, as {paths[0]} has images, got {len(labels)}")
    return images[:, None], labels


def cifar10_of_torchvision(root: Path, split: Split) -> Arrays:
    """What torchvision has downloaded; ValueError where a checksum is wrong."""
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError as error:  # raised on a wrong checksum, before anything is unpickled
        got = f"others: {error}"
        raise ValueError(f"{root / 'cifar-10-batches-py'}: expected the standard files, got {got}") from error
    return data.data.transpose(0, 3, 1, 2), np.asarray(data.targets)


def advice_on(folder: DataFolder, by_hand: str) -> str:
    """How to get the files of a data set: by the command, or by hand."""
    return f"optrelax data {folder.name} --to {folder.root or 'DIR'}; or {by_hand}"


def torchvision_advice(folder: DataFolder, name: str) -> str:
    """How to download a data set with torchvision into a folder that is looked at here."""
    first = "" if find_spec("torchvision") else " first pip install 'optrelax[vision]', then"
    where = "DIR" if folder.root is None else repr(str(folder.root))
    chosen = "" if name == "CIFAR10" else "split=..., "
    return f"{first} run torchvision.datasets.{name}({where}, {chosen}download=True)"
