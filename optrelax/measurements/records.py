"""Journals of measurements: JSON lines, one a finished piece of work under its key, so that none is done twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optrelax.certification.journals import read_lines

__all__ = ["Records"]

_FORMAT = "optrelax series journal 1"


class Records:
    """Finished pieces of work by key; on disk as soon as `put` returns, where there is a path."""

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: Mapping[str, Any]) -> None:
        """Open or make the journal at `path`; None keeps everything in memory.

        fingerprint: JSON-ready, what decides every piece of work alike; keys say the rest.
        Raises ValueError for a file that is no such journal, is damaged, or has another fingerprint.
        """
        self._found: dict[str, dict[str, Any]] = {}
        self._path = None if path is None else Path(path)
        header = {"format": _FORMAT, "fingerprint": dict(fingerprint)}
        if self._path is None:
            return
        if self._path.exists() and self._path.stat().st_size:
            self._read(json.loads(json.dumps(header)))
        else:
            self._append(header)

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was stored under a key; None where nothing was."""
        return self._found.get(_text(key))

    def put(self, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Store JSON-ready values; NaN and infinities are refused."""
        self._found[_text(key)] = dict(values)
        self._append({"key": dict(key), "values": dict(values)})

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        line = json.dumps(record, allow_nan=False) + "\n"
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line)

    def _read(self, header: Mapping[str, Any]) -> None:
        path = self._path
        assert path is not None
        lines = read_lines(path)
        if not lines or not isinstance(lines[0], dict) or lines[0].get("format") != _FORMAT:
            raise ValueError(f"resume: {path} is no journal of a series; choose another folder")
        was, now = lines[0].get("fingerprint"), header["fingerprint"]
        was = was if isinstance(was, dict) else {}
        changed = [
            f"{name} was {was.get(name)!r}, is {now.get(name)!r}"
            for name in sorted({*was, *now})
            if was.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"resume: {path} is the journal of another series ({'; '.join(changed)}); choose another folder, or "
                "repeat that series' settings"
            )
        for number, record in enumerate(lines[1:], 2):
            try:
                self._found[_text(record["key"])] = dict(record["values"])
            except (TypeError, KeyError, ValueError) as error:
                raise ValueError(f"resume: {path}, line {number} is no measurement: {error}") from error


def _text(key: Mapping[str, Any]) -> str:
    """A key as text, whatever the order of its parts."""
    return json.dumps(key, sort_keys=True)
