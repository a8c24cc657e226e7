"""Docstrings are plain text: shapes such as [*batch, k] must not turn into emphasis, nor lines run together."""

import re
from typing import Any

import griffe

# A line that opens with a word and a colon (Sound: ..., labels: ...) begins anew.
_ENTRY = re.compile(r"^[A-Za-z_][\w, ]{0,40}: ")


class PlainText(griffe.Extension):
    """Escapes what Markdown would take for markup, outside of code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object read; changes its docstring."""
        if obj.docstring is not None:
            obj.docstring.value = escaped(obj.docstring.value)


def escaped(text: str) -> str:
    """The same text as Markdown. Backquotes and blocks indented after an empty line stay as they are."""
    lines = []
    code = False
    previous = ""
    for line in text.splitlines():
        if not previous.strip():
            code = line.startswith("    ")
        previous = line
        if code or not line.strip():
            lines.append(line)
            continue
        parts = re.split(r"(`[^`]*`)", line.strip())
        plain = "".join(p if p.startswith("`") else re.sub(r"([\\*_\[\]<>|#])", r"\\\1", p) for p in parts)
        if _ENTRY.match(line) and lines and lines[-1].strip():
            lines[-1] += "  "  # a hard break
        lines.append(plain)
    return "\n".join(lines)
