"""The command line `optrelax`: one module a command, one line here for each.

A command's module imports little: plots, tables and solvers are imported by the functions that use them, so that
help and completion do not wait for them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from optrelax.cli.application import guarded, run

__all__ = ["main"]

# Every command, in the order of the help: its module, which registers it with `@command`.
_COMMANDS = (
    "demo",
    "training",
    "sweeping",
    "certifying",
    "verifying",
    "comparing",
    "measuring",
    "continuity",
    "loss_surfaces",
    "series",
    "listing",
    "fetching",
    "papers",
    "information",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 (bad input), 1 (errors during work) or 130 (Ctrl-C)."""
    with guarded():
        for name in _COMMANDS:
            importlib.import_module(f"optrelax.cli.{name}")
        run(list(sys.argv[1:] if arguments is None else arguments))
