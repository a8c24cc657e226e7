"""Networks in safetensors files: weights as tensors, the captured graph as JSON metadata. No pickle, no class needed.

Format 1: the metadata entry "optrelax" holds {"format", "input_shape", "output", "nodes", "tensors", "digest",
"extra"}. A node has its name, path, inputs, shape and what its op says of itself (`describe()`), with the keys of its
tensors; a tensor is a parameter (trainable or frozen) or a constant; the digest is of all their bytes. What a
network computes from its parameters and constants (the scale of a batch norm, 1 / std) is stored as computed.
A new op stores itself by `describe()` and is rebuilt by a function under `@stored_op`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optrelax.errors import suggest
from optrelax.kernels.convolutions import ConvGeometry
from optrelax.networks import activations, ops
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network, Node, Op
from optrelax.networks.ops import Shape, Source
from optrelax.networks.tracing import capture
from optrelax.output.files import read_tensors, write_tensors

__all__ = ["load", "read_extra", "save", "stored_op"]

FORMAT = 1
_KEY = "optrelax"
_COMPUTED = "graph:"  # how the keys of tensors begin that are computed at capture, not attributes of the module
_NET = "net.safetensors"  # the network of a run folder

PathLike = str | os.PathLike[str]
Settings = Mapping[str, Any]  # what an op's describe() gave, back from JSON
Rebuild = Callable[[Settings, tuple[Shape, ...], Mapping[str, Source]], Op]
_REBUILD: dict[str, Rebuild] = {}


def save(
    net: nn.Module | Network,
    path: PathLike,
    *,
    input_shape: tuple[int, ...] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Store a network, weights and graph, so that `load` needs nothing else; written whole or not at all.

    input_shape: without the batch, where `net` is a module whose first layer does not say it.
    extra: JSON-ready facts to keep with it (data set, eps, relaxation), see `read_extra`.
    Raises UnsupportedOpError for a module that cannot be captured, NotImplementedError for an op of the user's that
    does not describe itself, ValueError for an `extra` that is not JSON, OSError where the file cannot be written.
    """
    network = net if isinstance(net, Network) else capture(net, input_shape)
    store = _Store(network.module)
    with torch.enable_grad():  # which tensors depend on a parameter shows in their graph
        nodes = [_describe(node, store) for node in network]
    try:
        metadata = json.dumps(
            {
                "format": FORMAT,
                "input_shape": network.input_shape,
                "output": network.output,
                "nodes": nodes,
                "tensors": store.kinds,
                "digest": _digest(store.tensors),
                "extra": dict(extra or {}),
            },
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"save: extra must be JSON-ready: {error}") from None
    write_tensors(path, store.tensors, {_KEY: metadata})


def load(path: PathLike, device: torch.device | str = "cpu") -> Network:
    """The network that `save` stored: bounds and values as before, its `module.parameters()` ready to train.

    path: a file, or a run folder (its net.safetensors).  Raises FileNotFoundError, and ValueError for a file that
    is corrupt, foreign (a pickle is never read) or of a later format, saying which.
    """
    file = _file(path)
    metadata, tensors = _read(file, device)
    try:
        return _rebuild(metadata, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{file}: expected an optrelax network, got one that does not fit together: {reason}"
        ) from error


def read_extra(path: PathLike) -> dict[str, Any]:
    """The facts stored beside a network, {} where there are none.  Errors as `load`."""
    file = _file(path)
    extra = _read(file, "cpu")[0].get("extra", {})
    if not isinstance(extra, dict):
        raise ValueError(f"{file}: expected extra facts by name, got {type(extra).__name__}")
    return extra


def stored_op(*names: str) -> Callable[[Rebuild], Rebuild]:
    """Decorator: how ops whose `describe()` says {"op": name} are rebuilt: (settings, input shapes, tensors) -> op."""

    def decorate(rebuild: Rebuild) -> Rebuild:
        for name in names:
            if name in _REBUILD:
                raise ValueError(f"stored_op: {name!r} is registered already")
            _REBUILD[name] = rebuild
        return rebuild

    return decorate


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of every tensor's bytes, in the order of the keys: a flipped bit is another network."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- writing ------------------------------------------------------------------------------------------------------


class _Store:
    """The tensors of a file by key: those of the module under their own names, computed constants under the node's."""

    def __init__(self, module: nn.Module) -> None:
        self._names = {id(t): name for name, t in (*module.named_buffers(), *module.named_parameters())}
        self._dtype = next((p.dtype for p in module.parameters()), torch.get_default_dtype())
        self.tensors: dict[str, Tensor] = {}
        self.kinds: dict[str, str] = {}

    def add(self, node: str, name: str, value: Tensor) -> str:
        """The key of a tensor; one that several nodes share is stored once."""
        key = self._names.get(id(value))
        if key is None:
            # A leading part that no attribute can have keeps these apart from the module's own names.
            key = f"{_COMPUTED}{node}.{name}"
            if value.requires_grad:  # computed in float64 from parameters, it will be a parameter: of their type
                value = value.to(self._dtype)
        if value.requires_grad:
            self.kinds[key] = "trainable"
        else:
            self.kinds[key] = "frozen" if isinstance(value, nn.Parameter) else "constant"
        self.tensors[key] = value.detach()
        return key


def _describe(node: Node, store: _Store) -> dict[str, Any]:
    if isinstance(node.op, Activation):
        op: dict[str, Any] = {
            "op": "activation",
            "name": node.op.name,
            "kinks": node.op.kinks,
            "slopes": node.op.slopes,
            "intercepts": node.op.intercepts,
        }
        keys: dict[str, str] = {}
    else:
        op = node.op.describe()
        sources = node.op.tensors() if isinstance(node.op, ops.Affine) else {}
        keys = {name: store.add(node.name, name, source()) for name, source in sources.items()}
    return {
        "name": node.name,
        "path": node.path,
        "inputs": node.inputs,
        "shape": node.shape,
        "op": op,
        "tensors": keys,
    }


# --- reading ------------------------------------------------------------------------------------------------------


def _file(path: PathLike) -> Path:
    found = Path(path)
    if found.is_dir():
        found = found / _NET
    if not found.is_file():
        raise FileNotFoundError(f"{found}: no such file; expected a network stored by optrelax.save")
    return found


def _read(file: Path, device: torch.device | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, found = read_tensors(file, device)
    text = found.get(_KEY)
    if text is None:
        raise ValueError(
            f"{file}: expected a network stored by optrelax.save, got safetensors without its graph; build the module "
            "and load_state_dict it"
        )
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected the graph as JSON, got text that fails: {error}") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("format"), int):
        raise ValueError(f"{file}: expected the graph with a format number, got {str(metadata)[:40]!r}")
    if metadata["format"] != FORMAT:
        raise ValueError(
            f"{file}: expected format {FORMAT}, got {metadata['format']}; read it with the optrelax that wrote it"
        )
    return metadata, tensors


def _rebuild(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Network:
    kinds = metadata["tensors"]
    if kinds.keys() != tensors.keys():
        raise ValueError(f"tensors {sorted(kinds.keys() ^ tensors.keys())} are only in one of graph and file")
    if _digest(tensors) != metadata["digest"]:
        raise ValueError("the tensors' digest differs from the one stored with them")
    module, sources = _container(kinds, tensors)
    shapes: dict[str, Shape] = {"input": _shape(metadata["input_shape"])}
    nodes = []
    for stored in metadata["nodes"]:
        name, inputs, op = stored["name"], tuple(stored["inputs"]), stored["op"]
        if name in shapes:
            raise ValueError(f"two nodes are named {name!r}")
        if unknown := [i for i in inputs if i not in shapes]:
            raise ValueError(f"node {name!r} reads {unknown}, which no node before it gives")
        if op["op"] not in _REBUILD:
            raise ValueError(f"node {name!r} is the unknown op {op['op']!r}; {suggest(op['op'], _REBUILD)}")
        given = tuple(shapes[i] for i in inputs)
        built = _REBUILD[op["op"]](op, given, {key: sources[value] for key, value in stored["tensors"].items()})
        shape = _shape(stored["shape"])
        got = given[0] if isinstance(built, Activation) else built.shape
        if got != shape or (not isinstance(built, Activation) and built.input_shapes != given):
            raise ValueError(f"node {name!r} gives shape {got}, the graph says {shape}")
        shapes[name] = shape
        nodes.append(Node(str(name), str(stored["path"]), built, inputs, shape))
    if metadata["output"] not in shapes:
        raise ValueError(f"the output {metadata['output']!r} is not a node")
    return Network(module, tuple(nodes), metadata["output"], shapes["input"])


def _container(kinds: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Source]]:
    """A module that holds the tensors under their keys, and a reader of each."""
    root = nn.Module()
    sources: dict[str, Source] = {}
    for key, kind in kinds.items():
        *parents, leaf = key.split(".")
        if kind == "constant" and key.startswith(_COMPUTED):
            # Held in float64 beside weights of float32, and cast at use: no buffer, whose type must be the region's.
            sources[key] = _Held(tensors[key])
            continue
        module = root
        for part in parents:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if kind == "constant":
            module.register_buffer(leaf, tensors[key])
        elif kind in ("trainable", "frozen"):
            module.register_parameter(leaf, nn.Parameter(tensors[key], requires_grad=kind == "trainable"))
        else:
            raise ValueError(f"tensor {key!r} is of the unknown kind {kind!r}")
        sources[key] = _Reader(module, leaf)
    return root, sources


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads an attribute at each use, so that it follows .to() and training."""

    module: nn.Module
    name: str

    def __call__(self) -> Tensor:
        value: Tensor = getattr(self.module, self.name)
        return value


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A constant that is no part of the module."""

    value: Tensor

    def __call__(self) -> Tensor:
        return self.value


def _shape(numbers: Any) -> Shape:
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"{numbers} is not a shape")
    return tuple(numbers)


def _pair(numbers: Any) -> tuple[int, int]:
    first, second = _shape(numbers)
    return first, second


def _geometry(settings: Settings) -> ConvGeometry:
    return ConvGeometry(
        _pair(settings["stride"]),
        _pair(settings["padding"]),
        _pair(settings.get("dilation", (1, 1))),
        int(settings.get("groups", 1)),
    )


@stored_op("linear")
def _linear(settings: Settings, shapes: tuple[Shape, ...], tensors: Mapping[str, Source]) -> Op:
    return ops.Linear(shapes[0], tensors["weight"], tensors.get("bias"))


@stored_op("conv2d")
def _conv2d(settings: Settings, shapes: tuple[Shape, ...], tensors: Mapping[str, Source]) -> Op:
    return ops.Conv2d(shapes[0], tensors["weight"], tensors.get("bias"), _geometry(settings))


@stored_op("scale")
def _scale(settings: Settings, shapes: tuple[Shape, ...], tensors: Mapping[str, Source]) -> Op:
    return ops.Scale(shapes[0], tensors.get("scale"), tensors.get("shift"))


@stored_op("avg_pool2d")
def _avg_pool2d(settings: Settings, shapes: tuple[Shape, ...], tensors: Mapping[str, Source]) -> Op:
    return ops.AveragePool2d(shapes[0], _pair(settings["kernel"]), _geometry(settings), settings["divisor"])


@stored_op("max_pool2d")
def _max_pool2d(settings: Settings, shapes: tuple[Shape, ...], tensors: Mapping[str, Source]) -> Op:
    return ops.MaxPool2d(shapes[0], _pair(settings["kernel"]), _geometry(settings))


@stored_op("reshape")
def _reshape(settings: Settings, shapes: tuple[Shape, ...], tensors: Mapping[str, Source]) -> Op:
    return ops.Reshape(shapes[0], _shape(settings["shape"]))


@stored_op("add")
def _add(settings: Settings, shapes: tuple[Shape, ...], tensors: Mapping[str, Source]) -> Op:
    signs = tuple(float(sign) for sign in settings["signs"])
    if set(signs) - {1.0, -1.0}:
        raise ValueError(f"add: signs must be 1 or -1, got {signs}")
    return ops.Add(shapes[0], signs)


@stored_op("activation")
def _activation(settings: Settings, shapes: tuple[Shape, ...], tensors: Mapping[str, Source]) -> Op:
    """torch's own function where the pieces are those of a known one, else the pieces themselves."""
    name = str(settings["name"])
    kinks, slopes, intercepts = (tuple(map(float, settings[k])) for k in ("kinks", "slopes", "intercepts"))
    pieces = (kinks, slopes, intercepts)
    known = [activations.relu()]
    if len(kinks) == 1:
        known.append(activations.leaky_relu(slopes[0]))
    elif kinks[0] < kinks[-1]:
        known.append(activations.clamp(kinks[0], kinks[-1], name))
    for candidate in known:
        if candidate.name == name and (candidate.kinks, candidate.slopes, candidate.intercepts) == pieces:
            return candidate
    return Activation(name, _Pieces(*pieces), *pieces)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """A piecewise-linear function by its pieces; at a kink the right one."""

    kinks: tuple[float, ...]
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        value = self.slopes[0] * x + self.intercepts[0]
        for kink, slope, intercept in zip(self.kinks, self.slopes[1:], self.intercepts[1:], strict=True):
            value = torch.where(x >= kink, slope * x + intercept, value)
        return value
