"""Fetching: what is written is what was published, from the first place that has it, and nothing else."""

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from optrelax.cli import main
from optrelax.data import datasets
from optrelax.data.datasets import fetch_dataset, load_dataset, names, overview
from optrelax.data.fetching import FetchError, Source, fetch_source, is_whole

pytestmark = pytest.mark.smoke

CONTENT = bytes(range(256)) * 9000  # more than a chunk


def published(folder: Path, content: bytes, packing: str = "plain", name: str = "file") -> str:
    """A file in a place of its own: its address."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    if packing == "gzip":
        content = gzip.compress(content)
    elif packing == "tar":
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for member in ("other/../../escaped", "batches/a.bin", "batches/b.bin"):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        content = packed.getvalue()
    path.write_bytes(content)
    return path.as_uri()


def source(
    urls: list[str], content: bytes = CONTENT, packing: str = "plain", files: tuple[str, ...] = ("it",)
) -> Source:
    return Source(files, tuple(urls), hashlib.sha256(content).hexdigest(), len(content), packing)


@pytest.mark.parametrize("packing", ["plain", "gzip"])
def test_the_first_place_that_has_the_file_is_taken(tmp_path, packing):
    nowhere = (tmp_path / "gone").as_uri()
    wrong = published(tmp_path / "1", CONTENT[:-1] + b"x", packing)
    good = published(tmp_path / "2", CONTENT, packing)
    seen = []
    to = tmp_path / "to"
    paths = fetch_source(source([nowhere, wrong, good], packing=packing), to, lambda *at: seen.append(at))
    assert paths == [to / "it"]
    assert paths[0].read_bytes() == CONTENT
    assert seen[-1] == ("it", len(CONTENT), len(CONTENT))
    assert [path.name for path in to.iterdir()] == ["it"]  # nothing half done is left


@pytest.mark.parametrize("change", ["other", "short", "long", "cut"])
def test_what_is_not_the_published_file_is_not_kept(tmp_path, change):
    content = {"other": CONTENT[::-1], "short": CONTENT[:-1], "long": CONTENT + CONTENT}.get(change, CONTENT)
    url = published(tmp_path / "place", content, "gzip")
    if change == "cut":
        path = tmp_path / "place" / "file"
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FetchError, match=r"could not be fetched:\n  file:.*(SHA-256|cut short)"):
        fetch_source(source([url], packing="gzip"), tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []


def test_of_an_archive_only_the_named_members_are_taken(tmp_path):
    url = published(tmp_path / "place", CONTENT, "tar")
    packed = (tmp_path / "place" / "file").read_bytes()
    paths = fetch_source(source([url], packed, "tar", ("a.bin", "b.bin")), tmp_path / "to")
    assert [path.read_bytes() for path in paths] == [CONTENT, CONTENT]
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["a.bin", "b.bin"]
    assert not list(tmp_path.rglob("escaped"))
    with pytest.raises(FetchError, match=r"expected c\.bin in the archive"):
        fetch_source(source([url], packed, "tar", ("a.bin", "c.bin")), tmp_path / "again")


def test_a_file_on_disk_is_compared(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    (tmp_path / "b.gz").write_bytes(gzip.compress(CONTENT))
    (tmp_path / "c.gz").write_bytes(b"no gzip")
    (tmp_path / "d").write_bytes(CONTENT[1:])
    wanted = source([], packing="gzip")
    assert [is_whole(wanted, tmp_path / name) for name in ("a", "b.gz", "c.gz", "d")] == [True, True, False, False]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A data set `tiny` of two records of CIFAR-10's form, published in a folder."""
    record = np.zeros((2, 3073), np.uint8)
    record[:, 0] = 3, 4
    content = record.tobytes()
    url = published(tmp_path / "place", content)
    entry = datasets._REGISTRY["cifar10"]
    monkeypatch.setitem(
        datasets._REGISTRY,
        "tiny",
        datasets._Entry(
            10, entry.normalization, 255, (), (source([url], content, files=("test_batch.bin",)),), entry.read
        ),
    )
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return int(done.value.code or 0)


def test_the_command_fetches_checks_and_says_how_to_use_it(tiny, capsys):
    to = tiny / "to"
    path = to / "tiny" / "test_batch.bin"
    assert run("data", "tiny", "--to", str(to)) == 0
    assert capsys.readouterr().out == f"{path}: fetched\nTo use it: --data tiny --data-dir {to}\n"
    assert load_dataset("tiny", to).labels.tolist() == [3, 4]
    assert fetch_dataset("tiny", to) == {str(path): "there"}
    path.write_bytes(b"mine")
    assert run("data", "tiny", "--to", str(to)) == 2
    assert f"{path}: not the published file" in capsys.readouterr().err
    assert path.read_bytes() == b"mine"


def test_without_a_network_the_error_says_what_to_do(tiny, capsys):
    (tiny / "place" / "file").unlink()
    assert run("data", "tiny", "--to", str(tiny / "to")) == 1
    message = capsys.readouterr().err
    assert "tiny: test_batch.bin could not be fetched" in message
    assert f"put these into {tiny / 'to'}/tiny" in message
    assert f"{(tiny / 'place' / 'file').as_uri()}\n    SHA-256: " in message


def test_the_list_and_wrong_arguments(capsys):
    assert run("data") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names())
    assert [row["name"] for row in overview()] == names()
    assert fetch_dataset("digits", "nowhere") == {}
    assert run("data", "mnist") == 2
    assert "NAME and --to DIR" in capsys.readouterr().err
    assert run("data", "mnsit", "--to", "x") == 2
    assert "'mnist'" in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_published_checksums_are_those_of_the_real_files(data_dir, name):
    assert set(fetch_dataset(name, data_dir).values()) == {"there"}
