"""The published files of the data sets: where they may be had and what they must hold.

Nothing fetched is unpickled or run: a file is compared with its SHA-256 before it gets its name, and of an archive
only the files that are named here are taken.
"""

import hashlib
import http.client
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from optrelax.output.files import replacing

__all__ = ["FetchError", "Source", "fetch_source", "is_whole", "sources_text"]

FetchProgress = Callable[[str, int, int], None]  # the file, bytes so far, bytes in all

_CHUNK = 1 << 20


class FetchError(OSError):
    """A file could not be had from any of its places."""


@dataclass(frozen=True, slots=True)
class Source:
    """One published file."""

    files: tuple[str, ...]
    """What is kept of it: its own name, or the members of a tar archive."""
    urls: tuple[str, ...]
    """The same file in several places, the first one that answers is taken."""
    sha256: str
    """Of the file; of a gzip file, of what is in it, as mirrors pack anew."""
    size: int
    """Bytes of what the checksum is of."""
    packing: Literal["plain", "gzip", "tar"] = "plain"


def fetch_source(source: Source, folder: Path, progress: FetchProgress | None = None) -> list[Path]:
    """Write the files of a source into a folder: their paths.

    Raises FetchError where no place answers with a file of the right checksum, saying what each answered.
    """
    paths = [folder / name for name in source.files]
    folder.mkdir(parents=True, exist_ok=True)
    answers = []
    for url in source.urls:
        try:
            if source.packing == "tar":
                with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as place:
                    _download(source, url, Path(place) / "archive", progress)
                    _unpack(Path(place) / "archive", paths)
            else:
                with replacing(paths[0]) as whole:
                    _download(source, url, whole, progress)
            return paths
        except (OSError, http.client.HTTPException, ValueError, zlib.error, tarfile.TarError) as error:
            answers.append(f"{url}: {error}")
    raise FetchError("\n  ".join([f"{source.files[0]} could not be fetched:", *answers]))


def is_whole(source: Source, path: Path) -> bool:
    """Whether a file on disk holds what a source publishes; what is gzipped by its ending is unpacked on the way."""
    with path.open("rb") as stream:
        chunks = _chunks(stream.read)
        digest, size = hashlib.sha256(), 0
        try:
            for chunk in _unpacked(chunks, source.size) if path.suffix == ".gz" else chunks:
                digest.update(chunk)
                size += len(chunk)
        except (ValueError, zlib.error):
            return False
    return size == source.size and digest.hexdigest() == source.sha256


def sources_text(sources: tuple[Source, ...]) -> str:
    """For people: every file with its places and its checksum."""
    lines = []
    for source in sources:
        what = {"plain": "", "gzip": " unpacked", "tar": f", which holds {', '.join(source.files)}"}[source.packing]
        lines += [*(f"  {url}" for url in source.urls), f"    SHA-256{what}: {source.sha256}"]
    return "\n".join(lines)


def _download(source: Source, url: str, part: Path, progress: FetchProgress | None) -> None:
    """The file, unpacked if it is gzipped, to `part`; ValueError for another size or checksum."""
    digest, size = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=30) as answer, part.open("wb") as out:
        chunks = _unpacked(_chunks(answer.read), source.size) if source.packing == "gzip" else _chunks(answer.read)
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            if size > source.size:
                break
            out.write(chunk)
            if progress is not None:
                progress(source.files[0], size, source.size)
    if size != source.size or digest.hexdigest() != source.sha256:
        more = "more than " if size > source.size else ""
        raise ValueError(f"expected {source.size} bytes of SHA-256 {source.sha256}, got {more}{min(size, source.size)}")


def _unpack(packed: Path, paths: list[Path]) -> None:
    """Write the members of an archive that have the names of the paths, wherever they are in it."""
    wanted = {path.name: path for path in paths}
    with tarfile.open(packed) as archive:
        for member in archive:
            path = wanted.pop(Path(member.name).name, None)
            content = None if path is None else archive.extractfile(member)
            if path is None or content is None:
                continue
            with content, replacing(path) as whole, whole.open("wb") as out:
                for chunk in _chunks(content.read):
                    out.write(chunk)
    if wanted:
        raise ValueError(f"expected {', '.join(wanted)} in the archive")


def _chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    return iter(lambda: read(_CHUNK), b"")


def _unpacked(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """What is in a gzip file, not much more than `size` bytes of it; ValueError where it is cut short."""
    gunzip = zlib.decompressobj(wbits=31)
    for chunk in chunks:
        while chunk:
            yield gunzip.decompress(chunk, _CHUNK)
            chunk = gunzip.unconsumed_tail
    if not gunzip.eof:
        raise ValueError("the gzip file is cut short")
