"""A module as a functional graph of ATen ops, by torch.export, which leaves the module itself alone.

What is exported is a replica: the module's structure and Python state copied, its parameters and buffers shared. The
batch dimension is dynamic. Modules and functions with a rule of the user's stay whole, as calls of one marker op.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import threading
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from optrelax.errors import Problem
from optrelax.networks.attention import keep_batch_in_front
from optrelax.networks.batches import two_sizes, unify
from optrelax.networks.decompositions import made_of_others
from optrelax.networks.entries import read_in_front
from optrelax.networks.functional_graphs import flatten, mutations, renamed, transforms
from optrelax.networks.gradients import stopped_at_weights
from optrelax.networks.layouts import batch_in_front
from optrelax.networks.leaves import Leaf, RegisteredCalls, current, keep_leaves, kept_functions
from optrelax.networks.live_tensors import Attribute, Held
from optrelax.networks.ops import Source
from optrelax.networks.places import MIXES, TRANSFORMED, ExportRefused, problem_of, sentence
from optrelax.networks.recurrences import unroll
from optrelax.networks.replicas import Replica, replicate

BATCH_SIZE = 3  # of the example input; no number that the graph may depend on
_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch.fx.experimental.recording")


@dataclass(slots=True)
class Exported:
    """A functional graph, and where its placeholders come from."""

    graph: fx.Graph
    input: fx.Node
    output: str | None
    """Name of the node that forward returns."""
    sources: dict[fx.Node, Source]
    """Parameters, buffers and constants, read at each use."""
    leaves: dict[int, Leaf]
    problems: list[Problem] = field(default_factory=list)
    fixed: list[tuple[Source, Tensor]] = field(default_factory=list)
    """What the graph depends on beside numbers that it reads, and the values of that."""
    from_two: bool = False
    """Whether it was made of the graphs of two sizes: torch then guards no other."""


class _Silent(logging.Filter):
    """Drops what torch logs on this thread: a refusal says it in one sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self.thread


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    silent = _Silent()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(silent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(silent)


class _Root(nn.Module):
    """Calls the replica by position, whatever its forward calls its argument."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.training = net.training

    def forward(self, x: Tensor) -> object:
        return self.net(x)


@functools.cache
def load() -> None:
    """Import what torch.export needs, once; what these imports do to warnings and to Python's generator is undone."""
    drawn = random.getstate()
    with _quiet():
        torch.export.export(nn.Identity(), (torch.zeros(2, 2, device="cpu"),), strict=False)
    random.setstate(drawn)


def export(net: nn.Module, example: Tensor) -> Exported:
    """The graph of `net` on inputs like `example` [batch, *shape], any batch size.

    Raises ExportRefused with the reason in one sentence.
    """
    try:
        return _export(net, example, torch.export.Dim("batch", min=2))
    except ExportRefused as error:
        if error.problem.reason != MIXES:
            raise
        # `len(x)` must be a plain number: the graphs of two sizes, where they are alike but for that number.
        sizes = two_sizes(net, tuple(example.shape[1:]))
        try:
            first, second = (_export(net, example[:1].expand(size, *example.shape[1:]).clone(), None) for size in sizes)
        except ExportRefused:
            raise error from None  # it works for one size alone
        if not unify(first.graph, second.graph, first.input, sizes):
            raise
        first.from_two = True
        return first


def _export(net: nn.Module, example: Tensor, batch: object) -> Exported:
    try:
        with torch.inference_mode(False):
            replica = replicate(net)
    except Exception as error:
        reason = f"cannot be copied for its capture: {sentence(error)}"
        raise ExportRefused(Problem("(root)", type(net).__name__, reason)) from error
    keep_leaves(replica)
    keep_batch_in_front(replica)
    unroll(replica)
    try:
        try:
            return _program(net, replica, example, batch, gradients=True)
        except RuntimeError as error:
            # Running statistics that are parameters: forward runs without gradients alone.
            if "is not differentiable with respect to argument" not in str(error):
                raise
            return _program(net, replica, example, batch, gradients=False)
    except ExportRefused:
        raise
    except Exception as error:
        raise ExportRefused(problem_of(replica.module, error, tuple(example.shape[1:]))) from error
    finally:
        current.clear()


def _program(net: nn.Module, replica: Replica, example: Tensor, batch: object, gradients: bool) -> Exported:
    current.clear()
    shapes = None if batch is None else ({0: batch},)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for device in {example.device.type, "cpu"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(kept_functions(net))
        stack.enter_context(RegisteredCalls(functools.partial(_value_of, replica, net)))
        program = torch.export.export(_Root(replica.module), (example,), dynamic_shapes=shapes, strict=False)
        return _exported(net, program, replica)


def _exported(net: nn.Module, program: Any, replica: Replica) -> Exported:
    graph = flatten(program.graph_module)
    problems = mutations(graph, program) + transforms(graph)
    if not problems and not renamed(graph):
        # Something changed in place is read through another view: torch's own functionalisation knows every view.
        program = program.run_decompositions({})
        graph = flatten(program.graph_module)
    if not problems and (rewritten := made_of_others(program, graph)) is not None:
        program, graph = rewritten, flatten(rewritten.graph_module)
    sources: dict[fx.Node, Source] = {}
    given: fx.Node | None = None
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        if spec.kind.name == "USER_INPUT":
            given = node
        elif spec.kind.name in ("PARAMETER", "BUFFER"):
            sources[node] = _attribute(spec.target.removeprefix("net."), replica, net)
        elif isinstance(constant := program.constants[spec.target], FakeTensor):
            raise ExportRefused(Problem("(root)", type(net).__name__, TRANSFORMED))
        else:
            sources[node] = _constant(constant, net)
    assert given is not None
    read_in_front(graph)
    batch_in_front(graph, given)
    returned = program.call_spec.out_spec
    if returned.type is not None:
        problems.append(_returns(returned.type.__name__))
    kinds = [spec.kind.name for spec in program.graph_signature.output_specs]
    (given_back,) = next(n for n in reversed(graph.nodes) if n.op == "output").args
    output = given_back[kinds.index("USER_OUTPUT")] if "USER_OUTPUT" in kinds else None
    if not problems and not isinstance(output, fx.Node):
        problems.append(_returns("no tensor"))
    stopped_at_weights(graph, given)
    found = Exported(graph, given, getattr(output, "name", None), sources, dict(current.leaves), problems)
    found.fixed += current.fixed
    if current.backwards:  # no problem as long as no weight takes a gradient
        found.fixed.append((read := functools.partial(_trained, weakref.ref(net)), read()))
        found.problems += [problem for problem in current.backwards.values() if problem is not None]
    return found


def _trained(net: weakref.ref[nn.Module]) -> Tensor:
    module = net()
    return torch.tensor([] if module is None else [p.requires_grad for p in module.parameters()], device="cpu")


def _returns(found: str) -> Problem:
    return Problem("output", "output", f"the network must return one tensor, got {found}")


def _attribute(target: str, replica: Replica, net: nn.Module) -> Source:
    path, _, name = target.rpartition(".")
    module = replica.module.get_submodule(path)
    owner = replica.originals.get(id(module))
    if owner is None:
        owner = net.get_submodule(path)
    return Attribute.of(owner, name)


def _value_of(replica: Replica, net: nn.Module, tensor: Tensor) -> Source | None:
    """Where the value of a tensor that forward sees is read: a buffer, or a tensor that it did not compute."""
    if not isinstance(tensor, FakeTensor):
        return _constant(tensor, net)
    for module in replica.module.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer is tensor and (owner := replica.originals.get(id(module))) is not None:
                return Attribute.of(owner, name)
    return None


def _constant(value: Any, net: nn.Module) -> Source:
    """A plain tensor among a module's attributes is read anew at each use; another is held."""
    for module in net.modules():
        for name, attribute in (*vars(module).items(), *module.named_buffers(recurse=False)):
            if attribute is value:
                return Attribute.of(module, name)
    return Held(value)
