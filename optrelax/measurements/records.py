"""Journals of measurements: JSON lines, one a finished piece of work under its key, so that none is done twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optrelax.output.json_lines import JsonLines

__all__ = ["Records"]

_FORMAT = "optrelax series journal 2"


class Records:
    """Finished pieces of work by key; on disk as soon as `put` returns, where there is a path."""

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: Mapping[str, object]) -> None:
        """Open or make the journal at `path`; None keeps everything in memory.

        fingerprint: JSON-ready, what decides every piece of work alike; keys say the rest.
        Raises ValueError for a file that is no such journal, is damaged, has another fingerprint, or is
        in use by another process.
        """
        self._found: dict[str, dict[str, object]] = {}
        self._lines: JsonLines | None = None
        if path is None:
            return
        header = {"format": _FORMAT, "fingerprint": dict(fingerprint)}
        self._lines = JsonLines(path, header, "no journal of a series")
        try:
            self._read(Path(path), json.loads(json.dumps(header)))
        except BaseException:
            self._lines.close()
            raise

    def get(self, key: Mapping[str, object]) -> dict[str, Any] | None:
        """What was stored under a key; None where nothing was."""
        return self._found.get(_text(key))

    def put(self, key: Mapping[str, object], values: Mapping[str, object]) -> None:
        """Store JSON-ready values; NaN and infinities are refused."""
        self._found[_text(key)] = dict(values)
        self._append({"key": dict(key), "values": dict(values)})

    def _append(self, record: Mapping[str, object]) -> None:
        if self._lines is not None:
            self._lines.append(record)

    def _read(self, path: Path, header: Mapping[str, Any]) -> None:
        assert self._lines is not None
        lines = self._lines.records
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
