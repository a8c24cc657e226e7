"""Files of JSON records, one a line: locked, only ever appended to, each line with a checksum of its own.

A process may be killed, or the disk be full, at any moment: a line is then whole or the last and cut short. That one
is cut off when the file is next opened to be written, and what it said is done again. A line that is damaged
elsewhere is an error, never another record.
"""

from __future__ import annotations

import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optrelax.output.locks import Lock

__all__ = ["JsonLines", "json_ready", "lock_of", "read_lines"]

_CHECK = ', "check": "'  # how every line ends: this, eight digits, and the two marks that close it
_WRITING = threading.Lock()


def lock_of(path: str | os.PathLike[str]) -> Lock:
    """The lock that whoever writes the file holds."""
    return Lock(Path(path).with_name(f".{Path(path).name}.lock"), path)


class JsonLines:
    """An open file of records; a context manager.

    The first record is a header that says what the file is: {"format": ...} and more.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, object], what: str) -> None:
        """Open the file, or make it with this header.

        header: JSON-ready, its first entry "format"; a file of another format is refused, the rest of the header is
        for the caller to compare.  what: for that message, such as "not a certification journal".
        Raises ValueError for that, for a damaged line, and for a file that another process writes.
        """
        self.path = Path(path)
        self._lock = lock_of(path)
        self._file = -1
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self.records = self._found(header, what)
            """What the file held when it was opened, the header first."""
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and let others write it; again is nothing."""
        handle, self._file = getattr(self, "_file", -1), -1
        if handle >= 0:
            os.close(handle)
        if hasattr(self, "_lock"):
            self._lock.close()

    def append(self, record: Mapping[str, object]) -> None:
        """Add a record, JSON-ready: whoever kills the process now does not lose it.  OSError where it does not fit."""
        line = _line(record)
        with _WRITING:
            size = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, line)
                if written < len(line):  # the rest says why: a full disk, or a limit
                    os.write(self._file, line[written:])
            except OSError:
                os.ftruncate(self._file, size)  # else the next line would be joined to what is there of this one
                raise

    def _found(self, header: Mapping[str, object], what: str) -> list[Any]:
        content = self.path.read_bytes()
        begin = json.dumps({"format": header["format"]})[:-1].encode()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and (begin.startswith(content) or content.startswith(begin)):
            os.ftruncate(self._file, 0)  # empty, or killed while the header was written
            self.append(header)
            return [json.loads(json.dumps(header))]
        # What is not ours is refused before anything of it is cut off.
        if (found := _format(whole)) not in (None, header["format"]):
            version = f" of this version but {found!r}" if isinstance(found, str) else ""
            raise ValueError(f"resume: {self.path} is {what}{version}; remove it, or name a new file")
        records = _records(self.path, whole)
        if not records:
            raise ValueError(f"resume: {self.path} is {what}; remove it, or name a new file")
        if whole != content:
            os.ftruncate(self._file, len(whole))
        return records


def read_lines(path: Path) -> list[Any]:
    """The records of a file that another process may be writing: a last line that is cut short is left out.

    Raises ValueError for a damaged line elsewhere.
    """
    content = path.read_bytes()
    return _records(path, content[: content.rfind(b"\n") + 1])


def json_ready(value: object, odd: Callable[[float], object]) -> Any:
    """What JSON can hold of a value: `odd(x)` in place of NaN and infinities, for which it has no word."""
    match value:
        case float() if not math.isfinite(value):
            return odd(value)
        case Mapping():
            return {str(key): json_ready(item, odd) for key, item in value.items()}
        case list() | tuple():
            return [json_ready(item, odd) for item in value]
    return value


def _line(record: Mapping[str, object]) -> bytes:
    text = json.dumps(record, allow_nan=False)[:-1]
    return f'{text}{_CHECK}{_sum(text)}"}}\n'.encode()


def _sum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _format(content: bytes) -> object:
    """What the first line says that the file is, whatever its checksum; None where it is no JSON."""
    try:
        first = json.loads(content.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return None
    return first.get("format", False) if isinstance(first, dict) else False


def _records(path: Path, content: bytes) -> list[object]:
    records = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            text, found, check = line.decode().rpartition(_CHECK)
            if not found or check != f'{_sum(text)}"}}':
                raise ValueError("its checksum is missing or of another text")
            records.append(json.loads(text + "}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"resume: {path}, line {number} is damaged: {error}; remove that line (what it held is done again), or "
                "the file to start anew"
            ) from error
    return records
