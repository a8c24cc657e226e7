"""Capture: a module as a graph of ops, through torch.export, and proof that it is the same function."""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optrelax.errors import Problem, UnsupportedOpError
from optrelax.networks.graph import HALF, Graph, Network, Statistics
from optrelax.networks.module_problems import HOOKED, module_problems, unreadable
from optrelax.networks.ops import Shape
from optrelax.networks.registry import generation, supported
from optrelax.networks.replicas import uncached
from optrelax.networks.snapshots import Snapshot
from optrelax.uncompiled import uncompiled

if TYPE_CHECKING:
    from optrelax.relaxations import Relaxation

# torch.export replaces methods of nn.Module itself while it runs, and puts back what it found: one thread at a time.
_EXPORTING = threading.RLock()
_KEPT = 4  # graphs of one module: its modes, shapes of its input
_WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True, slots=True)
class Report:
    """Whether a module can be bounded, and every reason why not.

    Args:
        ok: whether there is none.
        problems: one a reason.

    Example:
        >>> print(ox.check(nn.Sequential(nn.Linear(4, 4), nn.Dropout())))
        1: Dropout: is in training mode; call .eval()
    """

    ok: bool
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        return "ok" if self.ok else "\n".join(str(problem) for problem in self.problems)


@dataclass(frozen=True, slots=True)
class _Kept:
    """One capture of a module, valid as long as its snapshot holds."""

    snapshot: Snapshot
    shape: Shape
    rules: tuple[int, ...]
    graph: Graph


_CACHE: weakref.WeakKeyDictionary[nn.Module, list[_Kept]] = weakref.WeakKeyDictionary()


def capture(net: nn.Module | Network, input_shape: Sequence[int] | None = None) -> Network:
    """Capture a module as a graph that references its parameters (never copies).

    The module is exported, its graph built by rules, and both are run on probes: a graph that is not the module's
    function to rounding is refused with both values. Nothing of the module changes. A module that was captured before
    and has not changed since costs some microseconds. Threads may capture at the same time: they take turns.

    Args:
        net: a module, or a network, which comes back as it is.
        input_shape: without the batch, such as (1, 28, 28); None where the first layer is a Linear that says it. A
            network that was loaded, and takes n numbers in a row, takes n in any shape.

    Returns:
        The network, a module itself.

    Raises:
        UnsupportedOpError: with every op that has no rule, where it is and what is supported.
        TypeError: for what is no module that could be followed.
        ValueError: for an input shape that a network does not take, and for one without entries.

    Example:
        >>> network = ox.capture(ox.models.fc(4, 8, 2, seed=0), (4,))
        >>> network.input_shape, network.output_shape, [node.path for node in network.activations]
        ((4,), (2,), ['2'])
    """
    if isinstance(net, Network):
        return net if input_shape is None else net.taking(tuple(input_shape))
    net = unwrap(net)
    if isinstance(net, Network):
        return capture(net, input_shape)
    if input_shape is not None and not isinstance(input_shape, Sequence):
        raise TypeError(f"capture: input_shape must be numbers such as (1, 28, 28), got {input_shape!r}")
    shape = tuple(int(n) for n in input_shape) if input_shape is not None else _first_shape(net)
    if 0 in shape:
        raise ValueError(f"capture: an input of shape {shape} holds no numbers to bound over")
    return Network(net, graph_of(net, shape), recapture=True)


def check(
    net: nn.Module | Network,
    input_shape: Sequence[int] | None = None,
    relaxation: Relaxation | str | None = None,
) -> Report:
    """Report every op of `net` that cannot be bounded, where it is and why; raises nothing for unsupported ops.

    Args:
        net: as for `capture`.
        input_shape: as for `capture`.
        relaxation: what is to bound it, tried at a point; None: any.

    Returns:
        `ok`, and the problems; printed, a line each.

    Raises:
        TypeError: as `capture`.
        ValueError: as `capture`, and for an unknown relaxation.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        >>> ox.check(net).ok, ox.check(net, relaxation="triangle").ok, ox.check(net, relaxation="crown-0").ok
        (True, True, False)
    """
    from optrelax.relaxations import resolve

    asked = None if relaxation is None else resolve(relaxation)
    try:
        network = capture(net, input_shape)
        network.require_eval()
    except UnsupportedOpError as error:
        return Report(False, error.problems)
    problems = () if asked is None else _refused(network, asked)
    return Report(not problems, problems)


def _refused(network: Network, relaxation: Relaxation) -> tuple[Problem, ...]:
    """Why a relaxation cannot bound a network: what it says when it is asked at a point."""
    from optrelax.analysis import lower_bounds
    from optrelax.regions import InputBox

    like = next((p for p in network.module.parameters() if p.is_floating_point()), torch.zeros((), device="cpu"))
    x = like.new_full((1, *network.input_shape), 0.5)
    try:
        with torch.no_grad():
            lower_bounds(network, InputBox(x, x), torch.eye(network.outputs, device="cpu").to(x), relaxation)
    except UnsupportedOpError as error:
        return error.problems
    return ()


def on_batch(net: nn.Module | Network, x: Tensor, statistics: Statistics = "batch") -> tuple[Network, Tensor]:
    """A network as the map that it is for one batch of training, and its outputs there.

    Batch norms in training mode normalise by a batch. Here they become affine maps: their statistics are those of the
    clean images, computed by one forward pass, differentiated through, and the same in every bound, attack and LP of
    the network returned. The running statistics move once, as the module itself would move them. A network without such
    batch norms comes back as it is.

    Args:
        net: as for `capture`.
        x: clean images, [batch, *input_shape].
        statistics: "batch", or "population": the running ones, after this batch: constants, those of evaluation.

    Returns:
        The network, and its outputs for x.

    Raises:
        UnsupportedOpError: as `capture`.
        ValueError: for a batch of one value a channel.

    Source: Shi et al. 2021.

    Example:
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(5, 4)
        >>> network, logits = ox.on_batch(net, x)
        >>> ox.lower_bounds(network, ox.LinfBall(x, eps=0.1), torch.eye(3), "crown-ibp").shape
        torch.Size([5, 3])
    """
    return capture(net, tuple(x.shape[1:])).on_batch(x, statistics)


def unwrap(net: object) -> Any:
    """What a compiled or parallel module wraps; TypeError for what is no module that could be followed."""
    while type(net).__name__ in _WRAPPERS and isinstance(net, nn.Module):
        net = net._orig_mod if hasattr(net, "_orig_mod") else net.module
    if isinstance(net, torch.jit.ScriptModule):
        raise TypeError("capture: a scripted module cannot be followed; pass the nn.Module that was scripted or traced")
    if type(net).__name__ == "ExportedProgram":
        raise TypeError("capture: an exported program has left its module behind; pass the nn.Module that was exported")
    if not isinstance(net, nn.Module):
        raise TypeError(f"capture: wants an nn.Module or a Network, got {type(net).__name__}")
    return net


@uncompiled
def graph_of(net: nn.Module, shape: Shape) -> Graph:
    """The graph of a module, kept from the last time where nothing has changed since.  Errors as `capture`."""
    kept = _CACHE.get(net, ())
    for entry in kept:
        if entry.shape == shape and entry.rules == generation() and entry.snapshot.holds(net):
            return entry.graph
    if problems := unreadable(net):
        raise UnsupportedOpError(problems)
    with _EXPORTING, uncached():
        snapshot = Snapshot(net)
        graph, problems = _capture(net, shape, snapshot)
        if problems or graph is None:
            raise UnsupportedOpError(problems, supported() if any("no rule" in p.reason for p in problems) else "")
        graph.snapshot = snapshot  # a network that someone holds looks at what can be seen
        if snapshot.known:
            _CACHE[net] = [_Kept(snapshot, shape, generation(), graph), *_CACHE.get(net, ())][:_KEPT]
    return graph


def _first_shape(net: nn.Module) -> Shape:
    """Input shape of a network that starts with a Linear (perhaps after a Flatten)."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        if not isinstance(module, (nn.Sequential, nn.Flatten, nn.Identity)) and next(module.children(), None) is None:
            break
    raise ValueError("capture: give input_shape (without the batch); the first layer does not say it")


@contextlib.contextmanager
def _undrawn() -> Iterator[None]:
    """What is drawn inside moves Python's generator for nobody else."""
    drawn = random.getstate()
    try:
        yield
    finally:
        if random.getstate() != drawn:
            random.setstate(drawn)


def _capture(net: nn.Module, shape: Shape, snapshot: Snapshot) -> tuple[Graph | None, list[Problem]]:
    from optrelax.networks.building import Building
    from optrelax.networks.exporting import BATCH_SIZE, export, load
    from optrelax.networks.places import ExportRefused
    from optrelax.networks.probing import disagreement, kind_of

    load()
    problems = module_problems(net)
    hooked = [p for p in problems if p.reason.endswith(HOOKED)]
    if hooked or any(t.dtype in HALF or t.is_complex() for t in (*net.parameters(), *net.buffers())):
        return None, problems  # not even run: hooks may do anything
    with torch.inference_mode(False):
        example = torch.zeros(BATCH_SIZE, *shape, **kind_of(net))
    try:
        with _undrawn():
            exported = export(net, example)
            built = Building(exported).run()
    except ExportRefused as error:
        return None, problems or [error.problem]
    known = [p.where for p in problems]
    problems += [p for p in built.problems if not any(p.where == w or p.where.startswith(f"{w}.") for w in known)]
    if problems or built.output is None:
        return None, problems
    snapshot.fix(built.fixed)
    graph = Graph(tuple(built.nodes), built.output, shape)
    with _undrawn():
        reason = disagreement(net, graph, example, exported.from_two)
    return (graph, []) if reason is None else (None, [Problem("(root)", type(net).__name__, reason)])
