"""Small ONNX models for the tests: one node or a few, and what the onnx package's reference evaluator says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor


def node(op: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), **attributes: Any) -> onnx.NodeProto:
    """A node; attributes that are arrays become tensors."""
    given = {k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for k, v in attributes.items()}
    return helper.make_node(op, inputs, outputs, name=f"my_{op}_{outputs[0]}", **given)


def model(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str],
    constants: Mapping[str, Any] | None = None,
    opset: int = 17,
    output: str = "y",
) -> onnx.ModelProto:
    """A model from input "x" to `output`; constants are initializers, float arrays in float32."""
    tensors = []
    for name, value in (constants or {}).items():
        array = np.asarray(value)
        tensors.append(numpy_helper.from_array(array.astype(np.float32) if array.dtype.kind == "f" else array, name))
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ())],  # a shape is wanted, and not looked at
        tensors,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = 8
    return made


def stored(made: onnx.ModelProto, folder: Path) -> Path:
    """The model as a file."""
    path = folder / "net.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def reference(made: onnx.ModelProto | str, x: Tensor) -> Tensor:
    """The evaluator's outputs, example by example, for inputs [batch, *input_shape] in the model's own type."""
    evaluator = ReferenceEvaluator(made)
    known = {tensor.name for tensor in evaluator.proto_.graph.initializer}
    (name,) = (n for n in evaluator.input_names if n not in known)
    found = [evaluator.run(None, {name: x[i : i + 1].numpy()})[0] for i in range(len(x))]
    return torch.from_numpy(np.concatenate(found))
