"""Smooth activations: the area between their lines, and widths of networks, beside auto_LiRPA's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

import optrelax as ox
from benchmarks import peers
from benchmarks.reports import Bar, Options, Report, Row, Table, environment
from benchmarks.transformer import VisionTransformer

TITLE = "Smooth activations: areas between lines, and widths of networks, float64, random weights"


def _gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x)  # looked up when it is called: the peer traces another in its place


_FUNCTIONS: dict[str, tuple[ox.Smooth, Callable[[Tensor], Tensor]]] = {
    "sigmoid": (ox.activations.sigmoid(), torch.sigmoid),
    "tanh": (ox.activations.tanh(), torch.tanh),
    "gelu": (ox.activations.gelu(), _gelu),
    "sin": (ox.activations.sin(), torch.sin),
}
_RADII = (0.005, 0.02, 0.1, 0.5)
_WIDTHS = (20, 50, 50, 50, 10)
_PIXELS = (0.25, 1.0, 4.0)  # of 255
_NEAR = 1e-9  # what a line of theirs may be beaten by
_EQUAL = 1 + 1e-6  # a ratio up to here is of equals: rounding, and rows that like another line than that of least area


class Elementwise(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Of every entry."""
        return self.function(x)


def run(options: Options) -> Report:
    """Three tables; the last two want auto_LiRPA, which makes its lines in PyTorch's default type."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return _report(options)
    finally:
        torch.set_default_dtype(usual)


def _report(options: Options) -> Report:
    facts = environment(options)
    lines = _lines(options)
    bars = [Bar(f"{row['function']}: area above the best, median %", 5.0, None, row["median %"]) for row in lines.rows]
    tables = [lines]
    if peers.has_auto_lirpa():
        bars += [
            Bar(f"{row['function']}: area, at most, of theirs", _EQUAL, None, row["of theirs, at most"])
            for row in lines.rows
        ]
        networks = _networks(options)
        tables += [networks, _transformer(options)]
        for name in _FUNCTIONS:
            worst = [row["of theirs, at most"] for row in networks.rows if row["function"] == name]
            sound = [ratio for ratio in worst if ratio is not None]
            bars.append(Bar(f"{name} networks: width, at most, of theirs", _EQUAL, None, max(sound, default=None)))
    return Report("smooth_lines", TITLE, options, tables, bars, facts)


# --- one neuron ---------------------------------------------------------------------------------------------------


def _lines(options: Options) -> Table:
    count = 20 if options.quick else 2000
    g = torch.Generator().manual_seed(options.seed)
    width = 10 ** (torch.rand(count, generator=g) * 3 - 2)
    middle = 2 * torch.randn(count, generator=g)
    l, u = middle - width / 2, middle + width / 2
    rows = [_line_row(name, l, u) for name in _FUNCTIONS]
    notes = (
        "Intervals 0.01 to 10 wide around normal middles. Best: what no two lines fall below, the height between the "
        "envelopes of 401 samples in the middle. of theirs: our area / auto_LiRPA's, where its lines hold; unsound: "
        "intervals whose samples its lines miss by more than 1e-9.",
    )
    return Table(title=f"Lines over {count} intervals", keys=("function",), rows=rows, smaller=("mean %",), notes=notes)


def _line_row(name: str, l: Tensor, u: Tensor) -> Row:
    activation, function = _FUNCTIONS[name]
    ours, best = _height(activation.closest(l, u), l, u), _least_height(function, l, u)
    bent = best > 1e-6  # else the height between the lines is that of rounding
    above = 100 * (ours / best - 1)[bent]
    row: Row = {
        "function": name,
        "median %": float(above.median()),
        "mean %": float(above.mean()),
        "most %": float(above.amax()),
        "of theirs, median": None,
        "of theirs, at most": None,
        "1 % less than theirs, %": None,
        "theirs unsound": None,
    }
    if peers.has_auto_lirpa():
        theirs = peers.auto_lirpa_lines(Elementwise(function), l[None], u[None])
        sound = (_missed(function, theirs, l, u) <= _NEAR)[0]
        ratio = (ours / _height(theirs, l, u)[0])[sound & bent]
        row["of theirs, median"] = float(ratio.median())
        row["of theirs, at most"] = float(ratio.amax())
        row["1 % less than theirs, %"] = 100 * float((ratio < 0.99).double().mean())
        row["theirs unsound"] = int((~sound).sum())
    return row


def _height(lines: peers.Lines, l: Tensor, u: Tensor) -> Tensor:
    """Between two lines in the middle: the area over the width."""
    (s0, i0), (s1, i1) = lines
    return (s1 - s0) * (l + u) / 2 + i1 - i0


def _least_height(function: Callable[[Tensor], Tensor], l: Tensor, u: Tensor, count: int = 401) -> Tensor:
    """Between the concave and the convex envelope of samples, in the middle: chords over it, all pairs of them."""
    found = []
    for part_l, part_u in zip(l.split(100), u.split(100), strict=True):
        x = torch.lerp(part_l[:, None], part_u[:, None], torch.linspace(0, 1, count, dtype=l.dtype))
        y, half = function(x), count // 2
        p, q = x[:, :half, None], x[:, None, half + 1 :]
        share = (x[:, half, None, None] - p) / (q - p)
        chords = torch.lerp(y[:, :half, None], y[:, None, half + 1 :], share)
        at = y[:, half]
        found.append(torch.maximum(chords.amax((1, 2)), at) - torch.minimum(chords.amin((1, 2)), at))
    return torch.cat(found)


def _missed(function: Callable[[Tensor], Tensor], lines: peers.Lines, l: Tensor, u: Tensor) -> Tensor:
    """By how much samples lie beyond one of two lines; [*shape of l]."""
    worst = torch.full_like(lines[0][1] + l, -torch.inf)
    for share in torch.linspace(0, 1, 1001, dtype=l.dtype):
        x = torch.lerp(l, u, share)
        (s0, i0), (s1, i1), y = *lines, function(x)
        worst = torch.maximum(worst, torch.maximum(s0 * x + i0 - y, y - s1 * x - i1))
    return worst


# --- networks -----------------------------------------------------------------------------------------------------


def _networks(options: Options) -> Table:
    count = 2 if options.quick else 20
    rows = [
        _network_row(name, eps, count, options)
        for name in _FUNCTIONS
        for eps in (_RADII[:1] if options.quick else _RADII)
    ]
    notes = (
        "CROWN's bounds of ten outputs; both libraries are given Box's pre-activation bounds. of theirs: our width / "
        "auto_LiRPA's, of examples for whose neurons all its lines hold.",
    )
    sizes = "-".join(map(str, _WIDTHS))
    title = f"Widths of networks {sizes}, {count} examples"
    return Table(title=title, keys=("function", "eps"), rows=rows, smaller=("of theirs, mean",), notes=notes)


def _network_row(name: str, eps: float, count: int, options: Options) -> Row:
    function = _FUNCTIONS[name][1]
    g = torch.Generator().manual_seed(options.seed)
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(_WIDTHS):
        layer = nn.Linear(wide, narrow)
        for parameter, scale in ((layer.weight, 1.5 / wide**0.5), (layer.bias, 0.3)):
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=g))
        layers += [layer, Elementwise(function)]
    net = nn.Sequential(*layers[:-1]).requires_grad_(False)
    region = ox.LinfBall(torch.rand(count, _WIDTHS[0], generator=g), eps)
    given = ox.preactivation_bounds(net, region, "box")
    ours = ox.bounds(net, region, "crown-ibp").width
    theirs = peers.auto_lirpa_network(net, region, [(b.lower, b.upper) for b in given.values()])
    holds = torch.ones(count, dtype=torch.bool)
    for lines, bounds in zip(theirs.lines, given.values(), strict=True):
        holds &= (_missed(function, lines, bounds.lower, bounds.upper) <= _NEAR).all(1)
    ratio = (ours / theirs.width)[holds]
    return {
        "function": name,
        "eps": eps,
        "width": float(ours.mean()),
        "of theirs, mean": float(ratio.mean()) if len(ratio) else None,
        "of theirs, at most": float(ratio.amax()) if len(ratio) else None,
        "examples they are unsound for": int((~holds).sum()),
    }


def _transformer(options: Options) -> Table:
    rows = []
    for norm, radii in (("none", _PIXELS), ("layer", _PIXELS[:1])):
        torch.manual_seed(options.seed)
        net = VisionTransformer(nn.LayerNorm if norm == "layer" else nn.Identity).eval().requires_grad_(False)
        x = torch.rand(1, 3, 32, 32)
        theirs, network = peers.auto_lirpa_widths(net, x), ox.capture(net, x.shape[1:])
        for eps in radii[:1] if options.quick else radii:
            for name in ("box", "crown") if options.quick else ("box", "crown-ibp", "crown"):
                ours = float(ox.bounds(network, ox.LinfBall(x, eps / 255), name).width.mean())
                other = theirs(eps / 255, peers.AUTO_LIRPA[name])
                row: Row = {"norm": norm, "eps": f"{eps:g} / 255", "relaxation": name}
                rows.append(row | {"width": ours, "theirs": other, "of theirs": ours / other})
    title = "One layer of a vision transformer"
    notes = (
        "32 x 32 pixels in colour, patches of 16, 48 dimensions, 3 heads, MLP of 96, as VNN-COMP's networks; mean "
        "width of ten outputs, pre-activation bounds by each library itself.",
    )
    keys = ("norm", "eps", "relaxation")
    return Table(title=title, keys=keys, rows=rows, smaller=("of theirs",), notes=notes)
