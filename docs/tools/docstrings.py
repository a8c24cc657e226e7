"""Docstrings as Markdown: sections as lists, examples as code, all else plain text.

Shapes such as [*batch, k] must not turn into emphasis, nor lines run together.
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Returns|Raises|Example):$")
# A line that opens with a word and a colon (Sound: ..., labels: ...) begins anew.
_ENTRY = re.compile(r"^([\w*][\w, *]{0,60}): ")


class Sections(griffe.Extension):
    """Docstrings of every object read, as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object read; changes its docstring."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The same text with sections set off from what stands between them."""
    parts = (escaped(body) if name is None else section(name, body) for name, body in sections(text.splitlines()))
    return "\n\n".join(parts)


def sections(lines: list[str]) -> Iterator[tuple[str | None, list[str]]]:
    """Names of sections with their lines, no longer indented; None for the text between them."""
    name: str | None = None
    body: list[str] = []
    for line in lines:
        found = _SECTION.match(line)
        if found or (name is not None and line.strip() and not line.startswith("    ")):
            yield name, body
            name, body = (found[1], []) if found else (None, [line])
        else:
            body.append(line.removeprefix("    ") if name is not None else line)
    yield name, body


def section(name: str, body: list[str]) -> str:
    """An example as code; arguments and errors as a list, an entry a line that is not indented."""
    body = "\n".join(body).strip("\n").splitlines()
    if name == "Example":
        return "\n".join(["**Example**", "", "```pycon", *body, "```"])
    if name == "Returns":
        return f"**Returns**  \n{escaped(body)}"
    entries: list[str] = []
    for line in body:
        found = _ENTRY.match(line)
        if found:
            names = ", ".join(f"`{one}`" for one in found[1].split(", "))
            entries.append(f"- {names}: {plain(line[found.end() :])}")
        else:
            entries.append(f"  {plain(line.strip())}")
    return "\n".join([f"**{name}**", "", *entries])


def escaped(body: list[str]) -> str:
    """Text as Markdown. Blocks indented after an empty line stay as they are."""
    lines: list[str] = []
    code = False
    previous = ""
    for line in body:
        if not previous.strip():
            code = line.startswith("    ")
        previous = line
        if code or not line.strip():
            lines.append(line)
            continue
        if _ENTRY.match(line) and lines and lines[-1].strip():
            lines[-1] += "  "  # a hard break
        lines.append(plain(line.strip()))
    return "\n".join(lines)


def plain(text: str) -> str:
    """A line without what Markdown would take for markup, but backquotes."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_\[\]<>|#])", r"\\\1", p) for p in parts)
