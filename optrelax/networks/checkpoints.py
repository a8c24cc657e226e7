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
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optrelax.networks import storage
from optrelax.networks.capturing import capture
from optrelax.networks.graph import Network, Node
from optrelax.networks.onnx_files import is_onnx, read_onnx
from optrelax.networks.onnx_writing import write_onnx
from optrelax.networks.rebuilding import COMPUTED, rebuilt, require_keys, require_type
from optrelax.networks.sameness import require_same
from optrelax.output.files import read_tensors, write_tensors

__all__ = ["load", "read_extra", "save"]

FORMAT = 2
_KEY = "optrelax"
_NET = "net.safetensors"  # the network of a run folder
_log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


def save(
    net: nn.Module | Network,
    path: PathLike,
    *,
    input_shape: tuple[int, ...] | None = None,
    extra: Mapping[str, object] | None = None,
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
    network = capture(net, input_shape)
    network.require_statistics()
    if is_onnx(path):
        if extra:
            raise ValueError("save: an ONNX file keeps no extra facts; store them in a safetensors file")
        write_onnx(network, path)
        return
    try:
        facts = json.loads(json.dumps(dict(extra or {}), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"save: extra must be JSON-ready: {error}") from None
    graph, tensors = described(network, facts)
    graph["digest"] = _digest(graph, tensors)
    write_tensors(path, tensors, {_KEY: _text(graph)})


def described(network: Network, extra: object = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The graph of a network, as a reader will find it, and its tensors.  Errors as `save`."""
    store = _Store(network.module)
    with torch.enable_grad():  # which tensors depend on a parameter shows in their graph
        nodes = [_described(node, store) for node in network]
    graph = {
        "format": FORMAT,
        "input_shape": network.input_shape,
        "output": network.output,
        "nodes": nodes,
        "tensors": store.kinds,
        "extra": extra or {},
    }
    found: dict[str, Any] = json.loads(_text(graph))
    require_same(network, found, store.tensors)
    return found, store.tensors


def remade(network: Network) -> tuple[Callable[..., Network], tuple[object, ...]]:
    """What makes a network that was loaded anew, and of what, for copies and pickles; errors as `save`."""
    if network.statistics is not None:
        raise TypeError("a network that stands for one batch cannot be copied or pickled; do so with its module")
    graph, tensors = described(network)
    return rebuilt, (graph, {name: tensor.detach() for name, tensor in tensors.items()})


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
        return rebuilt(graph, {key: value.to(device) for key, value in tensors.items()})
    except Exception as error:  # whatever an op makes of a graph that some other hand wrote, a user's op too
        raise ValueError(f"{file}: {_UNFIT}: {_reason(error)}") from error


def read_extra(path: PathLike) -> dict[str, Any]:
    """The facts stored beside a network, {} where there are none.  Errors as `load`."""
    extra: dict[str, Any] = _read(_file(path))[0]["extra"]
    return extra


def read_epochs(path: PathLike) -> int | None:
    """Finished epochs of the stored network; None where the file does not say.  Errors as `load`."""
    epochs = read_extra(path).get("epochs")
    return epochs if isinstance(epochs, int) else None


_UNFIT = "expected an optrelax network, got one that does not fit together"


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else f"{error}" or type(error).__name__


def _text(graph: Mapping[str, object]) -> str:
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
            key = f"{COMPUTED}{node.name}.{name}"
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


def _file(path: PathLike) -> Path:
    found = Path(path)
    if found.is_dir():
        found = found / _NET
    if not found.is_file():
        raise FileNotFoundError(f"{found}: no such file; expected a network stored by optrelax.save")
    return found


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The graph and the tensors of a file, sealed by the digest."""
    if zipfile.is_zipfile(file):
        raise ValueError(
            f"{file}: expected a complete safetensors file, got an archive as torch.save writes it; a pickle "
            "is never read: load a state_dict into its module: net.load_state_dict(torch.load(path))"
        )
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
        require_keys("graph", graph, _KEYS)
        require_type("extra", graph["extra"], dict)
        if _digest(graph, tensors) != graph["digest"]:
            raise ValueError("the digest differs: graph or tensors are not those that were stored")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {_UNFIT}: {_reason(error)}") from error
    if graph["format"] == 1:
        _log.warning("%s: format 1, which does not seal the graph and rounds batch norms; save the module again", file)
    return graph, tensors


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


_KEYS = ("format", "input_shape", "output", "nodes", "tensors", "digest", "extra")
