"""Networks in safetensors files: weights as tensors, the captured graph as JSON metadata. No pickle, no class needed.

What `load` gives is what `save` was given: each op with the settings and the tensors that it reads, to the bit, or
`save` refuses. So what is certified of a loaded network holds for the saved one, and the other way round. A run folder
is its net.safetensors: `load(folder)` reads that file, as every command does that is given the folder, and what stands
beside it in certificates and tables speaks of that network.

Format 2: the metadata entry "optrelax" holds {"format", "input_shape", "output", "nodes", "tensors", "digest",
"extra"}. A node has its name, path, inputs, shape, what its op says of itself (storage.py, where a new op enters) and
the keys of its tensors; a tensor is a parameter (trainable or frozen) or a constant. The digest is of all else in the
entry and of every tensor's name, type, shape and bytes: it finds damage and edits, it is no signature.
Format 1, whose digest is of the tensors alone and which holds a batch norm as scale and shift of its weights' type, is
read as it stands, with a line in the log that says so; what such a file lacks, only saving the module again can add.
Nothing in a file is trusted: sizes are checked before anything is made of them, and every fault is a ValueError.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optrelax.networks import storage
from optrelax.networks.activations import Activation
from optrelax.networks.capturing import capture
from optrelax.networks.graph import Network, Node, Op
from optrelax.networks.maxima import Greatest
from optrelax.networks.onnx_files import is_onnx, read_onnx
from optrelax.networks.onnx_writing import write_onnx
from optrelax.networks.ops import Affine, Shape, Source
from optrelax.networks.products import Multiply
from optrelax.networks.storage import Settings, Tensors
from optrelax.output.files import read_tensors, write_tensors

__all__ = ["load", "read_extra", "save"]

FORMAT = 2
_KEY = "optrelax"
_COMPUTED = "graph:"  # how the keys of tensors begin that are computed at capture, not attributes of the module
_NET = "net.safetensors"  # the network of a run folder
# Numbers that one node's value, and all of them, may hold for one input; more in a file of more weights.
_VALUE, _VALUES = 2**24, 2**28
_DEPTH = 32  # modules within modules, of a tensor's name

_log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


def save(
    net: nn.Module | Network,
    path: PathLike,
    *,
    input_shape: tuple[int, ...] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Store a network, weights and graph, so that `load` needs nothing else; written whole or not at all.

    Args:
        net: a module or a network.
        path: a safetensors file, or one that ends in .onnx: then opset 17 with an open batch, equal in value to the
            rounding of the weights' type.
        input_shape: without the batch, where `net` is a module whose first layer does not say it.
        extra: JSON-ready facts to keep with it (data set, eps, relaxation), see `read_extra`.

    Raises:
        UnsupportedOpError: for a module that cannot be captured, or, all at once, ops without an ONNX form.
        NotImplementedError: for an op of the user's that is not registered with `storage.stored`.
        ValueError: for an op that would come back as another one and for an `extra` that is not JSON.
        OSError: where the file cannot be written.

    Example:
        >>> net = ox.models.fc(4, 8, 2, seed=0)
        >>> ox.save(net, "net.safetensors", extra={"eps": 0.1})
        >>> torch.equal(ox.load("net.safetensors")(torch.ones(1, 4)), net(torch.ones(1, 4)))
        True
    """
    network = net if isinstance(net, Network) else capture(net, input_shape)
    network.require_statistics()
    if is_onnx(path):
        if extra:
            raise ValueError("save: an ONNX file keeps no extra facts; store them in a safetensors file")
        write_onnx(network, path)
        return
    store = _Store(network.module)
    try:
        facts = json.loads(json.dumps(dict(extra or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"save: extra must be JSON-ready: {error}") from None
    with torch.enable_grad():  # which tensors depend on a parameter shows in their graph
        nodes = [_described(node, store) for node in network]
    graph = {
        "format": FORMAT,
        "input_shape": network.input_shape,
        "output": network.output,
        "nodes": nodes,
        "tensors": store.kinds,
        "extra": facts,
    }
    graph = json.loads(_text(graph))  # as a reader will find it
    _require_same(network, graph, store.tensors)
    graph["digest"] = _digest(graph, store.tensors)
    write_tensors(path, store.tensors, {_KEY: _text(graph)})


def load(path: PathLike, device: torch.device | str = "cpu") -> Network:
    """The network that `save` stored: values and bounds as before, its `module.parameters()` ready to train.

    Args:
        path: a file, a run folder (its net.safetensors), or an ONNX file, see `onnx_files.read_onnx`.
        device: where its tensors go.

    Returns:
        The network, captured.

    Raises:
        FileNotFoundError: where there is none.
        UnsupportedOpError: for an ONNX file of ops without a rule.
        ValueError: for a file that is corrupt, edited, foreign (a pickle is never read) or of a later format, saying
            which.

    Example:
        >>> ox.save(ox.models.fc(4, 8, 2, seed=0), "net.safetensors")
        >>> ox.load("net.safetensors").output_shape
        (2,)
    """
    if is_onnx(path):
        module = read_onnx(path).to(device)
        return capture(module, module.input_shape)
    file = _file(path)
    graph, tensors = _read(file)
    try:
        return _rebuilt(graph, {key: value.to(device) for key, value in tensors.items()})
    except Exception as error:  # whatever an op makes of a graph that some other hand wrote, a user's op too
        raise ValueError(f"{file}: {_UNFIT}: {_reason(error)}") from error


def read_extra(path: PathLike) -> dict[str, Any]:
    """The facts stored beside a network, {} where there are none.  Errors as `load`."""
    extra: dict[str, Any] = _read(_file(path))[0]["extra"]
    return extra


_UNFIT = "expected an optrelax network, got one that does not fit together"


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else f"{error}" or type(error).__name__


def _text(graph: Mapping[str, Any]) -> str:
    """The one text of a graph, however it was spaced; in its own order, which is that of the parameters."""
    return json.dumps(graph, allow_nan=False)


def _digest(graph: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the graph and of every tensor: a flipped bit is another network."""
    digest = hashlib.sha256()
    if graph["format"] > 1:
        digest.update(_text({key: value for key, value in graph.items() if key != "digest"}).encode())
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        heading = key if graph["format"] == 1 else json.dumps([key, str(value.dtype), value.shape])
        digest.update(heading.encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- writing ------------------------------------------------------------------------------------------------------


class _Store:
    """The tensors of a file by key: those of the module under their own names, computed constants under the node's."""

    def __init__(self, module: nn.Module) -> None:
        self._names = {id(t): name for name, t in (*module.named_buffers(), *module.named_parameters())}
        self._dtypes = {p.dtype for p in module.parameters()}
        self.tensors: dict[str, Tensor] = {}
        self.kinds: dict[str, str] = {}

    def add(self, node: Node, name: str, value: Tensor) -> str:
        """The key of a tensor; one that several nodes share is stored once."""
        key = self._names.get(id(value))
        if key is None:
            # A leading part that no attribute can have keeps these apart from the module's own names.
            key = f"{_COMPUTED}{node.name}.{name}"
            if value.requires_grad and value.dtype not in self._dtypes:
                # As a parameter it would have to be rounded to their type: another function.
                raise ValueError(
                    f"save: {node.path}: {name} is computed in {value.dtype} from parameters of "
                    f"{', '.join(map(str, self._dtypes))}; let the op's tensors() name what it is computed from"
                )
        if value.requires_grad:
            self.kinds[key] = "trainable"
        else:
            self.kinds[key] = "frozen" if isinstance(value, nn.Parameter) else "constant"
        self.tensors[key] = value.detach()
        return key


def _described(node: Node, store: _Store) -> dict[str, Any]:
    settings = node.op.describe()
    if "op" in settings:
        raise ValueError(f"save: {node.path}: describe() must not say 'op', which is the name given to storage.stored")
    return {
        "name": node.name,
        "path": node.path,
        "inputs": node.inputs,
        "shape": node.shape,
        "op": {"op": storage.name_of(node.op), **settings},
        "tensors": {name: store.add(node, name, source()) for name, source in node.op.tensors().items()},
    }


def _require_same(network: Network, graph: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """ValueError where the graph would be read back as another network."""
    try:
        again = _rebuilt(graph, tensors)
    except ValueError as error:
        raise ValueError(f"save: the network would not be read back: {error}") from error
    parameter = next(network.module.parameters(), torch.empty(()))
    with torch.no_grad():
        for node, other in zip(network, again, strict=True):
            shapes = [network.shape_of(name) for name in node.inputs]
            if not (_same_facts(node.op, other.op) and _same_values(node.op, other.op, shapes, parameter)):
                raise ValueError(
                    f"save: {node.path}: {type(node.op).__name__} would come back as another function; its describe() "
                    "and tensors() must say all that it reads, and an activation's pieces give its very values"
                )


def _same_facts(op: Op, other: Op) -> bool:
    mine, others = op.tensors(), other.tensors()
    return (
        type(op) is type(other)
        and _text(op.describe()) == _text(other.describe())
        and mine.keys() == others.keys()
        and all(_equal(mine[name](), others[name]()) for name in mine)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN being one."""
    none = a.isnan()
    same = a.dtype == b.dtype and torch.equal(none, b.isnan())
    return same and torch.equal(a.masked_fill(none, 0), b.masked_fill(none, 0))


def _close(a: Tensor, b: Tensor) -> bool:
    size = float(a.nan_to_num(0.0, 0.0, 0.0).abs().sum()) / max(a.numel(), 1)
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * size, equal_nan=True)


def _same_values(op: Op, other: Op, shapes: Iterable[Shape], like: Tensor) -> bool:
    """Whether two ops agree on probes: to the bit where they work elementwise.

    Sums are forgiven their order, which follows the layout of a weight in memory; what is looked for there is a setting
    that an op does not say.
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(op, Activation) and isinstance(other, Activation):
        x = torch.randn(4096, generator=generator, dtype=torch.float64) * torch.logspace(-4, 4, 4096).double()
        x = torch.cat([x, torch.tensor([*op.breaks, 0.0, torch.inf, -torch.inf], dtype=torch.float64)]).to(like)
        return _equal(op(x), other(x))
    probes = [torch.randn(2, *shape, generator=generator).to(like) for shape in shapes]
    if isinstance(op, Affine) and isinstance(other, Affine):
        return _close(op.apply(*probes), other.apply(*probes))
    if isinstance(op, (Greatest, Multiply)) and isinstance(other, type(op)):
        return _close(op(*probes), other(*probes))
    return False


# --- reading ------------------------------------------------------------------------------------------------------


def _file(path: PathLike) -> Path:
    found = Path(path)
    if found.is_dir():
        found = found / _NET
    if not found.is_file():
        raise FileNotFoundError(f"{found}: no such file; expected a network stored by optrelax.save")
    return found


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The graph and the tensors of a file, sealed by the digest."""
    tensors, found = read_tensors(file)
    text = found.get(_KEY)
    if text is None:
        raise ValueError(
            f"{file}: expected a network stored by optrelax.save, got safetensors without its graph; build the module "
            "and load_state_dict it"
        )
    try:
        graph = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{file}: expected the graph as JSON, got text that fails: {_reason(error)}") from error
    if not isinstance(graph, dict) or type(graph.get("format")) is not int:
        raise ValueError(f"{file}: expected the graph with a format number, got {text[:40]!r}")
    if graph["format"] not in (1, FORMAT):
        raise ValueError(
            f"{file}: expected format {FORMAT}, got {graph['format']}; read it with the optrelax that wrote it"
        )
    try:
        _require_keys("graph", graph, _KEYS)
        _require_type("extra", graph["extra"], dict)
        if _digest(graph, tensors) != graph["digest"]:
            raise ValueError("the digest differs: graph or tensors are not those that were stored")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {_UNFIT}: {_reason(error)}") from error
    if graph["format"] == 1:
        _log.warning("%s: format 1, which does not seal the graph and rounds batch norms; save the module again", file)
    return graph, tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


_KEYS = ("format", "input_shape", "output", "nodes", "tensors", "digest", "extra")
_NODE_KEYS = ("name", "path", "inputs", "shape", "op", "tensors")


def _require_type(name: str, value: object, wanted: type) -> None:
    if not isinstance(value, wanted):
        raise ValueError(f"{name} must be {wanted.__name__}, got {type(value).__name__}")


def _require_keys(name: str, found: Mapping[str, Any], wanted: Iterable[str]) -> None:
    if differing := sorted(found.keys() ^ set(wanted)):
        raise ValueError(f"the entries {differing[:8]} of a {name} are missing or unknown")


def _rebuilt(graph: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Network:
    for name, wanted in (("output", str), ("nodes", list), ("tensors", dict)):
        _require_type(name, graph[name], wanted)
    kinds = graph["tensors"]
    if kinds.keys() != tensors.keys():
        raise ValueError(f"tensors {sorted(kinds.keys() ^ tensors.keys())[:8]} are only in one of graph and file")
    module, sources = _container(kinds, tensors)
    budget = _Budget(sum(t.numel() * t.element_size() for t in tensors.values()))
    shapes = {"input": budget.shape("input", graph["input_shape"])}
    nodes = []
    for stored in graph["nodes"]:
        node = _node(stored, shapes, sources, budget)
        shapes[node.name] = node.shape
        nodes.append(node)
    if graph["output"] not in shapes:
        raise ValueError(f"the output {graph['output']!r} is not a node")
    return Network(module, tuple(nodes), graph["output"], shapes["input"])


def _node(stored: Any, shapes: Mapping[str, Shape], sources: Mapping[str, Source], budget: _Budget) -> Node:
    _require_type("a node", stored, dict)
    _require_keys("node", stored, _NODE_KEYS)
    for key, wanted in (("name", str), ("path", str), ("inputs", list), ("op", dict), ("tensors", dict)):
        _require_type(f"{key} of a node", stored[key], wanted)
    name, inputs, keys = stored["name"], tuple(stored["inputs"]), stored["tensors"]
    if name in shapes:
        raise ValueError(f"two nodes are named {name!r}")
    if not inputs:
        raise ValueError(f"node {name!r} reads nothing")
    if unknown := [i for i in inputs if not isinstance(i, str) or i not in shapes]:
        raise ValueError(f"node {name!r} reads {unknown[:8]}, which no node before it gives")
    if unknown := [k for k in keys.values() if not isinstance(k, str) or k not in sources]:
        raise ValueError(f"node {name!r}: the tensors {unknown[:8]} are missing")
    given, shape = tuple(shapes[i] for i in inputs), budget.shape(name, stored["shape"])
    settings = {key: value for key, value in stored["op"].items() if key != "op"}
    read = Tensors({key: sources[value] for key, value in keys.items()})
    try:
        op = storage.restored(stored["op"].get("op"), Settings(settings, budget.most), read, given)
    except ValueError as error:
        raise ValueError(f"node {name!r}: {error}") from error
    if not isinstance(op, (Affine, Activation, Greatest, Multiply)):
        raise ValueError(f"node {name!r}: {type(op).__name__} is no op of a graph")
    takes, gives = (given[:1], given[0]) if isinstance(op, Activation) else (op.input_shapes, op.shape)
    if takes != given or gives != shape:
        raise ValueError(f"node {name!r} takes {takes} and gives shape {gives}, the graph says {given} and {shape}")
    return Node(name, stored["path"], op, inputs, shape)


class _Budget:
    """How much a network may hold beside its weights: a short file must not ask for gigabytes."""

    def __init__(self, weights: int) -> None:
        """weights: their bytes."""
        self.most, self._left = _VALUE + 16 * weights, _VALUES + 16 * weights

    def shape(self, name: str, sizes: Any) -> Shape:
        """Sizes as a shape, its numbers counted.  ValueError for what is none, or too large."""
        if not isinstance(sizes, (list, tuple)) or not all(type(n) is int and n >= 0 for n in sizes[:17]):
            raise ValueError(f"node {name!r}: {str(sizes[:4])[:60]} is not a shape")
        if len(sizes) > 16:
            raise ValueError(f"node {name!r}: a shape of {len(sizes)} dimensions")
        # Of an empty shape too: who reads it may well drop the dimension of 0.
        count = math.prod(max(n, 1) for n in sizes)
        self._left -= count
        if count > self.most or self._left < 0:
            raise ValueError(f"node {name!r}: its value, or all of them, are more than a file of this size may ask for")
        return tuple(sizes)


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
        if kind not in ("constant", "trainable", "frozen"):
            raise ValueError(f"tensor {key!r} is of the unknown kind {kind!r}")
        if len(parents) > _DEPTH:
            raise ValueError(f"tensor {key[:40]!r}... lies more than {_DEPTH} modules deep")
        module = root
        for part in parents:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if kind == "constant":
            module.register_buffer(leaf, tensors[key])
        else:
            module.register_parameter(leaf, nn.Parameter(tensors[key], requires_grad=kind == "trainable"))
        sources[key] = _Attribute(module, leaf)
    return root, sources


@dataclass(frozen=True, slots=True)
class _Attribute:
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
