"""The text of a VNN-LIB file: its parenthesised lists, its numbers and its indices."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

__all__ = ["Expression", "expressions", "joined_indices", "parse_decimal", "parse_integers", "read_text", "shown"]

_MOST_BYTES = 2**28
_MOST_DEPTH = 64
_TOKEN = re.compile(
    r"(?P<skip>\s+|;[^\n]*)|(?P<text>\"[^\"\n]*\")|(?P<version><\d+\.\d+>)"
    r"|(?P<entry>[A-Za-z_]\w*\[[\d\s,]*\])|(?P<shape>\[[\d\s,]*\])"
    r"|(?P<name>[A-Za-z_][\w-]*)|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))"
    r"|(?P<sign><=|>=|==|!=|[()<>=+*/-])"
)

Expression = str | list[object]


def read_text(file: Path) -> str:
    """The text, unpacked where it is packed.  ValueError for what is none."""
    try:
        with file.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.open(raw) if packed else raw as content:
                found = content.read(_MOST_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"expected a whole gzip file, got one that fails: {error}") from error
    if len(found) > _MOST_BYTES:
        raise ValueError(f"holds more than {_MOST_BYTES} bytes")
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a VNN-LIB text, got bytes that are none: {error}") from error


def expressions(text: str) -> Iterator[tuple[int, list[object]]]:
    """Every top-level list with the line that it begins in."""
    stack: list[list[object]] = []
    place, line, begun = 0, 1, 1
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"line {line}: unexpected {text[place : place + 20]!r}")
        token, place = match[0], match.end()
        if match.lastgroup == "skip":
            line += token.count("\n")
        elif token == "(":
            begun = begun if stack else line
            stack.append([])
            if len(stack) > _MOST_DEPTH:
                raise ValueError(f"line {line}: nested more than {_MOST_DEPTH} deep")
        elif not stack:
            raise ValueError(f"line {line}: unexpected {token!r} outside parentheses")
        elif token == ")":
            done = stack.pop()
            if stack:
                stack[-1].append(done)
            else:
                yield begun, done
        else:
            stack[-1].append(token)
    if stack:
        raise ValueError(f"line {begun}: a parenthesis is never closed")


def parse_decimal(token: str) -> Fraction:
    """The decimal itself; ValueError for one that no float comes near."""
    if len(token) > 1100 or not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", token):
        raise ValueError(f"{shown(token)} is no number of at most 1,100 digits and an exponent of 3")
    return Fraction(token)


def parse_integers(token: str, least: int = 0) -> tuple[int, ...]:
    """The numbers of "[1, 5]"."""
    parts = token.strip("[] \n\t").split(",") if token.strip("[] \n\t") else []
    if not all(re.fullmatch(r"\s*\d{1,9}\s*", part) and int(part) >= least for part in parts) or len(parts) > 16:
        raise ValueError(f"{shown(token)} must be numbers >= {least} in brackets")
    return tuple(int(part) for part in parts)


def joined_indices(parts: list[object]) -> list[Any]:
    """With an index that stands apart from its name put to it: X [0] as X[0]."""
    found: list[object] = []
    for part in parts:
        if isinstance(part, str) and part.startswith("[") and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


def shown(expression: Any) -> str:
    """An expression for a message, shortened."""
    text = str(expression) if isinstance(expression, str) else f"({' '.join(map(shown, expression[:5]))})"
    return text if len(text) <= 60 else text[:57] + "..."
