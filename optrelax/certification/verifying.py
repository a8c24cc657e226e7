"""Verification of a property: holds, violated (with a counterexample that was replayed) or unknown.

Bounds prove cases, an attack refutes them, and what both leave open is unknown: the place of a complete method is
behind them, on the cases still open.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optrelax.analysis import Net
from optrelax.certification.attacks import PGD, Attack
from optrelax.certification.preparation import device_of, named, require_dtype
from optrelax.certification.property_files import read_property
from optrelax.certification.property_verdicts import Counterexample, PropertyStatus, PropertyVerdict
from optrelax.certification.strong_attacks import attack_of
from optrelax.disjunctions import group_bounds, row_bounds
from optrelax.joined_specifications import Spec, as_specification
from optrelax.networks.capturing import capture
from optrelax.networks.graph import Network
from optrelax.properties import Case, Property, avoiding
from optrelax.regions import InputBox, Region
from optrelax.relaxations import NamedRelaxations, Relaxation, with_rounding
from optrelax.rounding import Rounding, check_rounding, down, up
from optrelax.specifications import Specification

__all__ = ["default_attack", "verify"]

PathLike = str | os.PathLike[str]


def verify(
    net: Net | PathLike,
    prop: Property | Spec | PathLike,
    relaxation: NamedRelaxations = "crown",
    *,
    region: Region | None = None,
    attack: Attack | str | bool = True,
    rounding: Rounding = "outward",
    dtype: torch.dtype = torch.float64,
    timeout: float | None = None,
) -> PropertyVerdict:
    """Decide whether a network has a property.

    Args:
        net: an ONNX file or another checkpoint of `ox.load`, a module in eval mode, or a captured network. Inputs and
            outputs are numbered in the flattened order.
        prop: a VNN-LIB file, a `Property`, or with a `region` a `Specification` or rows, which must hold in every
            example's box: `Property.of(region, spec)`.
        relaxation: one or several, tried in this order on the cases still open; unsound ones are refused.
        region: of the specification.
        attack: after the first relaxation, on cases still open, an attack or its name ("pgd", "strong", "none"); True:
            PGD of 5 starts, each the best of many samples where inputs are few.
        rounding: "nearest" proves nothing in real arithmetic.
        dtype: in which bounds are computed.
        timeout: seconds after which no further step begins.

    Returns:
        A status, and with "violated" the counterexample.

    Raises:
        FileNotFoundError: where there is no such file.
        UnsupportedOpError: for a network that cannot be bounded.
        ValueError: for files or numbers that do not fit.

    Sound: yes. "holds" means that for every case and clause a bound of a sound relaxation, over a box that encloses
    the file's decimals (ends in the network's own type, rounded outward), excludes one of the clause's halfspaces; a
    NaN or infinite bound excludes nothing. "violated" means that a point whose exact decimals lie in the box was
    replayed by the network in float64 and in the file's own semantics, and met a clause both times.

    Example:
        >>> net, region = ox.models.fc(2, 8, 1, seed=0), ox.InputBox(torch.zeros(1, 2), torch.ones(1, 2))
        >>> below = ox.Specification(torch.tensor([[-1.0]]), offsets=5.0)  # y0 < 5
        >>> ox.verify(net, below, region=region).status.value
        'holds'
    """
    begin = time.perf_counter()
    check_rounding("verify", rounding)
    require_dtype("verify", dtype)
    if timeout is not None and not timeout > 0:
        raise ValueError(f"verify: timeout must be seconds > 0, got {timeout}")
    relaxations = {name: with_rounding(r, rounding) for name, r in named(relaxation, "verify").items()}
    wanted = _property(prop, region)
    network, replay = _network(net)
    _require_fit(network, wanted, dtype)
    with torch.no_grad():
        cases = [_Open.of(case, network, dtype) for case in wanted.cases]
        run = _Verification(network, replay, dtype, begin, timeout, rounding, cases)
        return run.decide(relaxations, _attack(attack, wanted.inputs))


def _property(prop: Property | Spec | PathLike, region: Region | None) -> Property:
    match prop:
        case Property() | str() | os.PathLike() if region is not None:
            raise ValueError("verify: a property has its own boxes; leave region out, or give a specification")
        case Property():
            return prop
        case str() | os.PathLike():
            return read_property(prop)
    if region is None:
        raise ValueError("verify: a specification wants a region, such as region=ox.LinfBall(x, eps)")
    return Property.of(region, as_specification(prop))


def default_attack(inputs: int, seed: int = 0) -> PGD:
    """The attack of attack=True."""
    # Where inputs are few, samples find what descents from the centre of a large box miss.
    return PGD(restarts=5, steps=40, targets=3, seed=seed, samples=max(1, min(1000, 2**13 // max(1, inputs))))


def _attack(attack: Attack | str | bool, inputs: int) -> Attack | None:
    if attack is True or attack == "pgd":
        return default_attack(inputs)
    if attack is False:
        return None
    return attack_of("verify", attack)


def _network(net: Net | PathLike) -> tuple[Network, Callable[[Tensor], Tensor]]:
    """The captured network, and what replays a point [1, *input_shape] in its own semantics."""
    if isinstance(net, Network):
        return net, net
    if isinstance(net, nn.Module):
        return capture(net), net
    from optrelax.networks.checkpoints import load
    from optrelax.networks.onnx_files import is_onnx, module_of, read_proto, reference_of

    if not is_onnx(net):
        network = load(net)
        return network, network
    model = read_proto(net)
    module = module_of(model, net)
    return capture(module, module.input_shape), reference_of(model)


def _require_fit(network: Network, prop: Property, dtype: torch.dtype) -> None:
    inputs = math.prod(network.input_shape)
    if (inputs, network.outputs) != (prop.inputs, prop.outputs):
        raise ValueError(
            f"verify: the property is of {prop.inputs} inputs and {prop.outputs} outputs, "
            f"the network has {inputs} and {network.outputs}"
        )
    if dtype == torch.float32 and _own_type(network) == torch.float64:
        raise ValueError("verify: the weights are float64, which dtype=torch.float32 would round; use torch.float64")


def _own_type(network: Network) -> torch.dtype:
    """float64 if any weight is, else float32."""
    weights = [t for t in network.module.state_dict().values() if isinstance(t, Tensor)]
    return torch.float64 if any(t.dtype == torch.float64 for t in weights) else torch.float32


@dataclass(slots=True)
class _Open:
    """A case, and which of its clauses nothing has excluded yet."""

    case: Case
    region: InputBox
    spec: Specification
    left: list[bool] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    """Best bound of each clause."""

    @classmethod
    def of(cls, case: Case, network: Network, dtype: torch.dtype) -> _Open:
        # Ends in the network's own type: a reader that rounds the decimals to it still gives a point of this box.
        ends = [end.to(device_of(network), dtype) for end in case.outer(min(dtype, _own_type(network), key=_bits))]
        if not all(bool(end.isfinite().all()) for end in ends):
            raise ValueError("verify: the property's box is too large for float32")
        region = InputBox(*(end.reshape(1, *network.input_shape) for end in ends))
        spec = avoiding(case.clauses, network.outputs, dtype).to(device_of(network))
        return cls(case, region, spec, [True] * len(case.clauses), [-math.inf] * len(case.clauses))


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


@dataclass(frozen=True, slots=True)
class _Verification:
    network: Network
    replay: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    begin: float
    timeout: float | None
    rounding: Rounding
    cases: list[_Open]

    def decide(self, relaxations: Mapping[str, Relaxation], attack: Attack | None) -> PropertyVerdict:
        """Bounds and attack in turn."""
        if not self.cases:
            return self._verdict(PropertyStatus.HOLDS, "", "no input lies in the property's box")
        notes: list[str] = []
        for number, (name, relaxation) in enumerate(relaxations.items()):
            for case in self._open():
                if self._late():
                    return self._verdict(PropertyStatus.UNKNOWN, "", f"stopped after {self.timeout:g} s")
                if len(case.spec.rows):
                    self._bound(case, relaxation)
            if not self._open():
                return self._verdict(PropertyStatus.HOLDS, name)
            for case in self._open() if attack is not None and number == 0 else ():
                assert attack is not None
                if self._late():
                    return self._verdict(PropertyStatus.UNKNOWN, "", f"stopped after {self.timeout:g} s")
                found = self._attacked(case, attack, notes)
                if found is not None:
                    return self._verdict(PropertyStatus.VIOLATED, "", found.note, found)
        return self._verdict(PropertyStatus.UNKNOWN, "", "; ".join(dict.fromkeys(notes)))

    def _open(self) -> list[_Open]:
        return [case for case in self.cases if any(case.left)]

    def _late(self) -> bool:
        return self.timeout is not None and time.perf_counter() - self.begin > self.timeout

    def _bound(self, case: _Open, relaxation: Relaxation) -> None:
        """Strike the clauses that a relaxation excludes."""
        spec = case.spec
        lower = row_bounds(relaxation, self.network, case.region, spec)[0].detach()
        self._strike(case, spec.worst(lower[None])[0].tolist(), spec.excluded(lower))
        # Where no row of a clause can be excluded alone, the greatest of several may be.
        several = [i for i, left in enumerate(case.left) if left and len(spec.groups[i]) > 1]
        if several:
            best: list[float] = [-math.inf] * len(case.left)
            found = group_bounds(relaxation, self.network, case.region, spec.only(several), sign=True)[0]
            for i, bound in zip(several, found.tolist(), strict=True):
                best[i] = bound
            self._strike(case, best, [0 < bound < math.inf for bound in best])

    @staticmethod
    def _strike(case: _Open, best: list[float], out: list[bool]) -> None:
        case.lower = [b if b > old else old for old, b in zip(case.lower, best, strict=True)]
        case.left = [left and not gone for left, gone in zip(case.left, out, strict=True)]

    def _attacked(self, case: _Open, attack: Attack, notes: list[str]) -> Counterexample | None:
        """A point that violates the case, replayed, or None."""
        box, note = self._inside(case)
        spec = case.spec.only([i for i, left in enumerate(case.left) if left]).to(dtype=torch.float64)
        found = attack.search(self.network, box, spec)
        for point in (self._single(found.points, box), found.points):
            outputs = self.network(point).reshape(-1)
            replayed = self.replay(point.to(_own_type(self.network))).reshape(-1)
            failing = [any(spec.failing(spec.values(y.double()))) for y in (outputs, replayed)]
            if all(failing):
                return Counterexample(point[0].cpu(), outputs.cpu(), replayed.cpu(), note)
            if any(failing):
                notes.append("a point violates the property in one of float64 and the network's own type alone")
        return None

    def _inside(self, case: _Open) -> tuple[InputBox, str]:
        """Floats in the exact box: float64 ones; where it holds none in a direction, the nearest to it."""
        lower, upper = case.case.inner(torch.float64)
        empty = lower > upper
        ends = zip(case.case.lower, case.case.upper, strict=True)
        middle = torch.tensor([float((l + u) / 2) for l, u in ends], dtype=torch.float64, device="cpu")
        lower, upper = (torch.where(empty, middle, end) for end in (lower, upper))
        note = f"{int(empty.sum())} inputs are fixed at decimals that are no floats" if bool(empty.any()) else ""
        shape, device = (1, *self.network.input_shape), device_of(self.network)
        return InputBox(lower.reshape(shape).to(device), upper.reshape(shape).to(device)), note

    def _single(self, points: Tensor, box: InputBox) -> Tensor:
        """The nearest float32 inside the box where there is one."""
        near = points.float()
        near = torch.where(near.double() > box.upper, down(near), near)
        near = torch.where(near.double() < box.lower, up(near), near).double()
        return torch.where((near >= box.lower) & (near <= box.upper), near, points)

    def _verdict(
        self, status: PropertyStatus, relaxation: str, message: str = "", found: Counterexample | None = None
    ) -> PropertyVerdict:
        bounds = [bound for case in self.cases for bound in case.lower]
        return PropertyVerdict(
            status=status,
            counterexample=found,
            relaxation=relaxation,
            lower=min(bounds, default=math.nan),
            cases=len(self.cases),
            open_cases=len(self._open()),
            seconds=time.perf_counter() - self.begin,
            message=message,
        )
