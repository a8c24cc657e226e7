"""Calls that an export keeps whole: of modules and functions that a rule is registered for, as one marker op each."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from optrelax.errors import Problem
from optrelax.networks.graph import normalises_by_batch
from optrelax.networks.ops import Source
from optrelax.networks.places import DependsOnValues, is_tracings, is_users
from optrelax.networks.registry import Rule, function_rule, module_rule, plain_functions
from optrelax.networks.replicas import Replica
from optrelax.networks.rules.layers import batch_norm_in_training


@dataclass(frozen=True, slots=True)
class Leaf:
    """A call of something that the user registered a rule for."""

    rule: Rule
    name: str
    module: Any
    """A weak proxy of the user's module, None for functions."""
    run: Callable[..., Any]
    arguments: list[object]
    """Flattened; an int wrapped in `Slot` stands for one of the marker op's tensors."""
    spec: Any
    many: bool = False
    """Whether it returns several tensors."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Place of a tensor among the marker op's inputs."""

    index: int


class _Current(threading.local):
    """What the export that runs on this thread has met."""

    leaves: dict[int, Leaf]
    fixed: list[tuple[Source, Tensor]]
    """Masks, which decide shapes, and tensors that numbers were made of; with their values."""
    backwards: dict[str, Problem | None]
    """Functions with a backward of their own that were called; with a problem, where a value takes a gradient."""
    functions: list[type]
    forwards: dict[types.CodeType, list[tuple[type, types.FunctionType]]]
    """What each of `functions` runs first, by its code."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the last export."""
        self.leaves, self.backwards, self.fixed = {}, {}, []
        self.functions, self.forwards = [], {}


current = _Current()
_BACKWARD = (
    "has a backward of its own, which bounds do not follow: their gradient would be another; to bound the network all "
    "the same, freeze its weights: net.requires_grad_(False)"
)


def _forwards() -> dict[types.CodeType, list[tuple[type, types.FunctionType]]]:
    """The code that each `torch.autograd.Function` runs first; one may be a decorator's, and serve several.

    This library's own are left out: their backward passes are the derivatives.
    """
    classes: list[type] = [torch.autograd.Function]
    for kind in classes:  # those that forward makes too
        classes += kind.__subclasses__()
    if classes == current.functions:
        return current.forwards
    current.functions, current.forwards = classes, {}
    for kind in classes:
        if kind.__module__.startswith("optrelax."):
            continue
        forward = kind.forward  # type: ignore[attr-defined]
        while isinstance(forward, functools.partial):
            forward = forward.func
        if isinstance(forward, types.FunctionType):
            current.forwards.setdefault(forward.__code__, []).append((kind, forward))
    return current.forwards


def _runs(frame: types.FrameType, function: types.FunctionType) -> bool:
    """Whether this frame of its code is a call of this function: a decorator's calls differ in what they enclose."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return all(frame.f_locals.get(name) is cell.cell_contents for name, cell in cells)


def _own_backward() -> Problem | None:
    """What is wrong with the `torch.autograd.Function` that the call under way is in; None where it is in none."""
    frame: types.FrameType | None = sys._getframe(2)
    if is_tracings(frame):
        return None
    inner, forwards, kind = frame, _forwards(), None
    while frame is not None and kind is None:  # at each call of each op: no more than this
        kind = next((k for k, f in forwards.get(frame.f_code, ()) if _runs(frame, f)), None)
        frame = frame.f_back
    if kind is None:
        return None
    line = ""
    while inner is not None and inner is not frame and not line:
        line = f"{name}:{inner.f_lineno}" if is_users(name := inner.f_code.co_filename) else ""
        inner = inner.f_back
    return Problem(kind.__name__, "torch.autograd.Function", _BACKWARD, line)


def _marker() -> Any:
    """The op that stands for a registered call: defined once, on first use."""
    if not hasattr(torch.ops.optrelax, "leaf"):
        torch.library.define("optrelax::leaf", "(Tensor[] tensors, int key) -> Tensor[]")
        torch.library.register_fake("optrelax::leaf", _shapes_of)
    return torch.ops.optrelax.leaf.default


def _shapes_of(tensors: list[Tensor], key: int) -> list[Tensor]:
    leaf: Leaf = current.leaves[key]
    found = leaf.run(*_fill(leaf, tensors)[0], **_fill(leaf, tensors)[1])
    return [t.clone() for t in (found if leaf.many else [found])]


def _fill(leaf: Leaf, tensors: list[Any]) -> Any:
    return pytree.tree_unflatten([tensors[a.index] if isinstance(a, Slot) else a for a in leaf.arguments], leaf.spec)


def arguments_of(leaf: Leaf, tensors: list[object]) -> tuple[tuple[object, ...], dict[str, object]]:
    """Positional and keyword arguments of a call, with these in place of its tensors."""
    args, kwargs = _fill(leaf, tensors)
    return args, kwargs


def _call_leaf(rule: Rule, name: str, module: object, run: Callable[..., object], args: Any, kwargs: Any) -> object:
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [a for a in flat if isinstance(a, Tensor)]
    slots = iter(range(len(tensors)))
    arguments = [Slot(next(slots)) if isinstance(a, Tensor) else a for a in flat]
    with torch.no_grad(), _unrecorded():
        shape = run(*args, **kwargs)
    many = isinstance(shape, (list, tuple))
    key = len(current.leaves)
    current.leaves[key] = Leaf(rule, name, module, run, arguments, spec, many)
    found = _marker()(tensors, key)
    return tuple(found) if many else found[0]


def _unrecorded() -> contextlib.AbstractContextManager[object]:
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


class RegisteredCalls(TorchFunctionMode):
    """Keeps registered functions whole, and refuses to read a number out of a tensor whose value is not known.

    value_of: where a tensor's value is read that forward does not change; None for one that it computes.
    """

    def __init__(self, value_of: Callable[[Tensor], Source | None]) -> None:
        super().__init__()
        self.value_of = value_of

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (func.__self__.__name__ if name == "__get__" else name) in _SHOWN:
            return func(*args, **kwargs)  # export asks these hundreds of times an op
        if (problem := _own_backward()) is not None:
            tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if any(t.requires_grad for t in tensors):
                current.backwards[problem.where] = problem
            current.backwards.setdefault(problem.where, None)
        if name in _READS and isinstance(args[0], Tensor):
            return self._read(func, args, kwargs)
        if func in _FEATURE_DROPOUT and kwargs.get("training", args[2] if len(args) > 2 else True) is False:
            return args[0]  # off; inside, the batch would leave its place for a moment
        if name == "__getitem__":
            args = (args[0], self._by_numbers(args[1]))
        found = function_rule(func)
        if found is None:
            return func(*args, **kwargs)
        target, rule = found
        label = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        return _call_leaf(rule, label, None, func, args, kwargs)

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Numbers of a tensor as it is now: the graph gets them, and is another one once they change."""
        tensor = args[0]
        if isinstance(tensor, FakeTensor) and tensor.constant is not None:
            return func(*args, **kwargs)
        read = self.value_of(tensor) if isinstance(tensor, FakeTensor) else tensor.detach
        if read is None:
            raise DependsOnValues
        with unset_fake_temporarily(), _unrecorded():
            value = read().detach().clone()
            current.fixed.append((read, value))
            return func(value, *args[1:], **kwargs)

    def _by_numbers(self, index: object) -> object:
        """An index with the places that constant masks choose in place of the masks: the shape is known then."""
        found: list[object] = []
        for entry in index if isinstance(index, tuple) else (index,):
            if isinstance(entry, list) and entry and all(type(e) is bool for e in entry):
                found.append([place for place, chosen in enumerate(entry) if chosen])
                continue
            is_mask = isinstance(entry, Tensor) and entry.dtype == torch.bool and entry.dim()
            read = self.value_of(entry) if is_mask else None
            if read is None:
                found.append(entry)
                continue
            with unset_fake_temporarily(), _unrecorded():
                value = read().detach().clone()
                found += value.nonzero(as_tuple=True)
            current.fixed.append((read, value))
        return tuple(found) if isinstance(index, tuple) or len(found) > 1 else found[0]


# What a tensor shows of itself; no number of it is read.
_SHOWN = frozenset({
    "_is_view", "device", "dim", "dtype", "grad", "grad_dtype", "is_conj", "is_inference",
    "is_leaf", "is_mkldnn", "is_neg", "is_nested", "is_quantized", "is_sparse", "layout", "numel",
    "requires_grad", "shape", "size", "storage_offset", "stride", "sym_max", "untyped_storage",
})  # fmt: skip
_FEATURE_DROPOUT = (F.dropout1d, F.dropout2d, F.dropout3d)
_READS = ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy", "__array__", "__contains__")


@contextlib.contextmanager
def kept_functions(net: nn.Module) -> Iterator[None]:
    """Python functions that are registered stay whole too: their names mean a call of the marker on this thread.

    Torch's own functions report to `RegisteredCalls`; a plain function has to be met where its callers look it up.
    """
    thread, places = threading.get_ident(), []
    for function, rule in plain_functions():

        @functools.wraps(function)
        def called(*args: object, _function: Any = function, _rule: Any = rule, **kwargs: object) -> object:
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


def keep_leaves(replica: Replica) -> None:
    for module in list(replica.module.modules()):
        rule, original, run = module_rule(module), replica.originals.get(id(module)), module.forward
        if rule is None and normalises_by_batch(module):
            rule, run = batch_norm_in_training, functools.partial(_normalised, module)
        if rule is None or original is None:
            continue
        name, proxy = type(module).__name__, weakref.proxy(original)

        def forward(*args: object, _call: Any = (rule, name, proxy, run), **kwargs: object) -> object:
            rule, name, proxy, run = _call
            return _call_leaf(rule, name, proxy, run, args, kwargs)

        module.forward = forward


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """A value such as a batch norm gives; nothing of the module changes."""
    norm._check_input_dim(x)
    return x.clone()
