"""Runs the code of pages as a reader would, in a process of its own: python tests/pages.py PAGE... > results.json

Blocks of one page share a namespace and a folder, in which DATA holds a small MNIST. What a block prints, and the error
it ends with, are written as JSON: page -> one {"code", "shown", "printed", "error"} a block. `shown` is the text block
after it in the page, None where there is none.
"""

import contextlib
import io
import json
import os
import re
import shlex
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str | None]]:
    """Language and content of every fenced block, and the text block that follows it."""
    found = list(_BLOCK.finditer(page))
    result = []
    for i, match in enumerate(found):
        after = found[i + 1] if i + 1 < len(found) else None
        adjoining = after is not None and after[1] == "text" and not page[match.end() : after.start()].strip()
        result.append((match[1], match[2], after[2] if after is not None and adjoining else None))
    return result


def write_mnist(folder: Path, count: int = 120) -> None:
    """The four files of MNIST with random images."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        images = generator.integers(0, 256, (count, 28, 28), np.uint8)
        labels = generator.integers(0, 10, count).astype(np.uint8)
        for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
            header = struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim, *array.shape)
            (folder / name).write_bytes(header + array.tobytes())


def run_block(language: str, code: str, namespace: dict[str, Any]) -> dict[str, str | None]:
    """What it printed, and how it ended."""
    out, err = io.StringIO(), io.StringIO()
    error = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if language == "python":
                exec(compile(code, "<page>", "exec"), namespace)
            else:
                from optrelax.cli import main

                main(shlex.split(code)[1:])
        except SystemExit:
            error = err.getvalue()
        except Exception as raised:  # noqa: BLE001, whatever it is, it is compared with the page
            error = f"{type(raised).__name__}: {raised}"
    return {"printed": out.getvalue(), "error": error}


def run_page(path: Path) -> list[dict[str, str | None]]:
    """Every Python block, and every command whose error the page shows."""
    namespace: dict[str, Any] = {"__name__": "page"}
    results: list[dict[str, str | None]] = []
    for language, code, shown in blocks(path.read_text()):
        fails = language == "console" and shown is not None and shown.startswith("error: ")
        if language == "python" or fails:
            results.append({"code": code, "shown": shown, **run_block(language, code, namespace)})
    return results


def main() -> None:
    """Run the pages named on the command line."""
    os.environ.pop("OPTRELAX_DATA", None)
    results = {}
    for page in sys.argv[1:]:
        path = Path(page).resolve()
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            write_mnist(Path("DATA/mnist"))
            results[path.name] = run_page(path)
    print(json.dumps(results))  # noqa: T201


if __name__ == "__main__":
    main()
