"""Weights of ONNX files, in the file or beside it: as many bytes as their shapes say, and from nowhere else.

`torch.onnx.export` writes `net.onnx` and `net.onnx.data`. A file that names its weights names a file of its own
folder, whole and no link, or is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["MOST_BYTES", "load_weights"]

MOST_BYTES = 2**31
"""Of a protobuf; and of all the weights that lie beside one, so that a small file cannot fill the memory."""


def load_weights(model: onnx.ModelProto, folder: Path) -> None:
    """Bring weights beside the file into the model.

    Raises ValueError for a model without nodes, sparse tensors, weights outside `folder`, and tensors whose bytes are
    not those of their shape.
    """
    if not model.HasField("graph") or not model.graph.node:
        raise ValueError("expected an ONNX file with a graph of nodes, got none")
    if model.graph.sparse_initializer:
        raise ValueError("sparse initializers have no rule; store them dense")
    held = 0
    for tensor in _tensors(model):
        held += _load(tensor, folder, MOST_BYTES - held)
        _require_whole(tensor)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _load(tensor: onnx.TensorProto, folder: Path, most: int) -> int:
    """Bytes of a tensor that were read from beside the file, 0 for one that is in it."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor

    if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data:
        return 0
    place = {entry.key: entry.value for entry in tensor.external_data}
    name = place.get("location", "")
    beside = f"weights of {tensor.name!r} lie in {name!r}"
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"{beside}, which is no file of the same folder; it is not read")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{beside}, which is missing beside the ONNX file, or is a link; put the file there")
    size = _numbers_wanted(tensor) * _item_bytes(tensor)
    if size > min(most, path.stat().st_size):
        raise ValueError(f"{beside}, which is too short for {size} bytes, or holds over 2 GiB")
    if place.get("length", str(size)) != str(size):
        raise ValueError(f"{beside}: {place['length']} bytes, its shape {list(tensor.dims)} wants {size}")
    if "length" not in place:  # else all of the file would be read
        tensor.external_data.add(key="length", value=str(size))
    load_external_data_for_tensor(tensor, str(folder))
    return size


def _numbers_wanted(tensor: onnx.TensorProto) -> int:
    if any(d < 0 for d in tensor.dims):
        raise ValueError(f"tensor {tensor.name!r} has a negative dimension")
    return math.prod(tensor.dims)


def _item_bytes(tensor: onnx.TensorProto) -> int:
    import onnx

    try:
        return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError) as error:
        raise ValueError(f"tensor {tensor.name!r} is of an unknown type") from error


def _require_whole(tensor: onnx.TensorProto) -> None:
    size = _numbers_wanted(tensor)
    if tensor.HasField("raw_data"):
        held = len(tensor.raw_data) // _item_bytes(tensor)
    else:
        lists = (tensor.float_data, tensor.double_data, tensor.int32_data, tensor.int64_data, tensor.uint64_data)
        held = max(*(len(numbers) for numbers in lists), len(tensor.string_data))
    if held != size:
        raise ValueError(f"tensor {tensor.name!r} holds {held} numbers, its shape {list(tensor.dims)} wants {size}")
