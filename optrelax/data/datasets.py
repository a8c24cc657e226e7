"""Data sets as tensors: pixels in [0, 1], labels from 0.

Nothing is downloaded but by `fetch_dataset`, and nothing is unpickled: a missing file is an error that says how to
get it. A new data set is one function under `@dataset`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from optrelax.checks import require_choice
from optrelax.data.data_files import Arrays, DataFolder, DatasetError, read_cifar, read_svhn
from optrelax.data.fetching import FetchError, FetchProgress, Source, fetch_source, is_whole, sources_text
from optrelax.data.splits import Dataset, Split
from optrelax.data.standard_files import (
    advice_on,
    cifar10_of_torchvision,
    idx_sources,
    read_idx_pair,
    torchvision_advice,
)
from optrelax.errors import suggest

__all__ = [
    "DatasetError",
    "Normalization",
    "dataset",
    "fetch_dataset",
    "load_dataset",
    "names",
    "normalization",
    "overview",
]

Reader = Callable[[DataFolder, Split], Arrays]


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One row of the registry."""

    classes: int
    normalization: Normalization
    white: int  # the stored value that becomes 1
    aliases: tuple[str, ...]  # folders under DIR that may hold the files, beside DIR/<name>
    sources: tuple[Source, ...]
    read: Reader


_REGISTRY: dict[str, _Entry] = {}


def dataset(
    name: str,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    classes: int = 10,
    white: int = 255,
    aliases: Sequence[str] = (),
    sources: Sequence[Source] = (),
) -> Callable[[Reader], Reader]:
    """Register a reader `(folder, split) -> (images [n, c, h, w] in 0 .. white, labels [n])` under `name`.

    sources: the files that `fetch_dataset` fetches; none where none are needed.
    """
    if name in _REGISTRY:
        raise ValueError(f"dataset: {name!r} is registered already")

    def register(read: Reader) -> Reader:
        constants = Normalization(tuple(mean), tuple(std))
        _REGISTRY[name] = _Entry(classes, constants, white, tuple(aliases), tuple(sources), read)
        return read

    return register


def names() -> list[str]:
    """Names of the data sets, the embedded one first."""
    return list(_REGISTRY)


def normalization(name: str) -> Normalization:
    """Mean and standard deviation of a data set's training pixels, for the network's first layer."""
    return _entry(name).normalization


def load_dataset(name: str, data_dir: str | os.PathLike[str] | None = None, split: Split = "test") -> Dataset:
    """One split of a named data set.

    Files are looked for in DIR/<name>/ and then in DIR/, where DIR is `data_dir` or else the environment variable
    OPTRELAX_DATA; `digits` needs none.

    Args:
        name: as `optrelax data` lists them.
        data_dir: the folder.
        split: "train" or "test".

    Returns:
        Pixels in [0, 1], labels, and their number of classes; a slice is a pair (x, labels).

    Raises:
        DatasetError: (a FileNotFoundError) for a missing file.
        ValueError: for a truncated or corrupt one and for an unknown name or split.

    Example:
        >>> x, labels = ox.load_dataset("digits")[:8]
        >>> x.shape, labels.shape
        (torch.Size([8, 1, 8, 8]), torch.Size([8]))
    """
    entry = _entry(name)
    require_choice("load_dataset", "split", split, "train", "test")
    images, labels = entry.read(DataFolder(name, data_dir, entry.aliases), split)
    pixels = torch.from_numpy(np.ascontiguousarray(images, np.float32)).div_(entry.white)
    return Dataset(name, split, pixels, torch.from_numpy(labels.astype(np.int64)), entry.classes)


def overview(data_dir: str | os.PathLike[str] | None = None) -> list[dict[str, object]]:
    """A row a data set: name, classes, bytes to fetch, and the folder in which its first file lies, if any."""
    rows: list[dict[str, object]] = []
    for name, entry in _REGISTRY.items():
        folder, where = DataFolder(name, data_dir, entry.aliases), "scikit-learn"
        if entry.sources:
            found = folder.find(*_spellings(entry.sources[0].files[0], entry.sources[0]))
            where = "not found" if found is None else str(found.parent)
        size = sum(source.size for source in entry.sources)
        rows.append({"name": name, "classes": entry.classes, "MB": round(size / 2**20), "where": where})
    return rows


def fetch_dataset(name: str, to: str | os.PathLike[str], progress: FetchProgress | None = None) -> dict[str, str]:
    """Fetch the files of a data set into `to`/<name>, where they are not there yet: "there" or "fetched" by file.

    Files that are there are compared with the published SHA-256 too, and never replaced.
    progress: called with a file, its bytes so far and in all.
    Raises FetchError where a file cannot be fetched (it says what to do by hand), ValueError for a file of another
    checksum and an unknown name.
    """
    entry, folder = _entry(name), DataFolder(name, to, _entry(name).aliases)
    done: dict[str, str] = {}
    for source in entry.sources:
        found = [folder.find(*_spellings(file, source)) for file in source.files]
        if all(found):
            # The members of an archive have no checksums of their own; the reader looks at their sizes.
            if source.packing != "tar" and found[0] is not None and not is_whole(source, found[0]):
                raise ValueError(
                    f"{found[0]}: not the published file, whose SHA-256 is {source.sha256}"
                    f"{' unpacked' if source.packing == 'gzip' else ''}; move it away to have it fetched"
                )
            done |= {str(path): "there" for path in found}
            continue
        try:
            done |= {str(path): "fetched" for path in fetch_source(source, Path(folder.home), progress)}
        except FetchError as error:
            raise FetchError(
                f"{name}: {error}\nBy hand, on a machine that may: put these into {folder.home}, gzip files as they "
                f"are or unpacked, archives unpacked; the same command then checks them.\n{sources_text(entry.sources)}"
            ) from error
    return done


def _spellings(file: str, source: Source) -> list[str]:
    """The names under which readers find a file."""
    stems = [file, file.replace("-idx", ".idx")] if source.packing == "gzip" else [file]
    return [stem + end for stem in stems for end in (("", ".gz") if source.packing == "gzip" else ("",))]


def _entry(name: str) -> _Entry:
    if name in _REGISTRY:
        return _REGISTRY[name]
    if any(sign in name for sign in "./\\"):
        raise ValueError(f"{name}: data of your own must be an npz file: numpy.savez('FILE.npz', x=x, labels=labels)")
    raise ValueError(f"unknown data set {name!r}; {suggest(name.lower(), _REGISTRY)}")


@dataset("digits", mean=[0.3052], std=[0.3763], white=16)
def _digits(folder: DataFolder, split: Split) -> Arrays:
    """scikit-learn's 1,797 real digits, 8x8 in 17 grey levels; every fifth example is the test set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    test = np.arange(len(data.target)) % 5 == 0
    chosen = test if split == "test" else ~test
    return data.images[chosen][:, None].astype(np.uint8), data.target[chosen]


@dataset(
    "mnist",
    mean=[0.1307],
    std=[0.3081],
    aliases=["MNIST/raw"],
    sources=idx_sources(
        ["https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist"],
        [
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ],
    ),
)
def _mnist(folder: DataFolder, split: Split) -> Arrays:
    return read_idx_pair(folder, split, "https://ossci-datasets.s3.amazonaws.com/mnist")


@dataset(
    "fashion-mnist",
    mean=[0.2861],
    std=[0.3530],
    aliases=["FashionMNIST/raw"],
    sources=idx_sources(
        [
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        ],
        [
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ],
    ),
)
def _fashion_mnist(folder: DataFolder, split: Split) -> Arrays:
    return read_idx_pair(folder, split, "https://github.com/zalandoresearch/fashion-mnist")


@dataset(
    "cifar10",
    mean=[0.4914, 0.4822, 0.4465],
    std=[0.2023, 0.1994, 0.2010],
    aliases=["cifar10/cifar-10-batches-bin", "cifar-10-batches-bin"],
    sources=[
        Source(
            (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
            ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            170_052_171,
            "tar",
        )
    ],
)
def _cifar10(folder: DataFolder, split: Split) -> Arrays:
    """The binary version, or the folder that torchvision downloads."""
    batches = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    pickled = next((place for place in folder.places if (place / "cifar-10-batches-py").is_dir()), None)
    if pickled and folder.find(batches[0]) is None and find_spec("torchvision"):
        return cifar10_of_torchvision(pickled, split)
    advice = advice_on(
        folder,
        "unpack cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html in"
        f" {folder.root or 'DIR'}; or{torchvision_advice(folder, 'CIFAR10')}. The python version"
        " (cifar-10-batches-py) is pickled, and a pickle can run any code: only torchvision reads it, which"
        " compares checksums first",
    )
    return read_cifar([folder.require(batch, advice=advice) for batch in batches])


_SVHN = "http://ufldl.stanford.edu/housenumbers"


@dataset(
    "svhn",
    mean=[0.4377, 0.4438, 0.4728],
    std=[0.1980, 0.2011, 0.1970],
    sources=[
        Source(
            ("test_32x32.mat",),
            (f"{_SVHN}/test_32x32.mat",),
            "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            64_275_384,
        ),
        Source(
            ("train_32x32.mat",),
            (f"{_SVHN}/train_32x32.mat",),
            "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            182_040_794,
        ),
    ],
)
def _svhn(folder: DataFolder, split: Split) -> Arrays:
    file = f"{split}_32x32.mat"
    advice = advice_on(folder, f"put {file} of {_SVHN} into {folder.home}; or{torchvision_advice(folder, 'SVHN')}")
    return read_svhn(folder.require(file, advice=advice))
