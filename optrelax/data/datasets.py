"""Data sets as tensors: pixels in [0, 1], labels from 0.

Nothing is downloaded but by `fetch_dataset`, and nothing is unpickled: a missing file is an error that says how to
get it. A new data set is one function under `@dataset`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from optrelax.data.data_files import Arrays, DataFolder, DatasetError, read_cifar, read_idx, read_svhn
from optrelax.data.fetching import FetchError, FetchProgress, Source, fetch_source, is_whole, sources_text
from optrelax.errors import suggest

__all__ = [
    "Dataset",
    "DatasetError",
    "Normalization",
    "dataset",
    "evenly_spaced",
    "fetch_dataset",
    "load_dataset",
    "names",
    "normalization",
    "overview",
]

Split = Literal["train", "test"]
Reader = Callable[[DataFolder, Split], Arrays]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """One split of a data set in memory; a map-style data set for `torch.utils.data.DataLoader`.

    Raises ValueError where the parts do not fit together.
    """

    name: str
    split: str
    images: Tensor  # float32 [n, channels, height, width] in [0, 1]
    labels: Tensor  # int64 [n] in 0 .. classes - 1
    classes: int

    def __post_init__(self) -> None:
        where = f"Dataset {self.name!r} ({self.split})"
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != torch.float32:
            got = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{where}: images must be float32 [n, channels, height, width], got {got}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            got = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"{where}: labels must be int64 [{len(images)}], one an image, got {got}")
        if images.numel() == 0:
            raise ValueError(f"{where}: expected at least one image, got shape {list(images.shape)}")
        low, high = (float(end) for end in images.aminmax())
        if not (low >= 0 and high <= 1):  # so put, a NaN is refused too
            raise ValueError(f"{where}: pixels must lie in [0, 1], got [{low:g}, {high:g}]")
        least, most = (int(end) for end in labels.aminmax())
        if least < 0 or most >= self.classes:
            raise ValueError(f"{where}: labels must lie in 0 .. {self.classes - 1}, got {least} .. {most}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        """Image [c, h, w] and label [] at `index`; a slice or a tensor of indices gives a batch."""
        return self.images[index], self.labels[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images, self.labels, strict=True)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def subset(self, n: int) -> "Dataset":
        """`n` evenly spaced examples, in order; ValueError unless 1 <= n <= size."""
        index = evenly_spaced(len(self), n)
        return replace(self, images=self.images[index], labels=self.labels[index])


def evenly_spaced(size: int, n: int) -> Tensor:
    """Indices of an evenly spaced subset: linspace(0, size - 1, n), floored. int64 [n], strictly increasing.

    Raises ValueError unless 1 <= n <= size.
    """
    if not 1 <= n <= size:
        raise ValueError(f"subset: must lie in 1 .. {size}, the examples there are, got {n}")
    # Floating point by definition: where an index is a whole number, the rounded product may fall just below
    # it (size 10000, n 40: 3332, not 3333). Results on such subsets are published, so the index stays.
    return torch.from_numpy(np.floor(np.linspace(0, size - 1, n)).astype(np.int64))


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
    if split not in ("train", "test"):
        raise ValueError(f"load_dataset: split must be 'train' or 'test', got {split!r}")
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
    raise ValueError(f"unknown data set {name!r}; {suggest(name.lower(), _REGISTRY)}")


@dataset("digits", mean=[0.3052], std=[0.3763], white=16)
def _digits(folder: DataFolder, split: Split) -> Arrays:
    """scikit-learn's 1,797 real digits, 8x8 in 17 grey levels; every fifth example is the test set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    test = np.arange(len(data.target)) % 5 == 0
    chosen = test if split == "test" else ~test
    return data.images[chosen][:, None].astype(np.uint8), data.target[chosen]


def _idx_sources(places: Sequence[str], sums: Sequence[str]) -> list[Source]:
    """The four files of MNIST or of what has its form; sums of test images, test labels, then training ones."""
    sizes = (7_840_016, 10_008, 47_040_016, 60_008)
    files = [f"{stem}-{part}-ubyte" for stem in ("t10k", "train") for part in ("images-idx3", "labels-idx1")]
    return [
        Source((file,), tuple(f"{place}/{file}.gz" for place in places), digest, size, "gzip")
        for file, digest, size in zip(files, sums, sizes, strict=True)
    ]


@dataset(
    "mnist",
    mean=[0.1307],
    std=[0.3081],
    aliases=["MNIST/raw"],
    sources=_idx_sources(
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
    return _idx_pair(folder, split, "https://ossci-datasets.s3.amazonaws.com/mnist")


@dataset(
    "fashion-mnist",
    mean=[0.2861],
    std=[0.3530],
    aliases=["FashionMNIST/raw"],
    sources=_idx_sources(
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
    return _idx_pair(folder, split, "https://github.com/zalandoresearch/fashion-mnist")


def _idx_pair(folder: DataFolder, split: Split, url: str) -> Arrays:
    """The image file and the label file of one split."""
    advice = _advice(folder, f"put the four IDX files of {url}, gzipped or not, into {folder.home}")
    stem = "train" if split == "train" else "t10k"
    paths = []
    for part, rank in (("images", 3), ("labels", 1)):
        spellings = [f"{stem}-{part}{dot}idx{rank}-ubyte" for dot in "-."]
        paths.append(folder.require(*(s + end for s in spellings for end in ("", ".gz")), advice=advice))
    images, labels = read_idx(paths[0], rank=3), read_idx(paths[1], rank=1)
    if len(images) != len(labels):
        raise ValueError(f"{paths[1]}: expected {len(images)} labels, as {paths[0]} has images, got {len(labels)}")
    return images[:, None], labels


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
        return _cifar10_of_torchvision(pickled, split)
    advice = _advice(
        folder,
        "unpack cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html in"
        f" {folder.root or 'DIR'}; or{_torchvision(folder, 'CIFAR10')}. The python version"
        " (cifar-10-batches-py) is pickled, and a pickle can run any code: only torchvision reads it, which"
        " compares checksums first",
    )
    return read_cifar([folder.require(batch, advice=advice) for batch in batches])


def _cifar10_of_torchvision(root: Path, split: Split) -> Arrays:
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError as error:  # raised on a wrong checksum, before anything is unpickled
        got = f"others: {error}"
        raise ValueError(f"{root / 'cifar-10-batches-py'}: expected the standard files, got {got}") from error
    return data.data.transpose(0, 3, 1, 2), np.asarray(data.targets)


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
    advice = _advice(folder, f"put {file} of {_SVHN} into {folder.home}; or{_torchvision(folder, 'SVHN')}")
    return read_svhn(folder.require(file, advice=advice))


def _advice(folder: DataFolder, by_hand: str) -> str:
    return f"optrelax data {folder.name} --to {folder.root or 'DIR'}; or {by_hand}"


def _torchvision(folder: DataFolder, name: str) -> str:
    """How to download a data set with torchvision into a folder that is looked at here."""
    first = "" if find_spec("torchvision") else " first pip install 'optrelax[vision]', then"
    where = "DIR" if folder.root is None else repr(str(folder.root))
    chosen = "" if name == "CIFAR10" else "split=..., "
    return f"{first} run torchvision.datasets.{name}({where}, {chosen}download=True)"
