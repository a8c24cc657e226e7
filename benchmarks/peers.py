"""Other libraries on the same network, where they are installed: auto_LiRPA (Xu et al. 2020)."""

from __future__ import annotations

import os
import sys
import unittest.mock
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import optrelax as ox

Lines = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Slope and intercept below, and above."""

AUTO_LIRPA = {"box": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN"}
"""Our name of a relaxation -> auto_LiRPA's method of the same bounds."""


def use_checkout(path: str) -> None:
    """Import auto_LiRPA from a checkout, here and in the processes that memory is measured in."""
    sys.path.insert(0, path)
    os.environ["PYTHONPATH"] = os.pathsep.join([path, *filter(None, [os.environ.get("PYTHONPATH")])])


def has_auto_lirpa() -> bool:
    """Whether auto_LiRPA can be imported."""
    return find_spec("auto_LiRPA") is not None


def auto_lirpa_version() -> str | None:
    """What it calls itself; None where it cannot be imported."""
    if not has_auto_lirpa():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import auto_LiRPA
    return str(auto_LiRPA.__version__)


def auto_lirpa(
    net: nn.Module, x: Tensor, eps: float, clip: tuple[float, float], method: str
) -> Callable[[Tensor], Tensor]:
    """Margins by auto_LiRPA, its module and region made beforehand: labels [batch] -> lower bounds [batch, 9]."""
    with warnings.catch_warnings():
        # Deprecations of the torch functions that it traces networks with.
        warnings.simplefilter("ignore")
        from auto_LiRPA import BoundedModule, BoundedTensor
        from auto_LiRPA.perturbations import PerturbationLpNorm

        module = BoundedModule(net, torch.zeros_like(x[:1]), device=x.device)
    region = ox.LinfBall(x, eps, clip)
    perturbation = PerturbationLpNorm(norm=float("inf"), x_L=region.lower, x_U=region.upper)
    given = BoundedTensor(x, perturbation)

    def lower(labels: Tensor) -> Tensor:
        rows = ox.margins(labels, 10).to(x)
        bound: Tensor
        bound, _ = module.compute_bounds(x=(given,), C=rows, method=method, bound_upper=False)
        return bound

    return lower


# --- lines and widths ---------------------------------------------------------------------------------------------


_GELU = nn.functional.gelu


class _Gelu(torch.autograd.Function):
    """GELU as the op that auto_LiRPA knows: ONNX's exporter of the version it uses has none."""

    @staticmethod
    def symbolic(graph: Any, x: Any) -> Any:
        return graph.op("custom::Gelu", x)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _GELU(x)


def _bounded(net: nn.Module, x: Tensor) -> Any:
    """auto_LiRPA's module, of a network whose GELUs are its own op while it is traced."""
    with warnings.catch_warnings(), unittest.mock.patch.object(nn.functional, "gelu", _Gelu.apply):
        warnings.simplefilter("ignore")
        from auto_LiRPA import BoundedModule

        return BoundedModule(net, torch.zeros_like(x[:1]), device=x.device)


def _bounds(module: Any, box: Any, **how: Any) -> tuple[Tensor, Tensor]:
    lower, upper = module.compute_bounds(x=(box,), **how)
    return lower.detach(), upper.detach()


def _box(l: Tensor, u: Tensor) -> Any:
    from auto_LiRPA import BoundedTensor
    from auto_LiRPA.perturbations import PerturbationLpNorm

    return BoundedTensor((l + u) / 2, PerturbationLpNorm(norm=float("inf"), x_L=l, x_U=u))


def _relaxed(module: Any) -> list[Any]:
    """Its nodes that have lines, in order."""
    return [node for node in module.nodes() if hasattr(node, "lw")]


def _lines_of(node: Any) -> Lines:
    return (node.lw.detach(), node.lb.detach()), (node.uw.detach(), node.ub.detach())


def auto_lirpa_lines(net: nn.Module, l: Tensor, u: Tensor) -> Lines:
    """Its lines below and above an elementwise function over intervals [1, n]."""
    module = _bounded(net, l)
    _bounds(module, _box(l, u), method="CROWN")
    (node,) = _relaxed(module)
    return _lines_of(node)


@dataclass(frozen=True, slots=True)
class Found:
    """Widths of outputs [batch, n], and the lines that they come from, activation by activation."""

    width: Tensor
    lines: list[Lines]


def auto_lirpa_network(net: nn.Module, region: ox.LinfBall, given: list[tuple[Tensor, Tensor]]) -> Found:
    """Its CROWN of a network of activations, at given pre-activation bounds, first to last."""
    module = _bounded(net, region.x)
    box = _box(region.lower, region.upper)
    _bounds(module, box, method="CROWN-IBP")  # makes lines, by which its activations are known
    inputs = [node.inputs[0].name for node in _relaxed(module)]
    lower, upper = _bounds(module, box, method="CROWN", interm_bounds=dict(zip(inputs, given, strict=True)))
    return Found(upper - lower, [_lines_of(node) for node in _relaxed(module)])


def auto_lirpa_widths(net: nn.Module, x: Tensor) -> Callable[[float, str], float]:
    """Its mean width of outputs over a ball around x, by radius and method."""
    module = _bounded(net, x)

    def width(eps: float, method: str) -> float:
        lower, upper = _bounds(module, _box(x - eps, x + eps), method=method)
        return float((upper - lower).mean())

    return width
