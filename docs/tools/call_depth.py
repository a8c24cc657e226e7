"""How deep a bound's calls go, and through which rooms: python docs/tools/call_depth.py

From `ox.lower_bounds` on an `nn.Module` down to the deepest function of the library that CROWN's bounds need; what
PyTorch calls in between is not counted.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import optrelax as ox
from optrelax import layers

ROOT, LAYERS = Path(ox.__file__).parent, Path(layers.__file__).parent
NETWORKS = {
    "fc": (lambda: ox.models.fc(16, 8, 8, 3, seed=0), (16,)),
    "conv": (lambda: ox.models.build("conv", (1, 12, 12), 3, seed=0), (1, 12, 12)),
    "resnet": (lambda: ox.models.resnet(seed=0), (3, 32, 32)),
}


def place(file: str) -> str | None:
    """The file as a path within the library, or None."""
    for root, name in ((ROOT, ""), (LAYERS, "layers/")):
        if file.startswith(f"{root}/"):
            return name + file.removeprefix(f"{root}/")
    return None


def deepest(call: Callable[[], object]) -> list[tuple[str, str]]:
    """File and function of every call of the library that was open at the deepest moment, the outermost first."""
    stack: list[tuple[str, str]] = []
    found: list[tuple[str, str]] = []

    def trace(frame: FrameType, event: str, _: Any) -> None:
        nonlocal found
        where = place(frame.f_code.co_filename)
        if where is None:
            return
        if event == "call":
            stack.append((where, frame.f_code.co_name))
            if len(stack) > len(found):
                found = stack.copy()
        elif event == "return" and stack:
            stack.pop()

    sys.setprofile(trace)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def rooms(calls: list[tuple[str, str]]) -> list[str]:
    """The rooms in the order in which they are entered."""
    return [room for room, _ in itertools.groupby(Path(file).parts[0].removesuffix(".py") for file, _ in calls)]


def crown(name: str) -> list[tuple[str, str]]:
    """The deepest calls of CROWN's bounds of one of the networks, capture included."""
    build, shape = NETWORKS[name]
    net = build().eval()
    region = ox.LinfBall(torch.zeros(1, *shape), eps=0.1)
    outputs = net(region.center).shape[1]
    return deepest(lambda: ox.lower_bounds(net, region, torch.eye(outputs), "crown"))


def main() -> None:
    """A line a network; with -v each call."""
    for name in NETWORKS:
        calls = crown(name)
        print(f"{name}: {len(calls)} calls: {', '.join(rooms(calls))}")  # noqa: T201
        if "-v" in sys.argv:
            print(*(f"  {file}: {function}" for file, function in calls), sep="\n")  # noqa: T201


if __name__ == "__main__":
    main()
