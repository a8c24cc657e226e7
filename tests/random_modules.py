"""Random modules, as people write them: capture gives the module's function, or refuses, and leaves all as it was.

`python -m tests.random_modules --count 10000` runs as many as one likes.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optrelax as ox

WIDTH = 4
Step = Callable[["Program", Tensor], Tensor]
SCALE = 1.5


class Program(nn.Module):
    """A forward made of drawn steps; what they need is held in attributes of every kind."""

    def __init__(self, names: list[str], seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.names = names
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.named = nn.ModuleDict({"act": nn.ReLU(inplace=True), "leaky": nn.LeakyReLU(0.1)})
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=draw))
        self.register_buffer("offset", torch.randn(WIDTH, generator=draw))
        self.register_buffer("count", torch.zeros(1))
        self.norm, self.drop = nn.BatchNorm1d(WIDTH).eval(), nn.Dropout(0.3).eval()
        self.flag, self.number, self.table = bool(seed % 2), 0.5 + seed % 3, {"k": [1.0, 2.0]}
        self.plain = torch.randn(WIDTH, generator=draw)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=draw) * 0.5
        if "weight norm" in names:
            nn.utils.parametrizations.weight_norm(self.shared)
        if "spectral norm" in names or "spectral norm in training" in names:
            nn.utils.parametrizations.spectral_norm(self.shared)
            self.shared.train("spectral norm in training" in names)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        for name in self.names:
            x = ALL[name](self, x)
        if mask is not None:
            x = x * mask
        return x * scale


def _branch(m: Program, x: Tensor) -> Tensor:
    if m.flag:
        return F.relu(m.shared(x))
    return m.layers[0](x) - x


def _kinds(m: Program, x: Tensor) -> Tensor:
    if isinstance(x, list):
        return x[0]
    return x / 2 if torch.is_tensor(x) and x.dim() == 2 else x


def _loop(m: Program, x: Tensor) -> Tensor:
    for i, layer in enumerate(m.layers):
        x = layer(x) if i == 0 else torch.relu(layer(x))
    return x


def _alias(m: Program, x: Tensor) -> Tensor:
    h = m.shared(x)
    v = h.view(-1, 2, 2)
    v.relu_()
    return h + x


def _quiet(m: Program, x: Tensor) -> Tensor:
    with torch.no_grad():
        w = m.weight * 2
    return F.linear(x, w)


GOOD: dict[str, Step] = {
    "module": lambda m, x: m.shared(x),
    "function": lambda m, x: F.linear(x, m.weight, m.offset),
    "keywords": lambda m, x: F.linear(bias=None, weight=m.weight.t(), input=x),
    "computed": lambda m, x: F.linear(x, (m.weight * m.offset).tanh()),
    "buffer": lambda m, x: (x - m.offset) * m.number,
    "plain tensor": lambda m, x: x * m.plain,
    "literal": lambda m, x: x + torch.tensor([0.1, -0.2, 0.3, 0.0]),
    "table": lambda m, x: x * m.table["k"][1] - m.table["k"][0],
    "global": lambda m, x: x * SCALE,
    "relu": lambda m, x: torch.relu(x - 0.1),
    "relu in place": lambda m, x: (x + 0.2).relu_(),
    "module in place": lambda m, x: m.named["act"](m.shared(x)),
    "leaky": lambda m, x: m.named["leaky"](x),
    "clamp": lambda m, x: x.clamp(-1.0, 0.7),
    "hardtanh": lambda m, x: F.hardtanh(x, -0.5, 0.5),
    "residual": lambda m, x: x + m.layers[1](F.relu(x)),
    "sum in place": lambda m, x: (lambda h: h.add_(x))(m.shared(x)),
    "alias": _alias,
    "branch": _branch,
    "kinds": _kinds,
    "loop": _loop,
    "no grad": _quiet,
    "shape": lambda m, x: x.view(x.shape[0], 2, -1).flatten(1) / x.shape[1],
    "squeeze": lambda m, x: x.unsqueeze(1).squeeze(1),
    "len": lambda m, x: x.reshape(len(x), -1),
    "assert": lambda m, x: x if x.shape[-1] == WIDTH and x.is_floating_point() else x * 0,
    "norm": lambda m, x: m.norm(x),
    "dropout off": lambda m, x: m.drop(x),
    "clone": lambda m, x: x.clone().contiguous(),
    "float": lambda m, x: x.float().to(torch.float32),
    "alpha": lambda m, x: torch.add(x, m.offset, alpha=2),
    "weight norm": lambda m, x: m.shared(x),
    "spectral norm": lambda m, x: m.shared(x),
    "zeros": lambda m, x: x + torch.zeros_like(x) + x.new_ones(WIDTH),
}


def _count(m: Program, x: Tensor) -> Tensor:
    m.count += 1
    return x


def _autocast(m: Program, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.shared(x).float()


BAD: dict[str, Step] = {
    "random": lambda m, x: x + torch.rand(WIDTH),
    "random like": lambda m, x: x + 0.01 * torch.randn_like(x),
    "python's random": lambda m, x: x * (1.5 + random.random()),
    "dropout on": lambda m, x: F.dropout(x, 0.5),
    "count": _count,
    "autocast": _autocast,
    "values decide": lambda m, x: x if x.sum() > 0 else -x,
    "a number of a tensor": lambda m, x: x * float(x.abs().max()),
    "mean of the batch": lambda m, x: x - x.mean(0),
    "size of the batch": lambda m, x: x * x.shape[0],
    "few or many": lambda m, x: x if len(x) > 2 else -x,
    "half": lambda m, x: x.half().float(),
    "double": lambda m, x: x.double(),
    "products along": lambda m, x: x.cumprod(1),
    "gamma": lambda m, x: torch.lgamma(x),
    "parameter in place": lambda m, x: (m.weight.data.mul_(0.5), x)[1],
    "numpy": lambda m, x: x + torch.from_numpy(x.detach().numpy()),
    "two": lambda m, x: (x, x),  # type: ignore[return-value]
    "spectral norm in training": lambda m, x: m.shared(x),
}
ALL = GOOD | BAD


def drawn(seed: int) -> tuple[Program, bool]:
    """A program, and whether capture must take it; a third of them hold one step that must be refused."""
    draw = random.Random(seed)
    names = draw.choices(list(GOOD), k=draw.randint(1, 5))
    if {"weight norm", "spectral norm"} <= set(names):
        names = [n for n in names if n != "spectral norm"]
    taken = draw.random() < 2 / 3
    if not taken:
        bad = draw.choice(list(BAD))
        if bad == "spectral norm in training":
            names = [n for n in names if n not in ("weight norm", "spectral norm")]
        names.insert(len(names) if bad == "two" else draw.randint(0, len(names)), bad)
    net = Program(names, seed)
    if draw.random() < 0.3 and "spectral norm" not in names:
        net.training = True  # of its own: the layers keep their modes
    return net, taken


def state(net: nn.Module) -> dict[str, Any]:
    """All that capture must leave as it is."""
    found: dict[str, Any] = {f"tensor {k}": v.clone() for k, v in net.state_dict().items()}
    for path, module in net.named_modules():
        found[f"attributes {path}"] = {
            k: id(v) if not isinstance(v, (int, float)) else v for k, v in vars(module).items()
        }
        found[f"hooks {path}"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
    found |= {f"gradient {k}": p.grad is None for k, p in net.named_parameters()}
    found |= {f"identity {k}": id(p) for k, p in net.named_parameters()}
    found["generator"] = torch.get_rng_state()
    if "pytest" not in sys.modules:  # whose checks of types draw from Python's own to look at samples of lists
        found["python's generator"] = random.getstate()
    found["modes"] = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled())
    found["globals"] = (
        SCALE,
        torch.get_default_dtype(),
        len(warnings.filters),
        nn.Module.__call__,
        nn.Module.__getattr__,
    )
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is not as it was."""

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)

    return [
        k for k in before.keys() | after.keys() if k not in before or k not in after or not same(before[k], after[k])
    ]


@dataclass(frozen=True)
class Trial:
    """What capture did with one module."""

    fault: str | None
    """What was wrong with that, None where nothing."""
    refused: tuple[str, ...] = ()
    """Reasons of its refusal; none where it was taken."""


def fault(seed: int) -> str | None:
    """What capture does wrong with one drawn module, None where nothing."""
    net, taken = drawn(seed)
    return verdict(net, taken=taken, seed=seed)


def verdict(net: Program, *, taken: bool, seed: int = 0) -> str | None:
    """What capture does wrong with a module that it must take or refuse."""
    return tried(net, taken=taken, seed=seed).fault


def tried(net: Program, *, taken: bool, seed: int = 0) -> Trial:
    """Check, capture and compare a module that must be taken or refused."""
    before = state(net)
    report = ox.check(net, (WIDTH,))
    reasons = tuple(problem.reason for problem in report.problems)
    if changed := differences(before, state(net)):
        return Trial(f"changed {changed}", reasons)
    if report.ok != taken:
        return Trial(f"{'taken' if report.ok else 'refused'}: {report}", reasons)
    if not report.ok:
        return Trial(None, reasons)
    network = ox.capture(net, (WIDTH,))
    draw = torch.Generator().manual_seed(seed)
    for size in (1, 3, 20):
        x = torch.randn(size, WIDTH, generator=draw) * 3
        with torch.no_grad():
            wanted, found = net(x.clone()), network(x.clone())
        if not torch.allclose(wanted, found, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())):
            return Trial(f"{float((wanted - found).abs().max())} apart")
    return Trial(None)


def main() -> None:
    """Try `--count` modules from `--seed` on; print every fault, the progress, and a summary."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    start = last = time.perf_counter()
    longest = 0.0
    for done, seed in enumerate(range(options.seed, options.seed + options.count), 1):
        net, taken = drawn(seed)
        trial = tried(net, taken=taken, seed=seed)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        counts["wrong" if trial.fault else "refused, as it must be" if trial.refused else "taken, and equal"] += 1
        reasons.update({re.split(r"[:;,(]", reason)[0].strip() for reason in trial.refused})
        if trial.fault is not None:
            print(seed, net.names, trial.fault, flush=True)  # noqa: T201
        if done % 500 == 0 or done == options.count:
            found = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
            print(f"{done} modules: {found}; {time.perf_counter() - start:.0f} s", flush=True)  # noqa: T201
    for reason, n in reasons.most_common():
        print(f"{n:6d}  {reason}")  # noqa: T201
    print(f"the slowest took {longest:.1f} s")  # noqa: T201


if __name__ == "__main__":
    main()
