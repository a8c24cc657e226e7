"""A module as a functional graph of ATen ops, by torch.export, which leaves the module itself alone.

What is exported is a replica: the module's structure and Python state copied, its parameters and buffers shared. The
batch dimension is dynamic. Modules and functions with a rule of the user's stay whole, as calls of one marker op.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import random
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from optrelax.errors import Problem
from optrelax.networks.batches import two_sizes, unify
from optrelax.networks.graph import normalises_by_batch
from optrelax.networks.ops import Shape, Source
from optrelax.networks.registry import Rule, function_rule, module_rule, plain_functions
from optrelax.networks.rules.layers import batch_norm_in_training

BATCH_SIZE = 3  # of the example input; no number that the graph may depend on
_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(__file__)
_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch.fx.experimental.recording")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A call of something that the user registered a rule for."""

    rule: Rule
    name: str
    module: Any
    """A weak proxy of the user's module, None for functions."""
    run: Callable[..., Any]
    arguments: list[Any]
    """Flattened; an int wrapped in `Slot` stands for one of the marker op's tensors."""
    spec: Any
    many: bool = False
    """Whether it returns several tensors."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Place of a tensor among the marker op's inputs."""

    index: int


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
    from_two: bool = False
    """Whether it was made of the graphs of two sizes: torch then guards no other."""


class ExportRefused(Exception):
    """The module cannot be exported: one problem that says why."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(str(problem))


# --- the replica --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replica:
    """A copy of a module, and for each of its modules the one it stands for."""

    module: nn.Module
    originals: dict[int, nn.Module]


def replicate(net: nn.Module, share: bool = True) -> Replica:
    """The module's structure and Python state anew; `share` its tensors, or hold clones of them."""
    memo: dict[int, Any] = {}
    modules = list(net.modules())
    for module in modules:
        for tensor in _tensors(vars(module)):
            memo[id(tensor)] = tensor if share else _clone(tensor)
        for given in module._parameters.values():  # put in by a functional call, a parameter is a plain tensor
            if share and given is not None and not isinstance(given, nn.Parameter):
                memo[id(given)] = nn.Parameter(given.detach(), given.requires_grad)
        if isinstance(inner := vars(module).get("_modules", {}).get("_orig_mod"), nn.Module):
            memo.setdefault(id(module), copy.deepcopy(inner, memo))  # compiled: what is compiled
    found = copy.deepcopy(net, memo)
    originals = {id(memo[id(m)]): m for m in modules if id(m) in memo}
    for module in found.modules():
        module._compiled_call_impl = None
    return Replica(found, originals)


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth < 4 and isinstance(value, (list, tuple, set)):
        for v in value:
            yield from _tensors(v, depth + 1)
    elif depth < 4 and isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v, depth + 1)


def _clone(tensor: Tensor) -> Tensor:
    found = tensor.detach().clone()
    return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found


# --- calls that stay whole ----------------------------------------------------------------------------------------

_current = threading.local()  # the leaves of the export that runs on this thread


def _marker() -> Any:
    """The op that stands for a registered call: defined once, on first use."""
    if not hasattr(torch.ops.optrelax, "leaf"):
        torch.library.define("optrelax::leaf", "(Tensor[] tensors, int key) -> Tensor[]")
        torch.library.register_fake("optrelax::leaf", _shapes_of)
    return torch.ops.optrelax.leaf.default


def _shapes_of(tensors: list[Tensor], key: int) -> list[Tensor]:
    leaf: Leaf = _current.leaves[key]
    found = leaf.run(*_fill(leaf, tensors)[0], **_fill(leaf, tensors)[1])
    return [t.clone() for t in (found if leaf.many else [found])]


def _fill(leaf: Leaf, tensors: list[Any]) -> Any:
    return pytree.tree_unflatten([tensors[a.index] if isinstance(a, Slot) else a for a in leaf.arguments], leaf.spec)


def arguments_of(leaf: Leaf, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, with these in place of its tensors."""
    args, kwargs = _fill(leaf, tensors)
    return args, kwargs


def _call_leaf(rule: Rule, name: str, module: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [a for a in flat if isinstance(a, Tensor)]
    slots = iter(range(len(tensors)))
    arguments = [Slot(next(slots)) if isinstance(a, Tensor) else a for a in flat]
    with torch.no_grad(), _unrecorded():
        shape = run(*args, **kwargs)
    many = isinstance(shape, (list, tuple))
    key = len(_current.leaves)
    _current.leaves[key] = Leaf(rule, name, module, run, arguments, spec, many)
    found = _marker()(tensors, key)
    return tuple(found) if many else found[0]


def _unrecorded() -> contextlib.AbstractContextManager[Any]:
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


class _Calls(TorchFunctionMode):
    """Keeps registered functions whole, and refuses to read a number out of a tensor whose value is not known."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READS and isinstance(args[0], torch._subclasses.FakeTensor) and args[0].constant is None:
            raise DependsOnValues
        if func in _FEATURE_DROPOUT and kwargs.get("training", args[2] if len(args) > 2 else True) is False:
            return args[0]  # off; inside, the batch would leave its place for a moment
        found = function_rule(func)
        if found is None:
            return func(*args, **kwargs)
        target, rule = found
        label = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        return _call_leaf(rule, label, None, func, args, kwargs)


class DependsOnValues(Exception):
    """Forward turned a tensor into a number."""


_FEATURE_DROPOUT = (F.dropout1d, F.dropout2d, F.dropout3d)
_READS = ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy", "__array__", "__contains__")
_AUTOCAST = "autocast inside forward rounds to half precision; take it out, or put it around the call of the network"
MIXES = "mixes the batch: forward works, or does the same, for some sizes of the batch only"
_DATA_DEPENDENT = "forward reads a number out of a tensor; control flow must not depend on values"


@contextlib.contextmanager
def _kept_functions(net: nn.Module) -> Iterator[None]:
    """Python functions that are registered stay whole too: their names mean a call of the marker on this thread.

    Torch's own functions report to `_Calls`; a plain function has to be met where its callers look it up.
    """
    thread, places = threading.get_ident(), []
    for function, rule in plain_functions():

        @functools.wraps(function)
        def called(*args: Any, _function: Any = function, _rule: Any = rule, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return _function(*args, **kwargs)
            return _call_leaf(_rule, _function.__name__, None, _function, args, kwargs)

        modules = [vars(sys.modules[type(m).__module__]) for m in net.modules() if type(m).__module__ in sys.modules]
        for names in {id(d): d for d in (function.__globals__, *modules)}.values():
            places += [(names, name, function) for name, value in list(names.items()) if value is function]
            names.update({name: called for name, value in list(names.items()) if value is function})
    try:
        yield
    finally:
        for names, name, function in places:
            names[name] = function


def _keep_leaves(replica: Replica) -> None:
    for module in list(replica.module.modules()):
        rule, original, run = module_rule(module), replica.originals.get(id(module)), module.forward
        if rule is None and normalises_by_batch(module):
            rule, run = batch_norm_in_training, functools.partial(_normalised, module)
        if rule is None or original is None:
            continue
        name, proxy = type(module).__name__, weakref.proxy(original)

        def forward(*args: Any, _call: Any = (rule, name, proxy, run), **kwargs: Any) -> Any:
            rule, name, proxy, run = _call
            return _call_leaf(rule, name, proxy, run, args, kwargs)

        module.forward = forward


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """A value such as a batch norm gives; nothing of the module changes."""
    norm._check_input_dim(x)
    return x.clone()


# --- export -------------------------------------------------------------------------------------------------------


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

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


@functools.cache
def load() -> None:
    """Import what torch.export needs, once; what these imports do to warnings and to Python's generator is undone."""
    drawn = random.getstate()
    with _quiet():
        torch.export.export(nn.Identity(), (torch.zeros(2, 2),), strict=False)
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


def _export(net: nn.Module, example: Tensor, batch: Any) -> Exported:
    try:
        replica = replicate(net)
    except Exception as error:
        reason = f"cannot be copied for its capture: {_sentence(error)}"
        raise ExportRefused(Problem("(root)", type(net).__name__, reason)) from error
    _keep_leaves(replica)
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
        raise ExportRefused(_why(replica.module, error, tuple(example.shape[1:]))) from error
    finally:
        _current.leaves = {}


def _program(net: nn.Module, replica: Replica, example: Tensor, batch: Any, gradients: bool) -> Exported:
    _current.leaves = {}
    shapes = None if batch is None else ({0: batch},)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for device in {example.device.type, "cpu"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_kept_functions(net))
        stack.enter_context(_Calls())
        program = torch.export.export(_Root(replica.module), (example,), dynamic_shapes=shapes, strict=False)
        return _exported(net, program, replica)


def _why(net: nn.Module, error: BaseException, shape: Shape) -> Problem:
    """The one sentence that a failed export comes to."""
    name, text = type(error).__name__, str(error)
    path, kind = _module_of(net, error)
    if isinstance(error, DependsOnValues) or "DataDependent" in name or "data-dependent" in text:
        reason = _DATA_DEPENDENT
    elif "in-place operation" in text and "leaf" in text:
        reason = "forward changes a parameter or constant in place; use the form that copies"
    elif "specialized" in text or "Constraints violated" in text or "ConstraintViolation" in name:
        reason = MIXES
    elif name == "UserError" or type(error).__module__.startswith(("torch._dynamo", "torch.fx", "torch._export")):
        reason = f"cannot be exported: {_sentence(error)}"
    elif "missing a required argument" in text or "positional argument" in text:
        reason = f"the network must take one tensor: {_sentence(error)}"
    else:
        reason = f"fails on an input of shape {shape}: {_sentence(error)}"
    return Problem(path or "(root)", kind, reason, _line_of(error))


def _module_of(net: nn.Module, error: BaseException) -> tuple[str, str]:
    """Path and type of the innermost module whose forward an error came through."""
    paths = {id(m): (path, type(m).__name__) for path, m in net.named_modules()}
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__)]
    owners = [paths[id(me)] for f in frames if id(me := f.f_locals.get("self")) in paths]
    return owners[-1] if owners else ("", type(net).__name__)


def _sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _line_of(error: BaseException) -> str:
    """The last line of the user's own code that an error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def is_users(filename: str) -> bool:
    """Whether a file is neither torch's nor the capture's own."""
    checks = ("contextlib.py", "copy.py", "jaxtyping/_decorator.py")
    return not filename.startswith((_TORCH, _HERE, "<")) and not filename.endswith(checks)


def _exported(net: nn.Module, program: Any, replica: Replica) -> Exported:
    graph = _flatten(program.graph_module)
    problems = _mutations(graph, program)
    if not problems and not _renamed(graph):
        # Something changed in place is read through another view: torch's own functionalisation knows every view.
        program = program.run_decompositions({})
        graph = _flatten(program.graph_module)
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
        else:
            sources[node] = _constant(program.constants[spec.target], net)
    assert given is not None
    returned = program.call_spec.out_spec
    if returned.type is not None:
        problems.append(_returns(returned.type.__name__))
    outputs = [spec.arg for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    output = getattr(outputs[0], "name", None) if outputs else None
    if not problems and output is None:
        problems.append(_returns("no tensor"))
    return Exported(graph, given, output, sources, dict(_current.leaves), problems)


def _returns(found: str) -> Problem:
    return Problem("output", "output", f"the network must return one tensor, got {found}")


@dataclass(frozen=True, slots=True)
class Attribute:
    """Reads a tensor of a module at each use, so that it follows training, `.to()` and functional calls."""

    owner: weakref.ref[nn.Module]
    name: str

    def __call__(self) -> Tensor:
        owner = self.owner()
        if owner is None:
            raise RuntimeError("a module that was captured is gone; capture the network again")
        found: Tensor = getattr(owner, self.name)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A tensor that belongs to no module: one that forward makes or closes over."""

    value: Tensor

    def __call__(self) -> Tensor:
        return self.value


def _attribute(target: str, replica: Replica, net: nn.Module) -> Source:
    path, _, name = target.rpartition(".")
    module = replica.module.get_submodule(path)
    owner = replica.originals.get(id(module))
    if owner is None:
        owner = net.get_submodule(path)
    return Attribute(weakref.ref(owner), name)


def _constant(value: Any, net: nn.Module) -> Source:
    """A plain tensor among a module's attributes is read anew at each use; another is held."""
    for module in net.modules():
        for name, attribute in (*vars(module).items(), *module.named_buffers(recurse=False)):
            if attribute is value:
                return Attribute(weakref.ref(module), name)
    return Held(value)


# --- a functional graph -------------------------------------------------------------------------------------------


def _flatten(module: fx.GraphModule) -> fx.Graph:
    """The module's graph with blocks under torch.no_grad in place of their calls."""
    graph = fx.Graph()
    graph.output(_copy(module, graph, {}))
    return graph


def _copy(module: fx.GraphModule, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
    for node in module.graph.nodes:
        if node in values or node.op == "get_attr":
            continue
        if node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        if str(node.target) == "wrap_with_set_grad_enabled":
            block = getattr(module, str(node.args[1].target))
            given = [values[n] if isinstance(n, fx.Node) else n for n in node.args[2:]]
            inner = dict(zip((n for n in block.graph.nodes if n.op == "placeholder"), given, strict=True))
            outputs = _copy(block, graph, inner)
            for user in node.users:
                values[user] = outputs[user.args[1]]
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            autocast = "autocast" in str(node.target)
            reason = _AUTOCAST if autocast else "has no rule: a block that runs under conditions of its own"
            raise ExportRefused(Problem(node.name, str(node.target), reason, line_of(node)))
        values[node] = graph.node_copy(node, values.__getitem__)
        if node.target is torch.ops.aten.detach_.default:  # changes no number
            values[node].target = torch.ops.aten.detach.default
    return None


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    given = [*zip(schema.arguments, node.args, strict=False)]
    given += [(a, node.kwargs[a.name]) for a in schema.arguments if a.name in node.kwargs]
    return [v for a, v in given if a.alias_info is not None and a.alias_info.is_write and isinstance(v, fx.Node)]


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _mutations(graph: fx.Graph, program: Any) -> list[Problem]:
    """Parameters, buffers and constants that forward changes."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    owners = {_storage(n): specs[n.name] for n in graph.nodes if n.op == "placeholder"}
    problems = []
    for node in graph.nodes:
        for value in _written(node):
            spec = owners.get(_storage(value))
            if spec is None or spec.kind.name == "USER_INPUT":
                continue
            name = str(spec.target).removeprefix("net.")
            kind = spec.kind.name.lower().replace("_", " ")
            reason = (
                f"forward changes this {kind} at each call; call .eval() where that stops it, or change it elsewhere"
            )
            problems.append(Problem(name, op_name(node.target), reason, line_of(node)))
    return list({p.where: p for p in problems}.values())


def _renamed(graph: fx.Graph) -> bool:
    """Turn `relu_(v)` into `w = relu(v)`, with w for v from there on; False where v is read through another view."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: list[tuple[fx.Node, fx.Node, Any]] = []
    for node in graph.nodes:
        changed = _written(node)
        if not changed:
            continue
        functional, value, at = _functional_form(node.target), changed[0], order[node]
        if len(changed) > 1 or functional is None:
            return False
        aliases = (n for n in graph.nodes if _storage(n) == _storage(value) and n is not value and order[n] < at)
        mine = {w for w, v, _ in found if v is value} | {value}
        if any(order[user] > at for n in aliases if n not in mine for user in n.users):
            return False
        found.append((node, value, functional))
    for node, value, functional in found:
        node.target = functional
        value.replace_all_uses_with(node, delete_user_cb=functools.partial(_is_later, order, order[node]))
    return True


def _is_later(order: dict[fx.Node, int], at: int, user: fx.Node) -> bool:
    return order[user] > at


def _functional_form(target: Any) -> Any:
    """aten.relu_.default -> aten.relu.default; None where there is none."""
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)


# --- places -------------------------------------------------------------------------------------------------------


def op_name(target: Any) -> str:
    """`conv2d` for aten.conv2d.default."""
    name = str(target)
    return name.split(".")[1] if name.startswith("aten.") else name.removesuffix(".default")


def line_of(node: fx.Node) -> str:
    """FILE:LINE of the user's code that a node comes from, empty where it is all torch's."""
    lines = [line.strip() for line in node.meta.get("stack_trace", "").splitlines()]
    for line in reversed(lines):
        if line.startswith('File "'):
            name, rest = line.removeprefix('File "').split('", line ', 1)
            if is_users(name):
                return f"{name}:{rest.split(',')[0]}"
    return ""


def module_of(node: fx.Node) -> tuple[str, str]:
    """Path and type of the innermost module that a node belongs to, ("", "") at the root."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "", ""
    path, kind = stack[-1]
    return path.removeprefix("net").removeprefix("."), kind if isinstance(kind, str) else kind.__name__
