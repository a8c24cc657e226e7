"""Help that fits a screen: one line an option, in groups; `-h` shows what most calls need, `--help` everything.

Typer's own boxes take three lines an option at 80 columns. Groups are the options' `rich_help_panel`.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = ["command_page", "group_page"]

GROUPS = ("Network", "Data", "Region", "Bound", "Attack", "Recipe", "Lines", "Measure", "Run", "Output")
"""In the order of the help; an option without one is of the last but one."""
_OTHER = "Run"
_LEAST_TEXT = 24  # columns of an option's text before it moves to a line of its own


def command_page(command: Any, ctx: Any, examples: Sequence[str], common: Sequence[str] | None) -> str:
    """The help of one command.  common: names of the options that the short page shows; None for the full page."""
    parameters = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    options = [p for p in parameters if p.param_type_name == "option"]
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    shown = options if common is None else [p for p in options if p.required or p.name in common]
    usage = " ".join([ctx.command_path, *(_argument(p) for p in arguments), "[OPTIONS]"])
    about, _, rest = (command.help or "").strip().partition("\n\n")
    lines = [f"Usage: {usage}", *_wrapped(about), *(_wrapped(rest) if common is None else [])]
    grouped = _grouped(arguments, shown)
    width = max(map(len, (row[0] for rows in grouped.values() for row in rows)), default=0)
    for title, rows in grouped.items():
        lines += [f"{title}:", *(line for row in rows for line in _row(*row, width))]
    if examples:
        lines += ["Examples:", *(f"  {example}" for example in examples)]
    if common is not None and len(options) > len(shown):
        lines.append(f"{len(options) - len(shown)} options more: {ctx.command_path} --help")
    return "\n".join(lines) + "\n"


def group_page(group: Any, ctx: Any) -> str:
    """The help of a group of commands: a line each."""
    commands = {name: group.get_command(ctx, name) for name in group.list_commands(ctx)}
    width = max(map(len, commands), default=0)
    lines = [f"Usage: {ctx.command_path} COMMAND [OPTIONS]", *_wrapped((group.help or "").strip()), "Commands:"]
    for name, command in commands.items():
        first = (command.help or "").strip().partition("\n\n")[0]
        lines += _row(name, " ".join(first.split()), width)
    options = [p for p in group.params if p.param_type_name == "option" and p.name != "help"]
    lines += ["Options:" if options else "", *(line for p in options for line in _row(_names(p), p.help or "", width))]
    lines.append(f"`{ctx.command_path} COMMAND -h` shows what most calls need, --help every option.")
    return "\n".join(line for line in lines if line) + "\n"


def _grouped(arguments: Iterable[object], options: Iterable[Any]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for p in (*arguments, *sorted(options, key=lambda p: not p.required)):
        title = getattr(p, "rich_help_panel", None) or _OTHER
        name = _argument(p) if p.param_type_name == "argument" else _names(p)
        found.setdefault(title, []).append((name, _text(p)))
    return {title: found[title] for title in sorted(found, key=_place)}


def _place(title: str) -> tuple[int, str]:
    return (GROUPS.index(title) if title in GROUPS else len(GROUPS), title)


def _argument(p: Any) -> str:
    name = p.metavar or str(p.name).upper()
    return name if p.required else f"[{name}]"


def _names(p: Any) -> str:
    """Every name of an option, a flag with its negation; of singular and plural the plural, which takes several."""
    if p.is_flag:
        return " / ".join([", ".join(p.opts), *p.secondary_opts])
    names = [name for name in p.opts if not (p.multiple and f"{name}s" in p.opts)]
    kind = p.metavar or "N"  # whatever is no number says what it takes
    return f"{', '.join(names)} {kind}" + ("..." if p.multiple and names[-1].endswith("s") else "")


def _text(p: Any) -> str:
    """What a parameter is, and its default."""
    return f"{p.help or ''}{_default(p) if p.param_type_name == 'option' else ''}"


def _default(p: Any) -> str:
    if p.required:
        return " (required)"
    if isinstance(p.show_default, str):
        return f" ({p.show_default})"
    if p.show_default is False or p.default is None or (p.is_flag and not p.secondary_opts):
        return ""
    if p.is_flag:
        return f" ({(p.opts if p.default else p.secondary_opts)[0].lstrip('-')})"
    several = isinstance(p.default, (list, tuple))
    if several and not p.default:
        return ""
    return f" ({' '.join(_plain(v) for v in p.default) if several else _plain(p.default)})"


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _columns() -> int:
    return min(100, shutil.get_terminal_size().columns)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _columns(), break_long_words=False, break_on_hyphens=False)


def _row(name: str, text: str, width: int) -> Iterator[str]:
    """A name and its text in two columns; a text that does not fit goes on below itself."""
    begin = f"  {name:<{width}}  "
    room = max(_LEAST_TEXT, _columns() - len(begin))
    first, *rest = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
    yield f"{begin}{first}".rstrip()
    yield from (" " * len(begin) + line for line in rest)
