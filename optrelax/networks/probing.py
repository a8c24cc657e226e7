"""Is the graph the module?  Both are run on random inputs and corner cases, and must agree to rounding."""

from __future__ import annotations

import random
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from optrelax.networks.graph import Graph, normalises_by_batch
from optrelax.networks.replicas import replicate, uncached
from optrelax.networks.snapshots import Snapshot

_SIZES = (1, 4)  # two sizes of the batch
_TRAINING_SIZES = (4, 7)
_MORE_SIZES = (*range(2, 41), 100, 1000)  # where nothing else shows that the size decides nothing
_LARGEST = 10_000
_ALONE = 8  # examples that are also given one by one
_MOST = 2**22  # numbers of one probe
_SEED = 20_240_607


def disagreement(net: nn.Module, graph: Graph, example: Tensor, every_size: bool = False) -> str | None:
    """How the network that was captured from `net` differs from it on probes like `example`; None where it does not.

    The module runs as a copy with tensors of its own, so that nothing of it changes; random inputs come from a
    generator of their own.  every_size: more sizes of the batch.
    """
    replica = replicate(net, share=False).module
    before = Snapshot(replica)
    norms = [m for m in replica.modules() if normalises_by_batch(m)]
    with torch.inference_mode(False), torch.no_grad():
        if not norms:
            reason = _fixed_disagreement(replica, graph, example, every_size)
            return reason or _own_disagreement(net, graph, example, before, replica)
        if all(m.running_mean is not None for m in norms):
            # The same map with other statistics, and a fixed function.
            for m in norms:
                m.eval()
            if reason := _fixed_disagreement(replica, graph.at_population(), example, every_size):
                return reason
            for m in norms:
                m.train()
        return _batch_disagreement(replica, graph, example)


def _fixed_disagreement(replica: nn.Module, graph: Graph, example: Tensor, every_size: bool) -> str | None:
    for name, x in _probes(example, _named_sizes(replica) if every_size else []):
        drawn = random.getstate()
        try:
            wanted = replica(x.clone())
        except Exception as error:  # noqa: BLE001  the user's code: whatever it raises on inputs it should take
            return f"the module fails on {name} with {len(x)} example(s): {str(error).splitlines()[:1]}"
        if random.getstate() != drawn:  # a clamp may hide what was drawn
            return "draws random numbers, so that it is no fixed function; draw them outside of forward"
        if isinstance(wanted, Tensor) and wanted.shape[:1] != x.shape[:1]:
            return f"mixes the batch: {len(x)} examples give an output of shape {tuple(wanted.shape)}"
        probe = Probe(graph, x)
        if reason := probe.compare(wanted):
            other = f"the captured graph is another function than the module on {name}: {reason}"
            return _no_function(replica, probe, x, wanted) or other
        if len(x) > _ALONE:
            continue
        if len(x) == 1:
            if reason := probe.compare(wanted, replica(x.clone().requires_grad_()), "as an attack sees it"):
                other = f"is another function of inputs that require a gradient: {reason}"
                return _no_function(replica, probe, x, wanted) or other
            continue
        alone = torch.cat([replica(x[i : i + 1].clone()) for i in range(len(x))])
        if reason := probe.compare(wanted, alone, "alone"):
            return f"mixes the batch: an example alone gives another output than in a batch of {len(x)}: {reason}"
    return None


def _no_function(replica: nn.Module, probe: Probe, x: Tensor, wanted: Tensor) -> str | None:
    again = probe.compare(wanted, replica(x.clone()), "the next time")
    return again and f"gives another output each time it is called with one input, so that it is no function: {again}"


def _own_disagreement(net: nn.Module, graph: Graph, example: Tensor, was: Snapshot, replica: nn.Module) -> str | None:
    """How the module itself differs, which may depend on what object it is; asked where calls of it change nothing."""
    if not was.holds(replica) or any("_orig_mod" in m._modules or m._compiled_call_impl for m in net.modules()):
        return None
    pairs = zip((*net.parameters(), *net.buffers()), (*replica.parameters(), *replica.buffers()), strict=True)
    if not all(torch.equal(mine, theirs) for mine, theirs in pairs):
        return None
    name, x = next(_probes(example, ()))
    reason = Probe(graph, x).compare(net(x.clone()))
    return reason and f"a copy of the module is another function than the module itself on {name}: {reason}"


def _batch_disagreement(replica: nn.Module, graph: Graph, example: Tensor) -> str | None:
    """How the outputs differ where batch norms take the statistics of the batch."""
    generator = torch.Generator().manual_seed(_SEED)
    for size in _TRAINING_SIZES:
        x = torch.randn(size, *example.shape[1:], generator=generator, dtype=torch.float64, device="cpu").to(example)
        measured, _ = graph.clean_pass(x)
        probe = Probe(graph.at_statistics(measured), x)
        for name, (mean, variance) in measured.items():
            # What x - mean cancels, it loses.
            probe.slack = probe.slack * (
                1 + float((mean.abs() / (variance + graph.in_training[name].eps).sqrt()).amax())
            )
        if reason := probe.compare(replica(x.clone())):
            return f"the captured graph is another function than the module on a batch of {size} in training: {reason}"
    return None


def difference(net: nn.Module, graph: Graph, x: Tensor) -> str | None:
    """How the outputs of a module and of its graph differ on x, in the module's own type: None to rounding."""
    x = x.to(**kind_of(net))
    with torch.no_grad(), uncached():
        wanted = net(x.clone())
    reason = Probe(graph, x).compare(wanted)
    return reason and f"the captured graph is another function than the module on the data: {reason}"


def kind_of(net: nn.Module) -> dict[str, Any]:
    """Type and device of the inputs that a module takes."""
    tensor: Tensor | None = next((t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()), None)
    if tensor is None:
        return {"dtype": torch.get_default_dtype(), "device": torch.device("cpu")}
    return {"dtype": tensor.dtype, "device": tensor.device}


def _named_sizes(net: nn.Module) -> list[int]:
    """Sizes of a batch that forward may ask for: small ones, and what code and attributes name, or one more."""
    found: set[int] = set()
    for module in net.modules():
        if not type(module).__module__.startswith("torch."):
            found.update(n for n in vars(module).values() if type(n) is int)
            for function in (*vars(type(module)).values(), *vars(module).values()):
                found |= _numbers(getattr(function, "__code__", None))
    named = {n + more for n in found for more in (0, 1) if 0 < n < _LARGEST}
    return sorted(named.union(_MORE_SIZES) - set(_SIZES))


def _numbers(code: types.CodeType | None) -> set[int]:
    """Whole numbers in code, its inner functions too."""
    if code is None:
        return set()
    inner = (_numbers(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return {n for n in code.co_consts if type(n) is int}.union(*inner)


def _probes(example: Tensor, more: Iterable[int]) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(_SEED)
    shape = example.shape[1:]
    most = _MOST // max(1, example[0].numel())
    for size in (*_SIZES, *(n for n in more if n <= most)):
        x = torch.randn(size, *shape, generator=generator, dtype=torch.float64, device="cpu").to(example)
        yield "random inputs", x
    zeros = torch.zeros(shape, device="cpu")
    corners = [zeros, zeros + 1, zeros - 1, zeros + 100]
    corners.append(torch.randn(shape, generator=generator, device="cpu") * 100)
    yield "corner cases (zeros, ones, -1, 100, random in the hundreds)", torch.stack(corners).to(example)


class Probe:
    """What a graph makes of one input, and how near to it the module's outputs have to be."""

    def __init__(self, graph: Graph, x: Tensor) -> None:
        values = graph.values(x)
        self.output = values[graph.output]
        sizes = [v.abs().reshape(len(x), -1) for v in values.values() if v.numel()]
        greatest = torch.stack([v.amax(1) for v in sizes]).amax(0) if sizes else x.new_zeros(len(x))
        self.ordinary = greatest.isfinite()
        """Which examples overflow nowhere: where one does, the order of its sums decides what comes out."""
        if not bool(self.ordinary.all()):
            greatest = torch.stack([torch.where(v.isfinite(), v, 0.0).amax(1) for v in sizes]).amax(0)
        scale = torch.where(self.ordinary, greatest, 0.0).amax().expand_as(greatest)
        scale = torch.where(self.ordinary, scale, torch.maximum(scale, greatest))
        # Sums of many terms in another order, a layer: some hundred units in the last place of the greatest value.
        numbers = torch.finfo(self.output.dtype)
        self.slack = 256.0 * numbers.eps * (len(graph.nodes) + 1) * scale.clamp_min(numbers.tiny)
        """Of each example."""

    def compare(self, wanted: object, found: Tensor | None = None, label: str = "by the graph") -> str | None:
        """What is unlike in the module's output and the graph's (or `found`); None where they agree to rounding."""
        given = self.output if found is None else found
        if not isinstance(wanted, Tensor):
            return f"the module returns {type(wanted).__name__}, no tensor"
        if wanted.shape != given.shape:
            return f"the module gives shape {tuple(wanted.shape)}, the graph {tuple(given.shape)}"
        if wanted.dtype != given.dtype:
            return f"the module gives {wanted.dtype}, the graph {given.dtype}"
        wide = (-1, *[1] * (given.dim() - 1))
        near = (wanted - given).abs() <= self.slack.reshape(wide)
        same = (wanted == given) | (wanted.isnan() & given.isnan()) | near
        lost = ~(wanted.isfinite() & given.isfinite())
        same |= lost & ~self.ordinary.reshape(wide)
        if bool(same.all()):
            return None
        at = (~same).nonzero()[0].tolist()
        return f"{float(wanted[tuple(at)]):.9g} by the module, {float(given[tuple(at)]):.9g} {label}, at {at}"
