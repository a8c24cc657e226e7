"""What all commands share: the application, how a command registers, and what errors become."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from optrelax.cli.help_pages import command_page, group_page

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "Group",
    "WorkError",
    "app",
    "command",
    "fail",
    "guarded",
    "print_json",
    "run",
    "say",
    "show_error",
    "show_table",
    "stderr",
    "stdout",
]

EXIT_WORK, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130

Function = TypeVar("Function", bound=Callable[..., object])


class WorkError(RuntimeError):
    """The input was fine and the work was not: exit code 1."""


class _Command(TyperCommand):
    """A command whose list options take several values at once: `--relaxations box crown` is one option twice."""

    examples: Sequence[str] = ()
    common: Sequence[str] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "-h" in args:
            typer.echo(command_page(self, ctx, self.examples, self.common), nl=False)
            raise typer.Exit
        spread = {
            name
            for parameter in self.params
            if getattr(parameter, "multiple", False)
            for name in parameter.opts
            if name.startswith("--") and name.endswith("s")
        }
        return super().parse_args(ctx, _expanded([_HOME.sub(_home, arg) for arg in args], spread))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(command_page(self, ctx, self.examples, None))


class Group(TyperGroup):
    """A group of commands with the help of this application."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--help" if arg == "-h" and i == 0 else arg for i, arg in enumerate(args)])

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(group_page(self, ctx))


_HOME = re.compile(r"^(--[\w-]+=)?~(?=/|$)")


def _home(found: re.Match[str]) -> str:
    """A folder that the shell leaves as it is: `--out=~/runs`."""
    return (found[1] or "") + os.path.expanduser("~")


app = typer.Typer(
    name="optrelax",
    help="Convex relaxations of neural networks: certify, compare, train.",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _expanded(args: list[str], options: set[str]) -> list[str]:
    """`--names a b` as `--names a --names b`; a value that starts with a dash ends the list."""
    result: list[str] = []
    current = None
    fresh = False
    for i, arg in enumerate(args):
        if arg == "--":
            return result + args[i:]
        if arg.startswith("-"):
            current, fresh = (arg, True) if arg in options else (None, False)
            result.append(arg)
        elif current is None or fresh:
            fresh = False
            result.append(arg)
        else:
            result += [current, arg]
    return result


def command(
    name: str, group: typer.Typer = app, *, common: Sequence[str] = (), examples: Sequence[str] = ()
) -> Callable[[Function], Function]:
    """Decorator: register a function as the command `name`; options whose name ends in s take several values.

    A parameter whose type is a dataclass is a set of options, its fields.
    group: of commands, which has been added to `app`.  common: parameters that the short help (-h) shows beside the
    required ones.  examples: whole command lines.
    """
    kind = type("Command", (_Command,), {"common": tuple(common), "examples": tuple(examples)})

    def register(function: Function) -> Function:
        group.command(name, cls=kind)(_with_options(function))
        return function

    return register


def _with_options(function: Callable[..., object]) -> Callable[..., object]:
    """The function with the fields of its option sets as parameters of its own, which is what typer reads."""
    kinds = get_type_hints(function, include_extras=True)
    sets: dict[str, Any] = {name: kind for name, kind in kinds.items() if is_dataclass(kind)}
    if not sets:
        return function
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in sets:
            parameters += _parameters(sets[parameter.name])
        else:
            kept = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kinds[parameter.name])
            parameters.append(kept)

    def flat(**given: object) -> object:
        made = {n: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for n, kind in sets.items()}
        return function(**made, **given)

    flat.__doc__ = function.__doc__
    flat.__annotations__ = {p.name: p.annotation for p in parameters}
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return flat


def _parameters(kind: Any) -> list[inspect.Parameter]:
    """The fields of a set of options."""
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f), annotation=hints[f.name])
        for f in fields(kind)
    ]


def _default(field: Field[object]) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _version(wanted: bool) -> bool:
    if wanted:
        from optrelax import __version__

        typer.echo(__version__)
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Convex relaxations of neural networks, from intervals to exact layerwise linear programs.

    Exit codes: 0 done; 2 bad input; 1 errors during work; 130 Ctrl-C. OPTRELAX_TRACEBACK=1 shows where an error
    arose.
    """
    from optrelax.kernels.pages import keep_pages

    keep_pages()


def stdout() -> Console:
    """For tables and their captions; in a pipe or a file a table keeps to COLUMNS, else it may take its full width."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    return Console(file=sys.stdout, width=width, soft_wrap=True)


def say(*lines: str) -> None:
    """Lines on standard output, as they are."""
    for line in lines:
        stdout().print(line, markup=False, highlight=False, soft_wrap=True)


def show_table(frame: pl.DataFrame, decimals: Mapping[str, int] | None = None, title: str | None = None) -> None:
    """A table for people.  decimals: by column."""
    from optrelax.output.tables import rich_table

    stdout().print(rich_table(frame, title=title, decimals=decimals or {}))


def print_json(value: object) -> None:
    """A JSON-ready value, and nothing else, on standard output."""
    from optrelax.output.tables import json_text

    typer.echo(json_text(value))


def stderr() -> Console:
    """For progress and messages."""
    return Console(file=sys.stderr, soft_wrap=True)


def show_error(message: str) -> None:
    """One message on stderr, as it is."""
    stderr().print("error:", message, style="bold red", markup=False, highlight=False)


def fail(message: str) -> typer.Exit:
    """What to raise after work that went wrong: exit code 1, with a message."""
    show_error(message)
    return typer.Exit(EXIT_WORK)


# Of typer's public errors the one whose base is that of everything wrong with a command line.
_UsageError: Any = typer.BadParameter.__base__


def run(arguments: list[str]) -> None:
    """The application on these arguments; what is wrong with them is one line, without typer's box."""
    try:
        code = app(args=arguments, prog_name="optrelax", standalone_mode=False)
    except _UsageError as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if message.startswith("Usage: "):  # called without arguments: the help
            typer.echo(message)
        else:
            show_error(message.replace("Value error, ", ""))
        sys.exit(EXIT_INPUT)
    except typer.Abort:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Errors as one clear line and an exit code; what is none of them is a fault of ours and keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away; the rest of it must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_WORK)
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        _report(error, EXIT_INPUT)
    except (WorkError, OSError, MemoryError, ArithmeticError, RuntimeError) as error:
        _report(error, EXIT_WORK)


def _report(error: BaseException, code: int) -> None:
    if os.environ.get("OPTRELAX_TRACEBACK"):
        traceback.print_exception(error)
    show_error(_line(error))
    sys.exit(code)


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
