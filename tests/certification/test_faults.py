"""Certification killed at any moment, by two at once, on a full disk: nothing lost, nothing false.

Each part runs in a process of its own that forks. By hand, for longer: `python tests/certification/test_faults.py 200`.
"""

import functools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import optrelax as ox
from optrelax.certification.journals import Journal
from optrelax.cli import main as main_command
from optrelax.output import json_lines
from optrelax.output.json_lines import JsonLines, lock_of, read_lines
from optrelax.output.locks import Lock

COUNT = 24


@functools.cache
def network() -> ox.Network:
    """Captured once: children inherit it."""
    return ox.capture(ox.models.fc(4, 10, 8, 3, seed=10))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(COUNT, 4, generator=torch.Generator().manual_seed(1))
    labels = network()(x).argmax(1)
    return x, torch.where(torch.arange(COUNT) % 8 == 7, (labels + 1) % 3, labels)


def certify(path: Path, pause: float = 0.0) -> list[dict[str, Any]]:
    """The rows of a run that goes on from its journal, without their times."""
    report = ox.certify(network(), data(), 0.06, relaxation=["box", "crown"], batch_size=3,
                        resume=path, progress=lambda progress: time.sleep(pause))  # fmt: skip
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in report.examples.to_dicts()]


def forked(work: Callable[[], None], kill_when: Callable[[], bool] = lambda: False) -> int:
    """Exit code of a child that does some work; it is killed when told so."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except OSError:
            os._exit(28)
        finally:
            traceback.print_exc()
            os._exit(1)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if kill_when():
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.0005)


def finish(folder: Path) -> None:
    (folder / "result.json").write_text(json.dumps(certify(folder / "journal.jsonl", pause=0.004)))


def sound(folder: Path, whole: list[dict[str, Any]]) -> int:
    """How many examples a journal holds, all of them as the whole run has them; readable without its last line."""
    path = folder / "journal.jsonl"
    records = read_lines(path)[1:] if path.exists() else []
    true = {row["index"]: row for row in whole}
    for record in records:
        row = true[record["index"]]
        assert record["verdict"] == row["verdict"]
        assert record["lower"] == [row["lower:box"], row["lower:crown"]]
    return len(records)


def kill_at_random(count: int, seed: int) -> int:
    """Runs killed three times each at random moments; how many kills met a run at work."""
    torch.set_num_threads(1)
    certify(Path(tempfile.mkdtemp(), "first.jsonl"))  # everything is imported, and captured, before a child begins
    rng, folder, kills = random.Random(seed), Path(tempfile.mkdtemp()), 0
    whole = folder / "whole"
    whole.mkdir()
    assert forked(lambda: finish(whole)) == 0
    longest = (whole / "journal.jsonl").stat().st_size
    expected = json.loads((whole / "result.json").read_text())
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        done = 0
        for _ in range(3):
            journal, pause = place / "journal.jsonl", rng.uniform(0, 0.004)
            now = journal.stat().st_size if journal.exists() else 0
            size = rng.uniform(now, longest)  # of the journal, however fast the machine is

            def met(journal: Path = journal, size: float = size, pause: float = pause) -> bool:
                if not journal.exists() or journal.stat().st_size < size:
                    return False
                time.sleep(pause)
                return True

            kills += forked(lambda place=place: finish(place), met) == -signal.SIGKILL
            before, done = done, sound(place, expected)
            assert done >= before  # what was done once is never lost
        assert forked(lambda place=place: finish(place)) == 0
        assert json.loads((place / "result.json").read_text()) == expected
        assert len({record["index"] for record in read_lines(place / "journal.jsonl")[1:]}) == COUNT
    return kills


def fill_the_disk(folder: Path) -> None:
    """A limit on the size of files, met within a line, at its end and before the first one."""
    torch.set_num_threads(1)
    certify(Path(tempfile.mkdtemp(), "first.jsonl"))
    whole = folder / "whole"
    whole.mkdir()
    assert forked(lambda: finish(whole)) == 0
    expected = json.loads((whole / "result.json").read_text())
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    third = sum(map(len, lines[:3]))
    for number, size in enumerate((0, 1, 40, len(lines[0]) - 1, third - 1, third, third + 20)):
        place = folder / str(number)
        place.mkdir()

        def limited(size: int = size, place: Path = place) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            certify(place / "journal.jsonl")

        assert forked(limited) == 28, size
        content = (place / "journal.jsonl").read_bytes()
        assert not content or content.endswith(b"\n")
        sound(place, expected)
        assert forked(lambda place=place: finish(place)) == 0
        assert json.loads((place / "result.json").read_text()) == expected


def count_together(folder: Path, processes: int, times: int) -> None:
    """Processes that take turns at a counter that none may write while another does."""
    counter = folder / "counter"
    counter.write_text("0")

    def count() -> None:
        for _ in range(times):
            while True:
                try:
                    lock = Lock(folder / ".lock", folder)
                except ValueError:
                    continue
                with lock:
                    before = int(counter.read_text())
                    counter.write_text(str(before + 1))
                break

    children = []
    for _ in range(processes):
        child = os.fork()
        if not child:
            count()
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * processes
    assert int(counter.read_text()) == processes * times
    assert not (folder / ".lock").exists()


def in_a_process_of_its_own(call: str) -> None:
    script = f"from pathlib import Path; import test_faults; {call}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@forks
def test_a_run_killed_at_random_moments_loses_and_invents_nothing():
    in_a_process_of_its_own("assert test_faults.kill_at_random(4, seed=3) > 3")


@forks
def test_a_full_disk_leaves_whole_lines_and_the_run_goes_on(tmp_path):
    in_a_process_of_its_own(f"test_faults.fill_the_disk(Path({str(tmp_path)!r}))")


@forks
def test_one_process_at_a_time_holds_a_lock(tmp_path):
    in_a_process_of_its_own(f"test_faults.count_together(Path({str(tmp_path)!r}), 3, 40)")


# --- two at once ----------------------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path):
    """A process that holds the journal of a run; killed at the end, if not before."""
    script = (
        "import sys; from optrelax.output.json_lines import lock_of; "
        "lock = lock_of(sys.argv[1]); print('held', flush=True); sys.stdin.readline()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "journal.jsonl")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_second_process_is_told_who_holds_the_journal(other, tmp_path):
    path = tmp_path / "journal.jsonl"
    with pytest.raises(ValueError, match=rf"journal\.jsonl: in use by process {other.pid} on \S+ since 2\d\d\d-"):
        certify(path)
    assert not path.exists()
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / ".journal.jsonl.lock").exists()  # a dead process removes nothing, and bars nobody
    assert len(certify(path)) == COUNT
    assert [p.name for p in tmp_path.iterdir()] == ["journal.jsonl"]


def test_the_command_says_so_with_exit_code_2(other, tmp_path, capsys):
    ox.save(ox.models.fc(64, 8, 10, seed=0), tmp_path / "net.safetensors", input_shape=(1, 8, 8))
    arguments = ["certify", str(tmp_path / "net.safetensors"), "--data", "digits", "--eps", "0.1", "--subset", "2"]
    with pytest.raises(SystemExit) as done:
        main_command([*arguments, "--out", str(tmp_path)])
    assert done.value.code == 2
    assert f"in use by process {other.pid}" in capsys.readouterr().err
    other.communicate(b"\n")
    with pytest.raises(SystemExit) as done:
        main_command([*arguments, "--out", str(tmp_path)])
    assert not done.value.code


def test_within_a_process_a_journal_may_be_opened_again(tmp_path):
    """Each line is appended whole, wherever the others have come to."""
    path = tmp_path / "journal.jsonl"
    header = {"format": "test 1"}
    with JsonLines(path, header, "no test") as first, JsonLines(path, header, "no test") as second:
        for i in range(5):
            first.append({"first": "x" * i})
            second.append({"second": i})
    with JsonLines(path, header, "no test") as again:
        assert len(again.records) == 11


def test_a_short_write_is_taken_back(tmp_path, monkeypatch):
    """ENOSPC after half a line; the next line must not be joined to it."""
    with JsonLines(tmp_path / "lines.jsonl", {"format": "test 1"}, "no test") as lines:
        write, calls = os.write, []

        def full(handle: int, content: bytes) -> int:
            calls.append(content)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return write(handle, content[: len(content) // 2])

        monkeypatch.setattr(json_lines.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            lines.append({"a": 1})
        monkeypatch.undo()
        lines.append({"b": 2})
    assert read_lines(tmp_path / "lines.jsonl") == [{"format": "test 1"}, {"b": 2}]


def test_a_journal_killed_within_its_first_line_begins_anew(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"eps": 1}, 3).file.close()
    header = path.read_bytes()
    for cut in (0, 1, 15, 40, len(header) - 1):
        path.write_bytes(header[:cut])
        Journal(path, {"eps": 1}, 3).file.close()
        assert path.read_bytes() == header
    path.write_text("someone's notes")  # no end of line either, and none of ours
    with pytest.raises(ValueError, match="is not a certification journal; remove it"):
        Journal(path, {"eps": 1}, 3)
    assert path.read_text() == "someone's notes"


def test_a_journal_of_an_earlier_format_is_refused_as_such(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"format": "optrelax certification journal 1", "fingerprint": {}, "examples": 2}\n')
    with pytest.raises(ValueError, match="not a certification journal of this version but 'optrelax certification"):
        certify(path)


def test_a_lock_is_let_go_once_all_have_closed_it(tmp_path):
    first, second = lock_of(tmp_path / "a"), lock_of(tmp_path / "a")
    first.close()
    first.close()
    assert (tmp_path / ".a.lock").exists()
    second.close()
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    sys.stdout.write(f"{kill_at_random(int(sys.argv[1]), seed=int(time.time()))} kills\n")
