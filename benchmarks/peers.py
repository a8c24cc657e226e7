"""Other libraries on the same network, where they are installed: auto_LiRPA (Xu et al. 2020)."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import optrelax as ox

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
