"""Data sets: formats written by hand here, real files where OPTRELAX_DATA has them."""

import gzip
import inspect
import pickle
import re
import struct
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from optrelax.data import datasets
from optrelax.data.datasets import DatasetError, load_dataset
from optrelax.data.splits import Dataset, evenly_spaced

pytestmark = pytest.mark.smoke

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 4, 5), dtype=np.uint8)
LABELS = np.array([7, 0, 9], dtype=np.uint8)


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    """The bytes of an IDX file."""
    number = 0x0800 + array.ndim if magic is None else magic
    return struct.pack(f">{array.ndim + 1}I", number, *array.shape) + array.tobytes()


def write_idx(
    folder: Path, dot: str = "-", end: str = "", stem: str = "t10k", labels: np.ndarray = LABELS
) -> tuple[Path, Path]:
    """An image file and a label file, gzipped if `end` is .gz."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{stem}-images{dot}idx3-ubyte{end}", folder / f"{stem}-labels{dot}idx1-ubyte{end}"
    for path, array in zip(paths, (IMAGES, labels), strict=True):
        path.write_bytes(gzip.compress(idx(array)) if end else idx(array))
    return paths


# Subsets


@given(st.integers(1, 70_000), st.data())
def test_evenly_spaced_is_numpys_linspace_floored(size, data):
    n = data.draw(st.integers(1, min(size, 2000)))
    index = evenly_spaced(size, n)
    assert index.dtype == torch.int64
    assert index.tolist() == np.linspace(0, size - 1, n).astype(int).tolist()
    assert index[0] == 0
    assert n == 1 or index[-1] == size - 1
    assert (index.diff() > 0).all()


@pytest.mark.parametrize("n", [0, -1, 11])
def test_evenly_spaced_wants_a_size_that_fits(n):
    with pytest.raises(ValueError, match=re.escape(f"must lie in 1 .. 10, the examples there are, got {n}")):
        evenly_spaced(10, n)


def test_subset_keeps_images_and_labels_together():
    whole = load_dataset("digits")
    part = whole.subset(7)
    assert (len(part), part.name, part.split, part.classes) == (7, "digits", "test", 10)
    for place, (image, label) in zip(evenly_spaced(360, 7).tolist(), part, strict=True):
        assert torch.equal(image, whole.images[place])
        assert label == whole.labels[place]


# The embedded set


def test_digits_split_every_fifth_example():
    data = load_digits()
    train, test = load_dataset("digits", split="train"), load_dataset("digits")
    assert (len(train), len(test)) == (1437, 360)
    assert test.images.shape == (360, 1, 8, 8)
    assert test.input_shape == (1, 8, 8)
    for i, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        split, place = (test, i // 5) if i % 5 == 0 else (train, i - i // 5 - 1)
        assert np.array_equal(split.images[place, 0].numpy() * 16, image)
        assert split.labels[place] == label


def test_a_data_loader_serves_a_dataset():
    batches = list(DataLoader(load_dataset("digits"), batch_size=100))
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([images for images, _ in batches]), load_dataset("digits").images)
    assert batches[0][1].dtype == torch.int64


def test_indexing_follows_python():
    test = load_dataset("digits")
    assert torch.equal(test[-1][0], test.images[359])
    assert len(test[10:20][1]) == 10
    with pytest.raises(IndexError):
        test[360]


# IDX files


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("inside", [True, False], ids=["DIR/name", "DIR"])
@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize(("split", "stem"), [("train", "train"), ("test", "t10k")])
def test_idx_files_in_every_usual_place(tmp_path, name, inside, end, dot, split, stem):
    write_idx(tmp_path / name if inside else tmp_path, dot, end, stem)
    got = load_dataset(name, tmp_path, split)
    assert torch.equal(got.images, torch.from_numpy(IMAGES[:, None] / np.float32(255)))
    assert got.labels.tolist() == [7, 0, 9]
    assert (got.name, got.split, got.classes) == (name, split, 10)


def test_the_folder_of_the_name_comes_first(tmp_path):
    write_idx(tmp_path)
    write_idx(tmp_path / "mnist", labels=np.array([1, 1, 1], np.uint8))
    assert load_dataset("mnist", tmp_path).labels.tolist() == [1, 1, 1]


def test_the_environment_names_the_folder_and_the_argument_wins(tmp_path, monkeypatch):
    write_idx(tmp_path / "one")
    write_idx(tmp_path / "two", labels=np.array([1, 1, 1], np.uint8))
    monkeypatch.setenv("OPTRELAX_DATA", str(tmp_path / "one"))
    assert load_dataset("mnist").labels.tolist() == [7, 0, 9]
    assert load_dataset("mnist", str(tmp_path / "two")).labels.tolist() == [1, 1, 1]


def assert_corrupt(name: str, folder: Path, path: Path, *parts: str) -> None:
    with pytest.raises(ValueError, match=r"expected .* got ") as caught:
        load_dataset(name, folder)
    assert str(caught.value).startswith(f"{path}: expected ")
    for part in parts:
        assert part in str(caught.value)


def test_bad_magic_number(tmp_path):
    images, _ = write_idx(tmp_path)
    images.write_bytes(idx(IMAGES, magic=2049))
    assert_corrupt("mnist", tmp_path, images, "magic number 2051", "got 2049")


@pytest.mark.parametrize("length", [*range(16 + 60), 16 + 61])
def test_idx_file_of_every_wrong_length(tmp_path, length):
    images, _ = write_idx(tmp_path)
    images.write_bytes((idx(IMAGES) + b"\0")[:length])
    assert_corrupt("mnist", tmp_path, images)


@pytest.mark.parametrize("end", [0, 5, 30, -9, -1])
def test_gzip_file_cut_short(tmp_path, end):
    images, _ = write_idx(tmp_path, end=".gz")
    images.write_bytes(images.read_bytes()[:end])
    assert_corrupt("mnist", tmp_path, images)


def test_gzip_file_that_is_none_or_has_a_wrong_byte(tmp_path):
    images, _ = write_idx(tmp_path, end=".gz")
    packed = bytearray(images.read_bytes())
    images.write_bytes(idx(IMAGES))
    assert_corrupt("mnist", tmp_path, images, "gzip")
    packed[30] ^= 0xFF
    images.write_bytes(packed)
    assert_corrupt("mnist", tmp_path, images, "gzip")


def test_as_many_labels_as_images(tmp_path):
    _, labels = write_idx(tmp_path, labels=np.array([1, 2], np.uint8))
    assert_corrupt("mnist", tmp_path, labels, "expected 3 labels", "got 2")


def test_a_label_outside_the_classes(tmp_path):
    write_idx(tmp_path, labels=np.array([1, 2, 10], np.uint8))
    with pytest.raises(ValueError, match=r"'mnist' \(test\): labels must lie in 0 \.\. 9, got 1 \.\. 10"):
        load_dataset("mnist", tmp_path)


def test_missing_file_says_which_where_and_how(tmp_path):
    with pytest.raises(DatasetError, match="t10k-images-idx3-ubyte not found") as caught:
        load_dataset("fashion-mnist", tmp_path)
    assert isinstance(caught.value, FileNotFoundError)
    message = str(caught.value)
    for place in (tmp_path / "fashion-mnist", tmp_path):
        for dot in "-.":
            for end in ("", ".gz"):
                assert f"{place}/t10k-images{dot}idx3-ubyte{end}\n" in message
    assert f"into {tmp_path}/fashion-mnist" in message
    assert "github.com/zalandoresearch" in message


def test_missing_label_file_is_named(tmp_path):
    _, labels = write_idx(tmp_path)
    labels.unlink()
    with pytest.raises(DatasetError, match="t10k-labels-idx1-ubyte not found"):
        load_dataset("mnist", tmp_path)


def test_without_a_folder_the_error_says_how_to_name_one():
    with pytest.raises(DatasetError, match=r"pass data_dir .* or set OPTRELAX_DATA"):
        load_dataset("mnist")


# CIFAR-10


def cifar_records(n: int, first: int = 0) -> np.ndarray:
    records = np.random.default_rng(first).integers(0, 256, (n, 3073), dtype=np.uint8)
    records[:, 0] = (first + np.arange(n)) % 10
    return records


@pytest.mark.parametrize("inside", ["cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "."], ids=str)
def test_cifar_binary_batches(tmp_path, inside):
    folder = tmp_path / inside
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(1, 6):
        cifar_records(2, i).tofile(folder / f"data_batch_{i}.bin")
    cifar_records(3).tofile(folder / "test_batch.bin")

    test = load_dataset("cifar10", tmp_path)
    assert test.images.shape == (3, 3, 32, 32)
    assert test.labels.tolist() == [0, 1, 2]
    # Byte 1 + 1024 c + 32 row + column of a record is that pixel of channel c.
    assert test.images[2, 1, 4, 5] * 255 == cifar_records(3)[2, 1 + 1024 + 4 * 32 + 5]

    train = load_dataset("cifar10", tmp_path, "train")
    assert train.labels.tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]


@pytest.mark.parametrize("size", [0, 1, 3072, 3074, 2 * 3073 - 1])
def test_cifar_batch_cut_short(tmp_path, size):
    path = tmp_path / "test_batch.bin"
    path.write_bytes(bytes(size))
    assert_corrupt("cifar10", tmp_path, path, "multiple of 3073", f"got {size}")


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def fake_torchvision(monkeypatch: pytest.MonkeyPatch, cifar10: object) -> None:
    """A torchvision with nothing but CIFAR10."""
    package, module = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    package.__spec__ = ModuleSpec("torchvision", None)
    module.CIFAR10 = cifar10
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)


def test_pickled_cifar_is_explained_and_never_opened(tmp_path, monkeypatch):
    without_torchvision(monkeypatch)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(pickle.dumps(Payload(tmp_path / "was-run")))
    with pytest.raises(DatasetError, match=r"test_batch\.bin not found(.|\n)*a pickle can run any code") as caught:
        load_dataset("cifar10", tmp_path)
    assert "pip install 'optrelax[vision]'" in str(caught.value)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_through_torchvision(tmp_path, monkeypatch, split):
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    pixels = RNG.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    calls = []

    def cifar10(root: str, train: bool, download: bool) -> SimpleNamespace:
        calls.append((root, train, download))
        return SimpleNamespace(data=pixels, targets=[3, 4])

    fake_torchvision(monkeypatch, cifar10)
    got = load_dataset("cifar10", tmp_path, split)
    assert calls == [(str(tmp_path / "cifar10"), split == "train", False)]
    assert got.labels.tolist() == [3, 4]
    assert got.images[1, 2, 7, 9] * 255 == pixels[1, 7, 9, 2]


def test_torchvisions_wrong_checksum_is_a_corrupt_file(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()

    def cifar10(root: str, train: bool, download: bool) -> None:
        raise RuntimeError("Dataset not found or corrupted.")

    fake_torchvision(monkeypatch, cifar10)
    assert_corrupt("cifar10", tmp_path, tmp_path / "cifar-10-batches-py", "not found or corrupted")


@pytest.mark.parametrize(("name", "call"), [("cifar10", "CIFAR10"), ("svhn", "SVHN")])
def test_torchvisions_download_is_named_where_it_is_installed(tmp_path, monkeypatch, name, call):
    fake_torchvision(monkeypatch, None)
    with pytest.raises(DatasetError, match=f"run torchvision.datasets.{call}") as caught:
        load_dataset(name, tmp_path)
    assert "pip install" not in str(caught.value)


# SVHN


def write_svhn(path: Path, labels: list[int], compressed: bool = True, **variables: np.ndarray) -> np.ndarray:
    pixels = RNG.integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
    content = {"X": pixels, "y": np.array(labels, np.uint8)[:, None]} | variables
    scipy.io.savemat(path, content, do_compression=compressed)
    return pixels


@pytest.mark.parametrize("inside", ["svhn", "."])
@pytest.mark.parametrize("split", ["train", "test"])
def test_svhn_files(tmp_path, inside, split):
    (tmp_path / "svhn").mkdir()
    pixels = write_svhn(tmp_path / inside / f"{split}_32x32.mat", [10, 1, 9])
    got = load_dataset("svhn", tmp_path, split)
    assert got.labels.tolist() == [0, 1, 9]
    assert got.images.shape == (3, 3, 32, 32)
    assert got.images[2, 1, 4, 5] * 255 == pixels[4, 5, 1, 2]


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn_file_cut_short(tmp_path, compressed):
    path = tmp_path / "test_32x32.mat"
    write_svhn(path, [10, 1, 9], compressed)
    content = path.read_bytes()
    for length in [
        *range(0, 300, 9),
        *range(300, len(content), 501),
        *range(len(content) - 40, len(content)),
    ]:
        path.write_bytes(content[:length])
        assert_corrupt("svhn", tmp_path, path)


def test_svhn_file_with_other_content(tmp_path):
    path = tmp_path / "test_32x32.mat"
    write_svhn(path, [10, 1, 9], X=np.zeros((32, 32, 3, 2), np.uint8))
    assert_corrupt("svhn", tmp_path, path, "(32, 32, 3, 3)", "(32, 32, 3, 2)")
    write_svhn(path, [10, 1, 0])
    assert_corrupt("svhn", tmp_path, path, "labels in 1 .. 10", "got 0 .. 10")
    scipy.io.savemat(path, {"X": np.zeros((32, 32, 3, 2), np.uint8)})
    assert_corrupt("svhn", tmp_path, path, "['y']")


# The registry and the record


@pytest.mark.parametrize(("name", "nearest"), [("MNIST", "mnist"), ("fashionmnist", "fashion-mnist")])
def test_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"unknown data set '{name}'; did you mean '{nearest}'"):
        load_dataset(name)


def test_unknown_split_says_what_to_type():
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
        # Unwrapped, since under test a type checker would refuse the argument first.
        inspect.unwrap(load_dataset)("digits", split="valid")


def test_a_new_data_set_is_one_function(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "_REGISTRY", dict(datasets._REGISTRY))

    @datasets.dataset("stripes", mean=[0.5], std=[0.5], classes=2, white=1)
    def stripes(folder, split):
        return np.eye(2, dtype=np.uint8)[:, None, None], np.arange(2)

    got = load_dataset("stripes")
    assert got.images.tolist() == [[[[1.0, 0.0]]], [[[0.0, 1.0]]]]
    assert "stripes" in datasets.names()
    assert datasets.normalization("stripes") == ((0.5,), (0.5,))
    with pytest.raises(ValueError, match="'stripes' is registered already"):
        datasets.dataset("stripes", mean=[0.5], std=[0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(2, 3)},
            r"images must be float32 \[n, channels, height, width\], got .* \[2, 3\]",
        ),
        ({"images": torch.zeros(2, 1, 3, 3).double()}, "images must be float32 .* got torch.float64"),
        ({"images": torch.zeros(0, 1, 3, 3), "labels": torch.zeros(0).long()}, "at least one image"),
        ({"images": torch.full((2, 1, 3, 3), 1.5)}, r"pixels must lie in \[0, 1\], got \[1.5, 1.5\]"),
        ({"images": torch.full((2, 1, 3, 3), torch.nan)}, r"pixels must lie in \[0, 1\], got \[nan, nan\]"),
        (
            {"labels": torch.tensor([0, 1, 2])},
            r"labels must be int64 \[2\], one an image, got torch.int64 \[3\]",
        ),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels must be int64 .* got torch.float32"),
        ({"labels": torch.tensor([0, 3])}, r"labels must lie in 0 \.\. 2, got 0 \.\. 3"),
        ({"labels": torch.tensor([-1, 2])}, r"labels must lie in 0 \.\. 2, got -1 \.\. 2"),
    ],
)
def test_a_dataset_whose_parts_do_not_fit(change, message):
    parts = {"images": torch.zeros(2, 1, 3, 3), "labels": torch.tensor([0, 2])}
    assert len(Dataset("mine", "test", **parts, classes=3)) == 2
    with pytest.raises(ValueError, match=r"Dataset 'mine' \(test\): .*" + message):
        Dataset("mine", "test", **parts | change, classes=3)


def test_normalization_of_digits_is_that_of_its_training_pixels():
    pixels = load_dataset("digits", split="train").images
    mean, std = datasets.normalization("digits")
    assert mean == pytest.approx([pixels.mean().item()], abs=5e-5)
    assert std == pytest.approx([pixels.std().item()], abs=5e-5)


# The real files


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_training_pixels_have_the_published_normalization(data_dir, name):
    train = load_dataset(name, data_dir, "train")
    assert train.images.shape == (60000, 1, 28, 28)
    mean, std = datasets.normalization(name)
    # The paper's constants; Fashion's mean is 0.28604, published as 0.2861.
    assert mean == pytest.approx([train.images.double().mean().item()], abs=1e-4)
    assert std == pytest.approx([train.images.double().std().item()], abs=1e-4)


@pytest.mark.data
def test_real_test_labels_have_the_published_counts(data_dir):
    counts = {
        "mnist": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
        "fashion-mnist": [1000] * 10,
    }
    for name, expected in counts.items():
        test = load_dataset(name, data_dir)
        assert test.images.shape == (10000, 1, 28, 28)
        assert test.labels.bincount().tolist() == expected
