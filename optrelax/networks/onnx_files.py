"""Networks from ONNX files, which are not trusted: everything is checked before it is used, and nothing is run.

An initializer must hold as many bytes as its shape says (`onnx_weights`), shapes are followed without numbers, and
every op is a rule of `onnx_ops`, `onnx_windows`, `onnx_shapes` or `onnx_resizing`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optrelax.networks.onnx_modules import GraphBuilder, OnnxModule
from optrelax.networks.onnx_nodes import MOST_ENTRIES
from optrelax.networks.onnx_patterns import whole_nodes
from optrelax.networks.onnx_weights import MOST_BYTES, load_weights

if TYPE_CHECKING:
    import onnx

__all__ = ["is_onnx", "read_onnx", "read_proto"]

_OLDEST = 7  # before opset 7 arithmetic broadcast in another way


def is_onnx(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one by its name."""
    return str(path).endswith(".onnx")


def read_onnx(path: str | os.PathLike[str], input_shape: Sequence[int] | None = None) -> OnnxModule:
    """The module of an ONNX file, in eval mode on the CPU; weights keep their type.

    input_shape: without the batch, of as many numbers as the file's input, which it is reshaped to; default the
    file's own. The first dimension of the file's input is the batch, 1 or open, and becomes free.
    Raises FileNotFoundError; UnsupportedOpError that lists every node without a rule; ValueError for a file that is
    malformed, keeps weights outside its folder, or cannot have a free batch dimension; RuntimeError without the onnx
    package.
    """
    return module_of(read_proto(path), path, input_shape)


def read_proto(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The checked protobuf of a file.  Errors as `read_onnx`."""
    onnx = _package()
    from google.protobuf.message import DecodeError

    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{file}: larger than the 2 GiB that an ONNX file can hold")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{file}: expected an ONNX file, got one that is none, or truncated") from error
    try:
        load_weights(model, file.parent)
        onnx.checker.check_model(model)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except (onnx.checker.ValidationError, RuntimeError, TypeError) as error:
        raise ValueError(f"{file}: is no valid ONNX file: {_first_line(error)}") from error
    return model


def module_of(model: onnx.ModelProto, path: object, input_shape: Sequence[int] | None = None) -> OnnxModule:
    """The module of a checked model; `path` names it in errors."""
    from optrelax.errors import UnsupportedOpError

    try:
        return _built(model, input_shape)
    except UnsupportedOpError:
        raise
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: {_first_line(error)}") from error


def reference_of(model: onnx.ModelProto) -> Callable[[Tensor], Tensor]:
    """The onnx package's own evaluation of a checked model, an example at a time: an oracle apart from the rules."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)
    known = {tensor.name for tensor in model.graph.initializer}
    (value,) = (value for value in model.graph.input if value.name not in known)
    shape = (1, *_input_shape(value)[0])

    def replay(x: Tensor) -> Tensor:
        outputs: list[Any] = [evaluator.run(None, {value.name: row.cpu().reshape(shape).numpy()}) for row in x]
        return torch.cat([torch.from_numpy(np.asarray(output[0])) for output in outputs])

    return replay


def _package() -> Any:
    try:
        import onnx
        import onnx.checker
    except ImportError as error:
        raise RuntimeError("ONNX files need the onnx package: pip install 'optrelax[onnx]'") from error
    return onnx


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def tensor_of(proto: onnx.TensorProto) -> Tensor:
    """A tensor of float32, float64, integers or bools; ValueError for another type, or numbers that are none."""
    import onnx
    from onnx import numpy_helper

    known = ("FLOAT", "DOUBLE", "INT64", "INT32", "BOOL")
    name = onnx.TensorProto.DataType.Name(proto.data_type)
    if name not in known:
        raise ValueError(f"tensor {proto.name!r} is {name}; bounds want FLOAT or DOUBLE")
    found = torch.from_numpy(numpy_helper.to_array(proto).copy())
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise ValueError(f"tensor {proto.name!r} holds NaN or infinite entries")
    return found


def _built(model: onnx.ModelProto, input_shape: Sequence[int] | None) -> OnnxModule:
    import onnx

    graph = model.graph
    (opset,) = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")] or (0,)
    if not _OLDEST <= opset <= onnx.defs.onnx_opset_version():
        raise ValueError(f"opset {opset}; rules are those of {_OLDEST} to {onnx.defs.onnx_opset_version()}")
    constants = {tensor.name: tensor_of(tensor) for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        names = [value.name for value in inputs], [value.name for value in graph.output]
        raise ValueError(f"wants one input and one output, got inputs {names[0]} and outputs {names[1]}")
    own, dtype = _input_shape(inputs[0])
    if input_shape is not None and math.prod(input_shape) != math.prod(own):
        raise ValueError(f"the network takes inputs {list(own)}, which {list(input_shape)} does not fit")
    builder = GraphBuilder(inputs[0].name, own, dtype, opset)
    for name, tensor in constants.items():
        builder.add_constant(name, tensor)
    for node, more in whole_nodes(graph, constants):
        name = node.name or f"{node.op_type}_{node.output[0] if node.output else ''}"
        op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        attributes = {a.name: _attribute(a) for a in node.attribute} | more
        builder.add(op, name, list(node.input), list(node.output), attributes)
    return builder.module(graph.output[0].name, input_shape)


def _attribute(attribute: onnx.AttributeProto) -> Any:
    """Numbers, bytes, or a tensor; graphs and the like as None, which no rule takes."""
    import onnx

    if attribute.type == onnx.AttributeProto.TENSOR:
        return tensor_of(attribute.t)
    kinds = onnx.AttributeProto
    if attribute.type in (kinds.INT, kinds.INTS, kinds.FLOAT, kinds.FLOATS, kinds.STRING, kinds.STRINGS):
        found = onnx.helper.get_attribute_value(attribute)
        return found if isinstance(found, (int, float, bytes)) else list(found)
    return None


def _input_shape(value: onnx.ValueInfoProto) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape without the batch, and type, of the network's input."""
    import onnx

    kinds: dict[int, torch.dtype] = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.DOUBLE: torch.float64}
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type not in kinds:
        raise ValueError(f"input {value.name!r} must be a tensor of FLOAT or DOUBLE")
    dims: list[int | str] = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    if len(dims) < 2 or (isinstance(dims[0], int) and dims[0] not in (0, 1)):
        raise ValueError(f"input {value.name!r} is {dims}; its first dimension must be the batch, 1 or open")
    rest = dims[1:]
    if not all(isinstance(d, int) and d > 0 for d in rest):
        raise ValueError(f"input {value.name!r} is {dims}; all but the batch must be fixed")
    shape = tuple(int(d) for d in rest)
    if math.prod(shape) > MOST_ENTRIES:
        raise ValueError(f"input {value.name!r} declares {math.prod(shape)} numbers; {MOST_ENTRIES} are the most")
    return shape, kinds[tensor.elem_type]
