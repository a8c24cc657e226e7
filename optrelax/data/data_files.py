"""The files of the published data sets: where they are looked for, and their formats.

A file that is truncated or corrupt is a ValueError that names it, what was expected and what was there.
"""

import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DataFolder", "DatasetError", "read_cifar", "read_idx", "read_svhn"]

Pixels = NDArray[np.uint8]
Arrays = tuple[Pixels, NDArray[np.integer[Any]]]  # images [n, c, h, w], labels [n]


class DatasetError(FileNotFoundError):
    """A data set's file is missing: which one, everywhere it was looked for, and how to get it."""


class DataFolder:
    """Where the files of one data set are looked for: DIR/<name>/, other usual folders, then DIR itself.

    DIR is `data_dir`, or else the environment variable OPTRELAX_DATA.
    """

    def __init__(self, name: str, data_dir: str | os.PathLike[str] | None = None, aliases: Sequence[str] = ()) -> None:
        given = data_dir if data_dir is not None else os.environ.get("OPTRELAX_DATA") or None
        self.name = name
        self.root = None if given is None else Path(given).expanduser()
        self.places = [] if self.root is None else [*(self.root / f for f in (name, *aliases)), self.root]

    @property
    def home(self) -> str:
        """Where to put the files: DIR/<name>."""
        return f"{self.root or 'DIR'}/{self.name}"

    def candidates(self, *names: str) -> list[Path]:
        """Every path at which a file of one of these names is looked for, first choice first."""
        return [place / name for place in self.places for name in names]

    def find(self, *names: str) -> Path | None:
        """The first of the candidates that is a file, or None."""
        return next((path for path in self.candidates(*names) if path.is_file()), None)

    def require(self, *names: str, advice: str) -> Path:
        """The first of the candidates that is a file; DatasetError, with `advice` how to get it, if none."""
        if (path := self.find(*names)) is not None:
            return path
        looked = "".join(f"\n  {path}" for path in self.candidates(*names))
        if self.root is None:
            looked = " nowhere, as no folder is given; pass data_dir (--data-dir) or set OPTRELAX_DATA"
        raise DatasetError(f"{self.name}: {names[0]} not found. Looked for:{looked}\nTo get it: {advice}")


def read_idx(path: Path, rank: int) -> Pixels:
    """An IDX file of unsigned bytes, gzipped if it ends in .gz, as an array of `rank` dimensions.

    Format: the magic number 0x0800 + rank, `rank` sizes (all big-endian uint32), then the bytes.
    """
    content = _gunzip(path) if path.suffix == ".gz" else path.read_bytes()
    header = 4 * (rank + 1)
    if len(content) < header:
        raise ValueError(f"{path}: expected an IDX header of {header} bytes, got {len(content)} bytes")
    magic, *sizes = struct.unpack(f">{rank + 1}I", content[:header])
    if magic != 0x0800 + rank:
        raise ValueError(f"{path}: expected IDX magic number {0x0800 + rank}, got {magic}")
    if len(content) - header != math.prod(sizes):
        wanted = f"{math.prod(sizes)} bytes after the header (sizes {sizes})"
        raise ValueError(f"{path}: expected {wanted}, got {len(content) - header}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)


def _gunzip(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a complete gzip file, got one that fails: {error}") from error


def read_cifar(paths: Sequence[Path]) -> Arrays:
    """Batches of the binary CIFAR-10: records of a label, then the red, green and blue planes, row by row."""
    size = 1 + 3 * 32 * 32
    for path in paths:
        if (got := path.stat().st_size) == 0 or got % size:
            raise ValueError(
                f"{path}: expected a multiple of {size} bytes (the standard file: 10000 of them), got {got}"
            )
    records = np.concatenate([np.fromfile(path, np.uint8) for path in paths]).reshape(-1, size)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def read_svhn(path: Path) -> Arrays:
    """A MATLAB file of cropped SVHN digits: X [32, 32, 3, n], y [n, 1]; the digit 0 is labelled 10 there."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    # What loadmat raises on files cut at every length, and on MATLAB 7.3 files (NotImplementedError).
    failures = (MatReadError, ValueError, TypeError, IndexError, NotImplementedError, OSError, zlib.error)
    try:
        content = loadmat(path, variable_names=("X", "y"))
    except failures as error:
        raise ValueError(f"{path}: expected a complete MATLAB 5 file, got one that fails: {error}") from error
    if missing := {"X", "y"} - content.keys():
        raise ValueError(f"{path}: expected the variables X and y, got a file without {sorted(missing)}")
    images, labels = content["X"], content["y"].ravel()
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
        wanted = f"X uint8 (32, 32, 3, {len(labels)}), one image a label"
        raise ValueError(f"{path}: expected {wanted}, got {images.dtype} {images.shape}")
    if not ((labels >= 1) & (labels <= 10)).all():
        raise ValueError(f"{path}: expected labels in 1 .. 10, got {labels.min()} .. {labels.max()}")
    return images.transpose(3, 2, 0, 1), labels % 10
