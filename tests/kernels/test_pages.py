"""Kept pages: a setting of the process that changes no number, and says where it cannot be set."""

import ctypes
import mmap
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from optrelax.kernels import pages
from optrelax.kernels.pages import huge_pages, keep_pages

# Bounds and gradients of two steps of CROWN large enough that their tensors would be mapped anew, as one hash.
STEPS = """
import hashlib, sys, torch
import optrelax as ox
from optrelax.kernels.pages import keep_pages
if sys.argv[1] == "keep":
    kept = keep_pages()
    assert kept is (sys.platform.startswith("linux") and hasattr(__import__("ctypes").CDLL(None), "mallopt"))
net = ox.models.fc(784, 100, 100, 10, seed=0)
x = torch.rand(40, 784, generator=torch.Generator().manual_seed(0))
labels = torch.arange(40) % 10
digest = hashlib.sha256()
for _ in range(2):
    m = ox.lower_bounds(net, ox.LinfBall(x, 0.05, (0.0, 1.0)), ox.margins(labels, 10), "crown")
    net.zero_grad()
    ox.certified_cross_entropy(m).backward()
    for value in (m, *(p.grad for p in net.parameters())):
        digest.update(value.detach().numpy().tobytes())
print(digest.hexdigest())
"""


def test_bounds_and_gradients_are_the_same_bit_for_bit():
    printed = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", STEPS, how],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for how in ("keep", "leave")
    ]
    assert printed[0] == printed[1]
    assert len(printed[0].strip()) == 64


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_say_no(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    assert keep_pages() is False


def test_a_c_library_without_the_setting_says_no(monkeypatch):
    """musl, for one."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_pages() is False


@pytest.mark.parametrize(("answers", "said"), [((1, 1), True), ((1, 0), False), ((0, 1), False)])
def test_the_c_librarys_refusal_is_told(monkeypatch, answers, said):
    left = list(answers)

    class Library:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            return left.pop(0)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: type("C", (), {"mallopt": _Function(Library.mallopt)}))
    assert keep_pages() is said


class _Function:
    """A function that takes argtypes and restype, as ctypes' do."""

    def __init__(self, function) -> None:
        self.function = function

    def __call__(self, *arguments: int) -> int:
        assert self.argtypes == [ctypes.c_int, ctypes.c_int]
        return self.function(*arguments)


def test_huge_pages_are_asked_for_large_tensors():
    t = torch.empty(2**22)
    assert huge_pages(t) is t
    middle, flags = t.data_ptr() + 2 * t.numel(), []
    smaps = pathlib.Path("/proc/self/smaps")
    for line in smaps.read_text().splitlines() if smaps.exists() else ():
        first, *rest = line.split()
        if rest and "-" in first and not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
        elif first == "VmFlags:" and low <= middle < high:
            flags = rest
    assert ("hg" in flags) is (hasattr(mmap, "MADV_HUGEPAGE") and bool(flags)), "this kernel's flag of huge pages"


def test_huge_pages_are_not_asked_for_small_tensors(monkeypatch):
    """What was asked, not the page's flag: a small tensor may lie where a large one was before."""
    asked = []
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    monkeypatch.setattr(pages, "_advise", lambda: lambda *arguments: asked.append(arguments))
    small, large = torch.empty(2**10), torch.empty(2**22)
    assert huge_pages(small) is small
    assert asked == []
    huge_pages(large)
    assert len(asked) == 1
    first, size, _ = asked[0]
    assert large.data_ptr() <= first
    assert first + size == large.data_ptr() + 4 * large.numel()
