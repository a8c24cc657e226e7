"""Every example runs, in a process of its own, and says what it should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str) -> str:
    """Standard output of an example, warnings being errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_your_own_loop():
    output = run("your_own_loop.py", "--epochs", "8")
    assert "can be bounded: ok" in output
    assert float(re.search(r"differ by at most (\S+)", output)[1]) < 1e-4
    certified = float(re.search(r"certified ([\d.]+) %", output)[1])
    accuracy = float(re.search(r"accuracy ([\d.]+) %", output)[1])
    assert 50 < certified < accuracy


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_a_short_story(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 100
    assert lines[0].startswith('"""')


def test_every_example_is_run_here():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}
