"""Network capture: any `nn.Module` of supported ops -> an immutable graph, through torch.fx.

One builder a module type, function or method turns an fx node into an op or an activation. Users
register their own with `register_op` and `register_activation`.
"""

from __future__ import annotations

import inspect
import math
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from optrelax.errors import Problem, UnsupportedOpError
from optrelax.kernels.convolutions import ConvGeometry
from optrelax.networks import activations
from optrelax.networks.activations import Activation
from optrelax.networks.graph import HALF, MODES, Network, Node, Op
from optrelax.networks.ops import (
    Add,
    AveragePool2d,
    BatchNorm,
    Conv2d,
    Divide,
    Linear,
    MaxPool2d,
    Reshape,
    Scale,
    Shape,
    Source,
)

Target = type[nn.Module] | Callable[..., Any] | str
_PROBE = 3  # batch size of the shapes' probe
# torch.fx replaces methods of nn.Module itself while it traces, and puts back what it found: one thread at a time.
_TRACING = threading.RLock()
_HOOKS = "has forward hooks, which a captured graph would not run; remove them"


@dataclass(frozen=True, slots=True)
class Site:
    """What a builder sees of one call: the arguments and where the network's values stand among them."""

    module: nn.Module | None
    """The module called, None for functions and methods."""
    args: tuple[Any, ...]
    """Probe values; a `Source` reads the live constant of `constant(i)`."""
    kwargs: dict[str, Any]
    traced: tuple[int, ...]
    """Positions of the arguments that depend on the network's input."""
    sources: dict[int | str, Source]
    """Live constants among the arguments."""
    result: Tensor
    """Probe of the result, [probe batch, *shape]."""

    def shape(self, position: int = 0) -> Shape:
        """Shape of a traced argument without the batch."""
        return tuple(self.args[position].shape[1:])

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name, probe value."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def constant(self, position: int, name: str) -> Source | None:
        """A live constant by position or name, None where it is absent or None."""
        value = self.argument(position, name)
        if value is None:
            return None
        key: int | str = position if len(self.args) > position else name
        if isinstance(value, float):
            number = torch.tensor(value, dtype=torch.float64)  # a Python number is no float32
            return lambda: number
        return self.sources.get(key, lambda: torch.as_tensor(value))


Builder = Callable[[Site], Op]
_MODULES: dict[type[nn.Module], Builder] = {}
_FUNCTIONS: dict[Any, Builder] = {}


class _Refused(Exception):
    """A builder's reason for not taking a call."""


def register_op(*targets: Target) -> Callable[[Builder], Builder]:
    """Decorator: how calls of these module types, functions or methods (by name) become an op.

    The builder gets a `Site` and returns an `Affine`, `Activation` or `MaxPool2d`; ValueError refuses the call.
    """

    def decorate(builder: Builder) -> Builder:
        for target in targets:
            if isinstance(target, type) and issubclass(target, nn.Module):
                _MODULES[target] = builder
            elif callable(target) or isinstance(target, str):
                _FUNCTIONS[target] = builder
            else:
                raise TypeError(f"register_op: wants a module type, function or method name, got {target!r}")
        return builder

    return decorate


def register_activation(*targets: Target, activation: Activation) -> None:
    """Make calls of `targets` this piecewise-linear activation, for every relaxation and layer."""
    if not isinstance(activation, Activation):
        raise TypeError(f"register_activation: wants an Activation, got {type(activation).__name__}")
    register_op(*targets)(lambda site: activation)


def supported() -> str:
    """One line naming every op with a builder."""
    modules = sorted(t.__name__ for t in _MODULES)
    functions = sorted({t if isinstance(t, str) else getattr(t, "__name__", str(t)) for t in _FUNCTIONS})
    return f"modules {', '.join(modules)}; functions and methods {', '.join(functions)}"


@dataclass(frozen=True, slots=True)
class Report:
    """Whether a module can be bounded, and every reason why not."""

    ok: bool
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        return "ok" if self.ok else "\n".join(str(problem) for problem in self.problems)


def capture(net: nn.Module | Network, input_shape: Sequence[int] | None = None) -> Network:
    """Capture a module as a graph that references its parameters (never copies).

    input_shape: without the batch, such as (1, 28, 28); None where the first layer is a Linear that says it.
    Raises UnsupportedOpError with every op that has no rule.  Threads may capture at the same time: they take turns.
    """
    if isinstance(net, Network):
        if input_shape is not None and tuple(input_shape) != net.input_shape:
            raise ValueError(f"capture: the network takes inputs of shape {net.input_shape}, got {tuple(input_shape)}")
        return net
    if not isinstance(net, nn.Module):
        raise TypeError(f"capture: wants an nn.Module or a Network, got {type(net).__name__}")
    if input_shape is not None and not isinstance(input_shape, Sequence):
        raise TypeError(f"capture: input_shape must be numbers such as (1, 28, 28), got {input_shape!r}")
    shape = tuple(int(n) for n in input_shape) if input_shape is not None else _first_shape(net)
    with _TRACING:
        network, problems = _trace(net, shape)
    if problems or network is None:
        raise UnsupportedOpError(problems, supported())
    return network


def check(net: nn.Module | Network, input_shape: Sequence[int] | None = None) -> Report:
    """Report every op of `net` that cannot be bounded, where it is and why; raises nothing for unsupported ops."""
    try:
        network = capture(net, input_shape)
        network.require_eval()
    except UnsupportedOpError as error:
        return Report(False, error.problems)
    return Report(True, ())


def _first_shape(net: nn.Module) -> Shape:
    """Input shape of a network that starts with a Linear (perhaps after a Flatten)."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        if not isinstance(module, (nn.Sequential, nn.Flatten, nn.Identity)) and next(module.children(), None) is None:
            break
    raise ValueError("capture: give input_shape (without the batch); the first layer does not say it")


class _Tracer(fx.Tracer):
    """Leaves are the module types with a builder; everything else is traced into.

    Parameters and buffers become nodes, read again at each use. Other tensors that the forward makes or closes over
    are kept here, not on the user's module as torch.fx would. What other threads do with modules meanwhile, which
    comes by here too, is none of the trace's business.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.constants: dict[str, Tensor] = {}
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not self._is_attribute(a):
            name = next((n for n, t in self.constants.items() if t is a), f"_constant_{len(self.constants)}")
            self.constants[name] = a
            return self.create_node("get_attr", name, (), {})
        return super().create_arg(a)

    def _is_attribute(self, a: Tensor) -> bool:
        named = (*self.root.parameters(), *self.root.buffers(), *self.tensor_attrs)
        return any(a is t for t in named)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _module_builder(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _module_builder(module: nn.Module) -> Builder | None:
    if "forward" in vars(module):
        return None  # replaced on this one object: not what its type computes
    for cls in type(module).__mro__:
        if cls in _MODULES and type(module).forward is cls.forward:
            return _MODULES[cls]
    return None


def _trace(net: nn.Module, shape: Shape) -> tuple[Network | None, list[Problem]]:
    before = torch.get_rng_state()
    network, problems = _trace_once(net, shape)
    after = torch.get_rng_state()
    if torch.equal(before, after):
        return network, problems
    # Another thread may have drawn meanwhile: only a second change is this module's.
    _trace_once(net, shape)
    if torch.equal(after, torch.get_rng_state()):
        return network, problems
    torch.set_rng_state(before)
    reason = "draws random numbers, so that it is no fixed function; draw them outside of forward"
    return None, [*problems, Problem("(root)", type(net).__name__, reason)]


def _trace_once(net: nn.Module, shape: Shape) -> tuple[Network | None, list[Problem]]:
    problems = _module_problems(net)
    if _module_builder(net) is not None:
        net = nn.Sequential(net)  # a single supported layer is a network too
    tracer = _Tracer()
    try:
        graph = tracer.trace(net)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        reason = f"cannot be traced: {error}; control flow must not depend on values"
        problems.append(Problem("(root)", type(net).__name__, reason))
        return None, problems
    return _Walk(net, shape, problems, tracer.constants).run(graph)


def _module_problems(net: nn.Module) -> list[Problem]:
    """What is wrong with the modules whatever their graph: modes, types, and what a trace would not see."""
    problems = [
        Problem(path or "(root)", type(m).__name__, "is in training mode; call .eval()")
        for path, m in net.named_modules()
        if isinstance(m, MODES) and m.training
    ]
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.dtype in HALF:
            reason = "bounds want float32 or float64; call .float()"
            problems.append(Problem(name, str(tensor.dtype), reason))
    # torch.fx takes the forward of the root's type, and calls it without the root's hooks.
    if net._forward_hooks or net._forward_pre_hooks:
        problems.append(Problem("(root)", type(net).__name__, _HOOKS))
    if "forward" in vars(net):
        reason = "has a forward of its own on the object; subclass the module instead"
        problems.append(Problem("(root)", type(net).__name__, reason))
    return problems


class _Walk:
    """Evaluates the fx graph on a probe and builds one node a call; collects every problem."""

    def __init__(self, net: nn.Module, shape: Shape, problems: list[Problem], constants: Mapping[str, Tensor]) -> None:
        self.net, self.shape, self.problems, self.constants = net, shape, problems, constants
        self.probe: dict[fx.Node, Any] = {}  # fx node -> value on the probe
        self.other: dict[
            fx.Node, Any
        ] = {}  # fx node -> what it would be for another batch size, where it reads a shape
        self.names: dict[fx.Node, str] = {}  # fx node -> node of the network, where it depends on the input
        self.live: dict[fx.Node, Callable[[], Any]] = {}  # fx node -> constant of the module, read at use
        self.broken: set[fx.Node] = set()
        self.nodes: list[Node] = []
        self.paths: dict[str, int] = {}
        self.output: str | None = None

    def run(self, graph: fx.Graph) -> tuple[Network | None, list[Problem]]:
        with torch.no_grad():
            for node in graph.nodes:
                self._visit(node)
        if self.problems or self.output is None:
            return None, self.problems
        return Network(self.net, tuple(self.nodes), self.output, self.shape), []

    def _problem(self, node: fx.Node, op: str, reason: str) -> None:
        self.problems.append(Problem(_where(node), op, reason))
        self.broken.add(node)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "get_attr":
            self._attribute(node)
        elif node.op == "output":
            self._output(node)
        elif any(parent in self.broken for parent in node.all_input_nodes):
            self.broken.add(node)
            self._report_unknown(node)
        else:
            self._call(node)

    def _placeholder(self, node: fx.Node) -> None:
        if self.names:
            if node.args:
                self.probe[node] = node.args[0]  # an optional argument keeps its default
            else:
                self._problem(node, "input", "the network must take one tensor")
            return
        parameter = next(self.net.parameters(), None)
        dtype = (
            parameter.dtype if parameter is not None and parameter.is_floating_point() else torch.get_default_dtype()
        )
        device = parameter.device if parameter is not None else torch.device("cpu")
        self.probe[node] = torch.zeros(_PROBE, *self.shape, dtype=dtype, device=device)
        self.names[node] = "input"

    def _attribute(self, node: fx.Node) -> None:
        path = str(node.target)

        def read() -> Any:
            if path in self.constants:
                return self.constants[path]
            value: Any = self.net
            for part in path.split("."):
                value = getattr(value, part)
            return value

        self.probe[node], self.live[node] = read(), read

    def _output(self, node: fx.Node) -> None:
        result = node.args[0]
        if not isinstance(result, fx.Node):
            self._problem(node, "output", f"the network must return one tensor, got {type(result).__name__}")
        elif result in self.names:
            self.output = self.names[result]
        elif result not in self.broken:
            self._problem(node, "output", "does not depend on the input")

    def _report_unknown(self, node: fx.Node) -> None:
        """Below a broken op shapes are unknown, but an op without a builder is named all the same."""
        if self._builder(node) is None and node.target not in (getattr, operator.getitem, "size", "dim"):
            self.problems.append(Problem(_where(node), _op_name(node, self._module(node)), "has no rule"))

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.net.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _builder(self, node: fx.Node) -> Builder | None:
        module = self._module(node)
        return _FUNCTIONS.get(node.target) if module is None else _module_builder(module)

    def _call(self, node: fx.Node) -> None:
        args = fx.map_arg(node.args, lambda n: self.probe[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: self.probe[n])
        module = self._module(node)
        name = _op_name(node, module)
        depends = any(parent in self.names for parent in node.all_input_nodes)
        builder = self._builder(node)
        if depends and builder is None and not _reads_shape(node):
            self._problem(node, name, "has no rule")
            return
        if isinstance(module, MODES) and module.training:
            self.broken.add(node)  # reported already, and running it would change the module
            return
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            self._problem(node, name, _HOOKS)
            return
        if _in_place(node, module):
            if not node.args or node.args[0] not in self.names:
                self._problem(node, name, "changes a parameter or constant in place; use the form that copies")
                return
            if self._aliased(node):
                reason = "works in place on a value that is read elsewhere; use the form that copies"
                self._problem(node, name, reason)
                return
        try:
            result = _evaluate(node, module, args, kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            self._problem(node, name, f"fails on an input of shape {self.shape}: {str(error).splitlines()[0]}")
            return
        self.probe[node] = result
        if not depends:
            self.live[node] = self._replay(node)
            if any(n in self.other for n in node.all_input_nodes):
                self._note_other(node)
        elif _reads_shape(node):
            self._note_other(node)
        else:
            assert builder is not None
            self._build(node, builder, name, module, args, kwargs, result)

    def _note_other(self, node: fx.Node) -> None:
        """Keep what a value that comes from a shape would be for another batch size."""

        def value(n: fx.Node) -> Any:
            if n in self.names:
                return torch.empty(_PROBE + 2, *self.probe[n].shape[1:], device="meta")
            return self.other.get(n, self.probe[n])

        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        try:
            self.other[node] = _evaluate(node, self._module(node), args, kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError):
            self.other[node] = None

    def _reads_batch_size(self, node: fx.Node) -> bool:
        return any(n in self.other and not _same(self.other[n], self.probe[n]) for n in node.all_input_nodes)

    def _aliased(self, node: fx.Node) -> bool:
        """Whether the value that an in-place call overwrites, or one it is a view of, has another reader."""
        value = node.args[0]
        while isinstance(value, fx.Node):
            if len(value.users) > 1:
                return True
            op = next((n.op for n in self.nodes if n.name == value.name), None)
            value = value.args[0] if isinstance(op, Reshape) else None
        return False

    def _replay(self, node: fx.Node) -> Callable[[], Any]:
        """A constant expression, evaluated again at each use so that it follows the parameters."""

        def read() -> Any:
            def value(n: fx.Node) -> Any:
                return self.live[n]() if n in self.live else self.probe[n]

            return _evaluate(node, self._module(node), fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value))

        return read

    def _build(
        self,
        node: fx.Node,
        builder: Builder,
        name: str,
        module: nn.Module | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        if not isinstance(result, Tensor) or result.dim() == 0 or result.shape[0] != _PROBE:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            self._problem(node, name, f"mixes the batch: a batch of {_PROBE} gives {got}")
            return
        traced = tuple(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a in self.names)
        sources: dict[int | str, Source] = {}
        given: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
        for key, argument in given:
            if isinstance(argument, fx.Node) and argument in self.live and isinstance(self.probe[argument], Tensor):
                sources[key] = self.live[argument]
        inputs = [node.args[i] for i in traced]
        if any(isinstance(v, fx.Node) and v in self.names for v in node.kwargs.values()) or not traced:
            self._problem(node, name, "takes the network's value as a keyword or in a list; pass it by position")
            return
        try:
            op = builder(Site(module, args, kwargs, traced, sources, result))
        except (ValueError, NotImplementedError, _Refused) as error:
            self._problem(node, name, str(error))
            return
        if not isinstance(op, Reshape) and self._reads_batch_size(node):
            self._problem(node, name, "mixes the batch: an argument depends on the batch size")
            return
        if isinstance(op, Activation) and len(traced) != 1:
            self._problem(node, name, "an activation takes one value")
            return
        path = _where(node)
        self.paths[path] = count = self.paths.get(path, 0) + 1
        path = path if count == 1 else f"{path}#{count}"
        self.nodes.append(
            Node(node.name, path, op, tuple(self.names[n] for n in inputs), tuple(result.shape[1:]))  # type: ignore[index]
        )
        self.names[node] = node.name


def _where(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _op_name(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return type(module).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def _in_place(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.target in _IN_PLACE:
        # A number read from a shape has no storage.
        return not (node.args and isinstance(node.args[0], fx.Node) and _reads_shape(node.args[0]))
    if node.op == "call_function" and _argument(node, "inplace"):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of a Python function by name, however it was passed; None where it has none."""
    if name in node.kwargs:
        return node.kwargs[name]
    if not inspect.isfunction(node.target):
        return None  # a builtin, whose signature is not known
    names = list(inspect.signature(node.target).parameters)
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else None


def _reads_shape(node: fx.Node) -> bool:
    """Calls whose result depends on the input's shape alone."""
    if node.op == "call_method" and node.target in ("size", "dim"):
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    # Arithmetic and indexing of sizes: their inputs are themselves read from a shape.
    return bool(node.all_input_nodes) and all(_reads_shape(parent) for parent in node.all_input_nodes)


def _evaluate(node: fx.Node, module: nn.Module | None, args: Any, kwargs: Any) -> Any:
    if module is not None:
        return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def _attribute_source(module: nn.Module, name: str) -> Source | None:
    return None if getattr(module, name) is None else (lambda: getattr(module, name))


def _same_padding(kernel: tuple[int, int], dilation: tuple[int, int], padding: Any, stride: Any) -> tuple[int, int]:
    """Padding as two numbers; 'same' only where it is symmetric."""
    if padding == "valid":
        return 0, 0
    if padding != "same":
        return _pair(padding)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total) or _pair(stride) != (1, 1):
        raise _Refused("padding='same' with an even kernel pads unevenly; pad by numbers")
    return total[0] // 2, total[1] // 2


# --- builders -----------------------------------------------------------------------------------------------------


@register_op(nn.Linear)
def _linear_module(site: Site) -> Op:
    assert site.module is not None
    weight = _attribute_source(site.module, "weight")
    assert weight is not None
    return Linear(site.shape(), weight, _attribute_source(site.module, "bias"))


@register_op(F.linear)
def _linear_function(site: Site) -> Op:
    _only_first(site)
    weight = site.constant(1, "weight")
    assert weight is not None
    return Linear(site.shape(), weight, site.constant(2, "bias"))


@register_op(nn.Conv2d)
def _conv_module(site: Site) -> Op:
    m = site.module
    assert isinstance(m, nn.Conv2d)
    if m.padding_mode != "zeros":
        raise _Refused(f"padding_mode={m.padding_mode!r} has no rule; only 'zeros'")
    dilation = _pair(m.dilation)
    padding = _same_padding(_pair(m.kernel_size), dilation, m.padding, m.stride)
    geometry = ConvGeometry(_pair(m.stride), padding, dilation, m.groups)
    return Conv2d(_image(site), lambda: m.weight, _attribute_source(m, "bias"), geometry)


@register_op(F.conv2d)
def _conv_function(site: Site) -> Op:
    _only_first(site)
    weight = site.constant(1, "weight")
    assert weight is not None
    dilation, stride = _pair(site.argument(5, "dilation", 1)), _pair(site.argument(3, "stride", 1))
    kernel = _pair(tuple(weight().shape[2:]))
    padding = _same_padding(kernel, dilation, site.argument(4, "padding", 0), stride)
    geometry = ConvGeometry(stride, padding, dilation, int(site.argument(6, "groups", 1)))
    return Conv2d(_image(site), weight, site.constant(2, "bias"), geometry)


def _image(site: Site) -> Shape:
    shape = site.shape()
    if len(shape) != 3:
        raise _Refused(f"takes a batch of [c, h, w], got {shape} (an input without a batch dimension mixes the batch)")
    return shape


def _only_first(site: Site) -> None:
    if site.traced != (0,):
        raise _Refused("the product of two values of the network is not affine")


@register_op(nn.BatchNorm1d, nn.BatchNorm2d)
def _batch_norm(site: Site) -> Op:
    m = site.module
    assert isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))
    if m.running_mean is None or m.running_var is None:
        raise _Refused("without running statistics it mixes the batch; track_running_stats=True")
    mean, variance = _attribute_source(m, "running_mean"), _attribute_source(m, "running_var")
    assert mean is not None
    assert variance is not None
    weight, bias = _attribute_source(m, "weight"), _attribute_source(m, "bias")
    return BatchNorm(site.shape(), m.eps, mean, variance, weight, bias)


@register_op(nn.AvgPool2d)
def _avg_pool_module(site: Site) -> Op:
    m = site.module
    assert isinstance(m, nn.AvgPool2d)
    return _avg_pool(site, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override)


@register_op(F.avg_pool2d)
def _avg_pool_function(site: Site) -> Op:
    kernel = site.argument(1, "kernel_size")
    return _avg_pool(
        site,
        kernel,
        site.argument(2, "stride") or kernel,
        site.argument(3, "padding", 0),
        site.argument(4, "ceil_mode", False),
        site.argument(5, "count_include_pad", True),
        site.argument(6, "divisor_override"),
    )


def _avg_pool(
    site: Site, kernel: Any, stride: Any, padding: Any, ceil: bool, count_pad: bool, divisor: int | None
) -> Op:
    if ceil:
        raise _Refused("ceil_mode=True has no rule; pad the input instead")
    size = _pair(kernel)
    if divisor is None and count_pad:
        divisor = math.prod(size)
    geometry = ConvGeometry(_pair(stride), _pair(padding))
    return AveragePool2d(_image(site), size, geometry, None if divisor is None else float(divisor))


@register_op(nn.AdaptiveAvgPool2d)
def _adaptive_pool_module(site: Site) -> Op:
    assert isinstance(site.module, nn.AdaptiveAvgPool2d)
    return _adaptive_pool(site)


@register_op(F.adaptive_avg_pool2d)
def _adaptive_pool(site: Site) -> Op:
    shape, out = _image(site), tuple(site.result.shape[2:])
    if any(n % o for n, o in zip(shape[1:], out, strict=True)):
        raise _Refused(f"output {out} does not divide the input {shape[1:]}")
    kernel = (shape[1] // out[0], shape[2] // out[1])
    return AveragePool2d(shape, kernel, ConvGeometry(kernel), float(math.prod(kernel)))


@register_op(nn.MaxPool2d)
def _max_pool_module(site: Site) -> Op:
    m = site.module
    assert isinstance(m, nn.MaxPool2d)
    if m.return_indices:
        raise _Refused("return_indices=True has no rule")
    return _max_pool(site, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)


def _max_pool_function(site: Site) -> Op:
    kernel = site.argument(1, "kernel_size")
    return _max_pool(
        site,
        kernel,
        site.argument(2, "stride") or kernel,
        site.argument(3, "padding", 0),
        site.argument(4, "dilation", 1),
        site.argument(5, "ceil_mode", False),
    )


# torch.fx records whichever of the two names the module reached for.
register_op(F.max_pool2d, torch.max_pool2d)(_max_pool_function)


def _max_pool(site: Site, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Op:
    if ceil:
        raise _Refused("ceil_mode=True has no rule; pad the input instead")
    return MaxPool2d(_image(site), _pair(kernel), ConvGeometry(_pair(stride), _pair(padding), _pair(dilation)))


@register_op(nn.Flatten, nn.Unflatten, torch.flatten, torch.reshape, "flatten", "view", "reshape", "unflatten")
@register_op(torch.squeeze, torch.unsqueeze, "squeeze", "unsqueeze", "contiguous", nn.Identity)
@register_op(nn.Dropout, nn.Dropout2d, nn.Dropout1d)
def _reshape(site: Site) -> Op:
    return Reshape(site.shape(), tuple(site.result.shape[1:]))


@register_op(F.dropout)
def _dropout_function(site: Site) -> Op:
    if site.argument(2, "training", True):
        raise _Refused("is random in training mode, its default; pass training=self.training and call .eval()")
    return Reshape(site.shape(), site.shape())


@register_op(operator.add, torch.add, operator.iadd, "add", "add_")
def _add(site: Site) -> Op:
    return _sum(site, (1.0, 1.0))


@register_op(operator.sub, torch.sub, operator.isub, "sub", "sub_")
def _sub(site: Site) -> Op:
    return _sum(site, (1.0, -1.0))


def _sum(site: Site, signs: tuple[float, float]) -> Op:
    if site.kwargs.get("alpha", 1) != 1:
        raise _Refused("alpha other than 1 has no rule; multiply first")
    shape = tuple(site.result.shape[1:])
    if len(site.traced) == 2:
        if site.shape(0) != site.shape(1):
            raise _Refused(f"adds shapes {site.shape(0)} and {site.shape(1)}; broadcasting branches has no rule")
        return Add(shape, signs)
    _unbroadcast(site, shape)
    constant = _per_example(site, 1 - site.traced[0])
    if site.traced == (0,):
        return Scale(shape, None, constant if signs[1] == 1 else lambda: -constant())
    if signs[1] == 1:
        return Scale(shape, None, constant)
    return Scale(shape, lambda: torch.tensor(-1.0), constant)


def _unbroadcast(site: Site, shape: Shape) -> None:
    if site.shape(site.traced[0]) != shape:
        raise _Refused(f"a constant widens the value from {site.shape(site.traced[0])} to {shape}; expand it first")


def _per_example(site: Site, position: int) -> Source:
    """The other operand as a constant that broadcasts to one example's shape."""
    value = site.args[position]
    dims = site.result.dim()
    if isinstance(value, Tensor) and value.dim() == dims:
        if value.shape[0] != 1:
            raise _Refused(f"a constant with batch {value.shape[0]} mixes the batch")
        read = site.constant(position, "other")
        assert read is not None
        return lambda: read()[0]
    source = site.constant(position, "other")
    assert source is not None
    return source


@register_op(operator.mul, torch.mul, operator.imul, "mul", "mul_")
def _mul(site: Site) -> Op:
    if len(site.traced) != 1:
        raise _Refused("the product of two values of the network is not affine")
    shape = tuple(site.result.shape[1:])
    _unbroadcast(site, shape)
    return Scale(shape, _per_example(site, 1 - site.traced[0]), None)


@register_op(operator.truediv, torch.div, operator.itruediv, "div", "div_")
def _div(site: Site) -> Op:
    if site.traced != (0,):
        raise _Refused("division by a value of the network is not affine")
    if site.kwargs.get("rounding_mode") is not None:
        raise _Refused("rounding_mode has no rule")
    shape = tuple(site.result.shape[1:])
    _unbroadcast(site, shape)
    return Divide(shape, _per_example(site, 1))


@register_op(operator.neg, torch.neg, "neg")
def _neg(site: Site) -> Op:
    return Scale(tuple(site.result.shape[1:]), lambda: torch.tensor(-1.0), None)


@register_op(nn.ReLU, F.relu, torch.relu, "relu", "relu_", torch.relu_)
def _relu(site: Site) -> Op:
    return activations.relu()


@register_op(nn.LeakyReLU)
def _leaky_module(site: Site) -> Op:
    assert isinstance(site.module, nn.LeakyReLU)
    return activations.leaky_relu(site.module.negative_slope)


@register_op(F.leaky_relu)
def _leaky_function(site: Site) -> Op:
    return activations.leaky_relu(float(site.argument(1, "negative_slope", 0.01)))


@register_op(nn.Hardtanh, nn.ReLU6)
def _hardtanh_module(site: Site) -> Op:
    assert isinstance(site.module, nn.Hardtanh)
    return activations.clamp(site.module.min_val, site.module.max_val)


@register_op(F.hardtanh)
def _hardtanh_function(site: Site) -> Op:
    return activations.clamp(float(site.argument(1, "min_val", -1.0)), float(site.argument(2, "max_val", 1.0)))


@register_op(F.relu6)
def _relu6_function(site: Site) -> Op:
    return activations.clamp(0.0, 6.0, "relu6")


@register_op(torch.clamp, "clamp")
def _clamp_function(site: Site) -> Op:
    low, high = site.argument(1, "min"), site.argument(2, "max")
    if low == 0 and high is None:
        return activations.relu()
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        raise _Refused("clamp needs two numbers (or min=0 alone)")
    return activations.clamp(float(low), float(high), "clamp")
