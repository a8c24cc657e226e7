"""A network made again of a file's graph and tensors, none of which is trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from optrelax.networks import storage
from optrelax.networks.activations import Activation
from optrelax.networks.graph import Network, Node
from optrelax.networks.live_tensors import Attribute, Held
from optrelax.networks.maxima import Greatest
from optrelax.networks.ops import Affine, Shape, Source
from optrelax.networks.products import Multiply
from optrelax.networks.storage import Settings, Tensors

COMPUTED = "graph:"  # how the keys of tensors begin that are computed at capture, not attributes of the module


# Numbers that one node's value, and all of them, may hold for one input; more in a file of more weights.
_NODE_KEYS = ("name", "path", "inputs", "shape", "op", "tensors")
_VALUE, _VALUES = 2**24, 2**28


_DEPTH = 32  # modules within modules, of a tensor's name


def require_type(name: str, value: object, wanted: type) -> None:
    if not isinstance(value, wanted):
        raise ValueError(f"{name} must be {wanted.__name__}, got {type(value).__name__}")


def require_keys(name: str, found: Mapping[str, object], wanted: Iterable[str]) -> None:
    if differing := sorted(found.keys() ^ set(wanted)):
        raise ValueError(f"the entries {differing[:8]} of a {name} are missing or unknown")


def rebuilt(graph: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Network:
    for name, wanted in (("output", str), ("nodes", list), ("tensors", dict)):
        require_type(name, graph[name], wanted)
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
    require_type("a node", stored, dict)
    require_keys("node", stored, _NODE_KEYS)
    for key, wanted in (("name", str), ("path", str), ("inputs", list), ("op", dict), ("tensors", dict)):
        require_type(f"{key} of a node", stored[key], wanted)
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
        if kind == "constant" and key.startswith(COMPUTED):
            # Held in float64 beside weights of float32, and cast at use: no buffer, whose type must be the region's.
            sources[key] = Held(tensors[key])
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
        sources[key] = Attribute.of(module, leaf)
    return root, sources
